"""MobileNetV2.

M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen, "MobileNetV2: Inverted residuals and linear bottlenecks", CVPR
2018, table 2.

The definition is torchvision's: symmetric padding, an epsilon of 1e-5 in BatchNorm, He initialization by fan-out, and
dropout before the classifier. The authors' network in TensorFlow and Keras pads as "SAME", which pads only the end at
stride 2, and has an epsilon of 1e-3: `padding="SAME", epsilon=1e-3, momentum=0.999`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import flax.linen as nn
import jax

from flaxvision.layers import BatchNorm, Conv, DepthwiseConv
from flaxvision.models.backbone import Backbone, Classifier, Initializer
from flaxvision.registry import register

Padding = str | tuple[tuple[int, int], ...]

SYMMETRIC = ((1, 1), (1, 1))
# Table 2 by resolution: expansion factor, output channels, repetitions, and stride of the first block of each row.
BLOCKS = (
    ((1, 16, 1, 1),),
    ((6, 24, 2, 2),),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)

_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def rounded(channels: float, multiple: int = 8) -> int:
    """Returns the multiple of `multiple` nearest to `channels` that is not 0 and not below 90 % of `channels`."""
    near = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return near + multiple if near < 0.9 * channels else near


class InvertedResidual(nn.Module):
    """Inverted residual block (section 3.4, table 1): 1x1 expansion, 3x3 depthwise convolution, 1x1 projection.

    ReLU6 follows the first two and nothing follows the projection. The input is added where the shape stays the same.

    Attributes:
        features: Output channels.
        expansion: Hidden channels per input channel; 1 omits the expansion.
        strides: Strides of the depthwise convolution, 1 or 2.
        padding: Padding of the depthwise convolution, before dilation.
        dilation: Dilation of the depthwise convolution.
        atrous: Whether to keep the resolution by using a stride of 1.
        conv: Makes a convolution without bias.
        depthwise: Makes a depthwise convolution without bias.
        norm: Makes a normalization; for training, `partial(BatchNorm, use_running_average=False)`.
    """

    features: int
    expansion: int = 6
    strides: int = 1
    padding: Padding = SYMMETRIC
    dilation: int = 1
    atrous: bool = False
    conv: Callable[..., nn.Module] = functools.partial(Conv, use_bias=False)
    depthwise: Callable[..., nn.Module] = functools.partial(DepthwiseConv, use_bias=False)
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), features]`."""
        rate, padding = self.dilation, self.padding
        if not isinstance(padding, str):
            padding = tuple((rate * low, rate * high) for low, high in padding)
        window = {"strides": 1 if self.atrous else self.strides, "padding": padding, "kernel_dilation": rate}
        channels, y = x.shape[-1], x
        if self.expansion != 1:
            y = self.conv(self.expansion * channels, (1, 1), name="expand_conv")(y)
            y = nn.relu6(self.norm(name="expand_bn")(y))
        y = self.depthwise((3, 3), **window, name="depthwise_conv")(y)
        y = nn.relu6(self.norm(name="depthwise_bn")(y))
        y = self.norm(name="project_bn")(self.conv(self.features, (1, 1), name="project_conv")(y))
        return x + y if self.strides == 1 and channels == self.features else y


class MobileNetV2Backbone(Backbone):
    """MobileNetV2 without its head: a 3x3 convolution, 17 inverted residual blocks and a 1x1 convolution.

    The stages have 16, 24, 32, 96 and `last_features` channels. The other fields are those of `Backbone`.

    Attributes:
        width_multiplier: Factor of the channels. The last convolution has at least `last_features` channels.
        channel_multiple: The channels are rounded to multiples of it. TensorFlow's DeepLab has 8 times a
            `width_multiplier` below 1.
        last_features: Channels of the 1x1 convolution of the last stage; 0 omits it, as DeepLab does.
        blocks: For each stage, the rows of table 2: expansion factor, output channels, repetitions, first stride.
        padding: Padding of the 3x3 convolutions: symmetric (torchvision) or "SAME" (TensorFlow, Keras).
        epsilon: Epsilon of BatchNorm: 1e-5 (torchvision), 1e-3 (TensorFlow, Keras).
        momentum: Decay of BatchNorm's running statistics: 0.9 (torchvision), 0.999 (Keras).
    """

    width_multiplier: float = 1.0
    channel_multiple: int = 8
    last_features: int = 1280
    blocks: tuple[tuple[tuple[int, int, int, int], ...], ...] = BLOCKS
    padding: Padding = SYMMETRIC
    epsilon: float = 1e-5
    momentum: float = 0.9

    atrous_from: ClassVar[int | None] = 2

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {f"stage{i}" if i else "stem": 2 ** (i + 1) for i in range(len(self.blocks))}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the last maps at each stride."""
        conv = functools.partial(Conv, use_bias=False, kernel_init=_he_fan_out, **self.dtypes)
        depthwise = functools.partial(DepthwiseConv, use_bias=False, kernel_init=_he_fan_out, **self.dtypes)
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        unit = functools.partial(InvertedResidual, padding=self.padding, conv=conv, depthwise=depthwise, norm=norm)

        width = functools.partial(rounded, multiple=self.channel_multiple)

        stem = conv(width(32 * self.width_multiplier), (3, 3), strides=2, padding=self.padding, name="stem_conv")
        x = nn.relu6(norm(name="stem_bn")(stem(x)))
        reached = 2
        last = list(self.stage_strides)[-1]
        for stage, rows in zip(self.stage_strides, self.blocks, strict=True):
            blocks = [(*row[:2], row[3] if i == 0 else 1) for row in rows for i in range(row[2])]
            for number, (expansion, channels, strides) in enumerate(blocks, start=1):
                fields = self.atrous_fields(reached, strides)
                features = width(channels * self.width_multiplier)
                x = unit(features, expansion, **fields, name=f"{stage}_block{number}")(x)
                reached *= strides
            if stage == last and self.last_features:
                x = conv(width(self.last_features * max(1.0, self.width_multiplier)), (1, 1), name=f"{stage}_conv")(x)
                x = nn.relu6(norm(name=f"{stage}_bn")(x))
            yield stage, x


class MobileNetV2(Classifier):
    """MobileNetV2: global average pool, dropout and linear layer on a `MobileNetV2Backbone`.

    The other fields are those of `Classifier`.

    Attributes:
        dropout_rate: Rate of the dropout before the linear layer.
    """

    dropout_rate: float = 0.2
    kernel_init: Initializer | None = nn.initializers.normal(0.01)


register(
    MobileNetV2,
    "mobilenet_v2",
    backbone=MobileNetV2Backbone,
    task="classification",
    paper="Sandler et al. 2018, MobileNetV2: Inverted residuals and linear bottlenecks",
    year=2018,
    input_size=(224, 224),
    channels=3,
    params=3_504_872,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
