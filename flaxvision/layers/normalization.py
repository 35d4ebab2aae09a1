"""Batch normalization and local response normalization."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flaxvision.layers.lowering import channel_sum, standardize


class BatchNorm(nn.Module, kw_only=True):
    """`flax.linen.BatchNorm` over the last axis, with faster sums on a CPU.

    Ioffe and Szegedy 2015, algorithm 1. The variables are those of Linen, and so are the results up to the order of the
    sums. Statistics are computed in float32 or wider. The variance is biased, `E[x^2] - E[x]^2`, also in the running
    statistics. Parameters: `scale [C]` and `bias [C]`. In `batch_stats`: `mean [C]` and `var [C]`.

    Fields are keyword-only. Linen's fields `axis`, `axis_index_groups`, `use_fast_variance` and
    `force_float32_reductions` and its argument `mask` do not exist here.

    Attributes:
        use_running_average: Normalize by the running statistics and do not update them. Given here or in the call.
        momentum: Decay of the running statistics; 0.9 is torch's 0.1.
        epsilon: Value added to the variance.
        dtype: Dtype of the result; None promotes the input and the parameters.
        param_dtype: Dtype of the parameters.
        use_bias: Whether to learn a bias.
        use_scale: Whether to learn a scale.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        axis_name: Name of the mapped axis over which the statistics are averaged, under `pmap`.
        frozen: Normalize by the running statistics even in training, and pass no gradient to the scale and the bias.
    """

    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    scale_init: Callable[..., jax.Array] = nn.initializers.ones
    axis_name: str | None = None
    frozen: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Maps `[..., C]` to `[..., C]`."""
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        use_running_average = use_running_average or self.frozen
        shape = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        scale, bias = lax.stop_gradient((scale, bias)) if self.frozen else (scale, bias)
        dtype = nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var = _moments(x, None if self.is_initializing() else self.axis_name)
            if not self.is_initializing():
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
        return _standardize(self.epsilon, jnp.dtype(dtype), x, mean, var, scale, bias)


@functools.partial(jax.jit, static_argnums=(0, 1))  # layers of equal shape are traced once
def _standardize(epsilon, dtype, x, mean, var, scale, bias):
    factor = lax.rsqrt(var + epsilon)
    if scale is not None:
        factor = factor * scale
    shift = jnp.zeros_like(factor) if bias is None else bias.astype(factor.dtype)
    return standardize(x, mean, factor, shift).astype(dtype)


def _moments(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the biased variance of each channel, over all devices along the axis."""
    moments = jnp.stack([channel_sum(x), channel_sum(jnp.square(x))]) / (x.size // x.shape[-1])
    if axis_name is not None:
        moments = lax.pmean(moments, axis_name)
    mean, square = moments
    return mean, jnp.maximum(0.0, square - jnp.square(mean))  # rounding can make it negative


def local_response_norm(
    x: jax.Array, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> jax.Array:
    """Divides each activation by a power of the energy of the neighbouring channels.

    `y_i = x_i / (k + alpha * sum_j x_j^2) ** beta`, where the sum is over the channels
    `i - size // 2 <= j <= i + (size - 1) // 2`, as in Krizhevsky, Sutskever and Hinton 2012, section 3.3. The defaults
    are the paper's values. `size` is the full width, and alpha is not divided by it. An odd size is symmetric. An even
    size includes one more channel below than above (size 4: two below, the channel itself, one above).

    To convert from other conventions:

    * Géron's equation 14-2 with radius r, a sum from `i - r/2` to `i + r/2`: `size = 2 * (r // 2) + 1`.
      The book's AlexNet (r=2, alpha=2e-5, beta=0.75, k=1) is `size=3, alpha=2e-5, beta=0.75, k=1`.
    * `tf.nn.local_response_normalization(depth_radius, bias, alpha, beta)`: `size = 2 * depth_radius + 1`, `k = bias`.
    * `torch.nn.LocalResponseNorm(size, alpha, beta, k)` and Caffe's ACROSS_CHANNELS: divide their alpha by `size`.

    Args:
        x: `[..., C]`, channels last. The computation is in float32 or wider.
        size: Number of neighbouring channels, including the channel itself.
        alpha: Weight of the sum of squares.
        beta: Exponent.
        k: Value added to the sum. With `k = 0` a neighbourhood of zeros gives NaN.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    return _local_response_norm(x, size, float(alpha), float(beta), float(k))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _local_response_norm(x: jax.Array, size: int, alpha: float, beta: float, k: float) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    edges = ((0, 0, 0),) * (x.ndim - 1) + ((size // 2, (size - 1) // 2, 0),)
    square = lax.pad(jnp.square(wide), jnp.zeros((), wide.dtype), edges)
    depth = x.shape[-1]
    # Shifted additions, which XLA fuses; it does not fuse the reduction of a window.
    energy = functools.reduce(lax.add, [lax.slice_in_dim(square, i, i + depth, axis=-1) for i in range(size)])
    base = k + alpha * energy
    if beta == 0.75:
        # Two square roots cost a fraction of a power, in the gradient too.
        root = jnp.sqrt(base)
        return (wide / (root * jnp.sqrt(root))).astype(x.dtype)
    return (wide / base**beta).astype(x.dtype)
