"""One step of training and one of evaluation: pure functions without I/O, globals or devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxvision import metrics as fm
from flaxvision.layers import batch_context
from flaxvision.train.objectives import Objective
from flaxvision.train.state import TrainState

Batch = dict[str, Any]
Transform = Callable[[jax.Array, Batch], Batch]
_ROWS = 0x726F7773


def train_step(
    state: TrainState,
    batch: Batch,
    rng: jax.Array,
    *,
    objective: Objective,
    transform: Transform | None = None,
    accumulate: int = 1,
    loss_scale: float | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, fm.Accumulator]]:
    """Takes one optimizer step on one batch.

    All randomness comes from `fold_in(rng, state.step)`, and from the index of the device if `axis_name` is set, so no
    random state needs to be saved. Detectors draw their samples from the `row_keys` of `layers.batch_context`, which
    depend on the place of a row in the global batch and not on the devices.

    Gradients are weighted, accumulated and averaged in float32 or wider, and rounded once to the dtype of the
    parameters for the optimizer. `layers.BatchNorm` is told the batch's mask and the mapped axis, see
    `layers.batch_context`.

    Args:
        state: The state before the step.
        batch: A dict of arrays with N rows each: `image`, the targets of the objective and optionally `mask`.
        rng: The key of the run, the same at every step.
        objective: The objective to minimise.
        transform: `(rng, batch) -> batch`, applied before the model: augmentation and normalization.
        accumulate: Number of parts into which the batch is split. The parts run one after another and their gradients
            are averaged, which takes the memory of one part and gives the update of the whole batch. BatchNorm
            normalizes each part on its own and updates its running statistics once a part.
        loss_scale: Factor of the loss while it is differentiated, for models that compute in float16
            (`dtype=jnp.float16`), in which gradients below 6e-8 become 0; 2.0**12 is a common choice. The gradients
            are divided by it. Too large a factor overflows, and the parameters are no longer finite.
        axis_name: The mapped axis to average over, under `pmap` only.

    Returns:
        The state after the step, and the accumulators of the batch over all devices, by name.

    Raises:
        ValueError: `accumulate` does not divide N, the objective gives no metric `"loss"` that is a `Mean`,
            `loss_scale` is not positive, or a parameter is float16.
    """
    if loss_scale is not None and not 0 < loss_scale < math.inf:
        raise ValueError(f"loss_scale must be positive and finite, or None; got {loss_scale}")
    _check_dtypes(state.params)
    rng = jax.random.fold_in(rng, state.step)
    row_keys = _row_keys(rng, len(batch["image"]), axis_name)
    if axis_name is not None:
        rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
    transform_rng, model_rng = jax.random.split(rng)
    if transform is not None:
        batch = transform(transform_rng, batch)

    def gradient(collections, part, key, row_keys):
        def loss(params):
            with batch_context(mask=part.get("mask"), axis_name=axis_name, row_keys=row_keys):
                value, (metrics, updated) = objective(state.apply_fn, params, collections, part, key, True)
            check_loss(metrics)
            weight = metrics["loss"].weight
            if axis_name is not None:
                # Synchronised BatchNorm passes gradients between devices, so each device's loss needs its share of the
                # whole before it is differentiated. The share is 1 if all devices have the same number of real rows.
                own, weight = weight, jax.lax.pmean(weight, axis_name)
                value = value * jnp.where(weight > 0, own / weight, 1.0)
            if loss_scale is not None:
                value, weight = value * loss_scale, weight / loss_scale
            return value, (weight, metrics, updated)

        grads, (weight, metrics, updated) = jax.grad(loss, has_aux=True)(state.params)
        # Parts have mean losses of different weights; what can be added up are the weighted sums.
        return updated, jax.tree.map(lambda g: g * weight.astype(g.dtype), jax.tree.map(_wide, grads)), metrics

    if accumulate == 1:
        collections, grads, metrics = gradient(state.collections, batch, model_rng, row_keys)
    else:
        rows = len(batch["image"])
        if rows % accumulate:
            each = "" if axis_name is None else " on each device"
            raise ValueError(f"accumulate must divide the {rows} rows of the batch{each}; got {accumulate}")
        # Part i takes rows i, i + accumulate, ..., so that the rows of a sharded batch stay on their devices.
        parts, row_keys = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape((rows // accumulate, accumulate, *x.shape[1:])), 0, 1), (batch, row_keys)
        )
        keys = jax.random.split(model_rng, accumulate)

        def accumulate_part(carry, part):
            collections, total = carry
            collections, grads, metrics = gradient(collections, *part)
            return (collections, jax.tree.map(jnp.add, total, grads)), metrics

        start = (state.collections, jax.tree.map(lambda p: jnp.zeros_like(_wide(p)), state.params))
        (collections, grads), stacked = jax.lax.scan(accumulate_part, start, (parts, keys, row_keys))
        # Merged outside of the scan, since an accumulator may change its shape when it is merged.
        metrics = functools.reduce(fm.merge, [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(accumulate)])

    if axis_name is not None:
        grads = jax.lax.psum(grads, axis_name)
        metrics = {name: metric.all_reduce(axis_name) for name, metric in metrics.items()}
        # Layers other than `layers.BatchNorm` may have statistics of their own on each device; keep their mean.
        collections = jax.tree.map(lambda x: _mean(x, axis_name), collections)
    weight = jnp.maximum(metrics["loss"].weight, 1.0)
    grads = jax.tree.map(lambda g, p: (g / weight.astype(g.dtype)).astype(p.dtype), grads, state.params)
    return state.apply_gradients(grads, collections), metrics


def check_loss(metrics: Mapping[str, Any]) -> None:
    """Checks that the metrics of a train step include the loss.

    Args:
        metrics: Accumulators by name.

    Raises:
        ValueError: There is no metric `"loss"`, or it is not a `Mean`.
    """
    if not isinstance(metrics.get("loss"), fm.Mean):
        found = {name: type(metric).__name__ for name, metric in metrics.items()}
        raise ValueError(f"training metrics must include 'loss', a Mean; got {found}")


def _row_keys(rng: jax.Array, rows: int, axis_name: str | None) -> jax.Array:
    """Returns a key for each row of the batch [N], by its place in the global batch."""
    first = 0 if axis_name is None else rows * jax.lax.axis_index(axis_name)
    places = first + jnp.arange(rows)
    # Apart from the keys of the transform and of dropout, which are split from the same key.
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(rng, _ROWS), places)


def _wide(x: jax.Array) -> jax.Array:
    """Casts half precision to float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_dtypes(params: Any) -> None:
    """Refuses to train float16 parameters: updates underflow, and so does the epsilon of most optimizers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype == jnp.float16:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"params must be float32, wider or bfloat16 to be trained (dtype=jnp.float16 and loss_scale compute in "
                f"float16); got float16 for {name}"
            )


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
) -> dict[str, fm.Accumulator]:
    """Measures one batch.

    Args:
        state: The state to evaluate.
        batch: A dict of arrays: `image`, the targets of the objective and optionally `mask`; rows with mask 0 are
            padding and count nothing.
        objective: The objective that gives the metrics.
        transform: `(rng, batch) -> batch`, applied before the model with a constant key.
        use_ema: Whether to evaluate the moving average instead of the parameters.
        axis_name: The mapped axis to merge over, under `pmap` only.

    Returns:
        The accumulators of the batch over all devices, by name.

    Raises:
        ValueError: `use_ema` is set and the state has no moving average.
    """
    variables = state.variables
    if use_ema:
        if state.ema is None:
            raise ValueError(
                "use_ema must be False for a state without a moving average; got True (create_state(ema_decay=...) "
                "keeps one)"
            )
        variables = state.ema
    if transform is not None:
        batch = transform(jax.random.key(0), batch)
    collections = {k: v for k, v in variables.items() if k != "params"}
    with batch_context(mask=batch.get("mask"), axis_name=axis_name):
        _, (metrics, _) = objective(state.apply_fn, variables["params"], collections, batch, None, False)
    return {name: m if axis_name is None else m.all_reduce(axis_name) for name, m in metrics.items()}
