"""Maxima and sums of windows. On a CPU they take a separable form, which XLA vectorizes.

Windows, strides and padding have one entry per spatial dimension of `[N, *spatial, C]`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxvision.layers.lowering.primitive import Form, LinearForm, call

Pads = tuple[tuple[int, int], ...]

# On the CPU windows of up to this many elements are folded at once, larger ones axis by axis (measured, 2x2 to 7x7).
FOLDED_AT_ONCE = 9


@dataclasses.dataclass(frozen=True)
class MaxWindows(Form):
    """The maximum of every window."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Pads

    def plain(self, x):
        """Calls `lax.reduce_window`."""
        return lax.reduce_window(x, _least(x.dtype), lax.max, *_full_rank(self))

    def cpu(self, x):
        """Compares slices."""
        # Axis by axis saves comparisons where windows overlap; otherwise it only adds a pass over the memory.
        at_once = self.window == self.strides and math.prod(self.window) <= FOLDED_AT_ONCE
        return _fold(first_larger, _padded(x, _least(x.dtype), self.padding), self.window, self.strides, at_once)


@dataclasses.dataclass(frozen=True)
class SumWindows(LinearForm):
    """The sum of every window."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Pads

    def plain(self, x):
        """Calls `lax.reduce_window`."""
        return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, *_full_rank(self))

    def cpu(self, x):
        """Adds slices."""
        at_once = math.prod(self.window) <= FOLDED_AT_ONCE
        return _fold(lax.add, _padded(x, np.zeros((), x.dtype), self.padding), self.window, self.strides, at_once)


def max_windows(x: jax.Array, window: tuple[int, ...], strides: tuple[int, ...], padding: Pads) -> jax.Array:
    """Takes the maximum of every window; see `flaxvision.layers.max_pool`."""
    return call(MaxWindows(window, strides, padding), x)


def sum_windows(x: jax.Array, window: tuple[int, ...], strides: tuple[int, ...], padding: Pads) -> jax.Array:
    """Takes the sum of every window, padding counted as zeros."""
    return call(SumWindows(window, strides, padding), x)


def first_larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the larger of two arrays, `a` where they are equal, NaN where either is NaN."""
    larger = b > a
    if jnp.issubdtype(a.dtype, jnp.floating):
        larger |= b != b
    return jnp.where(larger, b, a)


def _least(dtype) -> np.ndarray:
    return np.array(-np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min, dtype)


def _fold(function, x, window: tuple[int, ...], strides: tuple[int, ...], at_once: bool):
    """Folds every window in row-major order, all axes at once or one after the other."""
    if at_once:
        return functools.reduce(function, _places(x, window, strides))
    # The last axis comes first, so that the first place in row-major order wins a tie, as in `lax.reduce_window`.
    for axis in reversed(range(len(window))):
        alone = [[n if i == axis else 1 for i, n in enumerate(extents)] for extents in (window, strides)]
        x = functools.reduce(function, _places(x, *alone))
    return x


def _places(x, window: Sequence[int], strides: Sequence[int]) -> list[jax.Array]:
    """Returns the first, second, ... element of every window, in row-major order."""
    spans = [((n - k) // s) * s + 1 for n, k, s in zip(x.shape[1:-1], window, strides, strict=True)]
    places = []
    for offset in itertools.product(*map(range, window)):
        stop = [o + span for o, span in zip(offset, spans, strict=True)]
        places.append(lax.slice(x, (0, *offset, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1)))
    return places


def _full_rank(form: MaxWindows | SumWindows):
    return (1, *form.window, 1), (1, *form.strides, 1), ((0, 0), *form.padding, (0, 0))


def _padded(x, value: np.ndarray, pads: Pads):
    if not any(map(any, pads)):
        return x
    return lax.pad(x, value, ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)))
