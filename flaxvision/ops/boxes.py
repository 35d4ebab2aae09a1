"""Arithmetic of boxes: areas, overlaps (IoU, GIoU, DIoU, CIoU), conversions, and offsets to anchors.

Boxes are `[..., 4]`: x1, y1, x2, y2 in pixels, x to the right and y down. A box with x2 <= x1 or y2 <= y1 has no area,
and its IoU with every box is 0. For finite boxes, neither results nor gradients are NaN: 0 / 0 counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

KINDS = ("iou", "giou", "diou", "ciou")


def box_area(boxes: ArrayLike) -> Array:
    """Computes the areas of boxes.

    Args:
        boxes: `[..., 4]`.

    Returns:
        `[...]`, in square pixels; 0 for an inverted box.

    Raises:
        ValueError: The last dimension of `boxes` is not 4.
    """
    x1, y1, x2, y2 = _corners("boxes", boxes)
    return _area(x2 - x1, y2 - y1)


def box_iou(a: ArrayLike, b: ArrayLike) -> Array:
    """Computes the intersection over union of every pair of boxes.

    `box_giou`, `box_diou` and `box_ciou` take the same arguments. `paired_iou` defines these variants.

    Args:
        a: `[..., A, 4]`.
        b: `[..., B, 4]`, with the same leading (batch) dimensions.

    Returns:
        `[..., A, B]` in [0, 1]; 0 where the union is empty.

    Raises:
        ValueError: The last dimension of `a` or `b` is not 4.
    """
    return paired_iou(*_pairs(a, b), kind="iou")


def box_giou(a: ArrayLike, b: ArrayLike) -> Array:
    """Computes the generalized IoU of every pair of boxes, `[..., A, B]` in [-1, 1]; see `box_iou`."""
    return paired_iou(*_pairs(a, b), kind="giou")


def box_diou(a: ArrayLike, b: ArrayLike) -> Array:
    """Computes the distance IoU of every pair of boxes, `[..., A, B]` in [-1, 1]; see `box_iou`."""
    return paired_iou(*_pairs(a, b), kind="diou")


def box_ciou(a: ArrayLike, b: ArrayLike) -> Array:
    """Computes the complete IoU of every pair of boxes, `[..., A, B]`, at most 1; see `box_iou`."""
    return paired_iou(*_pairs(a, b), kind="ciou")


def paired_iou(a: ArrayLike, b: ArrayLike, kind: str = "iou") -> Array:
    """Computes the IoU of corresponding boxes, or a variant of it. The loss of the papers is 1 minus this value.

    * `"giou"` subtracts the fraction of the enclosing box that neither box covers (Rezatofighi et al. 2019).
    * `"diou"` subtracts the squared distance between the centers, divided by the squared diagonal of the enclosing box
      (Zheng et al. 2020, equation 7).
    * `"ciou"` also subtracts `alpha * v`, a penalty for different aspect ratios (equation 10). As in the paper, no
      gradient flows through `alpha`.

    Gradients are finite for all finite boxes, including identical boxes and boxes without an area.

    Args:
        a: `[..., 4]`.
        b: `[..., 4]`, of the same rank; dimensions of size 1 are broadcast.
        kind: `"iou"`, `"giou"`, `"diou"` or `"ciou"`.

    Returns:
        `[...]`; the IoU is 0 where the union is empty.

    Raises:
        ValueError: The last dimension of `a` or `b` is not 4, or `kind` is not one of the four.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    ax1, ay1, ax2, ay2 = _corners("a", a)
    bx1, by1, bx2, by2 = _corners("b", b)
    width = jnp.minimum(ax2, bx2) - jnp.maximum(ax1, bx1)
    height = jnp.minimum(ay2, by2) - jnp.maximum(ay1, by1)
    intersection = rounded(jnp.where((width > 0) & (height > 0), width * height, 0))
    union = _area(ax2 - ax1, ay2 - ay1) + _area(bx2 - bx1, by2 - by1) - intersection
    iou = _divide(intersection, union)
    if kind == "iou":
        return iou
    outer_width = jnp.maximum(ax2, bx2) - jnp.minimum(ax1, bx1)
    outer_height = jnp.maximum(ay2, by2) - jnp.minimum(ay1, by1)
    if kind == "giou":
        outer = _area(outer_width, outer_height)
        return iou - _divide(outer - union, outer)
    dx, dy = (ax1 + ax2) / 2 - (bx1 + bx2) / 2, (ay1 + ay2) / 2 - (by1 + by2) / 2
    diou = iou - _divide(dx * dx + dy * dy, outer_width * outer_width + outer_height * outer_height)
    if kind == "diou":
        return diou
    v = 4 / math.pi**2 * jnp.square(_slope(ax2 - ax1, ay2 - ay1) - _slope(bx2 - bx1, by2 - by1))
    alpha = lax.stop_gradient(_divide(v, 1 - iou + v))
    return diou - alpha * v


def clip_boxes(boxes: ArrayLike, size: ArrayLike | Sequence[float]) -> Array:
    """Clips boxes to the image.

    Args:
        boxes: `[..., 4]`.
        size: Height and width of the image in pixels: `[2]`, or one size per leading index of `boxes`, such as
            `[N, 2]` for boxes `[N, A, 4]`.

    Returns:
        `[..., 4]`: x in [0, width], y in [0, height].

    Raises:
        ValueError: The last dimension of `boxes` is not 4, or the shape of `size` does not match that of `boxes`.
    """
    x1, y1, x2, y2 = _corners("boxes", boxes)
    limit: Array = jnp.asarray(size, x1.dtype)
    if not limit.ndim or limit.shape[-1] != 2 or limit.shape[:-1] != x1.shape[: limit.ndim - 1]:
        raise ValueError(
            f"size must be [2] or have one row for each leading index of boxes {jnp.shape(boxes)}; got {limit.shape}"
        )
    limit = limit.reshape(limit.shape[:-1] + (1,) * (x1.ndim + 1 - limit.ndim) + (2,))
    height, width = limit[..., 0], limit[..., 1]
    clip = lambda x, high: jnp.minimum(jnp.maximum(x, 0), high)
    return jnp.stack([clip(x1, width), clip(y1, height), clip(x2, width), clip(y2, height)], axis=-1)


def to_centers(boxes: ArrayLike) -> Array:
    """Converts corners to center and size.

    Args:
        boxes: `[..., 4]`.

    Returns:
        `[..., 4]`: center x, center y, width, height.

    Raises:
        ValueError: The last dimension of `boxes` is not 4.
    """
    x1, y1, x2, y2 = _corners("boxes", boxes)
    return jnp.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=-1)


def from_centers(boxes: ArrayLike) -> Array:
    """Converts center and size to corners; the inverse of `to_centers`.

    Args:
        boxes: `[..., 4]`: center x, center y, width, height.

    Returns:
        `[..., 4]`: x1, y1, x2, y2.

    Raises:
        ValueError: The last dimension of `boxes` is not 4.
    """
    x, y, width, height = _corners("boxes", boxes)
    return jnp.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=-1)


def encode_boxes(boxes: ArrayLike, anchors: ArrayLike, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Array:
    """Encodes boxes as offsets to anchors (Girshick et al. 2014, appendix C, equations 6 to 9).

    A width or height that is not positive, as in padding, counts as 1 pixel, so that all offsets are finite.

    Args:
        boxes: `[..., 4]`.
        anchors: `[..., 4]`, of the same rank; dimensions of size 1 are broadcast.
        weights: Factors of the four offsets; Fast R-CNN uses (10, 10, 5, 5).

    Returns:
        `[..., 4]`: dx, dy, dw and dh, each multiplied by its weight. dx and dy are the offsets of the center divided by
        the anchor's width and height. dw and dh are the logarithms of the width and height relative to the anchor's.

    Raises:
        ValueError: The last dimension of `boxes` or `anchors` is not 4.
    """
    x1, y1, x2, y2 = _corners("boxes", boxes)
    ax1, ay1, ax2, ay2 = _corners("anchors", anchors)
    width, height, anchor_width, anchor_height = (
        jnp.where(side > 0, side, 1) for side in (x2 - x1, y2 - y1, ax2 - ax1, ay2 - ay1)
    )
    wx, wy, ww, wh = weights
    return jnp.stack(
        [
            wx * (x1 + 0.5 * width - (ax1 + 0.5 * anchor_width)) / anchor_width,
            wy * (y1 + 0.5 * height - (ay1 + 0.5 * anchor_height)) / anchor_height,
            ww * jnp.log(width / anchor_width),
            wh * jnp.log(height / anchor_height),
        ],
        axis=-1,
    )


def decode_boxes(
    deltas: ArrayLike,
    anchors: ArrayLike,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_scale: float = math.log(1000 / 16),
) -> Array:
    """Decodes offsets to anchors; the inverse of `encode_boxes`.

    Args:
        deltas: `[..., 4]`: offsets as `encode_boxes` returns them.
        anchors: `[..., 4]`, of the same rank; dimensions of size 1 are broadcast.
        weights: The weights of `encode_boxes`.
        max_scale: Upper limit of dw and dh after division by their weights, which prevents overflow.

    Returns:
        Boxes `[..., 4]`, not clipped.

    Raises:
        ValueError: The last dimension of `deltas` or `anchors` is not 4.
    """
    dx, dy, dw, dh = _corners("deltas", deltas)
    ax1, ay1, ax2, ay2 = _corners("anchors", anchors)
    wx, wy, ww, wh = weights
    width, height = ax2 - ax1, ay2 - ay1
    x = dx / wx * width + (ax1 + 0.5 * width)
    y = dy / wy * height + (ay1 + 0.5 * height)
    half_width = 0.5 * (jnp.exp(jnp.minimum(dw / ww, max_scale)) * width)
    half_height = 0.5 * (jnp.exp(jnp.minimum(dh / wh, max_scale)) * height)
    return jnp.stack([x - half_width, y - half_height, x + half_width, y + half_height], axis=-1)


def _corners(name: str, boxes: ArrayLike) -> tuple[Array, Array, Array, Array]:
    """Returns the four coordinates as floats."""
    boxes = jnp.asarray(boxes)
    if not boxes.ndim or boxes.shape[-1] != 4:
        raise ValueError(f"{name} must be [..., 4]; got {boxes.shape}")
    if not jnp.issubdtype(boxes.dtype, jnp.floating):
        boxes = boxes.astype(jnp.float32)
    return boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    return jnp.expand_dims(jnp.asarray(a), -2), jnp.expand_dims(jnp.asarray(b), -3)


def _area(width: Array, height: Array) -> Array:
    return rounded(jnp.where((width >= 0) & (height >= 0), width * height, 0))


def rounded(product: Array) -> Array:
    """Keeps the compiler from fusing a product and a following sum into one multiply-add.

    A fused multiply-add rounds once instead of twice. Without it, an IoU is rounded as in NumPy, and ties are exact.
    The compiler fuses the operations through a `where`, but not through a maximum.

    Args:
        product: An array of finite values.

    Returns:
        The same values.
    """
    return jnp.maximum(product, jnp.finfo(product.dtype).min)


def _divide(a: Array, b: Array) -> Array:
    """Returns a / b, and 0 with a zero gradient where b is not positive."""
    positive = b > 0
    return jnp.where(positive, a / jnp.where(positive, b, 1), 0)


def _slope(width: Array, height: Array) -> Array:
    """Returns the angle between a box's diagonal and the vertical; 0 with a zero gradient for a point."""
    known = (width != 0) | (height != 0)
    return jnp.arctan2(jnp.where(known, width, 0), jnp.where(known, height, jnp.ones_like(height)))
