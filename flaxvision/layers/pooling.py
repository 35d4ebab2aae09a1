"""Pooling over one to three spatial dimensions, over channels, and over whole feature maps.

Arrays are channels last, `[N, *spatial, C]`. On cuda and tpu the pools are `lax.reduce_window`. On a CPU they use a
faster implementation with the same values and gradients, also for ties; see `flaxvision.layers.lowering`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxvision.layers.lowering import first_larger, max_windows, spread, sum_windows, unfused

Pads = tuple[tuple[int, int], ...]


def max_pool(
    x: jax.Array,
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
    *,
    ceil_mode: bool = False,
) -> jax.Array:
    """Computes the maximum of every window. Padding is smaller than any number.

    If a window holds its maximum more than once, the whole gradient goes to the first position in row-major order. A
    NaN makes its windows NaN. A window that contains only padding gives the smallest value of the dtype (-inf for
    floats). Equals `keras.layers.MaxPooling*`, `tf.nn.max_pool` and, with `ceil_mode`, `torch.nn.MaxPool*`.

    Args:
        x: `[N, *spatial, C]` with one to three spatial dimensions, floating point or integer.
        window_shape: Size of the window, one number for all spatial dimensions or one each.
        strides: Steps between windows. The default is the size of the window, as in Keras and torch (in Linen it is 1).
        padding: `"SAME"`, `"VALID"`, or one `(low, high)` pair for each spatial dimension.
        ceil_mode: Round the size of the output up instead of down, as torch does. A last window that extends beyond the
            high end counts if it starts inside the input or the low padding.

    Returns:
        `[N, *pooled, C]` of the dtype of `x`.

    Raises:
        ValueError: The rank, window, strides or padding is wrong, or the window is larger than the padded input.

    Example:
        >>> x = jnp.arange(6.0).reshape(1, 6, 1)
        >>> max_pool(x, 2).ravel().tolist(), max_pool(x, 3, 2, ceil_mode=True).ravel().tolist()
        ([1.0, 3.0, 5.0], [2.0, 4.0, 5.0])
    """
    window, steps, pads, _ = _geometry(x, window_shape, strides, padding, ceil_mode)
    return max_windows(x, window, steps, pads)


def avg_pool(
    x: jax.Array,
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
    *,
    count_include_pad: bool = True,
    ceil_mode: bool = False,
) -> jax.Array:
    """Computes the mean of every window.

    With `count_include_pad=True` the sum is divided by the size of the window, which is the default of Linen and torch.
    With `False` it is divided by the number of real elements, as in `keras.layers.AveragePooling*` and
    `tf.nn.avg_pool`. With `ceil_mode`, elements beyond the padded input never count, as in `torch.nn.AvgPool*`. A
    window without a counted element gives 0. Sums are computed in float32 or wider. Integers give float32.

    Args:
        x: `[N, *spatial, C]` with one to three spatial dimensions.
        window_shape: Size of the window, one number for all spatial dimensions or one each.
        strides: Steps between windows. The default is the size of the window (in Linen it is 1).
        padding: `"SAME"`, `"VALID"`, or one `(low, high)` pair for each spatial dimension.
        count_include_pad: Whether the divisor counts padding.
        ceil_mode: Round the size of the output up instead of down, see `max_pool`.

    Returns:
        `[N, *pooled, C]` of the dtype of `x`.

    Raises:
        ValueError: The rank, window, strides or padding is wrong, or the window is larger than the padded input.

    Example:
        >>> x = jnp.arange(5.0).reshape(1, 5, 1)
        >>> avg_pool(x, 3, 2, "SAME", count_include_pad=False).ravel().tolist()
        [0.5, 2.0, 3.5]
    """
    window, steps, pads, asked = _geometry(x, window_shape, strides, padding, ceil_mode)
    total = sum_windows(_accumulated(x), window, steps, pads)
    count = np.ones((1,) * x.ndim)
    for axis, (extent, k, s, pad, real) in enumerate(
        zip(x.shape[1:-1], window, steps, pads, asked, strict=True), start=1
    ):
        start = np.arange(total.shape[axis]) * s - pad[0]
        low, high = (-real[0], extent + real[1]) if count_include_pad else (0, extent)
        counted = np.minimum(start + k, high) - np.maximum(start, low)
        if (counted == counted[0]).all():
            counted = counted[:1]
        count = count * np.expand_dims(counted, [i for i in range(x.ndim) if i != axis])
    return (total / jnp.asarray(np.maximum(count, 1), total.dtype)).astype(_result_dtype(x))


def l2_norm_pool(
    x: jax.Array,
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
    *,
    ceil_mode: bool = False,
) -> jax.Array:
    """Computes the Euclidean norm of every window.

    Equals `torch.nn.LPPool*d` with `norm_type=2`, except for windows that extend beyond the input with `ceil_mode`:
    torch scales their norms up as if the windows were full. The gradient at a window of zeros is 0, where the norm is
    not differentiable. Sums are computed in float32 or wider. Integers give float32.

    Args:
        x: `[N, *spatial, C]` with one to three spatial dimensions.
        window_shape: Size of the window, one number for all spatial dimensions or one each.
        strides: Steps between windows. The default is the size of the window.
        padding: `"SAME"`, `"VALID"`, or one `(low, high)` pair for each spatial dimension; padding is 0.
        ceil_mode: Round the size of the output up instead of down, see `max_pool`.

    Returns:
        `[N, *pooled, C]` of the dtype of `x`.

    Raises:
        ValueError: The rank, window, strides or padding is wrong, or the window is larger than the padded input.
    """
    window, steps, pads, _ = _geometry(x, window_shape, strides, padding, ceil_mode)
    square = sum_windows(jnp.square(_accumulated(x)), window, steps, pads)
    empty = square == 0
    # Two selections: the derivative of sqrt at 0 is infinite, and infinity times 0 is NaN.
    return jnp.where(empty, 0, jnp.sqrt(jnp.where(empty, 1, square))).astype(_result_dtype(x))


def adaptive_avg_pool(x: jax.Array, output_size: int | Sequence[int]) -> jax.Array:
    """Computes the means of a fixed number of bins for an input of any size.

    Bin `i` of `M` over a size `H` contains the positions from `floor(i H / M)` up to, but not including,
    `ceil((i + 1) H / M)`. This is the rule of `torch.nn.AdaptiveAvgPool*` and of Keras: bins may overlap by one, and
    `M` may exceed `H`. Sums are computed in float32 or wider. Integers give float32.

    Args:
        x: `[N, *spatial, C]` with one to three spatial dimensions.
        output_size: Number of bins, one number for all spatial dimensions or one each.

    Returns:
        `[N, *output_size, C]` of the dtype of `x`.

    Raises:
        ValueError: The rank is wrong, or an output size is below 1.
    """
    spatial = _spatial(x)
    bins = _each("output_size", output_size, len(spatial))
    y = _accumulated(x)
    for axis, (extent, m) in enumerate(zip(spatial, bins, strict=True), start=1):
        if extent % m == 0:
            y = y.reshape(*y.shape[:axis], m, extent // m, *y.shape[axis + 1 :]).mean(axis + 1)
        else:
            edges = [(i * extent // m, -((i + 1) * extent // -m)) for i in range(m)]
            y = jnp.stack([lax.slice_in_dim(y, a, b, axis=axis).mean(axis) for a, b in edges], axis)
    return y.astype(_result_dtype(x))


def depthwise_max_pool(x: jax.Array, window: int) -> jax.Array:
    """Computes the maximum of every `window` consecutive channels.

    Equals `tf.nn.max_pool(x, (1, 1, 1, window), (1, 1, 1, window), "VALID")`. As in `max_pool`, the gradient of a tie
    goes to the first channel, and a NaN makes its group NaN.

    Args:
        x: `[..., C]`.
        window: Number of channels in a group.

    Returns:
        `[..., C / window]` of the dtype of `x`.

    Raises:
        ValueError: `C` is not a multiple of `window`.
    """
    grouped = _groups(x, window)
    return functools.reduce(first_larger, [grouped[..., i] for i in range(window)])


def depthwise_avg_pool(x: jax.Array, window: int) -> jax.Array:
    """Computes the mean of every `window` consecutive channels.

    Equals `tf.nn.avg_pool(x, (1, 1, 1, window), (1, 1, 1, window), "VALID")`. Sums are computed in float32 or wider.
    Integers give float32.

    Args:
        x: `[..., C]`.
        window: Number of channels in a group.

    Returns:
        `[..., C / window]` of the dtype of `x`.

    Raises:
        ValueError: `C` is not a multiple of `window`.
    """
    return _groups(_accumulated(x), window).mean(-1).astype(_result_dtype(x))


def global_avg_pool(x: jax.Array) -> jax.Array:
    """Computes the mean of every feature map: `[N, *spatial, C]` to `[N, C]`.

    Equals `keras.layers.GlobalAveragePooling*`. Sums are computed in float32 or wider. Integers give float32.

    Raises:
        ValueError: `x` does not have one to three spatial dimensions.
    """
    axes = tuple(range(1, 1 + len(_spatial(x))))
    return _accumulated(x).mean(axes).astype(_result_dtype(x))


def global_max_pool(x: jax.Array) -> jax.Array:
    """Computes the maximum of every feature map: `[N, *spatial, C]` to `[N, C]`.

    Equals `keras.layers.GlobalMaxPooling*`. The gradient of a tie is shared equally, as in `tf.reduce_max`.

    Raises:
        ValueError: `x` does not have one to three spatial dimensions.
    """
    return jnp.max(x, tuple(range(1, 1 + len(_spatial(x)))))


class TrainableAvgPool(nn.Module):
    """LeNet-5's subsampling layer: the sum of a window times a coefficient plus a bias, one of each per feature map.

    LeCun, Bottou, Bengio and Haffner 1998, section II.B (layers S2 and S4). The squashing function that follows is not
    included. The coefficient starts at one over the size of the window, so an untrained layer is an average pool.

    Attributes:
        window_shape: Size of the window, one number for all spatial dimensions or one each.
        strides: Steps between windows. The default is the size of the window.
        padding: `"SAME"`, `"VALID"` or `(low, high)` pairs; padding is 0.
        dtype: Dtype of the computation; None promotes the input and the parameters.
        param_dtype: Dtype of the parameters `coefficient [C]` and `bias [C]`.
        coefficient_init: Initializer of the coefficient; None for one over the size of the window.
        bias_init: Initializer of the bias.
    """

    window_shape: int | Sequence[int] = 2
    strides: int | Sequence[int] | None = None
    padding: str | Sequence[tuple[int, int]] = "VALID"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    coefficient_init: Callable[..., jax.Array] | None = None
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, *spatial, C]` to `[N, *pooled, C]`."""
        window, steps, pads, _ = _geometry(x, self.window_shape, self.strides, self.padding, False)
        initializer = self.coefficient_init or nn.initializers.constant(1 / math.prod(window))
        coefficient = self.param("coefficient", initializer, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", self.bias_init, (x.shape[-1],), self.param_dtype)
        x, coefficient, bias = nn.dtypes.promote_dtype(x, coefficient, bias, dtype=self.dtype)
        total = sum_windows(_accumulated(x), window, steps, pads).astype(x.dtype)
        return total * spread(coefficient, total.shape) + spread(bias, total.shape)


def _spatial(x: jax.Array) -> tuple[int, ...]:
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"x must be [N, *spatial, C] with one to three spatial dimensions; got the shape {x.shape}")
    return x.shape[1:-1]


def _each(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values: tuple[Any, ...] = (value,) * rank if np.ndim(value) == 0 else tuple(value)  # type: ignore[arg-type]
    if any(not isinstance(v, int | np.integer) for v in values):
        raise ValueError(f"{name} must be an integer or {rank} of them; got {value!r}")
    values = tuple(int(v) for v in values)
    if len(values) != rank or any(v < 1 for v in values):
        raise ValueError(f"{name} must be a positive integer or {rank} of them; got {value!r}")
    return values


def _geometry(x, window_shape, strides, padding, ceil_mode) -> tuple[tuple[int, ...], tuple[int, ...], Pads, Pads]:
    """Checks the arguments; returns window, strides, the pads to apply, and the pads without those of `ceil_mode`."""
    spatial = _spatial(x)
    window = _each("window_shape", window_shape, len(spatial))
    steps = window if strides is None else _each("strides", strides, len(spatial))
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding must be 'SAME', 'VALID' or (low, high) pairs; got {padding!r}")
        asked = tuple(lax.padtype_to_pads(spatial, window, steps, padding))
    else:
        if isinstance(padding, int | np.integer):
            padding = ((int(padding), int(padding)),) * len(spatial)
        if len(padding) != len(spatial) or any(np.shape(p) != (2,) or min(p) < 0 for p in padding):
            raise ValueError(
                f"padding must be {len(spatial)} (low, high) pairs, none negative, one for each spatial dimension;"
                f" got {padding!r}"
            )
        asked = tuple((int(low), int(high)) for low, high in padding)
    pads = asked
    if ceil_mode:
        pads = tuple(map(_ceil_pads, spatial, window, steps, asked))
    if any(n + sum(p) < k for n, k, p in zip(spatial, window, pads, strict=True)):
        raise ValueError(
            f"window_shape must fit into the size {spatial} of x with the padding {asked}; got {window}."
            " In a network this means that the image is too small"
        )
    return window, steps, pads, asked


def _ceil_pads(extent: int, window: int, step: int, pad: tuple[int, int]) -> tuple[int, int]:
    low, high = pad
    outputs = -((extent + low + high - window) // -step) + 1
    if (outputs - 1) * step >= extent + low:
        outputs -= 1
    return low, max((outputs - 1) * step + window - extent - low, 0)


def _accumulated(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    if x.dtype == jnp.bfloat16:
        # On a CPU, jaxlib 0.11.2 to 0.12.0.1 miscompiles `relu(relu(x) + x).sum()` if it is fused.
        x = unfused(x)
    return x.astype(jnp.promote_types(_result_dtype(x), jnp.float32))


def _result_dtype(x: jax.Array) -> Any:
    return jax.dtypes.canonicalize_dtype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32


def _groups(x: jax.Array, window: int) -> jax.Array:
    depth = x.shape[-1]
    if window < 1 or depth % window:
        raise ValueError(f"window must divide the {depth} channels of x; got {window}")
    return x.reshape(*x.shape[:-1], depth // window, window)
