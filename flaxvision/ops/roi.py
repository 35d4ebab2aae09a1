"""Pooling over regions of interest (RoIs): RoIAlign on a feature map, a pyramid or masks, and RoI max-pooling.

RoIs are boxes `[R, 4]` in pixels of the image. As in the papers, no gradient flows to them. RoIs that are padding, such
as zeros, give finite features, which the caller should ignore.
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
    """Averages bilinear samples in each bin of each RoI (He et al. 2017, section 3, "RoIAlign").

    Args:
        features: `[H, W, C]`.
        rois: `[R, 4]` in pixels of the image. Samples more than one pixel outside of the feature map are 0.
        output_size: Number of bins: h and w, or one number for both.
        spatial_scale: Size of the feature map relative to the image: 1 / stride.
        sampling_ratio: Number of samples along each side of a bin; 2 gives the four samples per bin of the paper. The
            adaptive number that other libraries select by 0 or -1 is not supported: it depends on the sizes of the
            RoIs, and compiled code needs fixed shapes.
        aligned: Whether pixel i covers the interval from i to i + 1, so that its center is at i + 0.5. If False, pixel
            i is a point at i, and an RoI is at least one pixel of the feature map high and wide, as in the first
            releases of RoIAlign.

    Returns:
        `[R, h, w, C]`, with the dtype of `features`.

    Raises:
        ValueError: `features` or `rois` has another shape, or `sampling_ratio` or `output_size` is below 1.
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
    """Applies RoIAlign to the pyramid level that fits the size of each RoI (Lin et al. 2017, equation 1).

    Level k has stride 2^k. An RoI of area A uses level `floor(canonical_level + log2(sqrt(A) / canonical_size))`, or
    the nearest level that exists.

    Args:
        features: L feature maps `[H, W, C]`, finest first.
        strides: Stride of each feature map in pixels: powers of two, each twice the previous one.
        rois: `[R, 4]` in pixels of the image.
        output_size: Number of bins: h and w, or one number for both.
        sampling_ratio: See `roi_align`.
        canonical_size: Side in pixels of a square RoI that uses `canonical_level`.
        canonical_level: Level of an RoI of `canonical_size`; k0 of the paper.
        aligned: See `roi_align`.

    Returns:
        `[R, h, w, C]`, with the dtype of `features`.

    Raises:
        ValueError: `features`, `strides` or `rois` is not as described, the feature maps differ in C or dtype, or
            `sampling_ratio` or `output_size` is below 1.
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
    # torchvision adds the same number. Despite rounding, an RoI of `canonical_size` then uses `canonical_level`.
    level = jnp.floor(canonical_level + jnp.log2(jnp.sqrt(box_area(rois)) / canonical_size) + 1e-6)
    level = (jnp.clip(level, first, first + len(maps) - 1) - first).astype(jnp.int32)
    return _align(maps, rois, level, output_size, [1 / stride for stride in strides], sampling_ratio, aligned)


def crop_masks(
    masks: ArrayLike,
    rois: ArrayLike,
    indices: ArrayLike,
    output_size: Size,
    *,
    spatial_scale: float | tuple[float, float] = 1.0,
    size: ArrayLike | None = None,
) -> Array:
    """Resamples one mask within each RoI, for the targets of a mask head (He et al. 2017, section 3.1).

    As in torchvision, this is RoIAlign with an adaptive number of samples: the samples of a bin are at most one pixel
    apart. Thus a bin is close to the mean of the mask over its area, for RoIs of all sizes.

    Args:
        masks: `[M, H, W]`, zeros and ones of any dtype.
        rois: `[R, 4]` in pixels of the image.
        indices: `[R]` integers: which mask each RoI uses.
        output_size: Number of bins: h and w, or one number for both.
        spatial_scale: Size of the masks relative to the image, as one number or as (y, x).
        size: `[2]`, height and width of the valid region of the masks, at the top left. The last row and column of this
            region are continued beyond it. None for the whole masks.

    Returns:
        `[R, h, w]`, in [0, 1], with the dtype of `rois`. No gradient flows to the arguments.

    Raises:
        ValueError: `masks`, `rois` or `indices` has another shape, or `output_size` is below 1.
    """
    masks, rois, indices = lax.stop_gradient(jnp.asarray(masks)), _checked_rois(rois), jnp.asarray(indices)
    rows, columns = _pair(output_size)
    if masks.ndim != 3 or indices.shape != rois.shape[:1]:
        raise ValueError(f"masks must be [M, H, W] and indices {rois.shape[:1]}; got {masks.shape}, {indices.shape}")
    scale = jnp.asarray(np.broadcast_to(np.asarray(spatial_scale, np.float64), 2), rois.dtype)
    boxes = _product(scale[None, np.array([1, 0, 1, 0])], rois)
    limits = jnp.asarray(masks.shape[1:] if size is None else size, rois.dtype)
    by_row = _adaptive_weights(boxes[:, 1], boxes[:, 3], rows, masks.shape[1], limits[0])
    by_column = _adaptive_weights(boxes[:, 0], boxes[:, 2], columns, masks.shape[2], limits[1])

    def crop(given):
        index, by_row, by_column = given
        return jnp.linalg.multi_dot([by_row, masks[index].astype(rois.dtype), by_column.T], precision="highest")

    # A mask is as large as the image, so that only a few RoIs are computed at a time.
    return lax.map(crop, (indices, by_row, by_column), batch_size=4)


def roi_max_pool(features: ArrayLike, rois: ArrayLike, output_size: Size, *, spatial_scale: float = 1.0) -> Array:
    """Takes the maximum in each bin of each RoI (Girshick 2015, section 2.1).

    As in the paper's code, corners are rounded to pixels of the feature map, and an RoI includes its last pixel. If
    several pixels of a bin have the maximum, the gradient goes to the first one in row-major order.

    Args:
        features: `[H, W, C]`.
        rois: `[R, 4]` in pixels of the image.
        output_size: Number of bins: h and w, or one number for both.
        spatial_scale: Size of the feature map relative to the image: 1 / stride.

    Returns:
        `[R, h, w, C]`; 0 for a bin that contains no pixel.

    Raises:
        ValueError: `features` or `rois` has another shape, or `output_size` is below 1.
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
    """Computes RoIAlign; `level [R]` is the index of the feature map, and of its scale, for each RoI."""
    rows, columns = _pair(output_size)
    if sampling_ratio < 1:
        raise ValueError(
            f"sampling_ratio must be at least 1 (adaptive sampling is not supported); got {sampling_ratio}"
        )
    # One gather serves all levels: their pixels are the rows of one table.
    heights, widths = (jnp.asarray([x.shape[axis] for x in maps], jnp.int32)[level] for axis in (0, 1))
    starts = jnp.asarray(np.cumsum([0] + [x.shape[0] * x.shape[1] for x in maps[:-1]]), jnp.int32)[level]
    dtype = jnp.promote_types(maps[0].dtype, jnp.float32)
    table = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in maps]).astype(dtype)
    boxes = _product(jnp.asarray(scales, dtype)[level][:, None], rois.astype(dtype)) - (0.5 if aligned else 0.0)
    y, wy = _samples(boxes[:, 1], boxes[:, 3], rows, sampling_ratio, heights, aligned)
    x, wx = _samples(boxes[:, 0], boxes[:, 2], columns, sampling_ratio, widths, aligned)
    # Outer product of the two axes: [R, h, w, taps of y, taps of x].
    row_starts = starts[:, None, None] + y * widths[:, None, None]
    indices = row_starts[:, :, None, :, None] + x[:, None, :, None, :]
    weights = wy[:, :, None, :, None] * wx[:, None, :, None, :] / sampling_ratio**2
    count = rois.shape[0]
    taps = (count * rows * columns, (2 * sampling_ratio) ** 2)
    pooled = sum_rows(table, weights.reshape(taps), indices.reshape(taps))
    return pooled.reshape(count, rows, columns, table.shape[1]).astype(maps[0].dtype)


def _samples(start, end, bins, ratio, size, aligned) -> tuple[Array, Array]:
    """Returns pixels and weights along one axis, `[R, bins, 2 * ratio]`; a sample interpolates two pixels."""
    length = end - start if aligned else jnp.maximum(end - start, 1)
    step = _quotient(length, bins)[:, None, None]
    first = start[:, None, None] + _product(np.arange(bins, dtype=start.dtype)[None, :, None], step)
    points = first + _quotient(_product((np.arange(ratio) + 0.5).astype(start.dtype)[None, None], step), ratio)
    return _interpolated(points, size[:, None, None].astype(start.dtype))


def _adaptive_weights(start, end, bins, extent, size) -> Array:
    """Returns the weight of each pixel along one axis in each bin, `[R, bins, extent]`; `size` of them are valid."""
    step = _quotient(jnp.maximum(end - start, 1), bins)[:, None, None]
    most = -(-extent // bins)  # samples in a bin of an RoI that is as large as the mask
    count = jnp.minimum(jnp.ceil(step), most)
    first = start[:, None, None] + _product(np.arange(bins, dtype=start.dtype)[None, :, None], step)
    number = np.arange(most)[None, None]
    points = first + _product((number + 0.5).astype(start.dtype), step) / count
    pixels, weights = _interpolated(points, size)
    weights *= jnp.repeat((number < count) / count, 2, axis=-1)
    row, bin_ = np.arange(start.shape[0])[:, None, None], np.arange(bins)[None, :, None]
    return jnp.zeros((start.shape[0], bins, extent), start.dtype).at[row, bin_, pixels].add(weights)


def _interpolated(points, size) -> tuple[Array, Array]:
    """Returns the two pixels next to each of `points [R, bins, k]`, and their weights, `[R, bins, 2 * k]` each."""
    inside = (points >= -1) & (points <= size)  # False for NaN
    points = jnp.clip(jnp.where(inside, points, 0), 0, size - 1)
    low = jnp.floor(points)
    high = jnp.minimum(low + 1, size - 1)
    weights = jnp.stack([1 - (points - low), points - low], axis=-1) * inside[..., None]
    pixels = jnp.stack([low, high], axis=-1).astype(jnp.int32)
    shape = (*points.shape[:2], 2 * points.shape[2])
    return pixels.reshape(shape), weights.reshape(shape)


def _bins(start, end, count, size) -> tuple[Array, Array]:
    """Returns the first pixel of each bin and the pixel after its last one, `[R, count]` int32."""
    length = jnp.maximum(end - start + 1, 1)
    edges = _product(np.arange(count + 1, dtype=length.dtype)[None], _quotient(length, count)[:, None])
    low, high = jnp.floor(edges[:, :-1]), jnp.ceil(edges[:, 1:])
    low, high = (jnp.clip(x + start[:, None], 0, size).astype(jnp.int32) for x in (low, high))
    return low, high


def _first_maximum(table, top, bottom, left, right, width) -> Array:
    """Returns the row of `table [H * W, C]` that holds the first maximum of each bin, `[R, h, w, C]`."""
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


# These helpers make compiled code round as NumPy and torchvision do. At the border of a bin or of the feature map, a
# single rounding changes the result. XLA would otherwise turn a division by a constant into a product.


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
