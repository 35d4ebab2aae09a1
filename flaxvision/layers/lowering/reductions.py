"""Sums over all axes but the channels, their transpose, and the normalization that uses both."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from flaxvision.layers.lowering.cpu import divisor
from flaxvision.layers.lowering.primitive import Form, LinearForm, call

SUMMED_ROWS = 4096  # maximum number of rows in one product; their sums are added up, which rounds less


@dataclasses.dataclass(frozen=True)
class ChannelSum(LinearForm):
    """`[..., C]` to `[C]`."""

    def plain(self, x):
        """Reduces."""
        return x.sum(range(x.ndim - 1))

    def cpu(self, x):
        """Multiplies by ones: XLA's reduction takes up to ten times as long if arithmetic is fused into it."""
        count = math.prod(x.shape[:-1])
        if not isinstance(count, int) or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.inexact):
            return self.plain(x)
        some = count if divisor(count, SUMMED_ROWS) < 64 else divisor(count, SUMMED_ROWS)
        rows = x.reshape(-1, some, x.shape[-1])
        # Two rows of ones, halved: with one row XLA emits a slow loop for small products.
        return (jnp.ones((len(rows), 2, some), x.dtype) @ rows).sum((0, 1)) / 2

    def transposed(self, index, cotangent, operands):
        """Spreads the cotangent."""
        return call(Spread(operands[index].shape), cotangent)


@dataclasses.dataclass(frozen=True)
class Spread(LinearForm):
    """`[C]` to `[..., C]`, the given shape: one value per channel, repeated."""

    shape: tuple[int, ...]

    def plain(self, x):
        """Broadcasts."""
        return lax.broadcast_in_dim(x, self.shape, (len(self.shape) - 1,))

    def transposed(self, index, cotangent, operands):
        """Sums the cotangent."""
        return call(ChannelSum(), cotangent)


@dataclasses.dataclass(frozen=True)
class Standardize(Form):
    """`(x [..., C], mean [C], factor [C], shift [C])` to `(x - mean) * factor + shift`."""

    def plain(self, x, mean, factor, shift):
        """Broadcasts the three vectors."""
        mean, factor, shift = (lax.broadcast_in_dim(v, x.shape, (x.ndim - 1,)) for v in (mean, factor, shift))
        return (x - mean) * factor + shift

    def tangents(self, primals, tangents, moving):
        """Moves the mean as a shift by `-factor` times that, so that the gradients need two sums instead of three."""
        x, mean, factor, _ = primals
        of_x, of_mean, of_factor, of_shift = (tangents[i] if i in moving else None for i in range(4))
        parts, shifts = [], []
        if of_x is not None:
            parts.append(of_x * spread(factor, x.shape))
        if of_factor is not None:
            parts.append((x - spread(mean, x.shape)) * spread(of_factor, x.shape))
        if of_mean is not None:
            shifts.append(-factor * of_mean)
        if of_shift is not None:
            shifts.append(of_shift)
        if shifts:
            parts.append(spread(sum(shifts[1:], shifts[0]), x.shape))
        return sum(parts[1:], parts[0])


def channel_sum(x: jax.Array) -> jax.Array:
    """Sums over all but the last axis.

    Args:
        x: `[..., C]`.

    Returns:
        `[C]`.
    """
    return call(ChannelSum(), x)


def spread(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats one value per channel, the transpose of `channel_sum`.

    Args:
        values: `[C]`.
        shape: Shape `[..., C]` of the result.

    Returns:
        `[..., C]`, in which every row is `values`.
    """
    return call(Spread(tuple(shape)), values)


def standardize(x: jax.Array, mean: jax.Array, factor: jax.Array, shift: jax.Array) -> jax.Array:
    """Computes `(x - mean) * factor + shift`.

    Args:
        x: `[..., C]`.
        mean: `[C]`.
        factor: `[C]`.
        shift: `[C]`.

    Returns:
        `[..., C]`.
    """
    return call(Standardize(), x, mean, factor, shift)
