"""Deep residual networks, for ImageNet and for CIFAR.

K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016: table 1 for ImageNet,
section 4.2 for CIFAR-10.

Deviation in the bottleneck networks for ImageNet: the paper (and Keras) puts the stride of a stage in the first 1x1
convolution; here, as in torchvision ("v1.5"), it is in the 3x3 convolution. `stride_in_1x1=True` follows the paper.
The ImageNet networks use shortcuts of option B (projections where the shape changes), the CIFAR networks those of
option A (no parameters).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv, max_pool
from flaxvision.models.backbone import Backbone, Classifier, Initializer
from flaxvision.registry import register

SAME3 = ((1, 1), (1, 1))  # symmetric at stride 2 too, where "SAME" pads only the end

_conv = functools.partial(Conv, use_bias=False)
_norm = functools.partial(BatchNorm, use_running_average=True)
_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_he_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def pad_shortcut(x: jax.Array, features: int, strides: int = 1) -> jax.Array:
    """Shortcut of option A (section 4.1): subsamples the pixels and pads the channels with zeros.

    Half of the zeros come before the input's channels and half after; an odd one comes after.

    Args:
        x: `[N, H, W, C]`.
        features: Channels of the result, at least `C`.
        strides: Step between the pixels that are kept.

    Returns:
        `[N, ceil(H / strides), ceil(W / strides), features]`.

    Raises:
        ValueError: `features` is less than `C`.
    """
    new = features - x.shape[-1]
    if new < 0:
        raise ValueError(f"features must be at least the {x.shape[-1]} channels of x; got {features}")
    x = x[:, ::strides, ::strides]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


class BasicBlock(nn.Module):
    """Residual unit of two 3x3 convolutions (figure 5, left).

    Attributes:
        features: Output channels.
        strides: Strides of the first convolution and of the shortcut.
        projection: Whether the shortcut is a 1x1 convolution where the shape changes (option B), or `pad_shortcut`.
        dilation: Dilation of the convolutions.
        atrous: Whether to keep the resolution; `strides` then multiplies the dilation of the later convolutions.
        conv: Makes a convolution without bias.
        norm: Makes a normalization; for training, `partial(BatchNorm, use_running_average=False)`.
    """

    features: int
    strides: int = 1
    projection: bool = True
    dilation: int = 1
    atrous: bool = False
    conv: Callable[..., nn.Module] = _conv
    norm: Callable[..., nn.Module] = _norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), features]`."""
        before = self.dilation
        step, after = (1, before * self.strides) if self.atrous else (self.strides, before)
        y = self.conv(self.features, (3, 3), strides=step, padding=before, kernel_dilation=before, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, (3, 3), padding=after, kernel_dilation=after, name="conv2")(y)
        y = self.norm(name="bn2")(y)
        if self.strides != 1 or x.shape[-1] != self.features:
            if self.projection:
                x = self.conv(self.features, (1, 1), strides=step, name="shortcut_conv")(x)
                x = self.norm(name="shortcut_bn")(x)
            else:
                x = pad_shortcut(x, self.features, step)
        return nn.relu(y + x)


class Bottleneck(nn.Module):
    """Residual unit of a 1x1, a 3x3 and a 1x1 convolution (figure 5, right).

    Attributes:
        features: Channels of the first two convolutions; the output has four times as many.
        strides: Strides of one of the first two convolutions (see `stride_in_1x1`) and of the shortcut. The shortcut
            is a projection where the shape changes.
        stride_in_1x1: Whether the first 1x1 convolution has the strides (the paper, Keras) or the 3x3 (torchvision).
        dilation: Dilation of the 3x3 convolution.
        atrous: Whether to keep the resolution; `strides` then multiplies the dilation of the later convolutions.
        conv: Makes a convolution without bias.
        norm: Makes a normalization; for training, `partial(BatchNorm, use_running_average=False)`.
    """

    features: int
    strides: int = 1
    stride_in_1x1: bool = False
    dilation: int = 1
    atrous: bool = False
    conv: Callable[..., nn.Module] = _conv
    norm: Callable[..., nn.Module] = _norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), 4 * features]`."""
        step, after = (1, self.dilation * self.strides) if self.atrous else (self.strides, self.dilation)
        first, second, rate = (step, 1, after) if self.stride_in_1x1 else (1, step, self.dilation)
        y = self.conv(self.features, (1, 1), strides=first, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, (3, 3), strides=second, padding=rate, kernel_dilation=rate, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        y = self.norm(name="bn3")(self.conv(4 * self.features, (1, 1), name="conv3")(y))
        if self.strides != 1 or x.shape[-1] != 4 * self.features:
            x = self.conv(4 * self.features, (1, 1), strides=step, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return nn.relu(y + x)


class ResNetBackbone(Backbone):
    """ResNet for ImageNet without its head: a stem at stride 2 and stages at strides 4, 8, 16 and 32.

    The other fields are those of `Backbone`.

    Attributes:
        stage_sizes: Number of residual units in each stage.
        features: Width of the units in each stage.
        bottleneck: Whether the units are `Bottleneck` (output `4 * features`) or `BasicBlock`.
        stride_in_1x1: See `Bottleneck`; has no effect on `BasicBlock`.
        epsilon: Epsilon of BatchNorm; Keras uses 1.001e-5.
        momentum: Decay of BatchNorm's running statistics; Keras uses 0.99.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    features: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = True
    stride_in_1x1: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.9

    atrous_from: ClassVar[int | None] = 4

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {"stem": 2} | {f"stage{i}": 2 ** (i + 1) for i in range(1, len(self.stage_sizes) + 1)}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields `[N, ceil(H / stride), ceil(W / stride), features]` for each stage."""
        conv = functools.partial(_conv, kernel_init=_he_fan_out, **self.dtypes)
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        if self.bottleneck:
            unit = functools.partial(Bottleneck, stride_in_1x1=self.stride_in_1x1, conv=conv, norm=norm)
        else:
            unit = functools.partial(BasicBlock, conv=conv, norm=norm)

        x = conv(self.features[0], (7, 7), strides=2, padding=((3, 3), (3, 3)), name="stem_conv")(x)
        x = nn.relu(norm(name="stem_bn")(x))
        yield "stem", x
        x = max_pool(x, 3, 2, padding=SAME3)
        yield from _stages(self, unit, x, reached=4)


class ResNet(Classifier):
    """ResNet for ImageNet (224x224x3 as published): global average pool and linear layer on a `ResNetBackbone`.

    The fields are those of `Classifier`.
    """

    kernel_init: Initializer | None = _dense_init


class CifarResNetBackbone(Backbone):
    """ResNet for CIFAR without its head (section 4.2): a 3x3 stem and stages of basic blocks at strides 1, 2 and 4.

    The other fields are those of `Backbone`.

    Attributes:
        stage_sizes: Number of residual units in each stage, the paper's n.
        features: Channels of each stage.
        epsilon: Epsilon of BatchNorm.
        momentum: Decay of BatchNorm's running statistics.
    """

    stage_sizes: tuple[int, ...] = (3, 3, 3)
    features: tuple[int, ...] = (16, 32, 64)
    epsilon: float = 1e-5
    momentum: float = 0.9

    atrous_from: ClassVar[int | None] = 1

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {f"stage{i}": 2 ** (i - 1) for i in range(1, len(self.stage_sizes) + 1)}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields `[N, ceil(H / stride), ceil(W / stride), features]` for each stage."""
        conv = functools.partial(_conv, kernel_init=_he_fan_in, **self.dtypes)
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        unit = functools.partial(BasicBlock, projection=False, conv=conv, norm=norm)

        x = conv(self.features[0], (3, 3), padding=SAME3, name="stem_conv")(x)
        x = nn.relu(norm(name="stem_bn")(x))
        yield from _stages(self, unit, x, reached=1)


class CifarResNet(Classifier):
    """ResNet of `6n + 2` layers for CIFAR (32x32x3): global average pool and linear layer on a `CifarResNetBackbone`.

    The fields are those of `Classifier`.
    """

    num_classes: int = 10
    kernel_init: Initializer | None = _he_fan_in


def _stages(
    backbone: ResNetBackbone | CifarResNetBackbone, unit: Callable[..., nn.Module], x: jax.Array, reached: int
) -> Iterator[tuple[str, jax.Array]]:
    for stage, (size, width) in enumerate(zip(backbone.stage_sizes, backbone.features, strict=True), start=1):
        for block in range(1, size + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = unit(width, **backbone.atrous_fields(reached, strides), name=f"stage{stage}_block{block}")(x)
            reached *= strides
        yield f"stage{stage}", x


_PAPER = {
    "task": "classification",
    "paper": "He et al. 2016, Deep residual learning for image recognition",
    "year": 2015,
    "channels": 3,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}

# Table 1 of the paper: units of each stage, bottleneck, parameters.
_IMAGENET = {
    "resnet18": ((2, 2, 2, 2), False, 11_689_512),
    "resnet34": ((3, 4, 6, 3), False, 21_797_672),
    "resnet50": ((3, 4, 6, 3), True, 25_557_032),
    "resnet101": ((3, 4, 23, 3), True, 44_549_160),
    "resnet152": ((3, 8, 36, 3), True, 60_192_808),
}
for _name, (_sizes, _bottleneck, _params) in _IMAGENET.items():
    register(
        ResNet,
        _name,
        backbone=ResNetBackbone,
        defaults={"stage_sizes": _sizes, "bottleneck": _bottleneck},
        input_size=(224, 224),
        params=_params,
        **_PAPER,
    )

# Section 4.2: n units per stage make 6n + 2 layers. Mean and std are those of widely used trained weights; the paper
# subtracts the mean image instead.
for _n, _params in {3: 269_722, 5: 464_154, 7: 658_586, 9: 853_018, 18: 1_727_962}.items():
    register(
        CifarResNet,
        f"resnet{6 * _n + 2}_cifar",
        backbone=CifarResNetBackbone,
        defaults={"stage_sizes": (_n,) * 3},
        input_size=(32, 32),
        params=_params,
        **_PAPER,
    )
