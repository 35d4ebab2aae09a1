"""The objective of semantic segmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxvision import losses as fl
from flaxvision import metrics as fm
from flaxvision.layers.resize import resize_bilinear
from flaxvision.train.objectives.base import Objective

PerImage = Callable[[jax.Array, jax.Array], jax.Array]


def segmentation(
    *,
    loss: PerImage | None = None,
    class_weights: Sequence[float] | None = None,
    aux_weight: float = 0.5,
    ignore: int = fl.IGNORED,
) -> Objective:
    """Makes the objective of semantic segmentation.

    `batch["label"]` holds class indices `[N, H, W]`, with `ignore` where the class is unknown. `batch["weight"]` may
    hold a weight for every pixel `[N, H, W]`, such as `data.border_weights`. The loss is the cross-entropy, averaged
    over the pixels of the global batch with these weights. It does not depend on the number of devices.

    If the logits are smaller than the labels, as for `unet`, they belong to the central pixels. The labels and weights
    are then cropped. Logits of auxiliary heads are resized to the size of the labels.

    The metrics are `loss`, `accuracy` (the share of the known pixels that are predicted correctly) and, in evaluation,
    `segmentation`, a `SegmentationMetrics`. `accuracy` and the cross-entropy are NaN if a label is neither a class nor
    `ignore`; `segmentation` does not count such pixels.

    Args:
        loss: `(logits [N, H, W, K], labels [N, H, W]) -> [N]`, used instead of the cross-entropy and averaged over the
            images, such as `losses.soft_dice`. The batch must not hold weights, because `loss` would ignore them.
        class_weights: K factors, one for the pixels of each class, as in torch's `CrossEntropyLoss`.
        aux_weight: Weight of the loss of each auxiliary head (torchvision: 0.5).
        ignore: Label of pixels that are excluded.

    Returns:
        The objective. When traced it raises ValueError for labels or weights of the wrong shape, and for weights
        together with `loss`.

    Raises:
        ValueError: `class_weights`, or an `ignore` other than 255, is given together with `loss`.
    """
    if loss is not None and class_weights is not None:
        raise ValueError("class_weights must be None with a loss; got both")
    if loss is not None and ignore != fl.IGNORED:
        raise ValueError(f"ignore must be {fl.IGNORED} with a loss, which does not see it; got {ignore}")

    def mean_loss(logits: jax.Array, batch: dict[str, Any], mask: jax.Array) -> fm.Mean:
        if loss is not None:
            if "weight" in batch:
                raise ValueError("batch must not hold weight with a loss, which does not see it; got weight")
            return fm.Mean.of(loss(logits, batch["label"]), mask)
        if class_weights is not None and len(class_weights) != logits.shape[-1]:
            raise ValueError(
                f"class_weights must have {logits.shape[-1]} values, one per class; got {len(class_weights)}"
            )
        weights = fl.pixel_weights(batch["label"], class_weights=class_weights, ignore=ignore)
        weights = weights * batch.get("weight", 1.0) * mask[:, None, None]
        return fm.Mean.of(fl.pixel_cross_entropy(logits, batch["label"], ignore=ignore), weights)

    def objective(apply_fn, params, collections, batch, rng, train):
        mask = batch.get("mask")
        mask = jnp.ones(len(batch["image"]), jnp.float32) if mask is None else (mask > 0).astype(jnp.float32)
        image = jnp.where(mask[:, None, None, None] > 0, batch["image"], jnp.zeros((), batch["image"].dtype))
        variables, aux = {"params": params, **collections}, {}
        if train:
            mutable = [*collections, "aux_logits"]
            logits, updated = apply_fn(variables, image, train=True, rngs={"dropout": rng}, mutable=mutable)
            updated = dict(updated)
            aux = updated.pop("aux_logits", {})
            collections = {**collections, **updated}
        else:
            logits = apply_fn(variables, image, train=False)
        batch = _central(batch, logits)
        # A padded row may hold anything; the gradient of NaN is NaN even with a weight of 0.
        labels = jnp.where(mask[:, None, None] > 0, batch["label"].astype(jnp.int32), ignore)
        batch = {**batch, "label": labels}
        metrics: dict[str, Any] = {"loss": mean_loss(logits, batch, mask)}
        weight = jnp.maximum(metrics["loss"].weight, jnp.finfo(jnp.float32).tiny)
        total = metrics["loss"].total
        for extra in jax.tree.leaves(aux):
            total = total + aux_weight * mean_loss(resize_bilinear(extra, labels.shape[1:]), batch, mask).total
        found = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        known = labels != ignore
        right = jnp.where((labels >= 0) & (labels < logits.shape[-1]), (found == labels) * 1.0, jnp.nan)
        metrics["accuracy"] = fm.Mean.of(right, known.astype(jnp.float32))
        if not train:
            metrics["segmentation"] = fm.SegmentationMetrics.of(
                found, labels, logits.shape[-1], mask, batch.get("index")
            )
        return total / weight, (metrics, collections)

    return objective


def _central(batch: dict[str, Any], logits: jax.Array) -> dict[str, Any]:
    """Crops labels and weights to the central pixels that the logits belong to."""
    if "label" not in batch or batch["label"].ndim != 3:
        got = batch["label"].shape if "label" in batch else sorted(batch)
        raise ValueError(f"batch must hold label [N, H, W]; got {got}")
    size, full = logits.shape[1:3], batch["label"].shape[1:3]
    if logits.ndim != 4 or size[0] > full[0] or size[1] > full[1]:
        raise ValueError(f"logits must be [N, H, W, K] and not larger than the labels {full}; got {logits.shape}")
    if "weight" in batch and batch["weight"].shape != batch["label"].shape:
        raise ValueError(f"weight must have the shape of label, {batch['label'].shape}; got {batch['weight'].shape}")
    if size == full:
        return batch
    top, left = (full[0] - size[0]) // 2, (full[1] - size[1]) // 2
    cropped = {
        key: batch[key][:, top : top + size[0], left : left + size[1]] for key in ("label", "weight") if key in batch
    }
    return {**batch, **cropped}
