"""Weighted sums of the rows of a table, and their transpose."""

from __future__ import annotations

import dataclasses

import jax
from jax import lax

from flaxvision.layers.lowering.cpu import divisor
from flaxvision.layers.lowering.primitive import LinearForm, call, zeros_varying_as

CACHED_BYTES = 1 << 20  # scattered values of this size stay in the cache


@dataclasses.dataclass(frozen=True)
class SumRows(LinearForm):
    """Maps `table [P, C]`, `weights [Q, S]` and `indices [Q, S]` to `[Q, C]`: see `sum_rows`."""

    def plain(self, table, weights, indices):
        """Adds S gathers. XLA fuses them into one pass that only writes the result."""
        rows = (table.at[indices[:, s]].get(mode="promise_in_bounds") for s in range(indices.shape[1]))
        return sum(weights[:, s, None] * row for s, row in enumerate(rows))

    def transposed(self, index, cotangent, operands):
        """Scatters, for the table."""
        if index == 0:
            return call(SpreadRows(operands[0].shape[0]), cotangent, *operands[1:])
        return super().transposed(index, cotangent, operands)


@dataclasses.dataclass(frozen=True)
class SpreadRows(LinearForm):
    """The transpose of `SumRows` in the table: maps `x [Q, C]`, `weights` and `indices [Q, S]` to `[rows, C]`."""

    rows: int

    def plain(self, x, weights, indices):
        """Adds S scatters."""
        table = zeros_varying_as(x, (self.rows, x.shape[1]), x.dtype)
        for s in range(indices.shape[1]):
            table = table.at[indices[:, s]].add(weights[:, s, None] * x, mode="promise_in_bounds")
        return table

    def cpu(self, x, weights, indices):
        """Scatters a few rows of x at a time into the same array."""
        count, columns = x.shape
        few = CACHED_BYTES // (x.dtype.itemsize * columns * indices.shape[1])
        few = divisor(count, few) if isinstance(count, int) and count else 0
        if not few:
            return self.plain(x, weights, indices)

        def add(table, piece):
            x, weights, indices = piece
            return table.at[indices].add(weights[:, :, None] * x[:, None], mode="promise_in_bounds"), None

        table = zeros_varying_as(x, (self.rows, columns), x.dtype)
        return lax.scan(add, table, [a.reshape(-1, few, a.shape[1]) for a in (x, weights, indices)])[0]

    def transposed(self, index, cotangent, operands):
        """Gathers, for x."""
        if index == 0:
            return call(SumRows(), cotangent, *operands[1:])
        return super().transposed(index, cotangent, operands)


def sum_rows(table: jax.Array, weights: jax.Array, indices: jax.Array) -> jax.Array:
    """Computes weighted sums of the rows of a table.

    Args:
        table: `[P, C]`.
        weights: `[Q, S]`, of the same dtype. S should be small: the program has S gathers.
        indices: `[Q, S]` integers in [0, P).

    Returns:
        `[Q, C]`: the sum of `weights[q, s] * table[indices[q, s]]` over s.
    """
    return call(SumRows(), table, weights, indices)
