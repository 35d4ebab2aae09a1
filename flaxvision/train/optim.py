"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "lamb", "lars")
SCHEDULES = ("constant", "step", "cosine", "polynomial", "one_cycle")


def decayed(params: Any) -> Any:
    """Which parameters weight decay shrinks: kernels, but no bias, norm scale or other vector or scalar."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def optimizer(
    name: str,
    learning_rate: float | optax.Schedule,
    *,
    momentum: float = 0.9,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float | None = None,
    rms_decay: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Makes an optimizer.

    Weight decay spares biases and norms. In `sgd`, `momentum`, `nesterov`, `rmsprop` and `lars` it is added to the
    gradient, as torch does; in `adamw` and `lamb` it is decoupled (Loshchilov & Hutter 2019).

    Args:
        name: One of `OPTIMIZERS`.
        learning_rate: A number, or a schedule of the step.
        momentum: Of `momentum`, `nesterov`, `rmsprop` and `lars`.
        b1: Adam's, AdamW's and LAMB's decay of the gradient's mean.
        b2: Likewise of its square.
        eps: Added to the denominator; None for 1e-8, or LAMB's published 1e-6.
        rms_decay: RMSprop's decay of the squared gradient.
        weight_decay: See above.
        clip_norm: Scale the gradients down to this global norm before all else.

    Returns:
        An optax transformation.

    Raises:
        ValueError: An unknown name, the nearest ones given; weight decay with `adam`, which has none; negative
            `weight_decay`; `clip_norm` not positive.
    """
    if name not in OPTIMIZERS:
        raise ValueError(_unknown("optimizer", name, OPTIMIZERS))
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative; got {weight_decay}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive or None; got {clip_norm}")
    if name == "adam" and weight_decay:
        raise ValueError("adam has no weight decay; adamw has")
    eps = (1e-6 if name == "lamb" else 1e-8) if eps is None else eps
    adam: dict[str, Any] = {"b1": b1, "b2": b2, "eps": eps}
    base = {
        "sgd": lambda: optax.sgd(learning_rate),
        "momentum": lambda: optax.sgd(learning_rate, momentum),
        "nesterov": lambda: optax.sgd(learning_rate, momentum, nesterov=True),
        "adam": lambda: optax.adam(learning_rate, **adam),
        "adamw": lambda: optax.adamw(learning_rate, **adam, weight_decay=weight_decay, mask=decayed),
        "rmsprop": lambda: optax.rmsprop(learning_rate, rms_decay, eps, momentum=momentum),
        "lamb": lambda: optax.lamb(learning_rate, **adam, weight_decay=weight_decay, mask=decayed),
        "lars": lambda: optax.lars(
            learning_rate, weight_decay, weight_decay_mask=decayed, trust_ratio_mask=decayed, momentum=momentum
        ),
    }[name]()
    parts = []
    if clip_norm is not None:
        parts.append(optax.clip_by_global_norm(clip_norm))
    if weight_decay and name in ("sgd", "momentum", "nesterov", "rmsprop"):
        parts.append(optax.add_decayed_weights(weight_decay, decayed))
    return optax.chain(*parts, base) if parts else base


def schedule(
    name: str,
    learning_rate: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    boundaries: Sequence[float] = (1 / 3, 2 / 3, 8 / 9),
    factor: float = 0.1,
    power: float = 0.9,
    end_factor: float = 0.0,
) -> optax.Schedule:
    """Makes a learning-rate schedule.

    Args:
        name: One of `SCHEDULES`: `constant`; `step`, which multiplies by `factor` at each of `boundaries`; `cosine` to
            `end_factor` (Loshchilov & Hutter 2017, without restarts); `polynomial` of `power` to `end_factor`;
            `one_cycle`, which brings its own warm-up over the first 30 % (Smith & Topin 2018).
        learning_rate: The peak.
        total_steps: The run's steps, the warm-up's included.
        warmup_steps: Steps of linear rise from `learning_rate / (warmup_steps + 1)`.
        boundaries: Fractions of `total_steps`.
        factor: See `step`.
        power: See `polynomial`.
        end_factor: The last rate as a fraction of the peak.

    Returns:
        A function of the step.

    Raises:
        ValueError: An unknown name, the nearest ones given; steps that do not fit; `warmup_steps` with `one_cycle`.
    """
    if name not in SCHEDULES:
        raise ValueError(_unknown("schedule", name, SCHEDULES))
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be in [0, total_steps={total_steps}); got {warmup_steps}")
    if name == "one_cycle":
        if warmup_steps:
            raise ValueError("one_cycle brings its own warm-up; leave warmup_steps at 0")
        return optax.cosine_onecycle_schedule(total_steps, learning_rate)
    steps = total_steps - warmup_steps
    scales: dict[int, float] = {}
    for boundary in boundaries:  # in a short run several may fall on one step
        at = round(boundary * total_steps) - warmup_steps
        scales[at] = scales.get(at, 1.0) * factor
    if name == "step" and any(s <= 0 for s in scales):
        first = round(min(boundaries) * total_steps)
        raise ValueError(
            f"boundaries must come after the {warmup_steps} warm-up steps; got {tuple(boundaries)} of {total_steps} "
            f"steps, the first at step {first}"
        )
    after: Callable[..., Any] = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "step": lambda: optax.piecewise_constant_schedule(learning_rate, scales),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, steps, alpha=end_factor),
        "polynomial": lambda: optax.polynomial_schedule(learning_rate, learning_rate * end_factor, power, steps),
    }[name]()
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known
    return f"there is no {what} named {name!r}; the nearest are {', '.join(near)}"
