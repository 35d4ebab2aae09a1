"""Convolutions with dilated (atrous) kernels in the forms that are fast on a CPU; see `lowering.cpu`."""

import math
from itertools import product
from typing import Any

import jax.numpy as jnp

from flaxvision.layers.lowering.primitive import zeros_varying_as
from flaxvision.layers.lowering.window import Shape, Window, out_size, pad

SEEN = 0.7  # below this share of products with pixels instead of padding, skipping the padding is faster


def _seen(x_shape, k_shape, w: Window) -> list[list[tuple[int, int, int]]]:
    """Returns for each dimension and each element of the kernel the outputs whose input is a pixel and not padding.

    An entry is (first output, end of the outputs, offset from an output to its pixel).
    """
    seen = []
    for n, k, o, d, (low, _) in zip(
        x_shape[1:-1], k_shape, out_size(x_shape, k_shape, w), w.rhs_dilation, w.padding, strict=False
    ):
        shifts = [t * d - low for t in range(k)]
        seen.append([(max(0, -shift), max(0, -shift, min(o, n - shift)), shift) for shift in shifts])
    return seen


def reaches_far(x_shape, k_shape, w: Window) -> bool:
    """Whether a dilated kernel reaches so far beyond the map that it pays to skip the padding."""
    if max(w.rhs_dilation) == 1 or max(*w.strides, *w.lhs_dilation, w.groups) > 1:
        return False
    if not all(isinstance(n, int) for n in x_shape[1:-1]):
        return False
    parts = zip(_seen(x_shape, k_shape, w), k_shape, out_size(x_shape, k_shape, w), strict=False)
    return math.prod(sum(stop - start for start, stop, _ in seen) / (k * o) for seen, k, o in parts) < SEEN


def _elements(x_shape, k_shape, w: Window):
    """Yields each element of the kernel that covers a pixel, with the slices of its outputs and of their pixels."""
    for place in product(*(range(k) for k in k_shape[:-2])):
        ranges = [seen[t] for seen, t in zip(_seen(x_shape, k_shape, w), place, strict=True)]
        if all(stop > start for start, stop, _ in ranges):
            outputs = [slice(start, stop) for start, stop, _ in ranges]
            yield place, outputs, [slice(start + shift, stop + shift) for start, stop, shift in ranges]


def sum_of_elements(x, kernel, w: Window):
    """Convolves with one matrix product for each element of the kernel, over the pixels that it covers."""
    out = out_size(x.shape, kernel.shape, w)
    y: Any = zeros_varying_as(x, (x.shape[0], *out, kernel.shape[-1]), x.dtype)
    for place, outputs, pixels in _elements(x.shape, kernel.shape, w):
        view = x[:, *pixels]
        part = (view.reshape(-1, view.shape[-1]) @ kernel[place]).reshape(*view.shape[:-1], -1)
        y += pad(part, [(each.start, o - each.stop) for each, o in zip(outputs, out, strict=True)])
    return y


def kernel_gradient(x, g, w: Window, shape: Shape):
    """Computes the gradient of the kernel of `sum_of_elements`."""
    columns = jnp.moveaxis(g, -1, 0)  # so that both factors of the products are row-major
    found = dict.fromkeys(product(*map(range, shape[:-2])), zeros_varying_as(x, (shape[-1], shape[-2]), x.dtype))
    for place, outputs, pixels in _elements(x.shape, shape, w):
        found[place] = columns[:, :, *outputs].reshape(shape[-1], -1) @ x[:, *pixels].reshape(-1, shape[-2])
    return jnp.stack([*found.values()]).swapaxes(1, 2).reshape(shape)


def by_phases(x, g, w: Window, window: Shape):
    """Moves the position of the pixels modulo the dilation d into the batch, which removes the dilation of the kernel.

    Returns:
        The padded input `[N * d^n, *spatial / d, C]`, and the gradient of the output padded with zeros, in the same
        layout.
    """
    rank, dilation = len(window), w.rhs_dilation
    count = [-(-o // d) for o, d in zip(g.shape[1:-1], dilation, strict=True)]

    def sort(a, count):
        split = a.reshape(len(a), *(m for pair in zip(count, dilation, strict=True) for m in pair), a.shape[-1])
        order = (0, *range(2, 2 * rank + 1, 2), *range(1, 2 * rank, 2), 2 * rank + 1)
        return split.transpose(order).reshape(-1, *count, a.shape[-1])

    g = sort(pad(g, [(0, m * d - o) for m, d, o in zip(count, dilation, g.shape[1:-1], strict=True)]), count)
    count = [m + k - 1 for m, k in zip(count, window, strict=True)]
    sizes = zip(w.padding, count, dilation, x.shape[1:-1], strict=True)
    return sort(pad(x, [(low, m * d - n - low) for (low, _), m, d, n in sizes]), count), g
