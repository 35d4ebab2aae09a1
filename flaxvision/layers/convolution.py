"""Convolutions in 1-D, 2-D and 3-D, channels last: functions of arrays, and Linen modules with Linen's parameters.

Shapes: N batch, C channels in, F features out, `*spatial` one size per spatial dimension (H W for images), `*window`
the size of the kernel. The results are those of `jax.lax.conv_general_dilated` on every platform. On a CPU, faster
arithmetic computes them; see `flaxvision.layers.lowering`. Kernels are not flipped (cross-correlation), as in Keras,
TensorFlow and torch.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import canonicalize_padding
from jax import lax

from flaxvision.layers.lowering import conv_general_dilated, dimension_numbers_of

Padding = str | int | Sequence[int | tuple[int, int]]


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Convolves over the spatial dimensions, like `keras.ops.conv` and `tf.nn.convolution` (channels last).

    Args:
        x: `[N, *spatial, C]`, one to three spatial dimensions.
        kernel: `[*window, C / feature_group_count, F]`, of the dtype of `x`.
        strides: Step of the window, one per dimension or one for all.
        padding: `"SAME"` (output `ceil(size / stride)`, with one more zero at the end if their number is odd),
            `"VALID"`, `"CIRCULAR"` (wraps around), `"REFLECT"` or `"CAUSAL"` (1-D); or a number of zeros for every
            side; or a sequence with a number or a (low, high) pair for each dimension.
        kernel_dilation: Distance between the kernel's elements ("atrous"; `dilation_rate` in Keras).
        feature_group_count: Number of groups of channels that are convolved separately.
        precision: As in `jax.lax`.

    Returns:
        `[N, *spatial_out, F]`.

    Raises:
        ValueError: The ranks, channels, groups, strides or padding do not fit each other.

    Example:
        >>> conv(jnp.ones((1, 5, 5, 3)), jnp.ones((3, 3, 3, 8)), strides=2).shape
        (1, 3, 3, 8)
    """
    rank = _rank(x, kernel)
    strides, dilation = _each(strides, rank, "strides"), _each(kernel_dilation, rank, "kernel_dilation")
    groups, channels = feature_group_count, x.shape[-1]
    if groups < 1 or channels % groups or kernel.shape[-1] % groups:
        raise ValueError(
            f"feature_group_count must divide the {channels} channels of x and the {kernel.shape[-1]} features"
            f" of the kernel; got {groups}"
        )
    if kernel.shape[-2] * groups != channels:
        raise ValueError(
            f"kernel must have {channels} / {groups} input channels for x of shape {x.shape};"
            f" got the shape {kernel.shape}"
        )
    pads = canonicalize_padding(padding, rank)  # type: ignore[arg-type]
    if isinstance(pads, str) and pads in ("CIRCULAR", "REFLECT", "CAUSAL"):
        reach = [(k - 1) * d for k, d in zip(kernel.shape, dilation, strict=False)]
        if pads == "CAUSAL":
            if rank != 1:
                raise ValueError(f"x must have one spatial dimension for padding='CAUSAL'; got {rank}")
            x = jnp.pad(x, [(0, 0), (reach[0], 0), (0, 0)])
        else:
            mode = "wrap" if pads == "CIRCULAR" else "reflect"
            x = jnp.pad(x, [(0, 0), *((r // 2, (r + 1) // 2) for r in reach), (0, 0)], mode=mode)
        pads = "VALID"
    elif isinstance(pads, str) and pads not in ("SAME", "VALID"):
        raise ValueError(f"padding must be SAME, VALID, CIRCULAR, REFLECT, CAUSAL or numbers of pixels; got {pads!r}")
    return conv_general_dilated(
        x,
        kernel,
        strides,
        pads,  # type: ignore[arg-type]
        rhs_dilation=dilation,
        dimension_numbers=dimension_numbers_of(rank),
        feature_group_count=groups,
        precision=precision,
    )


def conv_transpose(
    x: jax.Array,
    kernel: jax.Array,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    kernel_dilation: int | Sequence[int] = 1,
    transpose_kernel: bool = False,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Applies a transposed ("fractionally strided") convolution, like `jax.lax.conv_transpose`.

    With `transpose_kernel=True` this is the gradient of `conv` with respect to its input, which is what
    `keras.ops.conv_transpose` and `tf.nn.conv2d_transpose` compute. Otherwise the kernel is not flipped and its
    channels are not swapped.

    Args:
        x: `[N, *spatial, C]`.
        kernel: `[*window, C, F]`, or `[*window, F, C]` with `transpose_kernel=True`.
        strides: Factor by which the spatial size grows.
        padding: `"SAME"` (output `size * stride`), `"VALID"` (`size * stride + max(window - stride, 0)`),
            `"CIRCULAR"`, or the numbers of zeros around the dilated input.
        kernel_dilation: Distance between the kernel's elements.
        transpose_kernel: Flip the kernel's spatial axes and swap its channels.
        precision: As in `jax.lax`.

    Returns:
        `[N, *spatial_out, F]`.

    Raises:
        ValueError: The ranks, channels, strides or padding do not fit each other.

    Example:
        >>> conv_transpose(jnp.ones((1, 5, 5, 3)), jnp.ones((2, 2, 3, 8)), strides=2).shape
        (1, 10, 10, 8)
    """
    rank = _rank(x, kernel)
    strides, dilation = _each(strides, rank, "strides"), _each(kernel_dilation, rank, "kernel_dilation")
    if transpose_kernel:
        kernel = jnp.flip(kernel, range(rank)).swapaxes(-1, -2)
    if kernel.shape[-2] != x.shape[-1]:
        raise ValueError(f"kernel must have the {x.shape[-1]} input channels of x; got {kernel.shape[-2]}")
    pads = canonicalize_padding(padding, rank)  # type: ignore[arg-type]
    circular = pads == "CIRCULAR"
    if isinstance(pads, str):
        if pads not in ("SAME", "VALID", "CIRCULAR"):
            raise ValueError(f"padding must be SAME, VALID, CIRCULAR or numbers of pixels; got {pads!r}")
        reach = [(k - 1) * d + 1 for k, d in zip(kernel.shape, dilation, strict=False)]
        pads = [_transpose_padding(k, s, pads == "SAME") for k, s in zip(reach, strides, strict=True)]
    y = conv_general_dilated(
        x,
        kernel,
        (1,) * rank,
        pads,  # type: ignore[arg-type]
        lhs_dilation=strides,
        rhs_dilation=dilation,
        dimension_numbers=dimension_numbers_of(rank),
        precision=precision,
    )
    if not circular:
        return y
    # Sum the positions that are equal modulo the period, centred as in Linen.
    for axis, stride in enumerate(strides, start=1):
        period = x.shape[axis] * stride
        missing = (period - y.shape[axis]) % (2 * period)
        half = (missing // 2, (missing + 1) // 2)
        around: list[Any] = [(0, 0)] * y.ndim
        around[axis] = half if transpose_kernel else half[::-1]
        y = jnp.pad(y, around)
        y = y.reshape(*y.shape[:axis], -1, period, *y.shape[axis + 1 :]).sum(axis)
    return y


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    kernel_dilation: int | Sequence[int] = 1,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Convolves every channel with its own filters, like `keras.ops.depthwise_conv` and `tf.nn.depthwise_conv2d`.

    Args:
        x: `[N, *spatial, C]`.
        kernel: `[*window, 1, C * multiplier]`. Filter m of channel c gives feature `c * multiplier + m`. Keras' kernel
            `[*window, C, multiplier]` is this one reshaped.
        strides: As in `conv`.
        padding: As in `conv`.
        kernel_dilation: As in `conv`.
        precision: As in `jax.lax`.

    Returns:
        `[N, *spatial_out, C * multiplier]`.

    Raises:
        ValueError: As in `conv`.
    """
    return conv(
        x,
        kernel,
        strides,
        padding,
        kernel_dilation=kernel_dilation,
        feature_group_count=x.shape[-1],
        precision=precision,
    )


def separable_conv(
    x: jax.Array,
    depthwise_kernel: jax.Array,
    pointwise_kernel: jax.Array,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    kernel_dilation: int | Sequence[int] = 1,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Applies `depthwise_conv`, then a pointwise `conv`, like `keras.ops.separable_conv`.

    Args:
        x: `[N, *spatial, C]`.
        depthwise_kernel: `[*window, 1, C * multiplier]`.
        pointwise_kernel: `[1, ..., C * multiplier, F]`.
        strides: Strides of the depthwise part.
        padding: Padding of the depthwise part.
        kernel_dilation: Dilation of the depthwise part.
        precision: As in `jax.lax`.

    Returns:
        `[N, *spatial_out, F]`.

    Raises:
        ValueError: As in `conv`.
    """
    x = depthwise_conv(x, depthwise_kernel, strides, padding, kernel_dilation=kernel_dilation, precision=precision)
    return conv(x, pointwise_kernel, padding="VALID", precision=precision)


class Conv(nn.Conv):
    """`flax.linen.Conv` with arithmetic chosen by platform: the same fields, parameters and results.

    Equals `keras.layers.Conv1D/2D/3D`. At stride 2, `torch.nn.Conv*d` pads both sides equally, but `"SAME"` does not.
    Parameters: `kernel [*window, C / feature_group_count, features]`, `bias [features]`.
    """

    conv_general_dilated: Any = conv_general_dilated


class ConvTranspose(nn.ConvTranspose):
    """`flax.linen.ConvTranspose` with arithmetic chosen by platform: the same fields, parameters and results.

    Parameters: `kernel [*window, C, features]`, or `[*window, features, C]` with `transpose_kernel=True` as in
    `keras.layers.Conv2DTranspose`, and `bias [features]`. An integer stride applies to every dimension.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[*batch, *spatial, C]` to `[*batch, *spatial_out, features]`."""
        window = _tuple(self.kernel_size)
        batch = inputs.shape[: inputs.ndim - len(window) - 1]
        x = inputs.reshape(-1, *inputs.shape[len(batch) :])
        channels = (self.features, x.shape[-1]) if self.transpose_kernel else (x.shape[-1], self.features)
        shape = (*window, *channels)
        if self.mask is not None and self.mask.shape != shape:
            raise ValueError(f"mask must have the kernel's shape {shape}; got {self.mask.shape}")
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if self.mask is not None:
            kernel = kernel * self.mask
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = self.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv_transpose(
            jnp.asarray(x),
            jnp.asarray(kernel),
            self.strides or 1,
            self.padding,
            kernel_dilation=self.kernel_dilation or 1,
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
        )
        if self.preferred_element_type is not None:
            y = y.astype(self.preferred_element_type)
        if bias is not None:
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y.reshape(*batch, *y.shape[1:])


class DepthwiseConv(nn.Module):
    """Convolves every channel with `channel_multiplier` filters of its own, like `keras.layers.DepthwiseConv1D/2D`.

    Parameters: `kernel [*window, 1, C * channel_multiplier]` and `bias [C * channel_multiplier]`, which are those of
    `nn.Conv` with `feature_group_count=C`. Filter m of channel c gives feature `c * channel_multiplier + m`.
    """

    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    channel_multiplier: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: lax.PrecisionLike = None
    kernel_init: Callable[..., jax.Array] = nn.linear.default_kernel_init
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[*batch, *spatial, C]` to `[*batch, *spatial_out, C * channel_multiplier]`."""
        channels = inputs.shape[-1]
        layer = Conv(
            channels * self.channel_multiplier,
            _tuple(self.kernel_size),
            self.strides,
            self.padding,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=channels,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,  # type: ignore[arg-type]
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        nn.share_scope(self, layer)
        return layer(inputs)


class SeparableConv(nn.Module):
    """Applies a depthwise convolution without bias, then a pointwise one, like `keras.layers.SeparableConv1D/2D`.

    Parameters: `depthwise/kernel [*window, 1, C * channel_multiplier]`,
    `pointwise/kernel [1, ..., C * channel_multiplier, features]` and `pointwise/bias [features]`.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    channel_multiplier: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: lax.PrecisionLike = None
    kernel_init: Callable[..., jax.Array] = nn.linear.default_kernel_init
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[*batch, *spatial, C]` to `[*batch, *spatial_out, features]`."""
        shared: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
            "kernel_init": self.kernel_init,
        }
        depthwise = DepthwiseConv(
            self.kernel_size,
            self.strides,
            self.padding,
            self.kernel_dilation,
            self.channel_multiplier,
            use_bias=False,
            name="depthwise",
            **shared,
        )
        window = (1,) * len(_tuple(self.kernel_size))
        pointwise = Conv(
            self.features, window, use_bias=self.use_bias, bias_init=self.bias_init, name="pointwise", **shared
        )
        return pointwise(depthwise(inputs))


def _tuple(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def _each(value: int | Sequence[int], rank: int, name: str) -> tuple[int, ...]:
    values = tuple(map(operator.index, (value,) * rank if np.ndim(value) == 0 else tuple(value)))  # type: ignore[arg-type]
    if len(values) != rank or min(values) < 1:
        raise ValueError(f"{name} must be a positive integer or {rank} of them; got {value}")
    return values


def _rank(x: jax.Array, kernel: jax.Array) -> int:
    rank = x.ndim - 2
    if rank < 1 or kernel.ndim != x.ndim:
        raise ValueError(
            f"x [N, *spatial, C] and kernel [*window, C, F] must have the same rank of at least 3;"
            f" got the shapes {x.shape} and {kernel.shape}"
        )
    return rank


def _transpose_padding(window: int, stride: int, same: bool) -> tuple[int, int]:
    """Returns padding of the dilated input for "SAME" and "VALID", which restore the size of a convolution."""
    if same:
        total = window + stride - 2
        low = window - 1 if stride > window - 1 else -(-total // 2)
        return low, total - low
    return window - 1, window + stride - 2 + max(window - stride, 0) - (window - 1)
