"""Convolutions in the forms that are fast on a CPU.

XLA's convolutions for the CPU leave much speed behind; these are the same sums in another order
(benchmarks/layers.py measures each against the plain form):

* pointwise kernels are matrix products, forward and backward;
* depthwise kernels are shifted multiply-adds;
* grouped kernels are dense convolutions of a few groups each, the rest of their kernels zero;
* a dilated input (the transposed convolution, and the gradient of a strided one's input) is one small convolution per
  output phase ("sub-pixel"), interleaved;
* filter gradients of large feature maps are matrix products of patches, a few images at a time;
* sums over all but the channels are matrix products with ones.

Two things differ from the plain form. A NaN or an infinity spreads to the groups that a grouped convolution computes
together with its own. Over a mesh of several CPU devices the pieces of a filter gradient are taken from the whole
batch, so each device does all of that work: the results are right, the speed is one device's; `pmap_step` shares it.
"""

import math
from functools import lru_cache, partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PATCH_BYTES = 8 << 20  # im2col matrices of this size stay in the caches
SMALL_MAP = 400  # XLA's own filter gradient is good for windows, which the output's extent is there, below this
GROUP_CHANNELS = 32  # input channels that one dense convolution of several groups has at least
SUMMED_ROWS = 4096  # at most in one product: the sums of those are added up, for the sake of their rounding
GROUP_BLOCKS = 16  # dense convolutions that stand for one grouped convolution at most: each costs compile time


class Window(NamedTuple):
    """How a kernel moves over an input: one entry per spatial dimension."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int = 1


def dimension_numbers_of(rank: int) -> lax.ConvDimensionNumbers:
    """Channels last: `[N, *spatial, C]`, `[*window, C, F]`, `[N, *spatial, F]`."""
    io = (0, rank + 1, *range(1, rank + 1))
    return lax.ConvDimensionNumbers(io, (rank + 1, rank, *range(rank)), io)


def plain(x, kernel, w: Window, precision=None):
    """XLA's own form."""
    return lax.conv_general_dilated(
        x,
        kernel,
        w.strides,
        w.padding,
        w.lhs_dilation,
        w.rhs_dilation,
        dimension_numbers_of(x.ndim - 2),
        w.groups,
        precision=precision,
    )


def fast(x, kernel, w: Window, precision=None):
    """The forms for the CPU, which knows no precision but its types'. For values: see `trainable`."""
    return _fast(x, kernel, w, _spatial)


def trainable(x, kernel, w: Window, precision=None):
    """`fast` whose reverse-mode derivatives are fast too; forward mode it has none."""
    return _fast(x, kernel, w, _trainable_spatial)


def _fast(x, kernel, w: Window, spatial):
    """`spatial` is the form of the undilated convolutions of one group."""
    dtype, channels = x.dtype, x.shape[-1]
    wide = jnp.promote_types(dtype, jnp.float32)
    x, kernel = x.astype(wide), kernel.astype(wide)
    if max(w.lhs_dilation) > 1:
        dense = w.groups == 1 and max(w.strides) == 1 and max(w.rhs_dilation) == 1
        y = _subpixel(x, kernel, w, spatial) if dense else plain(x, kernel, w)
    elif w.groups == 1:
        y = _dense(x, kernel, w, spatial)
    elif w.groups == channels:
        y = _depthwise(x, kernel, w)
    else:
        y = _grouped(x, kernel, w, spatial)
    return y.astype(dtype)


# -- geometry ---------------------------------------------------------------------------------------------------------


def reach_of(size: int, dilation: int) -> int:
    """What `size` elements span when they stand `dilation` apart."""
    return (size - 1) * dilation + 1 if size else 0


def _out_size(x_shape, k_shape, w: Window) -> tuple[int, ...]:
    """The spatial size of the output of an undilated input."""
    return tuple(
        (n + sum(p) - reach_of(k, d)) // s + 1
        for n, k, s, p, d in zip(x_shape[1:-1], k_shape, w.strides, w.padding, w.rhs_dilation, strict=False)
    )


def _pad(x, padding):
    """Zero padding of the spatial dimensions; negative amounts crop."""
    if not any(low or high for low, high in padding):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])


def _taps(x, window, out, w: Window) -> list[jax.Array]:
    """The padded input as each of the kernel's elements sees it: prod(window) arrays `[N, *out, C]`."""
    x = _pad(x, w.padding)
    views = []
    for place in product(*map(range, window)):
        start = [t * d for t, d in zip(place, w.rhs_dilation, strict=True)]
        stop = [a + (o - 1) * s + 1 for a, o, s in zip(start, out, w.strides, strict=True)]
        views.append(lax.slice(x, (0, *start, 0), (len(x), *stop, x.shape[-1]), (1, *w.strides, 1)))
    return views


@lru_cache
def _divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most limit, and at least 1."""
    return max(d for d in range(1, max(1, min(n, limit)) + 1) if n % d == 0)


def _in_pieces(fn, x, out, window, w: Window, bytes_per_position: int):
    """Apply `fn` to a few images, or a band of rows, at a time: a scan that keeps nothing for the backward pass."""
    rows, position = out[0], math.prod(out[1:]) * bytes_per_position
    band = rows if rows * position <= 2 * PATCH_BYTES else _divisor(rows, PATCH_BYTES // position)
    reach = (band - 1) * w.strides[0] + reach_of(window[0], w.rhs_dilation[0])
    bands = rows // band
    if bands > 1:
        x = _pad(x, (w.padding[0],) + ((0, 0),) * (len(out) - 1))
        w = w._replace(padding=((0, 0), *w.padding[1:]))
        step = band * w.strides[0]
        x = jnp.stack([lax.slice_in_dim(x, i * step, i * step + reach, axis=1) for i in range(bands)], axis=1)
        x = x.reshape(-1, *x.shape[2:])
    images = _divisor(len(x), PATCH_BYTES // (band * position))
    body = jax.checkpoint(lambda _, piece: (None, fn(piece, (band, *out[1:]), w)), prevent_cse=False)
    _, y = lax.scan(body, None, x.reshape(-1, images, *x.shape[1:]))
    return y.reshape(-1, *out, y.shape[-1])


def replicated_as(operand, gradient):
    """The gradient, in a `shard_map` summed over the devices over which its operand is replicated."""
    varying = jnp.where(False, gradient, jnp.zeros_like(gradient))
    return jax.vjp(lambda operand: operand + varying, operand)[1](gradient)[0]


# -- dense ------------------------------------------------------------------------------------------------------------


def _dense(x, kernel, w: Window, spatial):
    if math.prod(kernel.shape[:-2]) > 1:
        return spatial(x, kernel, w)
    out = _out_size(x.shape, kernel.shape, w)
    (x,) = _taps(x, kernel.shape[:-2], out, w)
    y = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[-2:])
    return y.reshape(x.shape[0], *out, -1)


def _spatial(x, kernel, w: Window):
    # jaxlib 0.10's unpadded 2-D convolution is three times slower than the padded one: one row too many is cheaper,
    # and the cut disappears in whatever reads the result. One or two channels do not meet that slow path.
    if x.ndim == 4 and x.shape[-1] > 2 and not any(map(any, w.padding)):
        rows = _out_size(x.shape, kernel.shape, w)[0]
        return plain(x, kernel, w._replace(padding=((0, w.strides[0]), (0, 0))))[:, :rows]
    return plain(x, kernel, w)


_trainable_spatial = jax.custom_vjp(_spatial, nondiff_argnums=(2,))


def _spatial_fwd(x, kernel, w: Window):
    return _spatial(x, kernel, w), (x, kernel)


def _spatial_bwd(w: Window, operands, gradient):
    x, kernel = operands
    of_kernel = replicated_as(kernel, _filter_gradient(x, kernel, gradient, w))
    return replicated_as(x, _input_gradient(x, kernel, gradient, w)), of_kernel


_trainable_spatial.defvjp(_spatial_fwd, _spatial_bwd)


def _input_gradient(x, kernel, gradient, w: Window):
    if max(w.strides) == 1 or max(w.rhs_dilation) > 1:
        return jax.vjp(lambda x: plain(x, kernel, w), x)[1](gradient)[0]
    # XLA's own can be 50 times slower: a window of 9 at steps of 2, from 256 to 256 channels, takes 6 s for 25 images.
    pads = tuple(
        (k - 1 - low, n - 1 - (o - 1) * s + low)
        for n, k, o, s, (low, _) in zip(
            x.shape[1:-1], kernel.shape, gradient.shape[1:-1], w.strides, w.padding, strict=False
        )
    )
    ones = (1,) * len(pads)
    flipped = jnp.flip(kernel, range(len(pads))).swapaxes(-1, -2)
    return _subpixel(gradient, flipped, Window(ones, pads, w.strides, ones), _spatial)


def _filter_gradient(x, kernel, gradient, w: Window):
    window, (channels, features) = kernel.shape[:-2], kernel.shape[-2:]
    out = gradient.shape[1:-1]
    depth = math.prod(window) * channels
    narrow = (channels < 16 and features < 32) or len(window) == 1  # little arithmetic for each patch copied
    small = math.prod(out) < SMALL_MAP and len(x) * math.prod(out) < 2 * depth
    if narrow or small or max(w.rhs_dilation) > 1:  # measured: XLA's own form is as good, or better
        return jax.vjp(lambda kernel: plain(x, kernel, w), kernel)[1](gradient)[0]

    # Patches stand as columns, so that the product needs no transpose and every copy is a run of a row's pixels.
    bytes_per_row = depth * math.prod(out[1:]) * x.dtype.itemsize
    band = out[0] if out[0] * bytes_per_row <= 2 * PATCH_BYTES else _divisor(out[0], PATCH_BYTES // bytes_per_row)
    images, bands = _divisor(len(x), PATCH_BYTES // (band * bytes_per_row)), out[0] // band
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
        g = lax.dynamic_slice(gradient, (image, top, *rest, 0), (images, band, *out[1:], features))
        return total + jnp.concatenate(views).reshape(depth, -1) @ g.reshape(-1, features), None

    # Never a value of theirs, but it varies over a mesh as they do: `shard_map` wants that of a carry.
    start = jnp.where(False, x.ravel()[0] + gradient.ravel()[0], jnp.zeros((depth, features), x.dtype))
    total, _ = lax.scan(piece, start, jnp.arange(len(x) // images * bands))
    return total.reshape(kernel.shape)


def _phases(x, window, out, w: Window):
    """The padded input's pixels by their place modulo the strides: `[*strides, C, N, *spatial / strides]`."""
    count = [o + (k - 1) // s for o, k, s in zip(out, window, w.strides, strict=True)]
    sizes = zip(x.shape[1:-1], w.padding, count, w.strides, strict=True)
    x = _pad(x, [(low, q * s - n - low) for n, (low, _), q, s in sizes])
    split = x.reshape(len(x), *(m for pair in zip(count, w.strides, strict=True) for m in pair), x.shape[-1])
    rank = len(window)
    return split.transpose(*range(2, 2 * rank + 1, 2), 2 * rank + 1, 0, *range(1, 2 * rank, 2))


# -- groups -----------------------------------------------------------------------------------------------------------


def _grouped(x, kernel, w: Window, spatial):
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


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _depthwise(x, kernel, w: Window):
    x, taps, out = _per_channel(x, kernel, w)
    return _shifted_sum(x, taps, kernel.shape[:-2], out, w)


def _per_channel(x, kernel, w: Window):
    """The input with each channel as often as it has filters, the kernel as `[1, ..., F]` per element, the out size."""
    multiplier = kernel.shape[-1] // x.shape[-1]
    if multiplier > 1:
        x = jnp.repeat(x, multiplier, axis=-1)
    taps = kernel.reshape(-1, *(1,) * (x.ndim - 1), kernel.shape[-1])
    return x, list(taps), _out_size(x.shape, kernel.shape, w)


def _shifted_sum(x, taps, window, out, w: Window):
    products = [view * tap for view, tap in zip(_taps(x, window, out, w), taps, strict=True)]
    return sum(products[1:], products[0])


@partial(_depthwise.defjvp, symbolic_zeros=True)
def _depthwise_jvp(w: Window, primals, tangents):
    x, kernel = primals
    dx, dkernel = (None if isinstance(t, jax.custom_derivatives.SymbolicZero) else t for t in tangents)
    parts = []
    if dx is not None:
        parts.append(_depthwise_input_map(dx, kernel, w))
    if dkernel is not None:
        parts.append(jax.checkpoint(partial(_depthwise_filter_map, w=w), prevent_cse=False)(x, dkernel))
    return _depthwise(x, kernel, w), sum(parts[1:], parts[0])


def _depthwise_input_map(x, kernel, w: Window):
    """Linear in x. Products are added into a canvas at their place: the transpose slices the padded gradient."""
    x, taps, out = _per_channel(x, kernel, w)
    window = kernel.shape[:-2]
    if max(w.strides) > 1:
        return _shifted_sum(x, taps, window, out, w)
    reach = [reach_of(k, d) - 1 for k, d in zip(window, w.rhs_dilation, strict=True)]
    canvas = 0
    for place, tap in zip(product(*map(range, window)), taps, strict=True):
        high = [t * d for t, d in zip(place, w.rhs_dilation, strict=True)]
        canvas += _pad(x * tap, [(r - h, h) for r, h in zip(reach, high, strict=True)])
    return _pad(canvas, [(low - r, high - r) for (low, high), r in zip(w.padding, reach, strict=True)])


def _depthwise_filter_map(x, kernel, w: Window):
    """Linear in the kernel; its transpose sums over a few images at a time, which stay in the cache."""
    x, taps, out = _per_channel(x, kernel, w)

    def piece(x, out, w):
        return _shifted_sum(x, taps, kernel.shape[:-2], out, w)

    return _in_pieces(piece, x, out, kernel.shape[:-2], w, 4 * kernel.shape[-1] * x.dtype.itemsize)


# -- sums -------------------------------------------------------------------------------------------------------------


def channel_sum(x):
    """`[..., C]` to `[C]`. XLA's reduction, with arithmetic fused into it, takes up to ten times as long."""
    count = math.prod(x.shape[:-1])
    some = _divisor(count, SUMMED_ROWS)
    some = count if some < 64 else some
    rows = x.reshape(-1, some, x.shape[-1])
    # By a single row of ones, small products become a slow loop as well.
    return (jnp.ones((len(rows), 2, some), x.dtype) @ rows).sum((0, 1)) / 2


# -- dilated inputs ---------------------------------------------------------------------------------------------------


def _subpixel(x, kernel, w: Window, spatial):
    """Outputs of one phase modulo the dilation f see every f-th kernel element: interleaved small convolutions.

    Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?".
    """
    size, window = x.shape[1:-1], kernel.shape[:-2]
    dense = w._replace(lhs_dilation=(1,) * len(size))
    dilated = tuple(map(reach_of, size, w.lhs_dilation))
    out = _out_size((len(x), *dilated, 1), kernel.shape, dense)
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
        # XLA aborts the process where an input is cropped to nothing.
        if part.size == 0 or any(n + min(a, 0) + min(b, 0) <= 0 for n, (a, b) in zip(size, pads, strict=True)):
            return jnp.zeros((len(x), *count, kernel.shape[-1]), x.dtype)
        return _dense(x, part, dense._replace(padding=tuple(pads)), spatial)

    def interleave(place, axis):
        if axis == len(size):
            return phase(place)
        parts = [interleave((*place, p), axis + 1) for p in range(w.lhs_dilation[axis])]
        y = jnp.stack(parts, axis=axis + 2)
        return y.reshape(*y.shape[: axis + 1], -1, *y.shape[axis + 3 :])

    y = interleave((), 0)
    return lax.slice(y, (0,) * y.ndim, (len(x), *out, y.shape[-1]))
