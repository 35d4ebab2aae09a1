"""Pastes instance masks into images. A mask head predicts each mask in the frame of its box.

Pasting follows torchvision and Detectron. A mask is padded by one pixel of zeros on each side, and its box is
enlarged by the same factor. The corners of the enlarged box are truncated to whole pixels, and the box includes its
last pixel. The padded mask is resized to the box by bilinear interpolation with half-pixel centers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from flaxvision.ops.boxes import rounded


def paste_masks(masks: ArrayLike, boxes: ArrayLike, size: Sequence[int]) -> Array:
    """Resizes masks to their boxes, and pastes them into images of one size.

    The result needs `H * W` numbers per mask. `iter_masks` pastes one mask at a time, on the host.

    Args:
        masks: `[..., h, w]`, probabilities in the frame of the boxes, such as `found.masks` of `flaxvision.detect`.
        boxes: `[..., 4]` in pixels of the image.
        size: Height H and width W of the image.

    Returns:
        Probabilities `[..., H, W]`, 0 outside of the boxes. A pixel belongs to the object if its probability exceeds
        0.5.

    Raises:
        ValueError: The shapes do not fit, or `size` is not two numbers of at least 1.
    """
    masks, boxes = jnp.asarray(masks), jnp.asarray(boxes, jnp.promote_types(jnp.result_type(boxes), jnp.float32))
    height, width = _checked(masks, boxes, size)
    weights = []
    for axis, (extent, bins) in enumerate(zip((width, height), masks.shape[:-3:-1], strict=True)):
        low, high = boxes[..., axis], boxes[..., axis + 2]
        center, half = (high + low) * 0.5, rounded((high - low) * 0.5 * ((bins + 2) / bins))
        corners = jnp.trunc(center - half)[..., None], jnp.trunc(center + half)[..., None]
        weights.append(_weights(corners, np.arange(extent, dtype=boxes.dtype), bins, jnp))
    by_column, by_row = (x.astype(masks.dtype) for x in weights)
    rows = jnp.einsum("...yi,...ij->...yj", by_row, masks, precision="highest")
    return jnp.einsum("...yj,...xj->...yx", rows, by_column, precision="highest")


def iter_masks(
    masks: ArrayLike, boxes: ArrayLike, size: Sequence[int], *, threshold: float = 0.5
) -> Iterator[np.ndarray]:
    """Pastes the masks of one image on the host, one at a time.

    Apart from the mask that it yields, it only needs memory for the box of this mask.

    Args:
        masks: `[M, h, w]`, probabilities in the frame of the boxes.
        boxes: `[M, 4]` in pixels of the image.
        size: Height H and width W of the image.
        threshold: Probability above which a pixel belongs to the object.

    Yields:
        The mask of each object, bool `[H, W]`.

    Raises:
        ValueError: The shapes do not fit, or `size` is not two numbers of at least 1.
    """
    masks, boxes = np.asarray(masks), np.asarray(boxes)
    boxes = boxes.astype(np.result_type(boxes, np.float32))
    if masks.ndim != 3:
        raise ValueError(f"masks must be the masks [M, h, w] of one image; got {masks.shape}")
    extents = _checked(masks, boxes, size)
    return (_pasted(mask, box, extents, threshold) for mask, box in zip(masks, boxes, strict=True))


def _pasted(mask: np.ndarray, box: np.ndarray, size: tuple[int, int], threshold: float) -> np.ndarray:
    window, weights = [], []
    for extent, bins, low, high in zip(size, mask.shape, box[1::-1], box[:1:-1], strict=True):
        center, half = (high + low) * 0.5, (high - low) * 0.5 * ((bins + 2) / bins)
        corners = np.trunc(center - half), np.trunc(center + half)
        start, end = (int(np.clip(corner, 0, extent)) for corner in (corners[0], max(corners) + 1))
        window.append(slice(start, end))
        weights.append(_weights(corners, np.arange(start, end, dtype=box.dtype), bins, np))
    pasted = np.zeros(size, bool)
    pasted[tuple(window)] = weights[0] @ mask @ weights[1].T > threshold
    return pasted


def _weights(corners: Any, pixels: np.ndarray, bins: int, numpy: Any) -> Any:
    """Returns the weight of each row (or column) of a mask in each pixel, `[..., P, bins]`.

    Args:
        corners: First and last pixel of the box, `[..., 1]`.
        pixels: The pixels, `[P]`.
        bins: Number of rows of the mask.
        numpy: `numpy` or `jax.numpy`.
    """
    start, end = corners
    length = numpy.maximum(end - start + 1, 1)
    place = pixels.reshape((1,) * (numpy.ndim(start) - 1) + (-1,)) - start
    # Positions in the padded mask, whose first and last rows are zeros.
    source = numpy.maximum((place + 0.5) * ((bins + 2) / length) - 0.5, 0)[..., None]
    row = np.arange(1, bins + 1, dtype=pixels.dtype).reshape((1,) * (source.ndim - 1) + (-1,))
    inside = (place >= 0) & (place < length)
    return numpy.where(inside[..., None], numpy.maximum(1 - abs(source - row), 0), 0)


def _checked(masks: Any, boxes: Any, size: Sequence[int]) -> tuple[int, int]:
    if masks.ndim < 2 or boxes.shape != (*masks.shape[:-2], 4):
        raise ValueError(f"masks must be [..., h, w] and boxes [..., 4]; got {masks.shape} and {boxes.shape}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be a height and a width of at least 1; got {size}")
    return int(size[0]), int(size[1])
