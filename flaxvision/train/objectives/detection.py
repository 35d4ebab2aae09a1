"""The objective of detection: the sum of the losses of the detector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxvision import metrics as fm
from flaxvision.layers.batch_context import current_batch
from flaxvision.train.objectives.base import Objective

_OBJECT_KEYS = ("boxes", "labels", "crowd", "difficult", "area")


def detection(
    *,
    weights: Mapping[str, float] | None = None,
    measure: Callable[[Callable[..., Any], dict[str, Any], dict[str, Any]], Mapping[str, Any]] | None = None,
) -> Objective:
    """Returns the objective of detection: the sum of the detector's `losses`.

    A batch holds `image` [N, H, W, C], `boxes` [N, M, 4], `labels` and `valid` [N, M], and optionally `size` [N, 2],
    `crowd` and `difficult` [N, M]. The metrics are `loss` and each of the detector's losses by name.

    Detectors that sample anchors or regions use one PRNG key per row of the global batch. The samples therefore do not
    depend on the number of devices, under `jit` and under `pmap`. In evaluation, the key of a row depends only on the
    `index` of the image, or without `index` on the number of the row. A loss that the detector divides by a count over
    the batch still depends on the other rows.

    Args:
        weights: Factor of each loss by name; the default is 1.
        measure: `(apply_fn, variables, batch) -> metrics` by name, called in evaluation only, such as
            `average_precision(model)`.

    Returns:
        The objective. When called, it raises ValueError if `weights` has an unknown loss or the batch has no boxes.
    """

    def objective(apply_fn, params, collections, batch, rng, train):
        batch, mask = _real_rows(batch)
        variables = {"params": params, **collections}
        rows = len(batch["image"])
        keys = _row_keys(rng, rows, batch)
        if train:
            named, updated = apply_fn(
                variables,
                batch,
                keys,
                train=True,
                method="losses",
                rngs={"dropout": rng},
                mutable=[*collections],
            )
            collections = {**collections, **updated}
        else:
            named = apply_fn(variables, batch, keys, train=False, method="losses")
        if unknown := sorted(set(weights or ()) - set(named)):
            raise ValueError(f"weights must be for the losses {', '.join(sorted(named))}; got {unknown[0]!r}")
        mask = jnp.ones(rows, jnp.float32) if mask is None else mask.astype(jnp.float32)
        total = sum(value * (weights or {}).get(name, 1.0) for name, value in named.items())
        metrics = {name: fm.Mean.of(value, mask) for name, value in {"loss": total, **named}.items()}
        if measure is not None and not train:
            metrics |= measure(apply_fn, variables, batch)
        loss = metrics["loss"].total / jnp.maximum(metrics["loss"].weight, 1.0)
        return loss, (metrics, collections)

    return objective


def average_precision(
    model: Any, num_classes: int, *, metrics: Mapping[str, type[fm.DetectionAP]] | None = None, **options: Any
) -> Callable[..., dict[str, Any]]:
    """Returns a `measure` for `detection` that runs `flaxvision.detect` and compares the detections with the objects.

    Args:
        model: The detector.
        num_classes: Number of classes of the data, without a background class.
        metrics: The metrics by name; None for `{"coco": CocoAP}`. `VocAP` leaves out difficult objects.
        **options: Options of `flaxvision.detect`, such as `score_threshold`.
    """
    chosen = {"coco": fm.CocoAP} if metrics is None else dict(metrics)

    def measure(apply_fn: Callable[..., Any], variables: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        from flaxvision.detection import detect

        found = detect(model, variables, batch["image"], batch.get("size"), **options)
        return {name: metric.of(batch, found, num_classes) for name, metric in chosen.items()}

    return measure


def _real_rows(batch: dict[str, Any]) -> tuple[dict[str, Any], jax.Array | None]:
    """Returns the batch, with rows that are padding set to 0 and without objects, and the mask."""
    missing = [key for key in ("image", "boxes", "labels", "valid") if key not in batch]
    if missing:
        raise ValueError(f"batch must hold image, boxes, labels and valid; got {sorted(batch)} without {missing[0]}")
    mask = batch.get("mask")
    if mask is None:
        return batch, None

    def real(x: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape((-1,) + (1,) * (x.ndim - 1)) > 0, x, jnp.zeros((), x.dtype))

    return {**batch, **{key: real(batch[key]) for key in ("image", "valid", *_OBJECT_KEYS) if key in batch}}, mask


def _row_keys(rng: jax.Array | None, rows: int, batch: dict[str, Any]) -> jax.Array:
    """Returns one key per row [N], the same for any number of devices."""
    if rng is None:
        numbers = batch.get("index", jnp.arange(rows))
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)
    keys = current_batch().row_keys
    if keys is not None:
        return keys
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))
