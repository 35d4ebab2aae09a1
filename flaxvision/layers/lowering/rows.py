"""Functions of rows that a CPU computes a few rows at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jax import lax

from flaxvision.layers.lowering.cpu import divisor
from flaxvision.layers.lowering.primitive import Form, LinearForm, call

CACHED_BYTES = 4 << 20  # intermediate results of this size stay in the caches


@dataclasses.dataclass(frozen=True)
class Rows(Form):
    """`function(*options, x, weights)`, row by row of `x`."""

    function: Callable[..., jax.Array]
    options: tuple[Hashable, ...]
    bytes_per_row: int

    def plain(self, x, weights):
        """Applies the function to all rows at once."""
        return self.function(*self.options, x, weights)

    def cpu(self, x, weights):
        """Scans over a few rows at a time and keeps none of the intermediate results for the gradient."""
        rows = x.shape[0]
        some = divisor(rows, CACHED_BYTES // self.bytes_per_row) if isinstance(rows, int) and rows else rows
        if some is rows or some == rows:
            return self.plain(x, weights)
        body = jax.checkpoint(lambda _, piece: (None, self.plain(piece, weights)), prevent_cse=False)
        _, y = lax.scan(body, None, x.reshape(-1, some, *x.shape[1:]))
        return y.reshape(rows, *y.shape[2:])


@dataclasses.dataclass(frozen=True)
class Unfused(LinearForm):
    """The identity; on a CPU, XLA does not fuse what comes before with what comes after."""

    def plain(self, x):
        """Returns x."""
        return x

    def cpu(self, x):
        """Puts a barrier."""
        return lax.optimization_barrier(x)

    def transposed(self, index, cotangent, operands):
        """Needs no barrier."""
        return cotangent


def map_rows(
    function: Callable[..., jax.Array],
    x: jax.Array,
    weights: jax.Array,
    *,
    options: tuple[Hashable, ...] = (),
    bytes_per_row: int,
) -> jax.Array:
    """Applies a function that treats every row of `x` alike.

    On a CPU it runs on a few rows at a time, and its intermediate results are computed again for the gradient.

    Args:
        function: `(*options, x, weights) -> y`, at the top level of a module, so that equal calls are recognized.
        x: `[N, ...]`.
        weights: Another operand, which all rows share.
        options: Hashable arguments.
        bytes_per_row: Size of the intermediate results of one row.

    Returns:
        `[N, ...]`.
    """
    return call(Rows(function, options, bytes_per_row), x, weights)


def unfused(x: jax.Array) -> jax.Array:
    """Returns `x`; on a CPU, XLA does not fuse what comes before with what comes after."""
    return call(Unfused(), jnp.asarray(x))
