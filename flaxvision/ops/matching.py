"""Matching of boxes to objects, and balanced random sampling. Both take one image; use `jax.vmap` for a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike


def match(
    iou: ArrayLike, valid: ArrayLike, *, low: float, high: float, allow_low_quality: bool = False
) -> tuple[Array, Array]:
    """Matches each box to the object with the highest IoU (Ren et al. 2015, section 3.1.2).

    Args:
        iou: IoU of each object with each box, `[M, A]`, such as `box_iou(objects, anchors)`.
        valid: `[M]` bool: which objects exist.
        low: A box whose highest IoU is below this is negative.
        high: A box whose highest IoU is at least this is positive. A box in between is ignored.
        allow_low_quality: Whether the box with the highest IoU with an object is positive even if that IoU is below
            `high`. In a tie this holds for all such boxes; an IoU of 0 does not count. Each of these boxes is still
            matched to the object with which it has its own highest IoU.

    Returns:
        A pair `(matched, label)`. `matched [A]` int32 is the index of the object with the highest IoU, the first one in
        a tie, and 0 without objects. `label [A]` int8 is 1 for positive, 0 for negative and -1 for ignored boxes.
        Without objects all boxes are negative.

    Raises:
        ValueError: The shapes do not fit, or not 0 <= low <= high.
    """
    iou, valid = jnp.asarray(iou), jnp.asarray(valid)
    if iou.ndim != 2 or valid.shape != iou.shape[:1]:
        raise ValueError(f"iou must be [M, A] and valid [M]; got {iou.shape} and {valid.shape}")
    if not 0 <= low <= high:
        raise ValueError(f"low must be in [0, high = {high}]; got {low}")
    if not iou.shape[0]:
        return jnp.zeros(iou.shape[1], jnp.int32), jnp.zeros(iou.shape[1], jnp.int8)
    overlap = jnp.where(valid[:, None] > 0, iou, -1)
    best = jnp.max(overlap, axis=0)
    positive, neither = best >= high, (best >= low) & (best < high)
    if allow_low_quality:
        most = jnp.max(overlap, axis=1, keepdims=True, initial=0)
        positive |= jnp.any((overlap == most) & (most > 0), axis=0)
    label = jnp.where(positive, 1, jnp.where(neither, -1, 0)).astype(jnp.int8)
    return lax.argmax(overlap, 0, jnp.int32), label


def sample(
    key: Array, label: ArrayLike, *, size: int, positive_fraction: float, ids: ArrayLike | None = None
) -> tuple[Array, Array]:
    """Draws positive and negative boxes at random, without replacement (Ren et al. 2015, section 3.1.3).

    At most `int(size * positive_fraction)` positives are drawn. Negatives fill the rest. If there are too few of them,
    fewer than `size` boxes are drawn.

    Args:
        key: PRNG key of the image.
        label: `[A]`, as returned by `match`: 1 for positives and 0 for negatives. Other boxes are never drawn.
        size: Number of boxes to draw.
        positive_fraction: Maximum fraction of positives in the sample, in [0, 1].
        ids: `[A]` integers: the random number of a box depends only on `key` and its id, so the sample does not depend
            on the order of the boxes. None for the positions of the boxes.

    Returns:
        A pair `(indices, kept)`: `indices [size]` int32, positives first, and `kept [size]` bool, which tells which
        indices were drawn. The other indices are 0.

    Raises:
        ValueError: `label` is not `[A]`, `ids` has another shape, `size` is below 1, or `positive_fraction` is not in
            [0, 1].
    """
    label = jnp.asarray(label)
    if label.ndim != 1:
        raise ValueError(f"label must be [A]; got {label.shape}")
    if ids is not None and jnp.shape(ids) != label.shape:
        raise ValueError(f"ids must have the shape of label, {label.shape}; got {jnp.shape(ids)}")
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    if not 0 <= positive_fraction <= 1:
        raise ValueError(f"positive_fraction must be in [0, 1]; got {positive_fraction}")
    if ids is None:
        priority = jax.random.uniform(key, label.shape)
    else:
        priority = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(jnp.asarray(ids))

    def draw(candidate, most):
        chosen = lax.top_k(jnp.where(candidate, priority, -1), min(most, label.shape[0]))[1]
        return jnp.pad(chosen, (0, size - chosen.shape[0])), jnp.sum(candidate, dtype=jnp.int32)

    most = int(size * positive_fraction)
    (positives, positive_count), (negatives, negative_count) = draw(label == 1, most), draw(label == 0, size)
    positive_count = jnp.minimum(positive_count, most)
    place = jnp.arange(size, dtype=jnp.int32)
    indices = jnp.where(place < positive_count, positives, negatives[jnp.maximum(place - positive_count, 0)])
    kept = place < positive_count + negative_count
    return jnp.where(kept, indices, 0), kept
