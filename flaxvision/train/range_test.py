"""The learning-rate range test (Smith 2017, section 3.3), continued until the loss diverges."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from flaxvision import metrics as fm
from flaxvision import processes
from flaxvision.train.objectives import explain_loss
from flaxvision.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class LearningRateRange:
    """The result of a range test.

    Attributes:
        rates: Learning rate of each step.
        losses: Loss of each step.
        turned: Learning rate at which the loss, averaged over neighbouring steps, was lowest.
        diverged: Whether the loss diverged. If not, the highest learning rate was too low for a conclusion.
        suggestion: A third of `turned`.
    """

    rates: list[float]
    losses: list[float]
    turned: float
    diverged: bool
    suggestion: float


def learning_rate_range(
    create_state: Callable[[optax.Schedule], TrainState],
    step: Callable[..., tuple[TrainState, dict[str, fm.Accumulator]]],
    batches: Iterator[dict[str, Any]],
    rng: jax.Array,
    *,
    low: float = 1e-5,
    high: float = 10.0,
    num_steps: int = 200,
    smoothing: float = 0.9,
    divergence: float = 2.0,
) -> LearningRateRange:
    """Raises the learning rate from step to step until the loss diverges, and suggests a learning rate.

    Args:
        create_state: `schedule -> state`, where the optimizer of the state follows that schedule.
        step: A compiled train step.
        batches: Training batches.
        rng: The key of the run.
        low: First learning rate.
        high: Last learning rate, unless the loss diverges before.
        num_steps: Number of steps; the ratio of consecutive learning rates is constant.
        smoothing: Decay of the exponential average of the loss.
        divergence: The loss has diverged when its average is this many times its lowest average, or is not finite.

    Returns:
        The `LearningRateRange`; `flaxvision.plot.lr_range` draws it.

    Raises:
        ValueError: Not `0 < low < high`, `num_steps` is below 10, or a label is not a class of the model.
    """
    if not 0 < low < high:
        raise ValueError(f"low and high must satisfy 0 < low < high; got low={low} and high={high}")
    if num_steps < 10:
        raise ValueError(f"num_steps must be at least 10; got {num_steps}")
    ratio = (high / low) ** (1 / (num_steps - 1))
    state = create_state(lambda count: low * ratio**count)
    rates, losses = [], []
    average, best, diverged = 0.0, math.inf, False
    with processes.Progress("range test") as progress:
        for i in range(num_steps):
            progress.advance()
            state, metrics = step(state, next(batches), rng)
            loss = fm.compute(metrics)["loss"]
            if cause := explain_loss(metrics):
                raise ValueError(f"the loss must be finite; got {loss} at step {i + 1}{cause}")
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
