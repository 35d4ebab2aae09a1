"""The learning-rate range test (Smith 2017, section 3.3, to the point of divergence)."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from flaxvision import metrics as fm
from flaxvision.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class LearningRateRange:
    """What a range test found.

    Attributes:
        rates: The learning rate of each step.
        losses: The loss of each step.
        turned: The rate at which the loss, averaged over its neighbours, was lowest: from there on it rose.
        diverged: Whether it rose to divergence; if not, the highest rate was still too low to tell.
        suggestion: A third of `turned`.
    """

    rates: list[float]
    losses: list[float]
    turned: float
    diverged: bool
    suggestion: float


def learning_rate_range(
    create_state: Callable[[optax.Schedule], TrainState],
    step: Callable[..., tuple[TrainState, dict[str, Any]]],
    batches: Iterator[dict[str, Any]],
    rng: jax.Array,
    *,
    low: float = 1e-5,
    high: float = 10.0,
    num_steps: int = 200,
    smoothing: float = 0.9,
    divergence: float = 2.0,
) -> LearningRateRange:
    """Raises the learning rate from step to step until the loss diverges; the rate where it turned, divided by 3.

    Args:
        create_state: `schedule -> state`, with the optimizer to test under that schedule.
        step: A compiled train step.
        batches: Training batches.
        rng: The run's key.
        low: The first rate.
        high: The last, unless the loss diverges before.
        num_steps: Steps from one to the other, in equal ratios.
        smoothing: Of the loss's exponential average.
        divergence: The loss has diverged when its average is this many times its lowest, or not finite.

    Returns:
        The `LearningRateRange`; `flaxvision.plot.lr_range` draws it.

    Raises:
        ValueError: The rates are not `0 < low < high`, or there are fewer than 10 steps.
    """
    if not 0 < low < high or num_steps < 10:
        raise ValueError(
            f"want 0 < low < high and at least 10 steps; got low={low}, high={high}, num_steps={num_steps}"
        )
    ratio = (high / low) ** (1 / (num_steps - 1))
    state = create_state(lambda count: low * ratio**count)
    rates, losses = [], []
    average, best, diverged = 0.0, math.inf, False
    for i in range(num_steps):
        state, sums = step(state, next(batches), rng)
        loss = fm.divide(jax.device_get(sums))["loss"]
        rates.append(low * ratio**i)
        losses.append(loss)
        average = smoothing * average + (1 - smoothing) * loss
        unbiased = average / (1 - smoothing ** (i + 1))
        if not math.isfinite(loss) or (i >= 10 and unbiased > divergence * best):
            diverged = True
            break
        best = min(best, unbiased)
    reach = max(1, num_steps // 50)
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    around = [statistics.fmean(finite[max(0, i - reach) : i + reach + 1]) for i in range(len(finite))]
    turned = rates[min(range(len(around)), key=around.__getitem__)]
    return LearningRateRange(rates, losses, turned, diverged, turned / 3)
