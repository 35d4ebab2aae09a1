"""Capsules: groups of units whose vector stands for an entity, its length for the entity's presence.

S. Sabour, N. Frosst, G. Hinton, "Dynamic routing between capsules", NIPS 2017. Shapes: I capsules of D numbers in the
layer below, J capsules of E numbers in the layer above.

Derivatives are of reverse mode, of any order; forward mode (`jax.jvp`) does not pass through these layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers.convolution import Conv
from flaxvision.layers.lowering import map_rows


def capsule_lengths(v: jax.Array, axis: int = -1) -> jax.Array:
    """Takes the Euclidean length of capsules, whose gradient at a capsule of zeros is 0.

    Args:
        v: Capsules along `axis`, any shape.
        axis: The axis of a capsule's numbers.

    Returns:
        The lengths, without `axis`, float32 where `v` is narrower.
    """
    return _root(_squares(v, axis)).squeeze(axis)


def squash(s: jax.Array, axis: int = -1) -> jax.Array:
    """Shortens vectors to a length between 0 and 1: `|s|^2 / (1 + |s|^2) * s / |s|` (equation 1).

    A vector of zeros stays one, with a gradient of zeros.

    Args:
        s: Vectors along `axis`, any shape.
        axis: The axis of a vector's numbers.

    Returns:
        The shape and dtype of `s`.
    """
    square = _squares(s, axis)
    return (s * (_root(square) / (1 + square))).astype(s.dtype)


def routing_by_agreement(predictions: jax.Array, iterations: int = 3) -> jax.Array:
    """Routes predictions to the capsules above that agree with them (procedure 1).

    Every round shares each lower capsule out by a softmax over the upper ones, squashes what arrives, and adds the
    agreement `prediction . output` to the logits of the shares, which start at zero. The gradient goes through all
    rounds.

    Args:
        predictions: `[N, J, I, E]`, what lower capsule i says of upper capsule j; float32 or wider.
        iterations: Rounds, at least 1.

    Returns:
        The upper capsules `[N, J, E]`.

    Raises:
        ValueError: `iterations` is less than 1.
    """
    if iterations < 1:
        raise ValueError(f"the routing needs at least 1 iteration, got {iterations}")
    v = squash(predictions.sum(2) / predictions.shape[1])  # equal shares
    logits = None
    for _ in range(iterations - 1):
        agreement = jnp.einsum("njie,nje->nji", predictions, v)
        logits = agreement if logits is None else logits + agreement
        v = squash(jnp.einsum("nji,njie->nje", nn.softmax(logits, axis=1), predictions))
    return v


class PrimaryCapsules(nn.Module):
    """A convolution whose channels are the numbers of capsules, squashed (section 4).

    Attributes:
        features: Capsules at each place of the map.
        capsule_dim: Numbers of a capsule.
        kernel_size: Height and width of the window, which sees no padding.
        strides: Step of the window.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        kernel_init: Initializer of the kernel.
    """

    features: int = 32
    capsule_dim: int = 8
    kernel_size: tuple[int, int] = (9, 9)
    strides: int = 2
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.glorot_uniform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H' * W' * features, capsule_dim]`.

        Raises:
            ValueError: The window exceeds the map.
        """
        if any(n < k for n, k in zip(x.shape[1:3], self.kernel_size, strict=True)):
            raise ValueError(f"a map of {x.shape[1:3]} is smaller than the window {self.kernel_size}")
        conv = Conv(
            self.features * self.capsule_dim,
            self.kernel_size,
            strides=self.strides,
            padding="VALID",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )
        y = conv(x)
        return squash(y.reshape(x.shape[0], math.prod(y.shape[1:]) // self.capsule_dim, self.capsule_dim))


class RoutedCapsules(nn.Module):
    """Capsules fully connected to those below by a matrix for each pair, and by routing (section 2).

    `kernel [I, D, J, E]`; equation 2 has no bias.

    Attributes:
        num_capsules: Capsules J.
        capsule_dim: Numbers E of a capsule.
        iterations: Rounds of the routing.
        dtype: Of the predictions' products; the routing itself is float32 or wider.
        param_dtype: Of the parameter.
        kernel_init: Initializer of the kernel.
    """

    num_capsules: int = 10
    capsule_dim: int = 16
    iterations: int = 3
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.truncated_normal(0.1)

    @nn.compact
    def __call__(self, u: jax.Array) -> jax.Array:
        """Maps capsules `[N, I, D]` to `[N, num_capsules, capsule_dim]`, float32 or wider.

        Raises:
            ValueError: `iterations` is less than 1.
        """
        shape = (*u.shape[1:], self.num_capsules, self.capsule_dim)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        u, kernel = nn.dtypes.promote_dtype(u, kernel, dtype=self.dtype)
        # A capsule's predictions are `capsule_dim` times as large as the kernel's share in them.
        i, _, j, e = kernel.shape
        return map_rows(_routed, u, kernel, options=(self.iterations,), bytes_per_row=4 * i * j * e)


def _squares(x: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))), axis, keepdims=True)


def _root(square: jax.Array) -> jax.Array:
    # Two selections: the derivative of sqrt at 0 is infinite, and infinity times 0 would be NaN.
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _routed(iterations: int, u: jax.Array, kernel: jax.Array) -> jax.Array:
    wide = jnp.promote_types(u.dtype, jnp.float32)
    predictions = jnp.einsum("nid,idje->njie", u, kernel, preferred_element_type=wide)
    return routing_by_agreement(predictions, iterations)
