"""Capsules: groups of units that represent an entity by a vector and its presence by the length of that vector.

S. Sabour, N. Frosst, G. Hinton, "Dynamic routing between capsules", NIPS 2017. Shapes: I capsules of dimension D in the
layer below, J capsules of dimension E in the layer above.
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
    """Computes the Euclidean length of capsules. The gradient at a capsule of zeros is 0.

    Args:
        v: Capsules of any shape, with their components along `axis`.
        axis: Axis of the components.

    Returns:
        The lengths, without `axis`, in float32 or wider.
    """
    return _root(_squares(v, axis)).squeeze(axis)


def squash(s: jax.Array, axis: int = -1) -> jax.Array:
    """Shortens vectors to a length between 0 and 1: `|s|^2 / (1 + |s|^2) * s / |s|` (equation 1).

    A vector of zeros stays zero and has a gradient of zeros.

    Args:
        s: Vectors of any shape, with their components along `axis`.
        axis: Axis of the components.

    Returns:
        An array of the shape and dtype of `s`.
    """
    square = _squares(s, axis)
    return (s * (_root(square) / (1 + square))).astype(s.dtype)


def routing_by_agreement(predictions: jax.Array, iterations: int = 3) -> jax.Array:
    """Routes predictions to the capsules above that agree with them (procedure 1).

    In each iteration a softmax over the upper capsules distributes each lower capsule, the weighted predictions are
    summed and squashed, and the agreement `prediction . output` is added to the logits, which start at zero. Gradients
    flow through all iterations.

    Args:
        predictions: `[N, J, I, E]`, the prediction of lower capsule i for upper capsule j, in float32 or wider.
        iterations: Number of iterations, at least 1.

    Returns:
        The upper capsules `[N, J, E]`.

    Raises:
        ValueError: `iterations` is less than 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    v = squash(predictions.sum(2) / predictions.shape[1])  # equal shares
    logits = None
    for _ in range(iterations - 1):
        agreement = jnp.einsum("njie,nje->nji", predictions, v)
        logits = agreement if logits is None else logits + agreement
        v = squash(jnp.einsum("nji,njie->nje", nn.softmax(logits, axis=1), predictions))
    return v


class PrimaryCapsules(nn.Module):
    """Computes capsules by a convolution without padding, and squashes them (section 4).

    Attributes:
        features: Number of capsules at each position of the map.
        capsule_dim: Dimension of a capsule.
        kernel_size: Height and width of the window.
        strides: Step of the window.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
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
            ValueError: The window is larger than the map.
        """
        if any(n < k for n, k in zip(x.shape[1:3], self.kernel_size, strict=True)):
            raise ValueError(f"x must be at least as large as the window {self.kernel_size}; got {x.shape[1:3]}")
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
    """Capsules that are connected to those below by a matrix for each pair, and by routing (section 2).

    The parameter is `kernel [I, D, J, E]`. There is no bias (equation 2).

    Attributes:
        num_capsules: Number of capsules J.
        capsule_dim: Dimension E of a capsule.
        iterations: Number of routing iterations.
        dtype: Dtype of the operands of the predictions; the routing is computed in float32 or wider.
        param_dtype: Dtype of the parameter.
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
        # The predictions of one row, which outgrow its capsules E-fold.
        i, _, j, e = kernel.shape
        return map_rows(_routed, u, kernel, options=(self.iterations,), bytes_per_row=4 * i * j * e)


def _squares(x: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))), axis, keepdims=True)


def _root(square: jax.Array) -> jax.Array:
    # Two selections: the derivative of sqrt at 0 is infinite, and infinity times 0 is NaN.
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _routed(iterations: int, u: jax.Array, kernel: jax.Array) -> jax.Array:
    wide = jnp.promote_types(u.dtype, jnp.float32)
    predictions = jnp.einsum("nid,idje->njie", u, kernel, preferred_element_type=wide)
    return routing_by_agreement(predictions, iterations)
