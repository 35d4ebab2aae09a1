"""Deep residual networks, for ImageNet and for CIFAR.

K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016: table 1 for ImageNet,
section 4.2 for CIFAR-10.

Deviation in ImageNet's bottleneck nets: the paper's first 1x1 convolution of a stage takes the stride, as Keras' does;
here, as in torchvision ("v1.5"), the 3x3 does. `stride_in_1x1=True` is the paper's. ImageNet's shortcuts are option B
(projections where the shape changes), CIFAR's option A (no parameters).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv, global_avg_pool, max_pool
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.registry import register

Dtype = Any
SAME3 = ((1, 1), (1, 1))  # both sides alike at stride 2 too, where "SAME" pads only the end

_conv = functools.partial(Conv, use_bias=False)
_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_he_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def pad_shortcut(x: jax.Array, features: int, strides: int = 1) -> jax.Array:
    """Option A of the paper's section 4.1: every `strides`-th pixel, and zeros for the new channels.

    The zeros come half before and half after the old channels, the odd one after.

    Args:
        x: `[N, H, W, C]`.
        features: Channels of the result, at least `C`.
        strides: Step between the pixels that stay.

    Returns:
        `[N, ceil(H / strides), ceil(W / strides), features]`.

    Raises:
        ValueError: `features` is less than `C`.
    """
    new = features - x.shape[-1]
    if new < 0:
        raise ValueError(f"features must be at least the {x.shape[-1]} channels of x, got {features}")
    x = x[:, ::strides, ::strides]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


class BasicBlock(nn.Module):
    """The residual unit of two 3x3 convolutions (figure 5, left).

    Attributes:
        features: Output channels.
        strides: Step of the first convolution and of the shortcut.
        projection: Where the shape changes, the shortcut is a 1x1 convolution (option B); else `pad_shortcut`.
        conv: Makes a convolution without bias.
        norm: Makes a normalization; in training hand in `partial(BatchNorm, use_running_average=False)`.
    """

    features: int
    strides: int = 1
    projection: bool = True
    conv: Callable[..., nn.Module] = _conv
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), features]`."""
        y = self.conv(self.features, (3, 3), strides=self.strides, padding=SAME3, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.norm(name="bn2")(self.conv(self.features, (3, 3), padding=SAME3, name="conv2")(y))
        if self.strides != 1 or x.shape[-1] != self.features:
            if self.projection:
                x = self.conv(self.features, (1, 1), strides=self.strides, name="shortcut_conv")(x)
                x = self.norm(name="shortcut_bn")(x)
            else:
                x = pad_shortcut(x, self.features, self.strides)
        return nn.relu(y + x)


class Bottleneck(nn.Module):
    """The residual unit of a 1x1, a 3x3 and a 1x1 convolution (figure 5, right).

    Attributes:
        features: Channels of the first two convolutions; the output has four times as many.
        strides: Step of one of them and of the shortcut, which is a projection where the shape changes.
        stride_in_1x1: The first 1x1 convolution takes the step (the paper, Keras) or the 3x3 does (torchvision).
        conv: Makes a convolution without bias.
        norm: Makes a normalization; in training hand in `partial(BatchNorm, use_running_average=False)`.
    """

    features: int
    strides: int = 1
    stride_in_1x1: bool = False
    conv: Callable[..., nn.Module] = _conv
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), 4 * features]`."""
        first, second = (self.strides, 1) if self.stride_in_1x1 else (1, self.strides)
        y = self.conv(self.features, (1, 1), strides=first, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, (3, 3), strides=second, padding=SAME3, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        y = self.norm(name="bn3")(self.conv(4 * self.features, (1, 1), name="conv3")(y))
        if self.strides != 1 or x.shape[-1] != 4 * self.features:
            x = self.conv(4 * self.features, (1, 1), strides=self.strides, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return nn.relu(y + x)


class ResNetBackbone(Backbone):
    """The trunk of an ImageNet ResNet: stem at stride 2, stages at 4, 8, 16, 32.

    Attributes:
        stage_sizes: Residual units of each stage.
        features: Their width in each stage.
        bottleneck: Units are `Bottleneck` (output `4 * features`) or `BasicBlock`.
        stride_in_1x1: See `Bottleneck`; a `BasicBlock` has no choice.
        epsilon: Of the BatchNorms; Keras' is 1.001e-5.
        momentum: Decay of their running statistics; Keras' is 0.99.
        axis_name: Device axis over which BatchNorm averages under `pmap`.
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    features: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = True
    stride_in_1x1: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.9
    axis_name: str | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage."""
        return {"stem": 2} | {f"stage{i}": 2 ** (i + 1) for i in range(1, len(self.stage_sizes) + 1)}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]` to a dict of `[N, ceil(H / stride), ceil(W / stride), features]`."""
        check_images(x)
        conv, norm = _policy(self, train, _he_fan_out)
        if self.bottleneck:
            unit = functools.partial(Bottleneck, stride_in_1x1=self.stride_in_1x1, conv=conv, norm=norm)
        else:
            unit = functools.partial(BasicBlock, conv=conv, norm=norm)
        x = conv(self.features[0], (7, 7), strides=2, padding=((3, 3), (3, 3)), name="stem_conv")(x)
        x = nn.relu(norm(name="stem_bn")(x))
        stages = {"stem": x}
        x = max_pool(x, 3, 2, padding=SAME3)
        return stages | _stages(unit, self.stage_sizes, self.features, x)


class ResNet(ResNetBackbone):
    """An ImageNet ResNet: trunk, global average pool, linear classifier.

    Attributes:
        num_classes: Outputs; 0 gives the pooled features, four times the last width with bottlenecks.
    """

    num_classes: int = 1000

    @nn.nowrap  # so that it works outside of a module too
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """The trunk; its parameters are `params["backbone"]`."""
        return part_of(self, ResNetBackbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:  # type: ignore[override]
        """Maps images `[N, H, W, C]`, 224x224x3 as published, to logits `[N, num_classes]` float32."""
        return _classify(self, self.make_backbone()(x, train=train), _dense_init)


class CifarResNetBackbone(Backbone):
    """The trunk of section 4.2: a 3x3 stem and stages of basic blocks with option A at strides 1, 2, 4.

    Attributes:
        stage_sizes: Residual units of each stage, the paper's n.
        features: Channels of each stage.
        epsilon: Of the BatchNorms.
        momentum: Decay of their running statistics.
        axis_name: Device axis over which BatchNorm averages under `pmap`.
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    stage_sizes: tuple[int, ...] = (3, 3, 3)
    features: tuple[int, ...] = (16, 32, 64)
    epsilon: float = 1e-5
    momentum: float = 0.9
    axis_name: str | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage."""
        return {f"stage{i}": 2 ** (i - 1) for i in range(1, len(self.stage_sizes) + 1)}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]` to a dict of `[N, ceil(H / stride), ceil(W / stride), features]`."""
        check_images(x)
        conv, norm = _policy(self, train, _he_fan_in)
        unit = functools.partial(BasicBlock, projection=False, conv=conv, norm=norm)
        x = conv(self.features[0], (3, 3), padding=SAME3, name="stem_conv")(x)
        x = nn.relu(norm(name="stem_bn")(x))
        return _stages(unit, self.stage_sizes, self.features, x)


class CifarResNet(CifarResNetBackbone):
    """A CIFAR ResNet of section 4.2, of `6n + 2` layers.

    Attributes:
        num_classes: Outputs; 0 gives the pooled features, as many as the last stage has channels.
    """

    num_classes: int = 10

    @nn.nowrap  # so that it works outside of a module too
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """The trunk; its parameters are `params["backbone"]`."""
        return part_of(self, CifarResNetBackbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:  # type: ignore[override]
        """Maps images `[N, H, W, C]`, 32x32x3 as published, to logits `[N, num_classes]` float32."""
        return _classify(self, self.make_backbone()(x, train=train), _he_fan_in)


def _policy(module: Any, train: bool, kernel_init: Callable[..., jax.Array]):
    types = {"dtype": module.dtype, "param_dtype": module.param_dtype}
    conv = functools.partial(Conv, use_bias=False, kernel_init=kernel_init, **types)
    norm = functools.partial(
        BatchNorm,
        use_running_average=not train,
        momentum=module.momentum,
        epsilon=module.epsilon,
        axis_name=module.axis_name,
        **types,
    )
    return conv, norm


def _stages(unit, sizes: tuple[int, ...], features: tuple[int, ...], x: jax.Array) -> dict[str, jax.Array]:
    stages = {}
    for stage, (size, width) in enumerate(zip(sizes, features, strict=True), start=1):
        for block in range(1, size + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = unit(width, strides, name=f"stage{stage}_block{block}")(x)
        stages[f"stage{stage}"] = x
    return stages


def _classify(module: Any, stages: dict[str, jax.Array], kernel_init: Callable[..., jax.Array]) -> jax.Array:
    x = global_avg_pool(stages[f"stage{len(module.stage_sizes)}"])
    if module.num_classes:
        types = {"dtype": module.dtype, "param_dtype": module.param_dtype}
        x = nn.Dense(module.num_classes, kernel_init=kernel_init, name="head", **types)(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


_PAPER = {
    "task": "classification",
    "paper": "He et al. 2016, Deep residual learning for image recognition",
    "year": 2015,
    "channels": 3,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
_V1, _V2, _KERAS = "torchvision/IMAGENET1K_V1", "torchvision/IMAGENET1K_V2", "keras/imagenet"

# Table 1 of the paper: units per stage, bottleneck, parameters, published weights.
_IMAGENET = {
    "resnet18": ((2, 2, 2, 2), False, 11_689_512, (_V1, "timm/a1_in1k", "timm/tv_in1k")),
    "resnet34": ((3, 4, 6, 3), False, 21_797_672, (_V1, "timm/a1_in1k", "timm/tv_in1k")),
    "resnet50": ((3, 4, 6, 3), True, 25_557_032, (_V1, _V2, "timm/a1_in1k", "timm/tv_in1k", _KERAS)),
    "resnet101": ((3, 4, 23, 3), True, 44_549_160, (_V1, _V2, "timm/a1h_in1k", "timm/tv_in1k", _KERAS)),
    "resnet152": ((3, 8, 36, 3), True, 60_192_808, (_V1, _V2, "timm/a1h_in1k", "timm/tv_in1k", _KERAS)),
}
for _name, (_sizes, _bottleneck, _params, _weights) in _IMAGENET.items():
    register(
        ResNet,
        _name,
        defaults={"stage_sizes": _sizes, "bottleneck": _bottleneck},
        input_size=(224, 224),
        params=_params,
        weights=_weights,
        **_PAPER,
    )

# Section 4.2: n units per stage make 6n + 2 layers. The normalization is that of the widely used trained weights; the
# paper subtracts the mean image.
for _n, _params in {3: 269_722, 5: 464_154, 7: 658_586, 9: 853_018, 18: 1_727_962}.items():
    register(
        CifarResNet,
        f"resnet{6 * _n + 2}_cifar",
        defaults={"stage_sizes": (_n,) * 3},
        input_size=(32, 32),
        params=_params,
        **_PAPER,
    )
