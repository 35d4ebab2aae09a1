"""Losses that Optax lacks. Each returns one value per example; the objective applies masks and takes means."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import lax

IGNORED = 255
"""Label of pixels whose class is not known."""


def lenet_map(logits: jax.Array, targets: jax.Array, *, rejection: float = 10.0) -> jax.Array:
    """Computes LeNet-5's maximum a posteriori criterion (LeCun et al. 1998, equation 9).

    It is the distance of the correct class plus a log-sum that increases the distances of the others. The term
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
    """Returns the weight of every pixel: that of its class, and 0 where the class is not known.

    Args:
        labels: Class indices of any shape, such as `[N, H, W]`.
        class_weights: K factors; None for 1. The weight of a label outside [0, K) is 1.
        ignore: Label of pixels whose class is not known.

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

    The mean of torch's `CrossEntropyLoss(weight, ignore_index)` is the mean of these losses weighted by
    `pixel_weights`.

    Args:
        logits: `[..., K]`.
        labels: Class indices `[...]`.
        ignore: Label of pixels whose class is not known; their loss and gradient are 0.

    Returns:
        Losses `[...]`. The loss of another label outside [0, K) is NaN, without a gradient.
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

    `-w (1 - p)^gamma log p` for the probability `p` and the weight `w` of the true class. With one logit per pixel
    (K = 1), `p` is its sigmoid for label 1 and 1 minus that for label 0.

    Args:
        logits: `[..., K]`.
        labels: Class indices `[...]`; 0 and 1 if K is 1.
        gamma: Exponent; 0 gives the cross-entropy.
        class_weights: The paper's alpha for each class; two values if K is 1. None for 1.
        ignore: Label of pixels whose class is not known; their loss and gradient are 0.

    Returns:
        Losses `[...]`. The loss of another label without a class is NaN, without a gradient.
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

    `1 - (2 sum p t + smooth) / (sum p^2 + sum t^2 + smooth)` over the pixels, for the probability `p` of a class and
    its target `t`, 0 or 1.

    Args:
        logits: `[N, H, W, K]`.
        labels: Class indices `[N, H, W]`.
        smooth: Added to both parts of the fraction; the paper has none.
        squared: Whether the denominator has the squares of the paper, or `p` and `t`.
        background: Whether class 0 counts.
        per_image: Whether the sums are over the pixels of each image, as in the paper, or of the whole batch. Under
            `jax.pmap`, the batch is that of one device.
        ignore: Label of pixels whose class is not known; they do not count.

    Returns:
        Losses `[N]`; 0 for an image without known pixels, NaN for one with another label outside [0, K). Without
        `per_image`, every entry is the loss of the batch.
    """
    probabilities, targets, wrong = _dense(logits, labels, ignore, per_image)
    first = 0 if background else 1
    p, t = probabilities[..., first:], targets[..., first:]
    part = jnp.sum(p * t, axis=1)
    whole = jnp.sum(jnp.square(p) + t if squared else p + t, axis=1)
    # Without a known pixel and without `smooth`, nothing is wrong.
    empty = whole + smooth == 0
    overlap = jnp.where(empty, 1.0, (2 * part + smooth) / jnp.where(empty, 1.0, whole + smooth))
    return _rows(jnp.where(wrong, jnp.nan, jnp.mean(1 - overlap, axis=-1)), len(labels))


def lovasz_softmax(logits: jax.Array, labels: jax.Array, *, per_image: bool = True, ignore: int = IGNORED) -> jax.Array:
    """Computes the Lovasz-softmax loss (Berman et al. 2018, equation 11 and algorithm 1) of every image.

    It is the mean, over the classes that occur in the labels of the image, of the Lovasz extension of the Jaccard loss
    of the errors.

    Args:
        logits: `[N, H, W, K]`.
        labels: Class indices `[N, H, W]`.
        per_image: Whether the pixels and classes are those of each image, or of the whole batch. The former
            approximates the mean IoU over images, the latter that of a data set (section 3). Under `jax.pmap`, the
            batch is that of one device.
        ignore: Label of pixels whose class is not known; they do not count.

    Returns:
        Losses `[N]`; 0 for an image without known pixels, NaN for one with another label outside [0, K). Without
        `per_image`, every entry is the loss of the batch.
    """
    probabilities, targets, wrong = _dense(logits, labels, ignore, per_image)
    errors = jnp.abs(targets - probabilities)

    def of_class(errors: jax.Array, truth: jax.Array) -> jax.Array:
        order = jnp.argsort(lax.stop_gradient(-errors))
        errors, truth = errors[order], truth[order]
        total = jnp.sum(truth)
        jaccard = 1 - (total - jnp.cumsum(truth)) / jnp.maximum(total + jnp.cumsum(1 - truth), 1e-12)
        # The gradient of the Jaccard loss along the sorted errors. Pixels that do not count have an error of 0.
        slope = lax.stop_gradient(jnp.diff(jaccard, prepend=0.0))
        return jnp.sum(errors * slope)

    each = jax.vmap(jax.vmap(of_class, in_axes=1))(errors, targets)
    present = jnp.any(targets > 0, axis=1)
    mean = jnp.sum(jnp.where(present, each, 0.0), axis=-1) / jnp.maximum(jnp.sum(present, axis=-1), 1)
    return _rows(jnp.where(wrong, jnp.nan, mean), len(labels))


def instance_mask(logits: jax.Array, targets: jax.Array, classes: jax.Array) -> jax.Array:
    """Computes Mask R-CNN's mask loss of every region (He et al. 2017, section 3).

    It is the mean binary cross-entropy over the pixels of the mask of the true class. The masks of other classes have
    no loss, so the classes do not compete. The paper averages over the regions that are not background.

    Args:
        logits: One mask for each class, `[..., h, w, K]`.
        targets: True mask of each region in the frame of its box, `[..., h, w]`, in [0, 1].
        classes: Class of each region, `[...]`.

    Returns:
        Losses `[...]`. The loss of a class outside [0, K) is NaN.
    """
    own = jnp.take_along_axis(logits, classes[..., None, None, None], axis=-1)[..., 0]
    return optax.sigmoid_binary_cross_entropy(own, targets).mean((-2, -1))


def _known(labels: jax.Array, classes: int, ignore: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns which labels are known, which are classes too, and labels that are all classes."""
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    known = labels != ignore
    inside = known & (labels >= 0) & (labels < classes)
    return known, inside, jnp.where(inside, labels, 0)


def _real(logits: jax.Array, inside: jax.Array) -> jax.Array:
    """Sets the logits of pixels that do not count to 0, so that their gradient is 0 even if they are not finite."""
    return jnp.where(inside[..., None], logits, jnp.zeros((), logits.dtype))


def _rows(losses: jax.Array, rows: int) -> jax.Array:
    """Repeats the loss of a batch `[1]` for every row; leaves losses of images `[N]` as they are."""
    return jnp.broadcast_to(losses, (rows,))


def _dense(
    logits: jax.Array, labels: jax.Array, ignore: int, per_image: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns probabilities and targets `[N, H * W, K]`, 0 where the class is not known, and wrong images `[N]`.

    Without `per_image`, the batch is one image: `[1, N * H * W, K]` and `[1]`.
    """
    rows, classes = labels.shape[0] if per_image else 1, logits.shape[-1]
    known, inside, labels = _known(labels, classes, ignore)
    counted = inside.reshape(rows, -1, 1).astype(logits.dtype)
    probabilities = jax.nn.softmax(_real(logits, inside)).reshape(rows, -1, classes) * counted
    targets = jax.nn.one_hot(labels.reshape(rows, -1), classes, dtype=logits.dtype) * counted
    return probabilities, targets, jnp.any((known & ~inside).reshape(rows, -1), axis=1)
