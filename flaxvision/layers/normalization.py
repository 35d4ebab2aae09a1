"""Batch normalization and local response normalization."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flaxvision.layers.lowering import channel_sum, spread


class BatchNorm(nn.Module, kw_only=True):
    """`flax.linen.BatchNorm` over the last axis, with sums that are fast on a CPU.

    The variables are the same, the numbers too but for the order of the sums. Ioffe and Szegedy 2015, algorithm 1:
    statistics are float32 under half precision, and the variance is biased, the running one too: `E[x^2] - E[x]^2`.
    Parameters `scale [C]` and `bias [C]`; `batch_stats` `mean [C]` and `var [C]`.

    Fields go by name. Of Linen's it lacks `axis`, `axis_index_groups`, `use_fast_variance`, `force_float32_reductions`
    and the call's `mask`. In training, as with convolutions, `jax.jvp` does not go straight through it; `grad` of any
    order does.

    Attributes:
        use_running_average: Normalize by the running statistics, and leave them alone; here or in the call.
        momentum: Decay of the running statistics: 0.9 is torch's 0.1.
        epsilon: Added to the variance.
        dtype: Of the result; None for the wider of the input's and the parameters'.
        param_dtype: Of the parameters.
        use_bias: Learn a shift.
        use_scale: Learn a factor.
        bias_init: Initializer of the shift.
        scale_init: Initializer of the factor.
        axis_name: The mapped axis over which the statistics are taken too, under `pmap`.
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
    y = (x - spread(mean, x.shape)) * spread(factor, x.shape)
    if bias is not None:
        y = y + spread(bias.astype(factor.dtype), x.shape)
    return y.astype(dtype)


def _moments(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """The mean and the biased variance of each channel, of all devices along the axis."""
    moments = jnp.stack([channel_sum(x), channel_sum(jnp.square(x))]) / (x.size // x.shape[-1])
    if axis_name is not None:
        moments = lax.pmean(moments, axis_name)
    mean, square = moments
    return mean, jnp.maximum(0.0, square - jnp.square(mean))  # rounding can make it negative


def local_response_norm(
    x: jax.Array, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> jax.Array:
    """Divides each activation by a power of its neighbouring channels' energy.

    `y_i = x_i / (k + alpha * sum_j x_j^2) ** beta`, the sum over the `size` channels
    `i - size // 2 <= j <= i + (size - 1) // 2` that exist: Krizhevsky, Sutskever and Hinton 2012, section 3.3, with
    its figures as defaults. `size` is the full width and alpha is not divided by it. An odd size is symmetric; an even
    one reaches one channel further down than up (size 4: two below, itself, one above).

    The other conventions, where `a` is their alpha:

    * Géron's equation 14-2 (radius r, sum from `i - r/2` to `i + r/2`): `size = 2 * (r // 2) + 1`, the rest as it is;
      its AlexNet (r=2, alpha=2e-5, beta=0.75, k=1) is `size=3, alpha=2e-5, beta=0.75, k=1`.
    * `tf.nn.local_response_normalization(depth_radius, bias, alpha, beta)`: `size = 2 * depth_radius + 1`, `k = bias`,
      the rest as it is.
    * `torch.nn.LocalResponseNorm(size, alpha, beta, k)` and Caffe's ACROSS_CHANNELS: `alpha = a / size`, the rest as it
      is, even sizes included.

    Args:
        x: `[..., C]`, channels last. The arithmetic is float32 under bfloat16 and float16.
        size: number of neighbouring channels, the channel itself included.
        alpha: weight of the sum of squares.
        beta: exponent.
        k: added to the sum; with `k = 0` a neighbourhood of zeros gives NaN.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: `size` below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return _normalized(x, size, float(alpha), float(beta), float(k))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _normalized(x: jax.Array, size: int, alpha: float, beta: float, k: float) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    edges = ((0, 0, 0),) * (x.ndim - 1) + ((size // 2, (size - 1) // 2, 0),)
    square = lax.pad(jnp.square(wide), jnp.zeros((), wide.dtype), edges)
    depth = x.shape[-1]
    # Shifted additions, which XLA fuses, where a window's reduction stands alone.
    energy = functools.reduce(lax.add, [lax.slice_in_dim(square, i, i + depth, axis=-1) for i in range(size)])
    base = k + alpha * energy
    if beta == 0.75:
        # Two square roots cost a fraction of a power, and more so in the gradient.
        root = jnp.sqrt(base)
        return (wide / (root * jnp.sqrt(root))).astype(x.dtype)
    return (wide / base**beta).astype(x.dtype)
