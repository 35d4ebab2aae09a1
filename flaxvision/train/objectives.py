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

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxvision import losses as fl
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
        targets, known = _class_targets(batch["label"], logits)
        classes, weights = logits.shape[-1], jnp.ones(known.shape)
        if class_weights is not None:
            if len(class_weights) != classes:
                raise ValueError(f"class_weights must have {classes} values, one per class; got {len(class_weights)}")
            weights = targets @ jnp.asarray(class_weights, jnp.float32)
        return _unless(known, weights * per_example(logits, optax.smooth_labels(targets, label_smoothing)))

    def measure(logits, batch):
        targets, known = _class_targets(batch["label"], logits)
        label = batch["label"] if batch["label"].ndim == 1 else jnp.argmax(targets, axis=-1)
        found = {"accuracy": _unless(known, fm.correct(logits, label))}
        if logits.shape[-1] > 5:
            found["top5_accuracy"] = _unless(known, fm.top_k_correct(logits, label, 5))
        return found

    return _objective(losses, measure, aux_weight)


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
        _expect(logits.shape == (*batch["label"].shape, 1), "one row per logit", logits, batch["label"])
        label = batch["label"].astype(jnp.float32)
        weights = 1 + (positive_weight - 1) * label
        return _unless(_probable(label), weights * optax.sigmoid_binary_cross_entropy(logits[:, 0], label))

    def measure(logits, batch):
        right = (logits[:, 0] > 0) == (batch["label"] > 0.5)
        return {"accuracy": _unless(_probable(batch["label"]), right.astype(jnp.float32))}

    return _objective(losses, measure)


def multilabel() -> Objective:
    """Makes the objective of multi-label classification, in which an example has any number of K classes.

    `batch["label"]` is 0 or 1, or a probability, `[N, K]`. The loss of an example is the mean binary cross-entropy over
    the classes. The metrics are `loss`, `accuracy` (the share of correct decisions) and `exact_match` (all K correct);
    all are NaN for an example with a label outside [0, 1].

    Returns:
        The objective. When traced it raises ValueError if the labels and the logits differ in shape.
    """

    def losses(logits, batch):
        _expect(logits.shape == batch["label"].shape, "the shape of the logits", logits, batch["label"])
        label = batch["label"].astype(jnp.float32)
        return _unless(_probable(label), jnp.mean(optax.sigmoid_binary_cross_entropy(logits, label), axis=-1))

    def measure(logits, batch):
        right = (logits > 0) == (batch["label"] > 0.5)
        found = {"accuracy": jnp.mean(right, axis=-1), "exact_match": jnp.all(right, axis=-1).astype(jnp.float32)}
        return {name: _unless(_probable(batch["label"]), values) for name, values in found.items()}

    return _objective(losses, measure)


def regression(loss: str = "mse", *, huber_delta: float = 1.0) -> Objective:
    """Makes the objective of regression.

    The model returns `[N, K]`; `batch["label"]` is `[N, K]`, or `[N]` if K is 1. Losses are means over K. The metrics
    are `loss`, `mse` and `mae`.

    Args:
        loss: `"mse"`, `"mae"` or `"huber"` (Huber 1964).
        huber_delta: Error at which the Huber loss changes from quadratic to linear.

    Returns:
        The objective. When traced it raises ValueError if the labels and the outputs differ in shape.

    Raises:
        ValueError: `loss` is not one of the three.
    """
    functions = {
        "mse": jnp.square,
        "mae": jnp.abs,
        "huber": lambda error: optax.huber_loss(error, delta=huber_delta),
    }
    if loss not in functions:
        raise ValueError(f"loss must be one of {', '.join(functions)}; got {loss!r}")

    def error(outputs, batch):
        label = batch["label"].astype(jnp.float32)
        label = label[:, None] if label.ndim == 1 else label
        _expect(outputs.shape == label.shape, "the shape of the outputs", outputs, label)
        return outputs - label

    def losses(outputs, batch):
        return jnp.mean(functions[loss](error(outputs, batch)), axis=-1)

    def measure(outputs, batch):
        e = error(outputs, batch)
        return {"mse": jnp.mean(jnp.square(e), axis=-1), "mae": jnp.mean(jnp.abs(e), axis=-1)}

    return _objective(losses, measure)


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
        batch, mask = _real_rows(batch)
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
        targets, known = _class_targets(label, lengths)
        margin = fl.margin(lengths, targets, present=present, absent=absent, absent_weight=absent_weight)
        margin = _unless(known, margin)
        found = {"loss": margin, "accuracy": _unless(known, fm.correct(lengths, classes)), "margin": margin}
        if drawings:
            error = jnp.sum(jnp.square(drawings[0] - image), axis=(1, 2, 3))
            found |= {"loss": margin + reconstruction_weight * error, "reconstruction": error}
        mask = jnp.ones(lengths.shape[:1], jnp.float32) if mask is None else mask.astype(jnp.float32)
        metrics = {name: fm.Mean.of(values, mask) for name, values in found.items()}
        loss = metrics["loss"].total / jnp.maximum(metrics["loss"].weight, 1.0)
        return loss, (metrics, {**collections, **updated})

    return objective


def _expect(fits: bool, what: str, outputs: jax.Array, label: jax.Array) -> None:
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


def _class_targets(label: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns targets `[N, K]` and whether they are usable, `[N]`; the targets of a label that is not are zeros."""
    if label.ndim == 1:
        classes = logits.shape[-1]
        label = label.astype(jnp.promote_types(label.dtype, jnp.int32))  # uint8 does not compare with 1000
        return jax.nn.one_hot(label, classes), (label >= 0) & (label < classes)
    if label.shape != logits.shape:
        raise ValueError(f"label must be integers [N] or targets {logits.shape}; got {label.shape}")
    known = jnp.all(jnp.isfinite(label), axis=-1)
    return jnp.where(known[:, None], label.astype(jnp.float32), 0.0), known


def _probable(label: jax.Array) -> jax.Array:
    """Returns whether labels `[N]` or `[N, K]` lie in [0, 1], `[N]`."""
    return jnp.all((label >= 0) & (label <= 1), axis=tuple(range(1, label.ndim)))


def _unless(known: jax.Array, values: jax.Array) -> jax.Array:
    """Replaces the values of rows that are not `known` by NaN, without a gradient."""
    return jnp.where(known, values, jnp.nan)


def _real_rows(batch: dict[str, Any]) -> tuple[dict[str, Any], jax.Array | None]:
    """Returns the batch with the images and labels of padded rows set to 0, and the mask.

    A padded row may hold anything. The gradient of NaN is NaN even if the loss is multiplied by 0.
    """
    mask = batch.get("mask")
    if mask is None:
        return batch, None

    def real(x):
        return jnp.where(mask.reshape((-1,) + (1,) * (x.ndim - 1)) > 0, x, jnp.zeros((), x.dtype))

    return {**batch, "image": real(batch["image"]), "label": real(batch["label"])}, mask


def _objective(losses, measure, aux_weight: float = 0.0) -> Objective:
    """Builds an objective from two functions of `(outputs, batch)`: the losses `[N]` and the other metrics `[N]`."""

    def objective(apply_fn, params, collections, batch, rng, train):
        variables = {"params": params, **collections}
        aux = []
        batch, mask = _real_rows(batch)
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
