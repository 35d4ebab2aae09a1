"""Batch normalization and local response normalization."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flaxvision.layers.batch_context import BatchContext, current_batch
from flaxvision.layers.lowering import channel_sum, standardize

BatchNormMode = Literal["sync", "local", "ghost", "frozen"]
MODES = ("sync", "local", "ghost", "frozen")


def check_mode(mode: str, ghost_size: int | None, argument: str = "mode") -> None:
    """Checks the arguments that select the statistics of BatchNorm.

    Args:
        mode: See `BatchNorm`.
        ghost_size: See `BatchNorm`.
        argument: Name of `mode` in error messages.

    Raises:
        ValueError: `mode` is unknown, `ghost_size` is missing or below 1 for "ghost", or given for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"{argument} must be one of {', '.join(MODES)}; got {mode!r}")
    if mode == "ghost" and (ghost_size is None or ghost_size < 1):
        raise ValueError(f"ghost_size must be at least 1 for {argument}='ghost'; got {ghost_size}")
    if mode != "ghost" and ghost_size is not None:
        raise ValueError(f"ghost_size must be None unless {argument} is 'ghost'; got {ghost_size} for {mode!r}")


class BatchNorm(nn.Module, kw_only=True):
    """Batch normalization over the last axis, like `flax.linen.BatchNorm`, with faster sums on CPU.

    Ioffe and Szegedy 2015, algorithm 1. The variables are the same as in Linen, and the results agree up to the order
    of sums. Statistics are computed in float32 or wider. The variance is biased, `E[x^2] - E[x]^2`, also in the running
    statistics. Parameters: `scale [C]` and `bias [C]`. In `batch_stats`: `mean [C]` and `var [C]`.

    `mode` selects the statistics that normalize a row in training. It means the same under `jit` and `pmap`, on one
    device and on many:

    * `"sync"`: the statistics of the whole batch, over all devices.
    * `"local"`: the statistics of the rows on the same device. The result depends on the number of devices.
    * `"ghost"`: the statistics of the group of the row. A group is `ghost_size` consecutive rows. The result does not
      depend on the number of devices. See Hoffer, Hubara and Soudry 2017, algorithm 1; here, the running statistics are
      updated once for all groups.
    * `"frozen"`: the running statistics, which do not change. The gradients of scale and bias are zero. Weight decay
      would still change them, so mask it (`optax.adamw(mask=...)`).

    With `"local"` and `"ghost"`, the running mean and variance are updated with the averages of the means and variances
    of the devices or groups, weighted by the number of real rows. Padded rows are ignored: `train_step` passes the
    `mask` of the batch through `batch_context`. A group without real rows is normalized with mean 0 and variance 0. A
    batch without real rows does not change the running statistics. With gradient accumulation, each part of a batch has
    its own statistics.

    Fields are keyword-only. Linen's fields `axis`, `axis_index_groups`, `use_fast_variance` and
    `force_float32_reductions` and its argument `mask` are not supported.

    Attributes:
        use_running_average: Whether to normalize by the running statistics without updating them. Pass it here or in
            the call.
        momentum: Decay of the running statistics; 0.9 is torch's 0.1.
        epsilon: Value added to the variance.
        dtype: Dtype of the result; None promotes the input and the parameters.
        param_dtype: Dtype of the parameters.
        use_bias: Whether to learn a bias.
        use_scale: Whether to learn a scale.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        axis_name: Name of the mapped axis over which the batch is split. None uses the axis of `batch_context`, which
            `train_step` sets.
        mode: Statistics that normalize a row in training.
        ghost_size: Number of rows per group for "ghost". It must divide the number of rows on each device.

    Raises:
        ValueError: The mode is unknown or inconsistent with `ghost_size`. In training: the number of rows is not a
            multiple of the number of devices, `ghost_size` does not divide the rows on each device, or the number of
            rows differs from that of the mask of the batch.
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
    mode: BatchNormMode = "sync"
    ghost_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_mode(self.mode, self.ghost_size)

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Maps `[N, ..., C]` to `[N, ..., C]`."""
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        frozen = self.mode == "frozen"
        shape = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        scale, bias = lax.stop_gradient((scale, bias)) if frozen else (scale, bias)
        dtype = nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normalize = functools.partial(_standardize, self.epsilon, jnp.dtype(dtype))
        if use_running_average or frozen:
            return normalize(x, running_mean.value, running_var.value, scale, bias)

        batch = BatchContext() if self.is_initializing() else current_batch()
        axis_name = None if self.is_initializing() else self.axis_name or batch.axis_name
        mask = batch.mask
        if mask is not None and mask.shape != x.shape[:1]:
            raise ValueError(
                f"x must have the {mask.shape[0]} rows of the batch's mask (see batch_context for layers with other "
                f"rows); got {x.shape}"
            )
        if self.mode == "sync":
            mean, var, count = _statistics(x, mask, axis_name)
            of_rows = functools.partial(normalize, x, mean, var, scale, bias)
        else:
            groups = self._groups(x.shape[0], batch.shards)
            rows = x.reshape((groups, -1, *x.shape[1:]))
            means, vars_, counts = jax.vmap(_statistics)(rows, None if mask is None else mask.reshape((groups, -1)))
            of_rows = functools.partial(jax.vmap(normalize, (0, 0, 0, None, None)), rows, means, vars_, scale, bias)
            mean, var, count = _over_groups(means, vars_, counts, axis_name)
        if not self.is_initializing():
            decay = self.momentum if count is None else jnp.where(count > 0, self.momentum, 1.0)
            running_mean.value = decay * running_mean.value + (1 - decay) * mean
            running_var.value = decay * running_var.value + (1 - decay) * var
        return of_rows().reshape(x.shape)

    @nn.nowrap
    def _groups(self, rows: int, shards: int) -> int:
        """Returns the number of groups of rows with statistics of their own."""
        if rows % shards:
            raise ValueError(f"x must have a multiple of {shards} rows, the number of devices; got {rows}")
        if self.mode == "local":
            return shards
        size, of_device = self.ghost_size or 1, rows // shards
        if of_device % size:
            raise ValueError(f"ghost_size must divide the {of_device} rows on each device; got {size}")
        return rows // size


@functools.partial(jax.jit, static_argnums=(0, 1))  # layers of equal shape are traced once
def _standardize(epsilon, dtype, x, mean, var, scale, bias):
    factor = lax.rsqrt(var + epsilon)
    if scale is not None:
        factor = factor * scale
    shift = jnp.zeros_like(factor) if bias is None else bias.astype(factor.dtype)
    return standardize(x, mean, factor, shift).astype(dtype)


def _statistics(
    x: jax.Array, mask: jax.Array | None, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Computes the statistics of real rows over all devices along an axis.

    Args:
        x: `[N, ..., C]`.
        mask: `[N]`, above 0 for real rows; None for all.
        axis_name: The mapped axis; None for no other devices.

    Returns:
        The mean `[C]`, the biased variance `[C]` and, with a mask, the number of real rows.
    """
    if mask is None:
        count = None
        moments = jnp.stack([channel_sum(x), channel_sum(jnp.square(x))]) / (x.size // x.shape[-1])
        if axis_name is not None:
            moments = lax.pmean(moments, axis_name)
    else:
        real = mask > 0
        # `where` and not a product: a padded row may hold NaN.
        x = jnp.where(real.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
        sums = jnp.stack([channel_sum(x), channel_sum(jnp.square(x))])
        count = jnp.sum(real, dtype=x.dtype)
        if axis_name is not None:
            sums, count = lax.psum((sums, count), axis_name)
        moments = sums / (jnp.maximum(count, 1) * math.prod(x.shape[1:-1]))
    mean, square = moments
    return mean, jnp.maximum(0.0, square - jnp.square(mean)), count  # rounding can make the difference negative


def _over_groups(
    mean: jax.Array, var: jax.Array, count: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Averages statistics over groups and devices, weighted by real rows.

    Args:
        mean: `[G, C]`.
        var: `[G, C]`.
        count: Number of real rows of each group, `[G]`; None if all rows are real.
        axis_name: The mapped axis; None for no other devices.

    Returns:
        The mean `[C]`, the variance `[C]` and, with a mask, the number of real rows.
    """
    both = jnp.stack([mean, var])
    if count is None:
        both = both.mean(1)
        both = both if axis_name is None else lax.pmean(both, axis_name)
        return both[0], both[1], None
    sums, total = jnp.sum(both * count[None, :, None], axis=1), count.sum()
    if axis_name is not None:
        sums, total = lax.psum((sums, total), axis_name)
    return sums[0] / jnp.maximum(total, 1), sums[1] / jnp.maximum(total, 1), total


def local_response_norm(
    x: jax.Array, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> jax.Array:
    """Local response normalization: divides each activation by a power of the energy of its neighbouring channels.

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
