"""Convolutions and their gradients in the forms that are fast on a CPU.

XLA's own convolutions are slow on a CPU in many cases. These forms compute the same sums in another order
(benchmarks/layers.py measures each of them against plain lax):

* Pointwise kernels are matrix products, forward and backward.
* Depthwise kernels are shifted multiply-adds.
* Grouped kernels are dense convolutions of several groups each, with zeros in the rest of their kernels.
* A dilated input is one small convolution per output phase ("sub-pixel"), interleaved. Transposed convolutions and the
  input gradients of strided ones have dilated inputs.
* Kernel gradients of large feature maps are matrix products of patches, a few images at a time.
* A dilated kernel that reaches far beyond the map (the rates 12 to 36 of DeepLab) is one matrix product per element,
  over the pixels that the element sees. With other dilations, the kernel gradient is that of an undilated kernel over
  the phases of the map ("space to batch").

Two things differ from plain lax. A NaN or an infinity spreads to the groups that are computed together with its own.
Over a mesh of several CPU devices, each device computes the whole of a kernel gradient that is cut into pieces: the
result is right, but the work is not shared. `pmap_step` shares it.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxvision.layers.lowering import dilated
from flaxvision.layers.lowering.primitive import transpose, zeros_varying_as
from flaxvision.layers.lowering.window import Shape, Window, dilated_size, lax_conv, out_size, pad

PATCH_BYTES = 8 << 20  # patch matrices of this size stay in the caches
SMALL_MAP = 400  # below this many output positions XLA's own kernel gradient is fast enough
GROUP_CHANNELS = 32  # minimum number of input channels of a dense convolution that computes several groups
GROUP_BLOCKS = 16  # maximum number of dense convolutions for one grouped convolution: each costs compile time

Convolve = Callable[[jax.Array, jax.Array, Window], jax.Array]


def convolution(x: jax.Array, kernel: jax.Array, w: Window) -> jax.Array:
    """Convolves `[N, *spatial, C]` with `[*window, C / groups, F]`."""
    return _in_float32(lambda x, kernel: _convolution(x, kernel, w, _spatial), x, kernel)


def input_gradient(g: jax.Array, kernel: jax.Array, w: Window, shape: Shape, convolve: Convolve) -> jax.Array:
    """Computes the gradient of a convolution's input.

    Args:
        g: Gradient of the output `[N, *out, F]`.
        kernel: `[*window, C / groups, F]`.
        w: Window of the convolution.
        shape: Shape of the input.
        convolve: Convolution with fast gradients, of which a grouped or dilated one is composed.

    Returns:
        The gradient `[N, *spatial, C]`.
    """

    def gradient(g, kernel):
        if _is_spatial(kernel, w):
            return _input_gradient(g, kernel, w, shape)
        form = _depthwise_by_input if _is_depthwise(kernel, w) else _convolution
        return transpose(lambda x: form(x, kernel, w, convolve), jax.ShapeDtypeStruct(shape, g.dtype), g)

    return _in_float32(gradient, g, kernel)


def kernel_gradient(x: jax.Array, g: jax.Array, w: Window, shape: Shape, convolve: Convolve) -> jax.Array:
    """Computes the gradient of a convolution's kernel.

    Args:
        x: Input `[N, *spatial, C]`.
        g: Gradient of the output `[N, *out, F]`.
        w: Window of the convolution.
        shape: Shape of the kernel.
        convolve: Convolution with fast gradients, of which a grouped or dilated one is composed.

    Returns:
        The gradient `[*window, C / groups, F]`.
    """

    def gradient(x, g):
        like = jax.ShapeDtypeStruct(shape, g.dtype)
        if not isinstance(x.shape[0], int):  # a symbolic batch cannot be cut into pieces
            return transpose(lambda kernel: lax_conv(x, kernel, w), like, g)
        if _is_spatial(like, w):
            return _kernel_gradient(x, g, w, shape)
        form = _depthwise_by_kernel if _is_depthwise(like, w) else _convolution
        return transpose(lambda kernel: form(x, kernel, w, convolve), like, g)

    return _in_float32(gradient, x, g)


def _in_float32(function, a, b):
    """Computes half precision in float32 and rounds the result."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return function(a.astype(wide), b.astype(wide)).astype(a.dtype)


def _is_spatial(kernel, w: Window) -> bool:
    """Whether the convolution is dense, of an undilated input, and of more than one element."""
    return w.groups == 1 and max(w.lhs_dilation) == 1 and math.prod(kernel.shape[:-2]) > 1


def _is_depthwise(kernel, w: Window) -> bool:
    return w.groups > 1 and kernel.shape[-2] == 1 and max(w.lhs_dilation) == 1


def _convolution(x, kernel, w: Window, spatial: Convolve):
    """Composes any convolution of `spatial`, a dense one of an undilated input."""
    if max(w.lhs_dilation) > 1:
        dense = w.groups == 1 and max(w.strides) == 1 and max(w.rhs_dilation) == 1
        return _subpixel(x, kernel, w, spatial) if dense else lax_conv(x, kernel, w)
    if w.groups == 1:
        return _dense(x, kernel, w, spatial)
    return (_depthwise if _is_depthwise(kernel, w) else _grouped)(x, kernel, w, spatial)


# -- geometry ---------------------------------------------------------------------------------------------------------


def _taps(x, window, out, w: Window) -> list[jax.Array]:
    """Returns the padded input as each element of the kernel sees it: prod(window) arrays `[N, *out, C]`."""
    x = pad(x, w.padding)
    views = []
    for place in product(*map(range, window)):
        start = [t * d for t, d in zip(place, w.rhs_dilation, strict=True)]
        stop = [a + (o - 1) * s + 1 for a, o, s in zip(start, out, w.strides, strict=True)]
        views.append(lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *w.strides, 1)))
    return views


@lru_cache
def divisor(n: int, limit: int) -> int:
    """Returns the largest divisor of n that is at most `limit`, or 1."""
    return max(d for d in range(1, max(1, min(n, limit)) + 1) if n % d == 0)


# -- dense ------------------------------------------------------------------------------------------------------------


def _dense(x, kernel, w: Window, spatial: Convolve):
    if math.prod(kernel.shape[:-2]) > 1:
        return spatial(x, kernel, w)
    out = out_size(x.shape, kernel.shape, w)
    (x,) = _taps(x, kernel.shape[:-2], out, w)
    y = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[-2:])
    return y.reshape(x.shape[0], *out, kernel.shape[-1])


def _spatial(x, kernel, w: Window):
    if dilated.reaches_far(x.shape, kernel.shape, w):
        return dilated.sum_of_elements(x, kernel, w)
    # jaxlib 0.10's unpadded 2-D convolution is three times slower than the padded one. Computing one row too many and
    # cutting it off is cheaper, and XLA fuses the cut into the next operation. Up to two channels are not affected.
    if x.ndim == 4 and x.shape[-1] > 2 and not any(map(any, w.padding)):
        rows = out_size(x.shape, kernel.shape, w)[0]
        return lax_conv(x, kernel, w._replace(padding=((0, w.strides[0]), (0, 0))))[:, :rows]
    return lax_conv(x, kernel, w)


def _input_gradient(g, kernel, w: Window, shape: Shape):
    if dilated.reaches_far(shape, kernel.shape, w):
        return transpose(lambda x: dilated.sum_of_elements(x, kernel, w), jax.ShapeDtypeStruct(shape, g.dtype), g)
    if max(w.strides) == 1 or max(w.rhs_dilation) > 1:
        return transpose(lambda x: lax_conv(x, kernel, w), jax.ShapeDtypeStruct(shape, g.dtype), g)
    # XLA's own can be 50 times slower: 6 s for 25 images with a 9x9 window at stride 2 and 256 channels in and out.
    pads = tuple(
        (k - 1 - low, n - 1 - (o - 1) * s + low)
        for n, k, o, s, (low, _) in zip(shape[1:-1], kernel.shape, g.shape[1:-1], w.strides, w.padding, strict=False)
    )
    ones = (1,) * len(pads)
    flipped = jnp.flip(kernel, range(len(pads))).swapaxes(-1, -2)
    return _subpixel(g, flipped, Window(ones, pads, w.strides, ones), _spatial)


def _kernel_gradient(x, g, w: Window, shape: Shape):
    window, (channels, features) = shape[:-2], shape[-2:]
    out = g.shape[1:-1]
    depth = math.prod(window) * channels
    narrow = (channels < 16 and features < 32) or len(window) == 1  # little arithmetic for each copied patch
    small = math.prod(out) < SMALL_MAP and len(x) * math.prod(out) < 2 * depth
    if dilated.reaches_far(x.shape, shape, w):
        return dilated.kernel_gradient(x, g, w, shape)
    if max(w.rhs_dilation) > 1 and max(w.strides) == 1 and not narrow:
        x, g = dilated.by_phases(x, g, w, window)
        undilated = w._replace(padding=((0, 0),) * len(window), rhs_dilation=(1,) * len(window))
        return _kernel_gradient(x, g, undilated, shape)
    if narrow or small or max(w.rhs_dilation) > 1:  # measured: XLA's own form is as fast or faster
        return transpose(lambda kernel: lax_conv(x, kernel, w), jax.ShapeDtypeStruct(shape, g.dtype), g)

    # Patches are columns: the product needs no transpose, and each copy is a contiguous run of pixels of one row.
    bytes_per_row = depth * math.prod(out[1:]) * x.dtype.itemsize
    band = out[0] if out[0] * bytes_per_row <= 2 * PATCH_BYTES else divisor(out[0], PATCH_BYTES // bytes_per_row)
    images, bands = divisor(len(x), PATCH_BYTES // (band * bytes_per_row)), out[0] // band
    phases = _phases(x, window, out, w)
    reach = band + (window[0] - 1) // w.strides[0]
    part = (*w.strides, channels, images, reach, *phases.shape[len(window) + 3 :])

    def piece(total, index):
        image, top = index // bands * images, index % bands * band
        rest = (0,) * (len(out) - 1)
        x = lax.dynamic_slice(phases, (*(0 for _ in window), 0, image, top, *rest), part)
        views = []
        for place in product(*map(range, window)):
            starts = [t // s for t, s in zip(place, w.strides, strict=True)]
            spans = (slice(start, start + n) for start, n in zip(starts, (band, *out[1:]), strict=True))
            views.append(x[tuple(t % s for t, s in zip(place, w.strides, strict=True))][:, :, *spans])
        part_of_g = lax.dynamic_slice(g, (image, top, *rest, 0), (images, band, *out[1:], features))
        return total + jnp.concatenate(views).reshape(depth, -1) @ part_of_g.reshape(-1, features), None

    start = zeros_varying_as(x, (depth, features), x.dtype)
    total, _ = lax.scan(piece, start, jnp.arange(len(x) // images * bands))
    return total.reshape(shape)


def _phases(x, window, out, w: Window):
    """Sorts the padded input's pixels by their position modulo the strides: `[*strides, C, N, *spatial / strides]`."""
    count = [o + (k - 1) // s for o, k, s in zip(out, window, w.strides, strict=True)]
    sizes = zip(x.shape[1:-1], w.padding, count, w.strides, strict=True)
    x = pad(x, [(low, q * s - n - low) for n, (low, _), q, s in sizes])
    split = x.reshape(len(x), *(m for pair in zip(count, w.strides, strict=True) for m in pair), x.shape[-1])
    rank = len(window)
    return split.transpose(*range(2, 2 * rank + 1, 2), 2 * rank + 1, 0, *range(1, 2 * rank, 2))


# -- groups -----------------------------------------------------------------------------------------------------------


def _grouped(x, kernel, w: Window, spatial: Convolve):
    *window, inside, features = kernel.shape
    groups, channels = w.groups, x.shape[-1]
    wanted = max(GROUP_CHANNELS // inside, -(-groups // GROUP_BLOCKS), 1)
    block = min(b for b in range(1, groups + 1) if groups % b == 0 and (b >= wanted or b == groups))
    blocks, outside = groups // block, features // groups
    kernel = kernel.reshape(*window, inside, blocks, block, outside)
    kernel = jnp.moveaxis(kernel, -3, 0)  # [blocks, *window, inside, block, outside]
    eye = jnp.eye(block, dtype=kernel.dtype).reshape((1,) * (len(window) + 1) + (block, 1, block, 1))
    kernel = (jnp.expand_dims(kernel, -4) * eye).reshape(blocks, *window, block * inside, block * outside)
    one = w._replace(groups=1)
    width = channels // blocks
    parts = [lax.slice_in_dim(x, i * width, (i + 1) * width, axis=-1) for i in range(blocks)]
    return jnp.concatenate([_dense(part, kernel[i], one, spatial) for i, part in enumerate(parts)], axis=-1)


def _depthwise(x, kernel, w: Window, _=None):
    x, taps, out = _per_channel(x, kernel, w)
    return _shifted_sum(x, taps, kernel.shape[:-2], out, w)


def _per_channel(x, kernel, w: Window):
    """Repeats each channel for its filters; returns that, the kernel as `[1, ..., F]` per element, the output size."""
    multiplier = kernel.shape[-1] // x.shape[-1]
    if multiplier > 1:
        x = jnp.repeat(x, multiplier, axis=-1)
    taps = kernel.reshape(-1, *(1,) * (x.ndim - 1), kernel.shape[-1])
    return x, list(taps), out_size(x.shape, kernel.shape, w)


def _shifted_sum(x, taps, window, out, w: Window):
    products = [view * tap for view, tap in zip(_taps(x, window, out, w), taps, strict=True)]
    return sum(products[1:], products[0])


def _depthwise_by_input(x, kernel, w: Window, _=None):
    """Adds the products into a canvas at their place, so that the transpose slices the padded gradient."""
    if max(w.strides) > 1:
        return _depthwise(x, kernel, w)
    x, taps, _ = _per_channel(x, kernel, w)
    window = kernel.shape[:-2]
    reach = [dilated_size(k, d) - 1 for k, d in zip(window, w.rhs_dilation, strict=True)]
    canvas: Any = 0
    for place, tap in zip(product(*map(range, window)), taps, strict=True):
        high = [t * d for t, d in zip(place, w.rhs_dilation, strict=True)]
        canvas += pad(x * tap, [(r - h, h) for r, h in zip(reach, high, strict=True)])
    return pad(canvas, [(low - r, high - r) for (low, high), r in zip(w.padding, reach, strict=True)])


def _depthwise_by_kernel(x, kernel, w: Window, _=None):
    """Scans over a few images at a time, so that the transpose sums pieces that stay in the cache."""
    x, taps, out = _per_channel(x, kernel, w)

    def piece(x, out, w):
        return _shifted_sum(x, taps, kernel.shape[:-2], out, w)

    return _in_pieces(piece, x, out, kernel.shape[:-2], w, 4 * kernel.shape[-1] * x.dtype.itemsize)


def _in_pieces(fn, x, out, window, w: Window, bytes_per_position: int):
    """Applies `fn` to a few images, or to a band of rows, at a time, and keeps nothing for the backward pass."""
    rows, position = out[0], math.prod(out[1:]) * bytes_per_position
    band = rows if rows * position <= 2 * PATCH_BYTES else divisor(rows, PATCH_BYTES // position)
    reach = (band - 1) * w.strides[0] + dilated_size(window[0], w.rhs_dilation[0])
    bands = rows // band
    if bands > 1:
        x = pad(x, (w.padding[0],) + ((0, 0),) * (len(out) - 1))
        w = w._replace(padding=((0, 0), *w.padding[1:]))
        step = band * w.strides[0]
        x = jnp.stack([lax.slice_in_dim(x, i * step, i * step + reach, axis=1) for i in range(bands)], axis=1)
        x = x.reshape(-1, *x.shape[2:])
    images = divisor(len(x), PATCH_BYTES // (band * position))
    body = jax.checkpoint(lambda _, piece: (None, fn(piece, (band, *out[1:]), w)), prevent_cse=False)
    _, y = lax.scan(body, None, x.reshape(-1, images, *x.shape[1:]))
    return y.reshape(-1, *out, y.shape[-1])


# -- dilated inputs ---------------------------------------------------------------------------------------------------


def _subpixel(x, kernel, w: Window, spatial: Convolve):
    """Interleaves small convolutions: outputs of one phase modulo the dilation f see every f-th kernel element.

    Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?".
    """
    size, window = x.shape[1:-1], kernel.shape[:-2]
    dense = w._replace(lhs_dilation=(1,) * len(size))
    dilated = tuple(map(dilated_size, size, w.lhs_dilation))
    out = out_size((x.shape[0], *dilated, 1), kernel.shape, dense)
    count = [-(-o // f) for o, f in zip(out, w.lhs_dilation, strict=True)]

    def phase(place):
        first, pads = [], []
        for p, f, n, k, (low, _), q in zip(place, w.lhs_dilation, size, window, w.padding, count, strict=True):
            t = (low - p) % f
            taps = len(range(t, k, f))
            before = (low - p - t) // f
            first.append(t)
            pads.append((before, q - n - before + taps - 1))
        part = kernel[tuple(slice(t, None, f) for t, f in zip(first, w.lhs_dilation, strict=True))]
        # XLA aborts the process if an input is cropped to nothing.
        if part.size == 0 or any(n + min(a, 0) + min(b, 0) <= 0 for n, (a, b) in zip(size, pads, strict=True)):
            return zeros_varying_as(x, (x.shape[0], *count, kernel.shape[-1]), x.dtype)
        return _dense(x, part, dense._replace(padding=tuple(pads)), spatial)

    def interleave(place, axis):
        if axis == len(size):
            return phase(place)
        parts = [interleave((*place, p), axis + 1) for p in range(w.lhs_dilation[axis])]
        y = jnp.stack(parts, axis=axis + 2)
        return y.reshape(*y.shape[: axis + 1], -1, *y.shape[axis + 3 :])

    y = interleave((), 0)
    return lax.slice(y, (0,) * y.ndim, (x.shape[0], *out, y.shape[-1]))
