"""Pooling over one to three spatial dimensions, over channels, and over everything.

Arrays are channels last, `[N, *spatial, C]`. On the CPU the pools take a separable form that XLA vectorises; elsewhere
they are plain `lax.reduce_window`. Both give the same values and the same gradients, ties included.
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
    """Takes the maximum of every window; padding never wins over a number.

    Where a window holds its maximum more than once, the whole gradient goes to the first place in row-major order. A
    NaN makes its windows NaN. A window of nothing but padding gives the dtype's least value (-inf for floats). The
    figures are those of `keras.layers.MaxPooling*`, `tf.nn.max_pool` and, with `ceil_mode`, `torch.nn.MaxPool*`.

    Args:
        x: `[N, *spatial, C]` with one to three spatial dimensions, floating point or integer.
        window_shape: extent of the window, one number for all spatial dimensions or one each.
        strides: steps between windows, the window's own extent by default (as Keras and torch; Linen's default is 1).
        padding: "SAME", "VALID" or one `(low, high)` pair for each spatial dimension.
        ceil_mode: round the output's extent up instead of down, as torch: a last window that hangs over the high end
            counts if it starts inside the input or the low padding.

    Returns:
        `[N, *pooled, C]` of the dtype of `x`.

    Raises:
        ValueError: a wrong rank, window, stride or padding, or a window larger than the padded input.
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
    """Takes the mean of every window.

    `count_include_pad=True`, the default, divides by the window's size as Linen and torch do by default; `False`
    divides by the number of real elements, as `keras.layers.AveragePooling*` and `tf.nn.avg_pool` do. With `ceil_mode`,
    what hangs over the padded input never counts, as in `torch.nn.AvgPool*`. A window without a counted element gives
    0. Sums are float32 under bfloat16 and float16; integers give float32.

    Args:
        x: `[N, *spatial, C]` with one to three spatial dimensions.
        window_shape: extent of the window, one number for all spatial dimensions or one each.
        strides: steps between windows, the window's own extent by default (Linen's default is 1).
        padding: "SAME", "VALID" or one `(low, high)` pair for each spatial dimension.
        count_include_pad: whether padding counts in the divisor.
        ceil_mode: round the output's extent up instead of down, see `max_pool`.

    Returns:
        `[N, *pooled, C]` of the dtype of `x`.

    Raises:
        ValueError: a wrong rank, window, stride or padding, or a window larger than the padded input.
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
    """Takes the Euclidean norm of every window, the square root of its sum of squares.

    Equals `torch.nn.LPPool*d` with `norm_type=2`; with `ceil_mode` a window that juts out is the norm of what is in it,
    where torch scales that up to the full window. The gradient at a window of zeros is 0 (the norm has none there).
    Sums are float32 under bfloat16 and float16; integers give float32.

    Args:
        x: `[N, *spatial, C]` with one to three spatial dimensions.
        window_shape: extent of the window, one number for all spatial dimensions or one each.
        strides: steps between windows, the window's own extent by default.
        padding: "SAME", "VALID" or one `(low, high)` pair for each spatial dimension; padding is 0.
        ceil_mode: round the output's extent up instead of down, see `max_pool`.

    Returns:
        `[N, *pooled, C]` of the dtype of `x`.

    Raises:
        ValueError: a wrong rank, window, stride or padding, or a window larger than the padded input.
    """
    window, steps, pads, _ = _geometry(x, window_shape, strides, padding, ceil_mode)
    square = sum_windows(jnp.square(_accumulated(x)), window, steps, pads)
    empty = square == 0
    # Two selections: the derivative of sqrt at 0 is infinite, and infinity times 0 would be NaN.
    return jnp.where(empty, 0, jnp.sqrt(jnp.where(empty, 1, square))).astype(_result_dtype(x))


def adaptive_avg_pool(x: jax.Array, output_size: int | Sequence[int]) -> jax.Array:
    """Takes the means of a fixed number of bins, whatever the input's extent.

    Bin `i` of `M` over an extent `H` runs from `floor(i H / M)` to `ceil((i + 1) H / M)` (exclusive), the rule of
    `torch.nn.AdaptiveAvgPool*`: bins may overlap by one, and `M` may exceed `H`. Keras' AdaptiveAveragePooling does so
    too. Sums are float32 under bfloat16 and float16; integers give float32.

    Args:
        x: `[N, *spatial, C]` with one to three spatial dimensions.
        output_size: number of bins, one number for all spatial dimensions or one each.

    Returns:
        `[N, *output_size, C]` of the dtype of `x`.

    Raises:
        ValueError: a wrong rank or an output size below 1.
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
    """Takes the maximum of every `window` consecutive channels.

    Equals `tf.nn.max_pool(x, (1, 1, 1, window), (1, 1, 1, window), "VALID")`. The gradient of a tie goes to the first
    channel, and a NaN makes its group NaN, as in `max_pool`.

    Args:
        x: `[..., C]`.
        window: channels to a group.

    Returns:
        `[..., C / window]` of the dtype of `x`.

    Raises:
        ValueError: `C` is not a multiple of `window`.
    """
    grouped = _groups(x, window)
    return functools.reduce(first_larger, [grouped[..., i] for i in range(window)])


def depthwise_avg_pool(x: jax.Array, window: int) -> jax.Array:
    """Takes the mean of every `window` consecutive channels.

    Equals `tf.nn.avg_pool(x, (1, 1, 1, window), (1, 1, 1, window), "VALID")`. Sums are float32 under bfloat16 and
    float16; integers give float32.

    Args:
        x: `[..., C]`.
        window: channels to a group.

    Returns:
        `[..., C / window]` of the dtype of `x`.

    Raises:
        ValueError: `C` is not a multiple of `window`.
    """
    return _groups(_accumulated(x), window).mean(-1).astype(_result_dtype(x))


def global_avg_pool(x: jax.Array) -> jax.Array:
    """Takes the mean of every feature map: `[N, *spatial, C]` to `[N, C]`.

    Equals `keras.layers.GlobalAveragePooling*`. Sums are float32 under bfloat16 and float16; integers give float32.

    Raises:
        ValueError: not one to three spatial dimensions.
    """
    axes = tuple(range(1, 1 + len(_spatial(x))))
    return _accumulated(x).mean(axes).astype(_result_dtype(x))


def global_max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum of every feature map: `[N, *spatial, C]` to `[N, C]`.

    Equals `keras.layers.GlobalMaxPooling*`. A tie shares its gradient equally, as `tf.reduce_max` does.

    Raises:
        ValueError: not one to three spatial dimensions.
    """
    return jnp.max(x, tuple(range(1, 1 + len(_spatial(x)))))


class TrainableAvgPool(nn.Module):
    """LeNet-5's sub-sampling layer: the window's sum times a coefficient plus a bias, one of each per feature map.

    LeCun, Bottou, Bengio and Haffner 1998, section II.B (layers S2 and S4); the squashing function comes after it. The
    coefficient starts at one over the window's size, so that an untrained layer is an average pool. As with
    convolutions, `jax.jvp` does not go straight through it.

    Attributes:
        window_shape: extent of the window, one number for all spatial dimensions or one each.
        strides: steps between windows, the window's own extent by default.
        padding: "SAME", "VALID" or `(low, high)` pairs; padding is 0.
        dtype: of the computation, by default promoted from the input and the parameters.
        param_dtype: of the parameters `coefficient [C]` and `bias [C]`.
        coefficient_init: initializer of the coefficient; None for one over the window's size.
        bias_init: initializer of the bias.
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
        raise ValueError(f"x must be [N, *spatial, C] with one to three spatial dimensions, got the shape {x.shape}")
    return x.shape[1:-1]


def _each(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values: tuple[Any, ...] = (value,) * rank if np.ndim(value) == 0 else tuple(value)  # type: ignore[arg-type]
    if any(not isinstance(v, int | np.integer) for v in values):
        raise ValueError(f"{name} must be an integer or {rank} of them, got {value!r}")
    values = tuple(int(v) for v in values)
    if len(values) != rank or any(v < 1 for v in values):
        raise ValueError(f"{name} must be a positive number or {rank} of them, got {value!r}")
    return values


def _geometry(x, window_shape, strides, padding, ceil_mode) -> tuple[tuple[int, ...], tuple[int, ...], Pads, Pads]:
    """Checks the arguments; the last two results are the pads to apply, and those before `ceil_mode` widened them."""
    spatial = _spatial(x)
    window = _each("window_shape", window_shape, len(spatial))
    steps = window if strides is None else _each("strides", strides, len(spatial))
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f'padding must be "SAME", "VALID" or (low, high) pairs, got {padding!r}')
        asked = tuple(lax.padtype_to_pads(spatial, window, steps, padding))
    else:
        if isinstance(padding, int | np.integer):
            padding = ((int(padding), int(padding)),) * len(spatial)
        if len(padding) != len(spatial) or any(np.shape(p) != (2,) or min(p) < 0 for p in padding):
            raise ValueError(
                f"padding must be {len(spatial)} (low, high) pairs, none negative, one for each spatial dimension, "
                f"got {padding!r}"
            )
        asked = tuple((int(low), int(high)) for low, high in padding)
    pads = asked
    if ceil_mode:
        pads = tuple(map(_ceil_pads, spatial, window, steps, asked))
    if any(n + sum(p) < k for n, k, p in zip(spatial, window, pads, strict=True)):
        raise ValueError(
            f"window_shape {window} exceeds the input's extent {spatial} padded by {asked}; "
            "within a network, its image is too small"
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
        # On a CPU jaxlib 0.11.2 to 0.12.0.1 gets `relu(relu(x) + x).sum()` wrong where it fuses that into one.
        x = unfused(x)
    return x.astype(jnp.promote_types(_result_dtype(x), jnp.float32))


def _result_dtype(x: jax.Array) -> Any:
    return jax.dtypes.canonicalize_dtype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32


def _groups(x: jax.Array, window: int) -> jax.Array:
    depth = x.shape[-1]
    if window < 1 or depth % window:
        raise ValueError(f"the depth of x must be a multiple of window, got depth {depth} and window {window}")
    return x.reshape(*x.shape[:-1], depth // window, window)
