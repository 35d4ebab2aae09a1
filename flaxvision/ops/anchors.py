"""Anchors: generating them for a feature map, and choosing their sizes for a data set by k-means."""

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
    """Generates the anchors of one feature map (Ren et al. 2015, section 3.1.1).

    As in torchvision, the anchors at position (x, y) are centered at (x * stride, y * stride). Before they are moved
    there, their corners are rounded to whole pixels, and halves to even numbers.

    Args:
        height: Height of the feature map, H.
        width: Width of the feature map, W.
        stride: Stride of the feature map in pixels, or the strides of rows and of columns.
        sizes: Sizes of the anchors in pixels; the size is the square root of the area.
        aspect_ratios: Ratios of height to width.

    Returns:
        `[H * W * len(aspect_ratios) * len(sizes), 4]` float32, ordered by row, column, aspect ratio and size.

    Raises:
        ValueError: `sizes` or `aspect_ratios` is empty or has a value that is not positive.
    """
    for name, values in (("sizes", sizes), ("aspect_ratios", aspect_ratios)):
        if not len(values) or min(values) <= 0:
            raise ValueError(f"{name} must be one or more positive numbers; got {values}")
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
    """Chooses anchor sizes for a data set by k-means (Redmon and Farhadi 2017, section 2, "Dimension Clusters").

    The distance between a box and a cluster is 1 minus their IoU when both have the same center. This function runs on
    the host in NumPy.

    Args:
        widths_heights: `[M, 2]`, the widths and heights of the boxes, in any unit.
        k: Number of anchors.
        seed: Seed of the initial clusters, which are drawn from the boxes.
        restarts: Number of runs. The run with the highest mean IoU between boxes and their clusters is kept.
        max_steps: Maximum number of steps of a run. A run ends earlier once no box changes its cluster.

    Returns:
        `[k, 2]` float64 widths and heights, sorted by area.

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
            # An empty cluster keeps its size.
            clusters = np.stack([boxes[member == i].mean(0) if np.any(member == i) else clusters[i] for i in range(k)])
        overlap = float(_centered_iou(boxes, clusters).max(axis=1).mean())
        if overlap > best_overlap:
            best, best_overlap = clusters, overlap
    return best[np.argsort(best.prod(axis=1), kind="stable")]


def _centered_iou(boxes: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    common = np.minimum(boxes[:, None], clusters[None]).prod(axis=-1)
    return common / (boxes.prod(axis=-1)[:, None] + clusters.prod(axis=-1)[None] - common)
