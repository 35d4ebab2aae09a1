"""The objective of CapsNet."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flaxvision import losses as fl
from flaxvision import metrics as fm
from flaxvision.train.objectives.base import Objective, class_targets, real_rows, unless


def capsule(
    *,
    reconstruction_weight: float = 5e-4,
    present: float = 0.9,
    absent: float = 0.1,
    absent_weight: float = 0.5,
) -> Objective:
    """Makes the objective of CapsNet: the margin loss plus the reconstruction error.

    See Sabour, Frosst and Hinton 2017, sections 3 and 4.1. `batch["label"]` holds integers `[N]` or targets `[N, K]`.
    The image is reconstructed from the capsule of the true class (the largest target) in training, and from the longest
    capsule in evaluation. Images are in [0, 1]. The metrics are `loss` (the sum), `accuracy`, `margin` and, if the
    model has a decoder, `reconstruction`: the squared error summed over the pixels of an image. The first three are NaN
    for an integer outside [0, K) and for a target that is not finite.

    Args:
        reconstruction_weight: Factor of the squared error; 0 leaves the decoder out.
        present: See `flaxvision.losses.margin`.
        absent: See `flaxvision.losses.margin`.
        absent_weight: See `flaxvision.losses.margin`.

    Returns:
        The objective. When traced it raises ValueError for labels of the wrong shape.

    Raises:
        ValueError: `reconstruction_weight` is negative.
    """
    if reconstruction_weight < 0:
        raise ValueError(f"reconstruction_weight must not be negative; got {reconstruction_weight}")

    def objective(apply_fn, params, collections, batch, rng, train):
        batch, mask = real_rows(batch)
        image, label = batch["image"], batch["label"]
        classes = label if label.ndim == 1 else jnp.argmax(label, axis=-1)
        lengths, updated = apply_fn(
            {"params": params, **collections},
            image,
            train=train,
            label=classes if train else None,
            rngs={"dropout": rng} if train else None,
            mutable=[*(collections if train else ()), *(["reconstruction"] if reconstruction_weight else ())],
        )
        updated = dict(updated)
        drawings = jax.tree.leaves(updated.pop("reconstruction", {}))
        targets, known = class_targets(label, lengths)
        margin = fl.margin(lengths, targets, present=present, absent=absent, absent_weight=absent_weight)
        margin = unless(known, margin)
        found = {"loss": margin, "accuracy": unless(known, fm.correct(lengths, classes)), "margin": margin}
        if drawings:
            error = jnp.sum(jnp.square(drawings[0] - image), axis=(1, 2, 3))
            found |= {"loss": margin + reconstruction_weight * error, "reconstruction": error}
        mask = jnp.ones(lengths.shape[:1], jnp.float32) if mask is None else mask.astype(jnp.float32)
        metrics = {name: fm.Mean.of(values, mask) for name, values in found.items()}
        loss = metrics["loss"].total / jnp.maximum(metrics["loss"].weight, 1.0)
        return loss, (metrics, {**collections, **updated})

    return objective
