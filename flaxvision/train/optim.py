"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "lamb", "lars")
SCHEDULES = ("constant", "step", "cosine", "polynomial", "one_cycle")


def decayed(params: Any) -> Any:
    """Marks the parameters that have weight decay: kernels, but no vectors and scalars such as biases."""
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
    frozen: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Makes an optimizer by name.

    Weight decay applies to kernels only, not to biases and normalization parameters. In `sgd`, `momentum`, `nesterov`,
    `rmsprop` and `lars` it is added to the gradient, as in PyTorch; in `adamw` and `lamb` it is decoupled (Loshchilov
    and Hutter 2019).

    Args:
        name: One of `OPTIMIZERS`.
        learning_rate: A number, or a schedule: a function of the step.
        momentum: Momentum of `momentum`, `nesterov`, `rmsprop` and `lars`.
        b1: Decay of the first moment in `adam`, `adamw` and `lamb`.
        b2: Decay of the second moment in `adam`, `adamw` and `lamb`.
        eps: Added to the denominator; None for 1e-8, or 1e-6 in `lamb` as published.
        rms_decay: Decay of the average of squared gradients in `rmsprop`.
        weight_decay: Weight decay; `adam` has none.
        clip_norm: Largest global norm of the gradients; larger ones are scaled down first. None for no limit.
        frozen: Shell patterns of the paths of parameters that stay as they are, such as `"backbone/stem*"`. They have
            no part in the gradient's norm and no state in the optimizer.

    Returns:
        An Optax transformation.

    Raises:
        ValueError: `name` is unknown, `adam` is given weight decay, or a number is out of range. When initialized: a
            pattern of `frozen` matches no parameter, or all parameters are frozen.
    """
    if name not in OPTIMIZERS:
        raise ValueError(_unknown("optimizer", name, OPTIMIZERS))
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative; got {weight_decay}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive or None; got {clip_norm}")
    if name == "adam" and weight_decay:
        raise ValueError(f"weight_decay must be 0 for adam (adamw has weight decay); got {weight_decay}")
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
    tx = optax.chain(*parts, base) if parts else base
    if not frozen:
        return tx
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, partial(_labels, tuple(frozen)))


def _labels(frozen: tuple[str, ...], params: Any) -> Any:
    """Labels each parameter as "frozen" or "trained"."""
    flat = flatten_dict(params, sep="/")
    for pattern in frozen:
        if not fnmatch.filter(flat, pattern):
            near = difflib.get_close_matches(pattern, flat, n=3, cutoff=0.2) or list(flat)[:3]
            raise ValueError(f"frozen must match a parameter, such as {', '.join(near)}; got {pattern!r}")
    labels = {
        path: "frozen" if any(fnmatch.fnmatchcase(path, pattern) for pattern in frozen) else "trained" for path in flat
    }
    if "trained" not in labels.values():
        raise ValueError(f"frozen must leave a parameter to train; got {frozen}")
    return unflatten_dict(labels, sep="/")


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
    """Makes a learning-rate schedule by name.

    Args:
        name: One of `SCHEDULES`. `constant` keeps the learning rate. `step` multiplies it by `factor` at each of
            `boundaries`. `cosine` lowers it to `end_factor` (Loshchilov and Hutter 2017, without restarts).
            `polynomial` lowers it to `end_factor` with exponent `power`. `one_cycle` raises it over the first 30 % of
            the steps and then lowers it (Smith and Topin 2018).
        learning_rate: Peak learning rate.
        total_steps: Number of steps, including the warm-up.
        warmup_steps: Number of steps of linear warm-up, which starts at `learning_rate / (warmup_steps + 1)`.
        boundaries: Fractions of `total_steps` for `step`.
        factor: Factor of `step`.
        power: Exponent of `polynomial`.
        end_factor: Last learning rate as a fraction of the peak, for `cosine` and `polynomial`.

    Returns:
        A function of the step.

    Raises:
        ValueError: `name` is unknown, the numbers of steps do not fit, or `one_cycle` is given `warmup_steps`.

    Example:
        >>> rate = schedule("cosine", 0.1, 100, warmup_steps=10)
        >>> [round(float(rate(step)), 4) for step in (0, 10, 55, 100)]
        [0.0091, 0.1, 0.05, 0.0]
    """
    if name not in SCHEDULES:
        raise ValueError(_unknown("schedule", name, SCHEDULES))
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be in [0, total_steps={total_steps}); got {warmup_steps}")
    if name == "one_cycle":
        if warmup_steps:
            raise ValueError(f"warmup_steps must be 0 for one_cycle, which has its own warm-up; got {warmup_steps}")
        return optax.cosine_onecycle_schedule(total_steps, learning_rate)
    steps = total_steps - warmup_steps
    scales: dict[int, float] = {}
    for boundary in boundaries:  # in a short run, several may fall on one step
        at = round(boundary * total_steps) - warmup_steps
        scales[at] = scales.get(at, 1.0) * factor
    if name == "step" and any(s <= 0 for s in scales):
        first = round(min(boundaries) * total_steps)
        raise ValueError(
            f"boundaries must come after the {warmup_steps} warm-up steps; got {tuple(boundaries)}, of which the first "
            f"is step {first} of {total_steps}"
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
    return f"name must be a known {what}, such as {', '.join(near)}; got {name!r}"
