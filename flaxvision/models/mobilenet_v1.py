"""MobileNetV1.

A. Howard, M. Zhu, B. Chen, D. Kalenichenko, W. Wang, T. Weyand, M. Andreetto, H. Adam, "MobileNets: Efficient
convolutional neural networks for mobile vision applications", arXiv:1704.04861, table 1.

Deviations from the paper:

* The last depthwise convolution has stride 1. Table 1 prints "s2", but its output keeps the size of its input.
* ReLU6 replaces ReLU, as in the authors' release, Keras and timm.
* The paper gives neither padding, BatchNorm's constants nor initializers. The defaults are those of Keras: "SAME", an
  epsilon of 1e-3, a decay of 0.99, and Glorot's uniform initialization.

Keras pads the depthwise convolutions of stride 2 by one row and one column at the end even where the input has odd
sides: `strided_padding=((0, 1), (0, 1))`. timm pads symmetrically and has an epsilon of 1e-5:
`padding=((1, 1), (1, 1)), epsilon=1e-5, momentum=0.9`.
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

# Table 1 by resolution: output channels and stride of each pair of a depthwise and a 1x1 convolution.
BLOCKS = (
    ((64, 1),),
    ((128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    ((1024, 2), (1024, 1)),
)

_glorot = nn.initializers.glorot_uniform()


class DepthwiseSeparable(nn.Module):
    """Depthwise separable convolution (figure 3, right): 3x3 depthwise and 1x1 convolution.

    BatchNorm and ReLU6 follow both.

    Attributes:
        features: Output channels.
        strides: Strides of the depthwise convolution, 1 or 2.
        padding: Padding of the depthwise convolution, before dilation.
        strided_padding: Padding of the depthwise convolution if it strides, None for `padding`.
        dilation: Dilation of the depthwise convolution.
        atrous: Whether to keep the resolution by using a stride of 1.
        conv: Makes a convolution without bias.
        depthwise: Makes a depthwise convolution without bias.
        norm: Makes a normalization; for training, `partial(BatchNorm, use_running_average=False)`.
    """

    features: int
    strides: int = 1
    padding: Padding = "SAME"
    strided_padding: Padding | None = None
    dilation: int = 1
    atrous: bool = False
    conv: Callable[..., nn.Module] = functools.partial(Conv, use_bias=False)
    depthwise: Callable[..., nn.Module] = functools.partial(DepthwiseConv, use_bias=False)
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H', W', features]`.

        H' is ceil(H / strides); with Keras' `strided_padding`, floor(H / strides).
        """
        strides = 1 if self.atrous else self.strides
        padding = self.padding if strides == 1 or self.strided_padding is None else self.strided_padding
        if not isinstance(padding, str):
            padding = tuple((self.dilation * low, self.dilation * high) for low, high in padding)
        window = {"strides": strides, "padding": padding, "kernel_dilation": self.dilation}
        x = nn.relu6(self.norm(name="depthwise_bn")(self.depthwise((3, 3), **window, name="depthwise_conv")(x)))
        return nn.relu6(self.norm(name="pointwise_bn")(self.conv(self.features, (1, 1), name="pointwise_conv")(x)))


class MobileNetV1Backbone(Backbone):
    """MobileNetV1 without its head: a 3x3 convolution and 13 depthwise separable convolutions.

    The stages have 64, 128, 256, 512 and 1024 channels. The other fields are those of `Backbone`.

    Attributes:
        width_multiplier: Factor of the channels (section 3.3), which are rounded down.
        blocks: For each stage, output channels and stride of its depthwise separable convolutions.
        padding: Padding of the 3x3 convolutions: "SAME" (TensorFlow) or symmetric (timm).
        strided_padding: Padding of the depthwise convolutions that stride: None for `padding`, or `((0, 1), (0, 1))`
            (Keras), which differs from "SAME" for odd sides.
        epsilon: Epsilon of BatchNorm: 1e-3 (Keras), 1e-5 (timm).
        momentum: Decay of BatchNorm's running statistics: 0.99 (Keras), 0.9 (timm).
    """

    width_multiplier: float = 1.0
    blocks: tuple[tuple[tuple[int, int], ...], ...] = BLOCKS
    padding: Padding = "SAME"
    strided_padding: Padding | None = None
    epsilon: float = 1e-3
    momentum: float = 0.99

    atrous_from: ClassVar[int | None] = 2

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {f"stage{i}" if i else "stem": 2 ** (i + 1) for i in range(len(self.blocks))}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the last maps at each stride."""
        conv = functools.partial(Conv, use_bias=False, kernel_init=_glorot, **self.dtypes)
        depthwise = functools.partial(DepthwiseConv, use_bias=False, kernel_init=_glorot, **self.dtypes)
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        unit = functools.partial(
            DepthwiseSeparable,
            padding=self.padding,
            strided_padding=self.strided_padding,
            conv=conv,
            depthwise=depthwise,
            norm=norm,
        )

        stem = conv(int(32 * self.width_multiplier), (3, 3), strides=2, padding=self.padding, name="stem_conv")
        x = nn.relu6(norm(name="stem_bn")(stem(x)))
        reached = 2
        for stage, blocks in zip(self.stage_strides, self.blocks, strict=True):
            for number, (channels, strides) in enumerate(blocks, start=1):
                fields = self.atrous_fields(reached, strides)
                x = unit(int(channels * self.width_multiplier), **fields, name=f"{stage}_block{number}")(x)
                reached *= strides
            yield stage, x


class MobileNetV1(Classifier):
    """MobileNetV1: global average pool, dropout and linear layer on a `MobileNetV1Backbone`.

    Keras stores the linear layer as a 1x1 convolution. The other fields are those of `Classifier`.

    Attributes:
        dropout_rate: Rate of the dropout before the linear layer.
    """

    dropout_rate: float = 1e-3

    @property
    def default_kernel_init(self) -> Initializer:
        """Initializer of the head unless `kernel_init` is set."""
        return _glorot


register(
    MobileNetV1,
    "mobilenet_v1",
    backbone=MobileNetV1Backbone,
    task="classification",
    paper="Howard et al. 2017, MobileNets: Efficient convolutional neural networks for mobile vision applications",
    year=2017,
    input_size=(224, 224),
    channels=3,
    params=4_231_976,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
