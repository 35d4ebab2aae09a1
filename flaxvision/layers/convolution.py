"""Convolutions, channels last, with the parameters of Linen's."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers.lowering import conv_general_dilated


class Conv(nn.Conv):
    """`flax.linen.Conv` over a lowering chosen by platform: the same fields, parameters and results."""

    conv_general_dilated: Any = conv_general_dilated


class ConvTranspose(nn.ConvTranspose):
    """`flax.linen.ConvTranspose` over a lowering chosen by platform: the same fields, parameters and results."""


class DepthwiseConv(nn.Module):
    """One group per input channel."""

    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Any = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    channel_multiplier: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply."""
        channels = inputs.shape[-1]
        conv = Conv(
            channels * self.channel_multiplier,
            self.kernel_size,
            self.strides,
            self.padding,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=channels,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        nn.share_scope(self, conv)
        return conv(inputs)


class SeparableConv(nn.Module):
    """Depthwise, then pointwise."""

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Any = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    channel_multiplier: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply."""
        rank = 1 if isinstance(self.kernel_size, int) else len(self.kernel_size)
        shared = dict(dtype=self.dtype, param_dtype=self.param_dtype, precision=self.precision, kernel_init=self.kernel_init)
        x = DepthwiseConv(
            self.kernel_size,
            self.strides,
            self.padding,
            self.kernel_dilation,
            self.channel_multiplier,
            use_bias=False,
            **shared,
            name="depthwise",
        )(inputs)
        return Conv(self.features, (1,) * rank, use_bias=self.use_bias, bias_init=self.bias_init, **shared, name="pointwise")(x)
