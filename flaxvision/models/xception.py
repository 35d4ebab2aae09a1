"""Xception.

F. Chollet, "Xception: Deep learning with depthwise separable convolutions", CVPR 2017, figure 5: 34 separable layers,
not counting the first convolutions and the projections of the shortcuts.

The definition is that of Keras, by the author: pools padded as "SAME" and an epsilon of 1e-3 in BatchNorm. timm's
`legacy_xception`, with weights converted from TensorFlow, pads the pools by one on every side and has an epsilon of
1e-5: `pool_padding=((1, 1), (1, 1)), epsilon=1e-5, momentum=0.9`. For ImageNet the paper has a dropout of rate 0.5
before the classifier (section 4.3), which both libraries omit; `dropout_rate=0.5` restores it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv, SeparableConv, max_pool
from flaxvision.models.backbone import Backbone, Classifier, Initializer
from flaxvision.registry import register

Padding = str | tuple[tuple[int, int], ...]

_glorot = nn.initializers.glorot_uniform()


class XceptionBlock(nn.Module):
    """Separable 3x3 convolutions with a shortcut around them (figure 5); each is ReLU, convolution, BatchNorm.

    Attributes:
        features: Output channels of each convolution.
        strides: 2 ends the block with a 3x3 max-pool of stride 2, and projects the shortcut by a 1x1 convolution.
        first_relu: Whether a ReLU precedes the first convolution.
        pool_padding: Padding of the max-pool, before dilation.
        dilation: Dilation of the convolutions and of the max-pool.
        atrous: Whether to keep the resolution by using a stride of 1.
        conv: Makes a convolution without bias.
        separable: Makes a separable convolution without bias.
        norm: Makes a normalization; for training, `partial(BatchNorm, use_running_average=False)`.
    """

    features: tuple[int, ...]
    strides: int = 1
    first_relu: bool = True
    pool_padding: Padding = "SAME"
    dilation: int = 1
    atrous: bool = False
    conv: Callable[..., nn.Module] = functools.partial(Conv, use_bias=False)
    separable: Callable[..., nn.Module] = functools.partial(SeparableConv, use_bias=False)
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), features[-1]]`."""
        y, step = x, 1 if self.atrous else self.strides
        for i, features in enumerate(self.features, start=1):
            y = nn.relu(y) if i > 1 or self.first_relu else y
            y = self.separable(features, (3, 3), kernel_dilation=self.dilation, name=f"sepconv{i}")(y)
            y = self.norm(name=f"bn{i}")(y)
        if self.strides != 1:
            y = _dilated_max_pool(y, step, self.pool_padding, self.dilation)
        if self.strides != 1 or x.shape[-1] != self.features[-1]:
            x = self.conv(self.features[-1], (1, 1), strides=step, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return x + y


def _dilated_max_pool(x: jax.Array, strides: int, padding: Padding, dilation: int) -> jax.Array:
    """Takes the maximum over 3x3 pixels that are `dilation` apart; `strides` must be 1 if `dilation` is not."""
    if dilation == 1:
        return max_pool(x, 3, strides, padding=padding)
    # The pixels of one phase of the grid form an image of their own, which an ordinary pool serves.
    low, high = zip(*((1, 1), (1, 1)) if isinstance(padding, str) else padding, strict=True)
    n, *extents, c = x.shape
    rows, columns = (-(-(size + dilation * b) // dilation) for size, b in zip(extents, high, strict=True))
    pads = [(0, 0, 0)]
    for size, a, count in zip(extents, low, (rows, columns), strict=True):
        pads.append((dilation * a, dilation * count - size, 0))
    x = jax.lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), [*pads, (0, 0, 0)])
    rows, columns = (size // dilation for size in x.shape[1:3])
    x = x.reshape(n, rows, dilation, columns, dilation, c).transpose(0, 2, 4, 1, 3, 5)
    x = max_pool(x.reshape(-1, rows, columns, c), 3, 1)
    rows, columns = x.shape[1:3]
    x = x.reshape(n, dilation, dilation, rows, columns, c).transpose(0, 3, 1, 4, 2, 5)
    x = x.reshape(n, rows * dilation, columns * dilation, c)
    return x[:, : extents[0] + dilation * (low[0] + high[0] - 2), : extents[1] + dilation * (low[1] + high[1] - 2)]


class XceptionBackbone(Backbone):
    """Xception without its head: the entry flow, the middle flow of eight equal blocks and the exit flow.

    The stages have 64, 128, 256, 728 and 2048 channels; `stage1` to `stage3` end with an addition, without a ReLU.
    Images must have 7x7 pixels or more. The other fields are those of `Backbone`.

    Attributes:
        middle_blocks: Number of blocks in the middle flow.
        pool_padding: Padding of the max-pools: "SAME" (Keras), or one on every side (timm's `legacy_xception`).
        epsilon: Epsilon of BatchNorm: 1e-3 (Keras), 1e-5 (timm).
        momentum: Decay of BatchNorm's running statistics: 0.99 (Keras), 0.9 (timm).
    """

    middle_blocks: int = 8
    pool_padding: Padding = "SAME"
    epsilon: float = 1e-3
    momentum: float = 0.99

    atrous_from: ClassVar[int | None] = 2

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the last maps at each stride."""
        conv = functools.partial(Conv, use_bias=False, kernel_init=_glorot, **self.dtypes)
        separable = functools.partial(SeparableConv, use_bias=False, kernel_init=_glorot, **self.dtypes)
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        block = functools.partial(
            XceptionBlock, pool_padding=self.pool_padding, conv=conv, separable=separable, norm=norm
        )

        x = nn.relu(norm(name="stem_bn1")(conv(32, (3, 3), strides=2, padding="VALID", name="stem_conv1")(x)))
        x = nn.relu(norm(name="stem_bn2")(conv(64, (3, 3), padding="VALID", name="stem_conv2")(x)))
        yield "stem", x
        x = block((128, 128), first_relu=False, **self.atrous_fields(2, 2), name="stage1_block1")(x)
        yield "stage1", x
        x = block((256, 256), **self.atrous_fields(4, 2), name="stage2_block1")(x)
        yield "stage2", x
        x = block((728, 728), **self.atrous_fields(8, 2), name="stage3_block1")(x)
        for i in range(self.middle_blocks):
            x = block((728, 728, 728), **self.atrous_fields(16, 1), name=f"stage3_block{i + 2}")(x)
        yield "stage3", x
        x = block((728, 1024), **self.atrous_fields(16, 2), name="stage4_block1")(x)
        rate = self.atrous_fields(32, 1)["dilation"]
        for i, features in enumerate((1536, 2048), start=1):
            x = separable(features, (3, 3), kernel_dilation=rate, name=f"stage4_sepconv{i}")(x)
            x = nn.relu(norm(name=f"stage4_bn{i}")(x))
        yield "stage4", x


class Xception(Classifier):
    """Xception: global average pool, dropout and linear layer on an `XceptionBackbone`.

    The fields are those of `Classifier`.
    """

    @property
    def default_kernel_init(self) -> Initializer:
        """Initializer of the head unless `kernel_init` is set."""
        return _glorot


register(
    Xception,
    "xception",
    backbone=XceptionBackbone,
    task="classification",
    paper="Chollet 2017, Xception: Deep learning with depthwise separable convolutions",
    year=2017,
    input_size=(299, 299),
    channels=3,
    params=22_855_952,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
