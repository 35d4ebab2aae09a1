"""A convolution with its normalization and activation, and chains of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from flaxvision.layers.convolution import Conv
from flaxvision.layers.normalization import BatchNorm


class ConvNorm(nn.Module):
    """A convolution without bias, a normalization and an activation.

    This is the unit of the Inception networks (Ioffe and Szegedy 2015, section 3.2: the shift of the normalization
    makes the bias superfluous). A model passes its policy (dtype, initializer, momentum) in two callables, which it
    makes once.

    Attributes:
        features: Output channels.
        kernel_size: Height and width of the window.
        strides: Strides of the window.
        padding: As in `layers.conv`.
        conv: Makes the convolution, for example `partial(Conv, use_bias=False, dtype=dtype)`.
        norm: Makes the normalization, for example `partial(BatchNorm, use_running_average=not train)`. The default
            normalizes by the running statistics and does not update them.
        activation: Applied last.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Any = "SAME"
    conv: Callable[..., nn.Module] = functools.partial(Conv, use_bias=False)
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H', W', features]`. The submodules are `conv` and `bn`."""
        x = self.conv(self.features, self.kernel_size, strides=self.strides, padding=self.padding, name="conv")(x)
        return self.activation(self.norm(name="bn")(x))


def conv_chain(unit: Callable[..., Any], x: jax.Array, name: str, *layers: tuple) -> jax.Array:
    """Applies convolutions in sequence. Call it from a compact method, which then owns the submodules.

    Args:
        unit: Makes one convolution, for example `partial(ConvNorm, conv=..., norm=...)`.
        x: `[N, H, W, C]`.
        name: Prefix of the submodules `name_1`, `name_2`, ...; a chain of one is called `name`.
        *layers: `(features, kernel_size, strides, padding)` of each convolution. The last two are optional and default
            to 1 and to half the kernel on every side. An integer kernel size means a square kernel.

    Returns:
        The output of the last convolution, `[N, H', W', features]`.
    """
    for i, (features, size, *rest) in enumerate(layers, start=1):
        window = (size, size) if isinstance(size, int) else size
        strides, padding = (*rest, *(1, [(k // 2, k // 2) for k in window])[len(rest) :])
        x = unit(features, window, strides, padding, name=f"{name}_{i}" if len(layers) > 1 else name)(x)
    return x
