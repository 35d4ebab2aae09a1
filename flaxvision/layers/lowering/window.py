"""How a kernel moves over an input, and the convolution of lax that this describes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Shape = tuple[int, ...]


class Window(NamedTuple):
    """How a kernel moves over an input: one entry per spatial dimension."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int = 1


def dimension_numbers_of(rank: int) -> lax.ConvDimensionNumbers:
    """Returns the channels-last layout: `[N, *spatial, C]`, `[*window, C, F]`, `[N, *spatial, F]`."""
    io = (0, rank + 1, *range(1, rank + 1))
    return lax.ConvDimensionNumbers(io, (rank + 1, rank, *range(rank)), io)


def dilated_size(size: int, dilation: int) -> int:
    """Returns the extent of `size` elements that stand `dilation` apart."""
    return (size - 1) * dilation + 1 if size else 0


def out_size(x_shape, k_shape, w: Window) -> Shape:
    """Returns the spatial size of the output of an undilated input."""
    return tuple(
        (n + sum(p) - dilated_size(k, d)) // s + 1
        for n, k, s, p, d in zip(x_shape[1:-1], k_shape, w.strides, w.padding, w.rhs_dilation, strict=False)
    )


def pad(x, padding):
    """Pads the spatial dimensions with zeros; negative amounts crop."""
    if not any(low or high for low, high in padding):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])


def lax_conv(x: jax.Array, kernel: jax.Array, w: Window, precision: lax.PrecisionLike = None) -> jax.Array:
    """Convolves `[N, *spatial, C]` with `[*window, C / groups, F]` in plain lax."""
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
