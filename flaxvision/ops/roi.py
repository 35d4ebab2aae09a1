"""Features of regions of interest (rois): RoIAlign, over one level or a pyramid, and RoI max-pooling.

Rois are boxes `[R, 4]` in pixels of the image. They have no gradient, as in the papers. A padded roi, such as zeros,
gives finite features; the caller ignores them.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from flaxvision.layers.lowering import sum_rows
from flaxvision.ops.boxes import box_area, rounded

Size = int | tuple[int, int]


def roi_align(
    features: ArrayLike,
    rois: ArrayLike,
    output_size: Size,
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> Array:
    """Averages bilinear samples in each bin of each roi (He et al. 2017, section 3, RoIAlign).

    Args:
        features: `[H, W, C]`.
        rois: `[R, 4]` in pixels of the image. A point more than a pixel outside of the features counts as 0.
        output_size: Rows and columns of bins, h and w.
        spatial_scale: Size of the features relative to the image.
        sampling_ratio: Samples along each side of a bin. The adaptive number that some libraries call 0 or -1 depends
            on the sizes of the rois, which compiled code cannot do; Mask R-CNN and its FPN form use 2.
        aligned: Whether pixel i covers the interval from i to i + 1, so that its center is at i + 0.5. If not, pixel i
            is a point at i, and a roi has at least one pixel of the features in each direction (the first releases).

    Returns:
        `[R, h, w, C]`, of the features' dtype.

    Raises:
        ValueError: The shapes do not fit, or `sampling_ratio` or `output_size` is below 1.
    """
    features, rois = jnp.asarray(features), _checked_rois(rois)
    _check_features("features", features)
    level = jnp.zeros(rois.shape[0], jnp.int32)
    return _align([features], rois, level, output_size, (spatial_scale,), sampling_ratio, aligned)


def multiscale_roi_align(
    features: Sequence[ArrayLike],
    strides: Sequence[int],
    rois: ArrayLike,
    output_size: Size,
    *,
    sampling_ratio: int = 2,
    canonical_size: int = 224,
    canonical_level: int = 4,
    aligned: bool = False,
) -> Array:
    """Applies RoIAlign to the level of a pyramid that fits the size of each roi (Lin et al. 2017, equation 1).

    A roi of area A is taken from level `floor(canonical_level + log2(sqrt(A) / canonical_size))`, where level k has
    stride 2^k, or from the nearest level that exists.

    Args:
        features: L arrays `[H, W, C]`, finest first.
        strides: Their L strides in pixels: powers of two, each twice the one before it.
        rois: `[R, 4]` in pixels of the image.
        output_size: Rows and columns of bins, h and w.
        sampling_ratio: See `roi_align`.
        canonical_size: Side of the roi, in pixels, that belongs to the canonical level.
        canonical_level: The canonical level.
        aligned: See `roi_align`.

    Returns:
        `[R, h, w, C]`, of the features' dtype.

    Raises:
        ValueError: The shapes do not fit, the strides are not such powers of two, or `sampling_ratio` or `output_size`
            is below 1.
    """
    maps, rois = [jnp.asarray(x) for x in features], _checked_rois(rois)
    for x in maps:
        _check_features("each of features", x)
    if not maps or len({(x.shape[-1], x.dtype) for x in maps}) > 1:
        raise ValueError(f"features must be one or more arrays with one C and dtype; got {[x.shape for x in maps]}")
    first = int(strides[0]).bit_length() - 1
    if list(strides) != [2 ** (first + i) for i in range(len(maps))]:
        raise ValueError(
            f"strides must be {len(maps)} powers of two, one per level, each twice the one before; got {list(strides)}"
        )
    # The small number is torchvision's: a roi of exactly the canonical size belongs to its level in spite of rounding.
    level = jnp.floor(canonical_level + jnp.log2(jnp.sqrt(box_area(rois)) / canonical_size) + 1e-6)
    level = (jnp.clip(level, first, first + len(maps) - 1) - first).astype(jnp.int32)
    return _align(maps, rois, level, output_size, [1 / stride for stride in strides], sampling_ratio, aligned)


def roi_max_pool(features: ArrayLike, rois: ArrayLike, output_size: Size, *, spatial_scale: float = 1.0) -> Array:
    """Takes the maximum in each bin of each roi (Girshick 2015, section 2.1).

    Corners are rounded to pixels of the features, and a roi includes its last pixel, as in the paper's code. Where
    several pixels of a bin have the maximum, the gradient goes to the first one, row by row.

    Args:
        features: `[H, W, C]`.
        rois: `[R, 4]` in pixels of the image.
        output_size: Rows and columns of bins, h and w.
        spatial_scale: Size of the features relative to the image.

    Returns:
        `[R, h, w, C]`; 0 for a bin that contains no pixel.

    Raises:
        ValueError: The shapes do not fit, or `output_size` is below 1.
    """
    features, rois = jnp.asarray(features), _checked_rois(rois)
    _check_features("features", features)
    height, width, channels = features.shape
    rows, columns = _pair(output_size)
    corners = _round(rois * spatial_scale)
    top, bottom = _bins(corners[:, 1], corners[:, 3], rows, height)
    left, right = _bins(corners[:, 0], corners[:, 2], columns, width)
    table = features.reshape(-1, channels)
    at = _first_maximum(lax.stop_gradient(table), top, bottom, left, right, width)
    found = table.at[at, jnp.arange(channels)[None, None, None]].get(mode="promise_in_bounds")
    empty = (top >= bottom)[:, :, None] | (left >= right)[:, None]
    return jnp.where(empty[..., None], jnp.zeros((), found.dtype), found)


def _align(maps, rois, level, output_size, scales, sampling_ratio, aligned) -> Array:
    """RoIAlign; `level [R]` is the index of the map and the scale of each roi."""
    rows, columns = _pair(output_size)
    if sampling_ratio < 1:
        raise ValueError(f"sampling_ratio must be at least 1, since no adaptive number exists; got {sampling_ratio}")
    # One gather serves all levels: their pixels are the rows of one table.
    heights, widths = (jnp.asarray([x.shape[axis] for x in maps], jnp.int32)[level] for axis in (0, 1))
    starts = jnp.asarray(np.cumsum([0] + [x.shape[0] * x.shape[1] for x in maps[:-1]]), jnp.int32)[level]
    dtype = jnp.promote_types(maps[0].dtype, jnp.float32)
    table = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in maps]).astype(dtype)
    boxes = _product(jnp.asarray(scales, dtype)[level][:, None], rois.astype(dtype)) - (0.5 if aligned else 0.0)
    y, wy = _samples(boxes[:, 1], boxes[:, 3], rows, sampling_ratio, heights, aligned)
    x, wx = _samples(boxes[:, 0], boxes[:, 2], columns, sampling_ratio, widths, aligned)
    # The product of the two axes: [R, h, w, taps of y, taps of x].
    row_starts = starts[:, None, None] + y * widths[:, None, None]
    indices = row_starts[:, :, None, :, None] + x[:, None, :, None, :]
    weights = wy[:, :, None, :, None] * wx[:, None, :, None, :] / sampling_ratio**2
    count = rois.shape[0]
    taps = (count * rows * columns, (2 * sampling_ratio) ** 2)
    pooled = sum_rows(table, weights.reshape(taps), indices.reshape(taps))
    return pooled.reshape(count, rows, columns, table.shape[1]).astype(maps[0].dtype)


def _samples(start, end, bins, ratio, size, aligned) -> tuple[Array, Array]:
    """Pixels and weights along one axis, `[R, bins, 2 * ratio]`; a sample lies between two pixels."""
    length = end - start if aligned else jnp.maximum(end - start, 1)
    step = _quotient(length, bins)[:, None, None]
    first = start[:, None, None] + _product(np.arange(bins, dtype=start.dtype)[None, :, None], step)
    points = first + _quotient(_product((np.arange(ratio) + 0.5).astype(start.dtype)[None, None], step), ratio)
    size = size[:, None, None].astype(start.dtype)
    inside = (points >= -1) & (points <= size)  # False for NaN
    points = jnp.clip(jnp.where(inside, points, 0), 0, size - 1)
    low = jnp.floor(points)
    high = jnp.minimum(low + 1, size - 1)
    weights = jnp.stack([1 - (points - low), points - low], axis=-1) * inside[..., None]
    pixels = jnp.stack([low, high], axis=-1).astype(jnp.int32)
    shape = (*points.shape[:2], 2 * ratio)
    return pixels.reshape(shape), weights.reshape(shape)


def _bins(start, end, count, size) -> tuple[Array, Array]:
    """First pixel of each bin and the one after its last, `[R, count]` int32."""
    length = jnp.maximum(end - start + 1, 1)
    edges = _product(np.arange(count + 1, dtype=length.dtype)[None], _quotient(length, count)[:, None])
    low, high = jnp.floor(edges[:, :-1]), jnp.ceil(edges[:, 1:])
    low, high = (jnp.clip(x + start[:, None], 0, size).astype(jnp.int32) for x in (low, high))
    return low, high


def _first_maximum(table, top, bottom, left, right, width) -> Array:
    """Indices of the rows of `table [H * W, C]` with the first maximum of each bin, `[R, h, w, C]`."""
    start = jnp.minimum(top, bottom)[:, :, None] * width + jnp.minimum(left, right)[:, None]
    start = jnp.minimum(start, table.shape[0] - 1)
    tall = jnp.max(bottom - top, initial=0)
    wide = jnp.maximum(jnp.max(right - left, initial=0), 1)

    def visit(i, state):
        best, at = state
        y, x = top + i // wide, left + i % wide
        inside = (y < bottom)[:, :, None] & (x < right)[:, None]
        here = jnp.where(inside, y[:, :, None] * width + x[:, None], 0)
        value = table.at[here].get(mode="promise_in_bounds")
        better = inside[..., None] & (value > best)
        return jnp.where(better, value, best), jnp.where(better, here[..., None], at)

    shape = (*start.shape, table.shape[1])
    best = jnp.full(shape, -jnp.inf, table.dtype)
    return lax.fori_loop(0, tall * wide, visit, (best, jnp.broadcast_to(start[..., None], shape)))[1]


# Compiled code rounds these as NumPy and torchvision do: at the limit of a bin or of the features one rounding decides.
# XLA turns the division by a constant into a product.


def _quotient(x: Array, divisor: int) -> Array:
    return x / jnp.where(x == x, divisor, 0).astype(x.dtype)


def _product(factor: ArrayLike, x: Array) -> Array:
    return rounded(jnp.asarray(factor * x))


def _round(x: Array) -> Array:
    """Rounds halves away from zero, as C does; NaN becomes 0."""
    whole = jnp.trunc(x)
    away = jnp.where(jnp.abs(x - whole) >= 0.5, jnp.sign(x), 0)
    return jnp.nan_to_num(whole + away)


def _pair(size: Size) -> tuple[int, int]:
    rows, columns = np.broadcast_to(size, 2).tolist()
    if min(rows, columns) < 1:
        raise ValueError(f"output_size must be at least 1; got {size}")
    return rows, columns


def _checked_rois(rois: ArrayLike) -> Array:
    rois = lax.stop_gradient(jnp.asarray(rois))
    if rois.ndim != 2 or rois.shape[1] != 4:
        raise ValueError(f"rois must be [R, 4]; got {rois.shape}")
    return rois if jnp.issubdtype(rois.dtype, jnp.floating) else rois.astype(jnp.float32)


def _check_features(name: str, x: Array) -> None:
    if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floats [H, W, C]; got {x.dtype} {x.shape}")
