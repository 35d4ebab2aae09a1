"""Losses that Optax lacks. Each returns one value per example, pixel or region. The objective averages them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import lax

IGNORED = 255
"""Label of pixels whose class is unknown."""


def lenet_map(logits: jax.Array, targets: jax.Array, *, rejection: float = 10.0) -> jax.Array:
    """Computes LeNet-5's maximum a posteriori criterion (LeCun et al. 1998, equation 9).

    It is the distance of the correct class plus a log-sum that increases the distances of the other classes. The term
    `exp(-j)` keeps classes that are already far away from being pushed further.

    Args:
        logits: Negative distances to the codes of the classes, `[N, K]`.
        targets: One-hot or soft targets `[N, K]`.
        rejection: The paper's `j`, the distance of the class "none of these". The paper does not give its value.

    Returns:
        Losses `[N]`.
    """
    none = jnp.full_like(logits[:, :1], -rejection)
    push = jax.nn.logsumexp(jnp.concatenate([logits, none], axis=-1), axis=-1)
    return push - jnp.sum(targets * logits, axis=-1)


def margin(
    lengths: jax.Array, targets: jax.Array, *, present: float = 0.9, absent: float = 0.1, absent_weight: float = 0.5
) -> jax.Array:
    """Computes CapsNet's margin loss (Sabour et al. 2017, equation 4). Any number of classes may be present.

    `sum_k T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2`.

    Args:
        lengths: Lengths of the capsules `[N, K]`, in [0, 1).
        targets: 1 for each class that is present, 0 for the others, `[N, K]`.
        present: The paper's m+: a present class contributes nothing above this length.
        absent: The paper's m-: an absent class contributes nothing below this length.
        absent_weight: The paper's lambda, which keeps the first steps from shrinking all capsules.

    Returns:
        Losses `[N]`.
    """
    short = jnp.square(jnp.maximum(present - lengths, 0))
    long = jnp.square(jnp.maximum(lengths - absent, 0))
    return jnp.sum(targets * short + absent_weight * (1 - targets) * long, axis=-1)


def pixel_weights(
    labels: jax.Array, *, class_weights: Sequence[float] | None = None, ignore: int = IGNORED
) -> jax.Array:
    """Returns the weight of every pixel: the weight of its class, or 0 if its class is unknown.

    Args:
        labels: Class indices of any shape, such as `[N, H, W]`.
        class_weights: K factors; None for 1. Other labels outside [0, K) have the weight 1.
        ignore: Label of pixels whose class is unknown.

    Returns:
        Weights of the shape of `labels`, float32.
    """
    known = (labels != ignore).astype(jnp.float32)
    if class_weights is None:
        return known
    factors = jnp.asarray(class_weights, jnp.float32)
    inside = (labels >= 0) & (labels < len(factors))
    return known * jnp.where(inside, factors[jnp.where(inside, labels, 0)], 1.0)


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array, *, ignore: int = IGNORED) -> jax.Array:
    """Computes the softmax cross-entropy of every pixel.

    The mean of these losses, weighted by `pixel_weights`, equals torch's `CrossEntropyLoss(weight, ignore_index)`.

    Args:
        logits: `[..., K]`.
        labels: Class indices `[...]`.
        ignore: Label of pixels whose class is unknown. Their loss and gradient are 0.

    Returns:
        Losses `[...]`. Any other label outside [0, K) has a loss of NaN and a gradient of 0.
    """
    known, inside, labels = _known(labels, logits.shape[-1], ignore)
    loss = optax.softmax_cross_entropy_with_integer_labels(_real(logits, inside), labels)
    return jnp.where(inside, loss, jnp.where(known, jnp.nan, 0.0))


def focal(
    logits: jax.Array,
    labels: jax.Array,
    *,
    gamma: float = 2.0,
    class_weights: Sequence[float] | None = None,
    ignore: int = IGNORED,
) -> jax.Array:
    """Computes the focal loss of every pixel (Lin et al. 2017, equation 5) for softmax probabilities.

    The loss is `-w (1 - p)^gamma log p`, where `p` is the probability and `w` the weight of the true class. With one
    logit per pixel (K = 1), `p` is `sigmoid(logit)` for label 1 and `1 - sigmoid(logit)` for label 0.

    Args:
        logits: `[..., K]`.
        labels: Class indices `[...]`; 0 and 1 if K is 1.
        gamma: Exponent; 0 gives the cross-entropy.
        class_weights: The paper's alpha for each class; two values if K is 1. None for 1.
        ignore: Label of pixels whose class is unknown. Their loss and gradient are 0.

    Returns:
        Losses `[...]`. Any other label that is not a class has a loss of NaN and a gradient of 0.
    """
    if logits.shape[-1] == 1:
        logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
    known, inside, labels = _known(labels, logits.shape[-1], ignore)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(_real(logits, inside)), labels[..., None], axis=-1)[..., 0]
    # (1 - p)^gamma from log p, with a finite gradient at p = 1.
    rest = jnp.where(inside, -jnp.expm1(jnp.minimum(log_p, -1e-12)), 1.0)
    weights = pixel_weights(labels, class_weights=class_weights, ignore=-1)
    loss = -weights * rest**gamma * log_p
    return jnp.where(inside, loss, jnp.where(known, jnp.nan, 0.0))


def soft_dice(
    logits: jax.Array,
    labels: jax.Array,
    *,
    smooth: float = 1.0,
    squared: bool = True,
    background: bool = True,
    per_image: bool = True,
    ignore: int = IGNORED,
) -> jax.Array:
    """Computes the soft Dice loss (Milletari et al. 2016, section 3) of every image, averaged over the classes.

    The loss of a class is `1 - (2 sum p t + smooth) / (sum p^2 + sum t^2 + smooth)`. The sums are over the pixels, `p`
    is the probability of the class, and `t` is its target, 0 or 1.

    Args:
        logits: `[N, H, W, K]`.
        labels: Class indices `[N, H, W]`.
        smooth: Added to the numerator and the denominator; 0 in the paper.
        squared: Whether the denominator sums `p^2 + t^2`, as in the paper, or `p + t`.
        background: Whether the average includes class 0.
        per_image: True sums over the pixels of each image, as in the paper, and False over the pixels of the batch.
            Under `jax.pmap`, each device has its own batch.
        ignore: Label of pixels whose class is unknown. These pixels are excluded.

    Returns:
        Losses `[N]`: 0 for an image without known pixels, and NaN for an image with any other label outside [0, K).
        Without `per_image`, every entry is the loss of the batch.
    """
    probabilities, targets, wrong = _dense(logits, labels, ignore, per_image)
    first = 0 if background else 1
    p, t = probabilities[..., first:], targets[..., first:]
    part = jnp.sum(p * t, axis=1)
    whole = jnp.sum(jnp.square(p) + t if squared else p + t, axis=1)
    # Without known pixels and with `smooth` 0, the fraction is 0 / 0; the loss is then 0.
    empty = whole + smooth == 0
    overlap = jnp.where(empty, 1.0, (2 * part + smooth) / jnp.where(empty, 1.0, whole + smooth))
    return _rows(jnp.where(wrong, jnp.nan, jnp.mean(1 - overlap, axis=-1)), len(labels))


def lovasz_softmax(logits: jax.Array, labels: jax.Array, *, per_image: bool = True, ignore: int = IGNORED) -> jax.Array:
    """Computes the Lovasz-softmax loss (Berman et al. 2018, equation 11 and algorithm 1) of every image.

    The loss of a class is the Lovasz extension of its Jaccard loss, at the errors `|t - p|` of the pixels. It is
    averaged over the classes that occur in the labels of the image.

    Args:
        logits: `[N, H, W, K]`.
        labels: Class indices `[N, H, W]`.
        per_image: True treats each image by itself and approximates the IoU averaged over images. False treats the
            pixels of the batch as one image and approximates the IoU of a data set (section 3). Under `jax.pmap`, each
            device has its own batch.
        ignore: Label of pixels whose class is unknown. These pixels are excluded.

    Returns:
        Losses `[N]`: 0 for an image without known pixels, and NaN for an image with any other label outside [0, K).
        Without `per_image`, every entry is the loss of the batch.
    """
    probabilities, targets, wrong = _dense(logits, labels, ignore, per_image)
    errors = jnp.abs(targets - probabilities)

    def of_class(errors: jax.Array, truth: jax.Array) -> jax.Array:
        order = jnp.argsort(lax.stop_gradient(-errors))
        errors, truth = errors[order], truth[order]
        total = jnp.sum(truth)
        jaccard = 1 - (total - jnp.cumsum(truth)) / jnp.maximum(total + jnp.cumsum(1 - truth), 1e-12)
        # The gradient of the Jaccard loss along the sorted errors. Excluded pixels have an error of 0.
        slope = lax.stop_gradient(jnp.diff(jaccard, prepend=0.0))
        return jnp.sum(errors * slope)

    each = jax.vmap(jax.vmap(of_class, in_axes=1))(errors, targets)
    present = jnp.any(targets > 0, axis=1)
    mean = jnp.sum(jnp.where(present, each, 0.0), axis=-1) / jnp.maximum(jnp.sum(present, axis=-1), 1)
    return _rows(jnp.where(wrong, jnp.nan, mean), len(labels))


def instance_mask(logits: jax.Array, targets: jax.Array, classes: jax.Array) -> jax.Array:
    """Computes Mask R-CNN's mask loss of every region (He et al. 2017, section 3).

    The loss is the binary cross-entropy of the mask of the true class, averaged over its pixels. The masks of other
    classes have no loss, so the classes do not compete. The paper averages over the regions that are not background.

    Args:
        logits: One mask for each class, `[..., h, w, K]`.
        targets: True mask of each region in the frame of its box, `[..., h, w]`, in [0, 1].
        classes: Class of each region, `[...]`.

    Returns:
        Losses `[...]`. A class in [-K, 0) counts from the end. Any other class outside [0, K) has a loss of NaN.
    """
    own = jnp.take_along_axis(logits, classes[..., None, None, None], axis=-1)[..., 0]
    return optax.sigmoid_binary_cross_entropy(own, targets).mean((-2, -1))


def _known(labels: jax.Array, classes: int, ignore: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns whether labels are known, whether they lie in [0, K), and the labels with 0 in place of all others."""
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    known = labels != ignore
    inside = known & (labels >= 0) & (labels < classes)
    return known, inside, jnp.where(inside, labels, 0)


def _real(logits: jax.Array, inside: jax.Array) -> jax.Array:
    """Sets the logits of excluded pixels to 0, so that their gradient is 0 even if the logits are not finite."""
    return jnp.where(inside[..., None], logits, jnp.zeros((), logits.dtype))


def _rows(losses: jax.Array, rows: int) -> jax.Array:
    """Repeats the loss of a batch `[1]` for every row. Returns losses of images `[N]` unchanged."""
    return jnp.broadcast_to(losses, (rows,))


def _dense(
    logits: jax.Array, labels: jax.Array, ignore: int, per_image: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns probabilities and targets `[N, H * W, K]`, and whether an image has an invalid label `[N]`.

    Probabilities and targets are 0 where the class is unknown. Without `per_image`, the batch is one image, and the
    shapes are `[1, N * H * W, K]` and `[1]`.
    """
    rows, classes = labels.shape[0] if per_image else 1, logits.shape[-1]
    known, inside, labels = _known(labels, classes, ignore)
    counted = inside.reshape(rows, -1, 1).astype(logits.dtype)
    probabilities = jax.nn.softmax(_real(logits, inside)).reshape(rows, -1, classes) * counted
    targets = jax.nn.one_hot(labels.reshape(rows, -1), classes, dtype=logits.dtype) * counted
    return probabilities, targets, jnp.any((known & ~inside).reshape(rows, -1), axis=1)
