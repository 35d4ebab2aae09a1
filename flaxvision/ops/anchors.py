"""Anchors: the boxes of every position of a feature map, and the choice of their sizes for a data set."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike


def level_anchors(
    height: int,
    width: int,
    stride: int | tuple[int, int],
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
) -> Array:
    """Computes the anchors of one level (Ren et al. 2015, section 3.1.1).

    As in torchvision, the anchors of the position (x, y) are centered at (x * stride, y * stride), and the corners of
    those of the first position are rounded to whole pixels (halves to even numbers).

    Args:
        height: Rows of the feature map, H.
        width: Columns of the feature map, W.
        stride: Pixels of the image for each pixel of the map, or those of rows and of columns.
        sizes: Square roots of the anchors' areas, in pixels.
        aspect_ratios: Ratios of height to width.

    Returns:
        `[H * W * len(aspect_ratios) * len(sizes), 4]` float32, in order of row, column, aspect ratio, size.

    Raises:
        ValueError: There are no sizes or aspect ratios, or one of them is not positive.
    """
    for name, values in (("sizes", sizes), ("aspect_ratios", aspect_ratios)):
        if not len(values) or min(values) <= 0:
            raise ValueError(f"{name} must be positive numbers, at least one; got {values}")
    stride_y, stride_x = np.broadcast_to(stride, 2).tolist()
    tall = np.sqrt(np.asarray(aspect_ratios, np.float32))
    lengths = np.asarray(sizes, np.float32)
    heights, widths = ((side[:, None] * lengths[None]).reshape(-1) for side in (tall, 1 / tall))
    base = np.round(np.stack([-widths, -heights, widths, heights], axis=1) / 2)
    y, x = (jnp.arange(n, dtype=jnp.int32) * step for n, step in ((height, stride_y), (width, stride_x)))
    shape = (height, width, 1)
    shifts = [jnp.broadcast_to(a, shape) for a in (x[None, :, None], y[:, None, None])]
    shifts = jnp.stack([*shifts, *shifts], axis=-1).astype(jnp.float32)
    return (shifts + base[None, None]).reshape(-1, 4)


def kmeans_anchors(
    widths_heights: ArrayLike, k: int, seed: int = 0, *, restarts: int = 10, max_steps: int = 1000
) -> np.ndarray:
    """Chooses the sizes of anchors for a data set by k-means (Redmon and Farhadi 2017, section 2, dimension clusters).

    The distance of a box to a cluster is 1 minus the IoU of the two when they share a center. This runs on the host.

    Args:
        widths_heights: `[M, 2]`, the widths and heights of the boxes, in any unit.
        k: Number of anchors.
        seed: Seed of the initial clusters, which are drawn among the boxes.
        restarts: Number of runs; the one with the largest mean IoU of a box and its cluster wins.
        max_steps: Most steps of a run, which ends earlier when no box changes its cluster.

    Returns:
        `[k, 2]` float64 widths and heights, by rising area.

    Raises:
        ValueError: `widths_heights` is not `[M, 2]`, finite and positive, or k is not in [1, M].
    """
    boxes = np.asarray(widths_heights, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 2 or not np.all(np.isfinite(boxes) & (boxes > 0)):
        raise ValueError(f"widths_heights must be positive numbers [M, 2]; got an array {boxes.shape}")
    if not 1 <= k <= len(boxes):
        raise ValueError(f"k must be in [1, {len(boxes)}], the number of boxes; got {k}")
    rng = np.random.default_rng(seed)
    best, best_overlap = boxes[:k], -1.0
    for _ in range(restarts):
        clusters = boxes[rng.choice(len(boxes), k, replace=False)]
        member = np.full(len(boxes), -1)
        for _ in range(max_steps):
            before, member = member, np.argmax(_centered_iou(boxes, clusters), axis=1)
            if np.array_equal(before, member):
                break
            # A cluster without boxes stays where it is.
            clusters = np.stack([boxes[member == i].mean(0) if np.any(member == i) else clusters[i] for i in range(k)])
        overlap = float(_centered_iou(boxes, clusters).max(axis=1).mean())
        if overlap > best_overlap:
            best, best_overlap = clusters, overlap
    return best[np.argsort(best.prod(axis=1), kind="stable")]


def _centered_iou(boxes: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    common = np.minimum(boxes[:, None], clusters[None]).prod(axis=-1)
    return common / (boxes.prod(axis=-1)[:, None] + clusters.prod(axis=-1)[None] - common)
