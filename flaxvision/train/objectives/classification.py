"""Objectives of classification: one label, one logit, or any number of labels."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import optax

from flaxvision import metrics as fm
from flaxvision.train.objectives.base import Objective, PerExample, class_targets, expect, from_losses, probable, unless


def classification(
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    aux_weight: float = 0.3,
    loss: PerExample | None = None,
) -> Objective:
    """Makes the objective of single-label classification.

    `batch["label"]` holds integers `[N]`, or soft targets `[N, K]` such as those of mixup and cutmix. The metrics are
    `loss`, `accuracy` and, if K > 5, `top5_accuracy`. The class of a soft target is that of its largest entry. All of
    them are NaN for an integer outside [0, K) and for a soft target that is not finite.

    Args:
        label_smoothing: Share of each target that is spread over all classes (Szegedy et al. 2015, section 7).
        class_weights: K factors, one for the losses of each class. The mean still divides by the number of examples.
        aux_weight: Weight of the loss of each auxiliary classifier (Szegedy et al. 2014, section 5: 0.3).
        loss: `(logits [N, K], targets [N, K]) -> [N]`, used instead of the cross-entropy, such as `losses.lenet_map`.

    Returns:
        The objective. When traced it raises ValueError for labels or weights of the wrong shape.

    Raises:
        ValueError: `label_smoothing` is not in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
    per_example = loss or optax.softmax_cross_entropy

    def losses(logits, batch):
        targets, known = class_targets(batch["label"], logits)
        classes, weights = logits.shape[-1], jnp.ones(known.shape)
        if class_weights is not None:
            if len(class_weights) != classes:
                raise ValueError(f"class_weights must have {classes} values, one per class; got {len(class_weights)}")
            weights = targets @ jnp.asarray(class_weights, jnp.float32)
        return unless(known, weights * per_example(logits, optax.smooth_labels(targets, label_smoothing)))

    def measure(logits, batch):
        targets, known = class_targets(batch["label"], logits)
        label = batch["label"] if batch["label"].ndim == 1 else jnp.argmax(targets, axis=-1)
        found = {"accuracy": unless(known, fm.correct(logits, label))}
        if logits.shape[-1] > 5:
            found["top5_accuracy"] = unless(known, fm.top_k_correct(logits, label, 5))
        return found

    return from_losses(losses, measure, aux_weight)


def binary(*, positive_weight: float = 1.0) -> Objective:
    """Makes the objective of binary classification from a single logit.

    The model returns `[N, 1]` (`num_classes=1`); `batch["label"]` is 0 or 1, `[N]`, or a probability. The metrics are
    `loss` and `accuracy`; both are NaN for a label outside [0, 1].

    Args:
        positive_weight: Factor of the loss of examples with label 1.

    Returns:
        The objective. When traced it raises ValueError if the model has another number of logits.
    """

    def losses(logits, batch):
        expect(logits.shape == (*batch["label"].shape, 1), "one row per logit", logits, batch["label"])
        label = batch["label"].astype(jnp.float32)
        weights = 1 + (positive_weight - 1) * label
        return unless(probable(label), weights * optax.sigmoid_binary_cross_entropy(logits[:, 0], label))

    def measure(logits, batch):
        right = (logits[:, 0] > 0) == (batch["label"] > 0.5)
        return {"accuracy": unless(probable(batch["label"]), right.astype(jnp.float32))}

    return from_losses(losses, measure)


def multilabel() -> Objective:
    """Makes the objective of multi-label classification, in which an example has any number of K classes.

    `batch["label"]` is 0 or 1, or a probability, `[N, K]`. The loss of an example is the mean binary cross-entropy over
    the classes. The metrics are `loss`, `accuracy` (the share of correct decisions) and `exact_match` (all K correct);
    all are NaN for an example with a label outside [0, 1].

    Returns:
        The objective. When traced it raises ValueError if the labels and the logits differ in shape.
    """

    def losses(logits, batch):
        expect(logits.shape == batch["label"].shape, "the shape of the logits", logits, batch["label"])
        label = batch["label"].astype(jnp.float32)
        return unless(probable(label), jnp.mean(optax.sigmoid_binary_cross_entropy(logits, label), axis=-1))

    def measure(logits, batch):
        right = (logits > 0) == (batch["label"] > 0.5)
        found = {"accuracy": jnp.mean(right, axis=-1), "exact_match": jnp.all(right, axis=-1).astype(jnp.float32)}
        return {name: unless(probable(batch["label"]), values) for name, values in found.items()}

    return from_losses(losses, measure)
