"""One step of training and of evaluation: pure functions without I/O, globals or devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flaxvision.train.objectives import Objective
from flaxvision.train.state import TrainState

Batch = dict[str, Any]
Transform = Callable[[jax.Array, Batch], Batch]


def train_step(
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
    *,
    objective: Objective,
    transform: Transform | None = None,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step on one batch.

    All randomness comes from `fold_in(rng, state.step)`, and the device's index where `axis_name` is set, so that
    nothing about it needs saving.

    Args:
        state: The run so far.
        batch: `image`, `label` and optionally `mask`, N rows.
        rng: The run's key, the same at every step.
        objective: What to minimise.
        transform: `(rng, batch) -> batch` before the model: normalisation, augmentation.
        accumulate: The batch is cut into this many parts, one after another, and their gradients are averaged: the
            memory of a part, the update of the whole. BatchNorm sees the parts.
        axis_name: The mapped axis to average over, under `pmap` only.

    Returns:
        The next state, and the batch's metric sums over all devices.

    Raises:
        ValueError: `accumulate` does not divide N.
    """
    rng = jax.random.fold_in(rng, state.step)
    if axis_name is not None:
        rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
    transform_rng, model_rng = jax.random.split(rng)
    if transform is not None:
        batch = transform(transform_rng, batch)

    def gradient(collections, part, key):
        def loss(params):
            return objective(state.apply_fn, params, collections, part, key, True)

        grads, (metrics, collections) = jax.grad(loss, has_aux=True)(state.params)
        # Means of parts differ in weight: sums add up.
        return collections, (jax.tree.map(lambda g: g * metrics["weight"].astype(g.dtype), grads), metrics)

    if accumulate == 1:
        collections, (grads, metrics) = gradient(state.collections, batch, model_rng)
    else:
        rows = len(batch["image"])
        if rows % accumulate:
            each = "" if axis_name is None else " on each device"
            raise ValueError(f"accumulate must divide the batch's {rows} rows{each}; got {accumulate}")
        # Part i takes rows i, i + accumulate, ...: a batch sharded over devices stays where it is.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape((rows // accumulate, accumulate, *x.shape[1:])), 0, 1), batch
        )
        keys = jax.random.split(model_rng, accumulate)
        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, state.collections, *first)[1])

        def accumulate_part(carry, part):
            collections, total = carry
            collections, sums = gradient(collections, *part)
            return (collections, jax.tree.map(jnp.add, total, sums)), None

        (collections, (grads, metrics)), _ = jax.lax.scan(accumulate_part, (state.collections, zeros), (parts, keys))

    if axis_name is not None:
        grads, metrics = jax.lax.psum((grads, metrics), axis_name)
        # Unsynchronised BatchNorm leaves each device its own statistics: their mean is what is kept.
        collections = jax.tree.map(lambda x: _mean(x, axis_name), collections)
    weight = jnp.maximum(metrics["weight"], 1.0)
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    return state.apply_gradients(grads, collections), metrics


def _mean(x: jax.Array, axis_name: str) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.pmean(x, axis_name)
    return jax.lax.pmax(x, axis_name)


def eval_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective,
    transform: Transform | None = None,
    use_ema: bool = False,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """Measures one batch.

    Args:
        state: The run.
        batch: `image`, `label` and optionally `mask`; rows of mask 0 count nothing.
        objective: Whose metrics.
        transform: `(rng, batch) -> batch` before the model; its key is constant.
        use_ema: Measure the moving average instead of the parameters.
        axis_name: The mapped axis to sum over, under `pmap` only.

    Returns:
        The batch's metric sums over all devices.

    Raises:
        ValueError: `use_ema` without a moving average in the state.
    """
    variables = state.variables
    if use_ema:
        if state.ema is None:
            raise ValueError("use_ema=True needs a state with a moving average; create_state(ema_decay=...) makes one")
        variables = state.ema
    if transform is not None:
        batch = transform(jax.random.key(0), batch)
    collections = {k: v for k, v in variables.items() if k != "params"}
    _, (metrics, _) = objective(state.apply_fn, variables["params"], collections, batch, None, False)
    return metrics if axis_name is None else jax.lax.psum(metrics, axis_name)
