"""Objectives: one pure function for each task, which gives the loss and the metrics.

An objective maps `(apply_fn, params, collections, batch, rng, train)` to `loss, (metrics, collections)`:

* `loss` is the mean loss over the real rows of the batch (`mask` 1; 0 is padding).
* `metrics` is a dict of accumulators, see `flaxvision.metrics`. `metrics["loss"]` is a `Mean`. Its weight is also the
  weight of the gradients when those of several devices or accumulated parts are averaged. Every other metric has its
  own weights.
* `collections` are the other Linen collections after the pass.

`layers.BatchNorm` leaves padded rows out of its statistics; Linen's sees them, as zeros. A new task needs a new
objective and no change in the step, the loop or the checkpoints.

A label outside the classes of the model has no loss, and a compiled step cannot raise. Such a row has a loss of NaN,
which ends a run of `fit`, and an accuracy of NaN, by which `explain_loss` knows the cause. It gives no gradient.

Metrics of training (`train=True`) are merged on the device and stored in checkpoints. They must include `"loss"` and
keep their names and shapes, both from step to step and when they are merged; otherwise `train_step` or `fit` raises
ValueError. Metrics of evaluation are merged on the host and may grow, so an accumulator of lists belongs there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flaxvision import metrics as fm

PerExample = Callable[[jax.Array, jax.Array], jax.Array]


class Objective(Protocol):
    """A pure function of a model's `apply`, its variables and a batch; see the module docstring."""

    def __call__(
        self,
        apply_fn: Callable[..., Any],
        params: Any,
        collections: dict[str, Any],
        batch: dict[str, Any],
        rng: jax.Array | None,
        train: bool,
        /,
    ) -> tuple[jax.Array, tuple[Mapping[str, Any], dict[str, Any]]]:
        """Returns `loss, (metrics, collections)`."""
        ...


def expect(fits: bool, what: str, outputs: jax.Array, label: jax.Array) -> None:
    """Raises ValueError unless `fits`; `what` says what labels must have."""
    if not fits:
        raise ValueError(f"label must have {what}; got outputs {outputs.shape} and labels {label.shape}")


def explain_loss(metrics: Mapping[str, Any]) -> str:
    """Explains a loss that is not finite, as far as the metrics tell.

    Args:
        metrics: Accumulators by name, or their values, of the steps in question.

    Returns:
        A clause for an error message, such as `"the loss is not finite" + explain_loss(metrics)`; empty if the labels
        are not the cause.
    """
    accuracy = metrics.get("accuracy")
    if isinstance(accuracy, fm.Mean):
        accuracy = accuracy.total
    if accuracy is None or not np.isnan(jax.device_get(accuracy)):
        return ""
    return ", because a label lies outside the classes of the model (fv.data.validate finds the example)"


def class_targets(label: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns targets `[N, K]` and whether they are usable, `[N]`; the targets of a label that is not are zeros."""
    if label.ndim == 1:
        classes = logits.shape[-1]
        label = label.astype(jnp.promote_types(label.dtype, jnp.int32))  # uint8 does not compare with 1000
        return jax.nn.one_hot(label, classes), (label >= 0) & (label < classes)
    if label.shape != logits.shape:
        raise ValueError(f"label must be integers [N] or targets {logits.shape}; got {label.shape}")
    known = jnp.all(jnp.isfinite(label), axis=-1)
    return jnp.where(known[:, None], label.astype(jnp.float32), 0.0), known


def probable(label: jax.Array) -> jax.Array:
    """Returns whether labels `[N]` or `[N, K]` lie in [0, 1], `[N]`."""
    return jnp.all((label >= 0) & (label <= 1), axis=tuple(range(1, label.ndim)))


def unless(known: jax.Array, values: jax.Array) -> jax.Array:
    """Replaces the values of rows that are not `known` by NaN, without a gradient."""
    return jnp.where(known, values, jnp.nan)


def real_rows(batch: dict[str, Any]) -> tuple[dict[str, Any], jax.Array | None]:
    """Returns the batch with the images and labels of padded rows set to 0, and the mask.

    A padded row may hold anything. The gradient of NaN is NaN even if the loss is multiplied by 0.
    """
    mask = batch.get("mask")
    if mask is None:
        return batch, None

    def real(x):
        return jnp.where(mask.reshape((-1,) + (1,) * (x.ndim - 1)) > 0, x, jnp.zeros((), x.dtype))

    return {**batch, "image": real(batch["image"]), "label": real(batch["label"])}, mask


def from_losses(losses, measure, aux_weight: float = 0.0) -> Objective:
    """Builds an objective from two functions of `(outputs, batch)`: the losses `[N]` and the other metrics `[N]`."""

    def objective(apply_fn, params, collections, batch, rng, train):
        variables = {"params": params, **collections}
        aux = []
        batch, mask = real_rows(batch)
        image = batch["image"]
        if train:
            outputs, updated = apply_fn(
                variables,
                image,
                train=True,
                rngs={"dropout": rng},
                mutable=[*collections, "aux_logits"],
            )
            updated = dict(updated)
            aux = jax.tree.leaves(updated.pop("aux_logits", {}))
            collections = {**collections, **updated}
        else:
            outputs = apply_fn(variables, image, train=False)
        mask = jnp.ones(outputs.shape[:1], jnp.float32) if mask is None else mask.astype(jnp.float32)
        metrics = {"loss": fm.Mean.of(losses(outputs, batch), mask)}
        total = metrics["loss"].total + aux_weight * sum(fm.Mean.of(losses(a, batch), mask).total for a in aux)
        metrics |= {name: fm.Mean.of(values, mask) for name, values in measure(outputs, batch).items()}
        return total / jnp.maximum(metrics["loss"].weight, 1.0), (metrics, collections)

    return objective
