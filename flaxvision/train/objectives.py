"""What a model is trained for: one pure function per task.

An objective maps `(apply_fn, params, collections, batch, rng, train)` to `loss, (metrics, collections)`: the mean loss
over the batch's real rows (`mask` 1; 0 is padding), metric sums with their `"weight"`, and the collections after the
pass. BatchNorm sees padded rows, as zeros, in training: train on full batches. A new task is a new objective; the step,
the loop and the checkpoints stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from flaxvision import losses as fl
from flaxvision import metrics as fm

PerExample = Callable[[jax.Array, jax.Array], jax.Array]


class Objective(Protocol):
    """A pure function of a model's `apply`, its variables and a batch; see the module's text."""

    def __call__(
        self,
        apply_fn: Callable[..., Any],
        params: Any,
        collections: dict[str, Any],
        batch: dict[str, Any],
        rng: jax.Array | None,
        train: bool,
        /,
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict[str, Any]]]:
        """Gives `loss, (metric sums, collections)`."""
        ...


def classification(
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    aux_weight: float = 0.3,
    loss: PerExample | None = None,
) -> Objective:
    """One of K classes.

    `batch["label"]` is integers `[N]`, or soft targets `[N, K]` as mixup and cutmix make them. Metrics: `loss`,
    `accuracy`, and `top5_accuracy` where K > 5; soft targets count as their largest class.

    Args:
        label_smoothing: The share of each target spread over all classes (Szegedy et al. 2015, section 7).
        class_weights: K factors of the examples' losses by their class; the mean still divides by the examples.
        aux_weight: Weight of each of the logits in `aux_logits` (Szegedy et al. 2014, section 5: 0.3).
        loss: `(logits [N, K], targets [N, K]) -> [N]` in place of the cross-entropy, such as `losses.lenet_map`.

    Returns:
        The objective.

    Raises:
        ValueError: `label_smoothing` is not in [0, 1); when traced, the labels' or weights' shapes do not fit.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
    per_example = loss or optax.softmax_cross_entropy

    def losses(logits, batch):
        label, classes = batch["label"], logits.shape[-1]
        if label.ndim == 1:
            targets = jax.nn.one_hot(label, classes)
        elif label.shape == logits.shape:
            targets = label.astype(jnp.float32)
        else:
            raise ValueError(f"labels must be integers [N] or targets {logits.shape}; got {label.shape}")
        weights = jnp.ones(label.shape[:1])
        if class_weights is not None:
            if len(class_weights) != classes:
                raise ValueError(f"class_weights must have {classes} values, one a class; got {len(class_weights)}")
            weights = targets @ jnp.asarray(class_weights, jnp.float32)
        return weights * per_example(logits, optax.smooth_labels(targets, label_smoothing))

    def measure(logits, batch):
        label = batch["label"] if batch["label"].ndim == 1 else jnp.argmax(batch["label"], axis=-1)
        found = {"accuracy": fm.correct(logits, label)}
        if logits.shape[-1] > 5:
            found["top5_accuracy"] = fm.top_k_correct(logits, label, 5)
        return found

    return _objective(losses, measure, aux_weight)


def binary(*, positive_weight: float = 1.0) -> Objective:
    """One class against the rest, from one logit.

    The model gives `[N, 1]` (`num_classes=1`); `batch["label"]` is 0 or 1, `[N]`. Metrics: `loss`, `accuracy`.

    Args:
        positive_weight: Factor of the loss of the examples labelled 1.

    Returns:
        The objective.

    Raises:
        ValueError: When traced: the model has another number of logits.
    """

    def losses(logits, batch):
        _expect(logits.shape == (*batch["label"].shape, 1), "one logit per label", logits, batch["label"])
        label = batch["label"].astype(jnp.float32)
        weights = 1 + (positive_weight - 1) * label
        return weights * optax.sigmoid_binary_cross_entropy(logits[:, 0], label)

    def measure(logits, batch):
        return {"accuracy": ((logits[:, 0] > 0) == (batch["label"] > 0.5)).astype(jnp.float32)}

    return _objective(losses, measure)


def multilabel() -> Objective:
    """Any number of K classes at once.

    `batch["label"]` is 0 or 1, `[N, K]`. The loss is the mean over the classes of the binary cross-entropies. Metrics:
    `loss`, `accuracy` (the share of right decisions) and `exact_match` (all K right).

    Returns:
        The objective.

    Raises:
        ValueError: When traced: the labels are not shaped as the logits.
    """

    def losses(logits, batch):
        _expect(logits.shape == batch["label"].shape, "labels shaped as the logits", logits, batch["label"])
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch["label"].astype(jnp.float32)), axis=-1)

    def measure(logits, batch):
        right = (logits > 0) == (batch["label"] > 0.5)
        return {"accuracy": jnp.mean(right, axis=-1), "exact_match": jnp.all(right, axis=-1).astype(jnp.float32)}

    return _objective(losses, measure)


def regression(loss: str = "mse", *, huber_delta: float = 1.0) -> Objective:
    """Real numbers.

    The model gives `[N, K]`; `batch["label"]` is `[N, K]`, or `[N]` where K is 1. Losses are means over K. Metrics:
    `loss`, `mse`, `mae`.

    Args:
        loss: `"mse"`, `"mae"` or `"huber"` (Huber 1964).
        huber_delta: Where Huber's loss goes from square to straight.

    Returns:
        The objective.

    Raises:
        ValueError: Another `loss`; when traced, the labels are not shaped as the outputs.
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
        _expect(outputs.shape == label.shape, "labels shaped as the outputs", outputs, label)
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
    """CapsNet's: the margin loss of the capsules' lengths, plus the error of the image drawn from one capsule.

    Sabour, Frosst and Hinton 2017, sections 3 and 4.1. `batch["label"]` is integers `[N]`, or targets `[N, K]`; the
    drawing is of the capsule of the (largest) true class in training, of the longest one otherwise. Images are in
    [0, 1]. Metrics: `loss` (all of it), `accuracy`, `margin`, and `reconstruction`, the sum of squares over an image's
    pixels, where the model has a decoder.

    Args:
        reconstruction_weight: Factor of the sum of squares; 0 leaves the decoder out.
        present: See `flaxvision.losses.margin`.
        absent: Likewise.
        absent_weight: Likewise.

    Returns:
        The objective.

    Raises:
        ValueError: `reconstruction_weight` is negative; when traced, the labels' shape does not fit.
    """
    if reconstruction_weight < 0:
        raise ValueError(f"reconstruction_weight must not be negative; got {reconstruction_weight}")

    def objective(apply_fn, params, collections, batch, rng, train):
        image, mask = _real_rows(batch)
        label = batch["label"]
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
        targets = jax.nn.one_hot(label, lengths.shape[-1]) if label.ndim == 1 else label.astype(lengths.dtype)
        _expect(targets.shape == lengths.shape, "labels [N] or targets shaped as the outputs", lengths, label)
        margin = fl.margin(lengths, targets, present=present, absent=absent, absent_weight=absent_weight)
        found = {"loss": margin, "accuracy": fm.correct(lengths, classes), "margin": margin}
        if drawings:
            error = jnp.sum(jnp.square(drawings[0] - image), axis=(1, 2, 3))
            found |= {"loss": margin + reconstruction_weight * error, "reconstruction": error}
        mask = jnp.ones(lengths.shape[:1], jnp.float32) if mask is None else mask.astype(jnp.float32)
        sums = {name: _total(values, mask) for name, values in found.items()} | {"weight": jnp.sum(mask)}
        return sums["loss"] / jnp.maximum(sums["weight"], 1.0), (sums, {**collections, **updated})

    return objective


def _expect(fits: bool, what: str, outputs: jax.Array, label: jax.Array) -> None:
    if not fits:
        raise ValueError(f"the objective wants {what}; got outputs {outputs.shape} and labels {label.shape}")


def _real_rows(batch: dict[str, Any]) -> tuple[jax.Array, jax.Array | None]:
    """The images and the mask; a padded row may hold anything, and 0 times its NaN would be a NaN gradient."""
    image, mask = batch["image"], batch.get("mask")
    if mask is not None:
        image = jnp.where(mask.reshape((-1,) + (1,) * (image.ndim - 1)) > 0, image, jnp.zeros((), image.dtype))
    return image, mask


def _total(values: jax.Array, mask: jax.Array) -> jax.Array:
    # where, not a product: the label of a padded row may be anything too
    return jnp.sum(jnp.where(mask > 0, mask * values, 0.0))


def _objective(losses, measure, aux_weight: float = 0.0) -> Objective:
    """Builds an objective from the losses `[N]` and the other metrics `[N]` of `(outputs, batch)`."""

    def objective(apply_fn, params, collections, batch, rng, train):
        variables = {"params": params, **collections}
        aux = []
        image, mask = _real_rows(batch)
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
        weight = jnp.sum(mask)
        total = functools.partial(_total, mask=mask)
        sums = {"loss": total(losses(outputs, batch))}
        objective_sum = sums["loss"] + aux_weight * sum(total(losses(a, batch)) for a in aux)
        sums.update({name: total(values) for name, values in measure(outputs, batch).items()}, weight=weight)
        return objective_sum / jnp.maximum(weight, 1.0), (sums, collections)

    return objective
