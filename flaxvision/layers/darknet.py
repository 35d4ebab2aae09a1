"""Layers of darknet that Linen lacks: `reorg`, max-pooling with darknet's padding, and locally connected layers.

J. Redmon, "Darknet: Open source neural networks in C", https://pjreddie.com/darknet, 2013-2018.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers.pooling import max_pool


def reorg(x: jax.Array, stride: int = 2) -> jax.Array:
    """Moves pixels to channels in the order of darknet's `[reorg]`, the passthrough layer of YOLOv2.

    This is not space-to-depth. darknet stores maps as `[C, H, W]`. It reads their memory as
    `[C / stride^2, H * stride, W * stride]`, applies space-to-depth to that, and reads the result as
    `[C * stride^2, H / stride, W / stride]`. Trained networks depend on this order.

    Args:
        x: `[N, H, W, C]`.
        stride: Factor by which the height and the width shrink.

    Returns:
        `[N, H / stride, W / stride, C * stride^2]`.

    Raises:
        ValueError: `stride` does not divide H and W, or its square does not divide C.
    """
    n, h, w, c = x.shape
    square = stride * stride
    if stride < 1 or h % stride or w % stride or c % square:
        raise ValueError(
            f"x must have a height and a width that are multiples of {stride} and channels that are a multiple of"
            f" {square}; got {x.shape}"
        )
    y = x.transpose(0, 3, 1, 2).reshape(n, c // square, h, stride, w, stride)
    y = y.transpose(0, 3, 5, 1, 2, 4)  # [N, row in the cell, column in the cell, C / stride^2, H, W]
    return y.reshape(n, c * square, h // stride, w // stride).transpose(0, 2, 3, 1)


def darknet_max_pool(x: jax.Array, size: int, stride: int, padding: int | None = None) -> jax.Array:
    """Computes the maximum of every window, with the padding of darknet's `[maxpool]`.

    `padding` is the total of both sides, and the smaller half comes first. The output has
    `(H + padding - size) // stride + 1` rows. For example, a window of 2 with a stride of 1 keeps the size and is
    padded at the bottom and at the right only.

    Args:
        x: `[N, H, W, C]`.
        size: Height and width of the window.
        stride: Step between windows.
        padding: Total padding of each dimension; None for `size - 1`, darknet's default.

    Returns:
        `[N, H', W', C]`.

    Raises:
        ValueError: The window is larger than the padded input, or `size` or `stride` is not positive.
    """
    total = size - 1 if padding is None else padding
    low, pads = total // 2, []
    for extent in x.shape[1:3]:
        outputs = (extent + total - size) // stride + 1
        pads.append((low, max((outputs - 1) * stride + size - extent - low, 0)))
    return max_pool(x, size, stride, pads)


class LocallyConnected(nn.Module):
    """A convolution with a separate kernel and bias at every output position, as darknet's `[local]`.

    Parameters: `kernel [H', W', size, size, C, features]` and `bias [H', W', features]`.

    Attributes:
        features: Output channels.
        size: Height and width of the window.
        stride: Step between windows.
        padding: Number of zeros on every side.
        dtype: Dtype of the computation; None promotes the input and the parameters.
        param_dtype: Dtype of the parameters.
        kernel_init: Initializer of the kernel; None for a normal distribution of variance `2 / (size^2 C)`.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: int = 0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H', W', features]`."""
        size, stride, channels = self.size, self.stride, x.shape[-1]
        x = jnp.pad(x, ((0, 0), (self.padding,) * 2, (self.padding,) * 2, (0, 0)))
        rows, columns = ((extent - size) // stride + 1 for extent in x.shape[1:3])
        init = self.kernel_init or nn.initializers.normal((2 / (size * size * channels)) ** 0.5)
        shape = (rows, columns, size, size, channels, self.features)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (rows, columns, self.features), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        last_row, last_column = (rows - 1) * stride + 1, (columns - 1) * stride + 1
        windows = jnp.stack(
            [
                jnp.stack([x[:, i : i + last_row : stride, j : j + last_column : stride] for j in range(size)], 3)
                for i in range(size)
            ],
            3,
        )  # [N, H', W', size, size, C]
        return jnp.einsum("nhwijc,hwijcf->nhwf", windows, kernel) + bias[None]
