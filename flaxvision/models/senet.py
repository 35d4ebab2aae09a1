"""Squeeze-and-excitation networks: SE-ResNet 18 to 152 and SENet-154.

J. Hu, L. Shen, G. Sun, "Squeeze-and-excitation networks", CVPR 2018 and TPAMI 2020: table 1 for SE-ResNet-50, the
section on the ImageNet challenge and the appendix for SENet-154. The definitions follow the authors' Caffe models, as
timm's `legacy_*` networks do: the first 1x1 convolution of a stage has the stride (in SENet-154 the 3x3), the pool of
the stem rounds up instead of padding, and a dropout of rate 0.2 precedes the classifier.

Deviations: the authors use dropout in SENet-154 only, timm in all networks; `dropout_rate=0` gives the paper's
SE-ResNet. As in timm, the basic block of SE-ResNet-18 and 34 has an additional ReLU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax

from flaxvision.layers import BatchNorm, Conv, SqueezeExcite, max_pool
from flaxvision.models.backbone import Backbone, Classifier, Initializer
from flaxvision.registry import register

_conv = functools.partial(Conv, use_bias=False)
_norm = functools.partial(BatchNorm, use_running_average=True)
_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class SEBasicBlock(nn.Module):
    """Residual unit of two 3x3 convolutions with a squeeze-and-excitation block before the addition (figure 3).

    Unlike the paper's and like timm's, it has a ReLU before the block too, so the residual is never negative.

    Attributes:
        features: Output channels.
        strides: Strides of the first convolution and of the shortcut, a projection where the shape changes.
        dilation: Dilation of the convolutions.
        atrous: Whether to keep the resolution: `strides` then multiply the dilation of the later convolutions.
        conv: Makes a convolution without bias.
        norm: Makes a normalization; for training, `partial(BatchNorm, use_running_average=False)`.
        se: Makes the squeeze-and-excitation block.
    """

    features: int
    strides: int = 1
    dilation: int = 1
    atrous: bool = False
    conv: Callable[..., nn.Module] = _conv
    norm: Callable[..., nn.Module] = _norm
    se: Callable[..., nn.Module] = SqueezeExcite

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), features]`."""
        before = self.dilation
        step, after = (1, before * self.strides) if self.atrous else (self.strides, before)
        y = self.conv(self.features, (3, 3), strides=step, padding=before, kernel_dilation=before, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, (3, 3), padding=after, kernel_dilation=after, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        if self.strides != 1 or x.shape[-1] != self.features:
            x = self.conv(self.features, (1, 1), strides=step, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return nn.relu(self.se(name="se")(y) + x)


class SEBottleneck(nn.Module):
    """Residual unit of 1x1, 3x3 and 1x1 convolutions with a squeeze-and-excitation block before the addition.

    See figure 3 of the paper.

    Attributes:
        features: A quarter of the output channels.
        strides: Strides of one convolution and of the shortcut, a projection where the shape changes.
        widths: Channels of the first and of the second convolution, as multiples of `features`.
        groups: Groups of channels in the 3x3 convolution.
        stride_in_1x1: Whether the first 1x1 convolution has the strides, or the 3x3.
        shortcut_size: Kernel size of the projection, 1 or 3.
        dilation: Dilation of the 3x3 convolutions.
        atrous: Whether to keep the resolution: `strides` then multiply the dilation of the later convolutions.
        conv: Makes a convolution without bias.
        norm: Makes a normalization; for training, `partial(BatchNorm, use_running_average=False)`.
        se: Makes the squeeze-and-excitation block.
    """

    features: int
    strides: int = 1
    widths: tuple[int, int] = (1, 1)
    groups: int = 1
    stride_in_1x1: bool = True
    shortcut_size: int = 1
    dilation: int = 1
    atrous: bool = False
    conv: Callable[..., nn.Module] = _conv
    norm: Callable[..., nn.Module] = _norm
    se: Callable[..., nn.Module] = SqueezeExcite

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), 4 * features]`."""
        one, two = (self.features * width for width in self.widths)
        out = 4 * self.features
        before = self.dilation
        step, after = (1, before * self.strides) if self.atrous else (self.strides, before)
        first, second, rate = (step, 1, after) if self.stride_in_1x1 else (1, step, before)
        spatial = functools.partial(
            self.conv, kernel_size=(3, 3), padding=rate, kernel_dilation=rate, feature_group_count=self.groups
        )
        y = self.conv(one, (1, 1), strides=first, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = spatial(two, strides=second, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        y = self.norm(name="bn3")(self.conv(out, (1, 1), name="conv3")(y))
        if self.strides != 1 or x.shape[-1] != out:
            size = self.shortcut_size
            pad = before * (size // 2)
            projection = functools.partial(self.conv, kernel_size=(size, size), padding=pad, kernel_dilation=before)
            x = projection(out, strides=step, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return nn.relu(self.se(name="se")(y) + x)


class SENetBackbone(Backbone):
    """SE-ResNet or SENet-154 without its head: a stem at stride 2 and stages at strides 4, 8, 16 and 32.

    The pool after the stem rounds up and does not pad. `stage1` therefore has one row less than the `ceil(H / 4)` of a
    ResNet if H is `4k + 1` or `4k + 2`; columns likewise. Images must have 3x3 pixels or more. The other fields are
    those of `Backbone`.

    Attributes:
        stage_sizes: Number of residual units in each stage.
        features: Width of the units in each stage.
        bottleneck: Whether the units are `SEBottleneck` (output `4 * features`) or `SEBasicBlock`.
        stem_features: Channels of the stem's convolutions. A single convolution is 7x7, several are 3x3. The first has
            stride 2.
        widths: See `SEBottleneck`.
        groups: See `SEBottleneck`.
        stride_in_1x1: See `SEBottleneck`.
        shortcut_size: Kernel size of the projections after the first stage.
        reduction: Channels per hidden unit of the squeeze-and-excitation blocks.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    features: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = True
    stem_features: tuple[int, ...] = (64,)
    widths: tuple[int, int] = (1, 1)
    groups: int = 1
    stride_in_1x1: bool = True
    shortcut_size: int = 1
    reduction: int = 16

    atrous_from: ClassVar[int | None] = 4

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {"stem": 2} | {f"stage{i}": 2 ** (i + 1) for i in range(1, len(self.stage_sizes) + 1)}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the output of the stem and of the last unit of each stage."""
        conv = functools.partial(_conv, kernel_init=_he_fan_out, **self.dtypes)
        norm = self.make_norm(train, epsilon=1e-5, momentum=0.9)
        se = functools.partial(SqueezeExcite, reduction=self.reduction, kernel_init=_he_fan_out, **self.dtypes)
        unit = functools.partial(SEBasicBlock, conv=conv, norm=norm, se=se)
        if self.bottleneck:
            layers = {"conv": conv, "norm": norm, "se": se}
            shape = {"widths": self.widths, "groups": self.groups, "stride_in_1x1": self.stride_in_1x1}
            unit = functools.partial(SEBottleneck, **shape, **layers)

        size = 7 if len(self.stem_features) == 1 else 3
        for i, width in enumerate(self.stem_features, start=1):
            strides = 2 if i == 1 else 1
            x = conv(width, (size, size), strides=strides, padding=size // 2, name=f"stem_conv{i}")(x)
            x = nn.relu(norm(name=f"stem_bn{i}")(x))
        yield "stem", x
        x = max_pool(x, 3, 2, ceil_mode=True)
        reached = 4
        for stage, (blocks, width) in enumerate(zip(self.stage_sizes, self.features, strict=True), start=1):
            for block in range(1, blocks + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                fields = self.atrous_fields(reached, strides)
                fields |= {"shortcut_size": self.shortcut_size} if self.bottleneck and strides > 1 else {}
                x = unit(width, **fields, name=f"stage{stage}_block{block}")(x)
                reached *= strides
            yield f"stage{stage}", x


class SENet(Classifier):
    """SE-ResNet or SENet-154: global average pool, dropout and linear layer on an `SENetBackbone`.

    The other fields are those of `Classifier`.

    Attributes:
        dropout_rate: Rate of the dropout before the linear layer.
    """

    dropout_rate: float = 0.2

    @property
    def default_kernel_init(self) -> Initializer:
        """Initializer of the head unless `kernel_init` is set."""
        return _dense_init


_SENET154 = {
    "stem_features": (64, 64, 128),
    "widths": (2, 4),
    "groups": 64,
    "stride_in_1x1": False,
    "shortcut_size": 3,
}
# Units of each stage, bottleneck, further fields, parameters.
_VARIANTS: dict[str, tuple[tuple[int, ...], bool, dict[str, Any], int]] = {
    "se_resnet18": ((2, 2, 2, 2), False, {}, 11_778_592),
    "se_resnet34": ((3, 4, 6, 3), False, {}, 21_958_868),
    "se_resnet50": ((3, 4, 6, 3), True, {}, 28_088_024),
    "se_resnet101": ((3, 4, 23, 3), True, {}, 49_326_872),
    "se_resnet152": ((3, 8, 36, 3), True, {}, 66_821_848),
    "senet154": ((3, 8, 36, 3), True, _SENET154, 115_088_984),
}
for _name, (_sizes, _bottleneck, _more, _params) in _VARIANTS.items():
    register(
        SENet,
        _name,
        backbone=SENetBackbone,
        defaults={"stage_sizes": _sizes, "bottleneck": _bottleneck, **_more},
        task="classification",
        paper="Hu et al. 2018, Squeeze-and-excitation networks",
        year=2017,
        input_size=(224, 224),
        channels=3,
        params=_params,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
