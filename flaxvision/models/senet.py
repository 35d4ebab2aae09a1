"""Squeeze-and-excitation networks: SE-ResNet 18 to 152 and SENet-154.

J. Hu, L. Shen, G. Sun, "Squeeze-and-excitation networks", CVPR 2018 and TPAMI 2020: table 1 for SE-ResNet-50, the
section on ImageNet's challenge and the appendix for SENet-154. The definitions are those of the authors' Caffe models
as timm's `legacy_*` nets have them: the first 1x1 convolution of a stage takes the stride (in SENet-154 the 3x3), the
stem's pool rounds up instead of padding, and a fifth of the pooled features is dropped in training.

Deviations: the authors drop features in SENet-154 only, timm in all; `dropout_rate=0` is the paper's SE-ResNet. timm's
basic block, of SE-ResNet-18 and 34, has one ReLU more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv, SqueezeExcite, global_avg_pool, max_pool
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.registry import register

Dtype = Any
SAME3 = ((1, 1), (1, 1))  # both sides alike at stride 2 too, where "SAME" pads only the end

_conv = functools.partial(Conv, use_bias=False)
_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class SEBasicBlock(nn.Module):
    """ResNet's unit of two 3x3 convolutions with an SE block before the addition (figure 3).

    Unlike the paper's, and as timm's, it has a ReLU before the SE block too, so that the residual is never negative.

    Attributes:
        features: Output channels.
        strides: Step of the first convolution and of the shortcut, which is a projection where the shape changes.
        conv: Makes a convolution without bias.
        norm: Makes a normalization; in training hand in `partial(BatchNorm, use_running_average=False)`.
        se: Makes the SE block.
    """

    features: int
    strides: int = 1
    conv: Callable[..., nn.Module] = _conv
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)
    se: Callable[..., nn.Module] = SqueezeExcite

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), features]`."""
        y = self.conv(self.features, (3, 3), strides=self.strides, padding=SAME3, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, (3, 3), padding=SAME3, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        if self.strides != 1 or x.shape[-1] != self.features:
            x = self.conv(self.features, (1, 1), strides=self.strides, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return nn.relu(self.se(name="se")(y) + x)


class SEBottleneck(nn.Module):
    """ResNet's unit of 1x1, 3x3 and 1x1 convolutions with an SE block before the addition (figure 3).

    Attributes:
        features: A quarter of the output channels.
        strides: Step of one convolution and of the shortcut, which is a projection where the shape changes.
        widths: Channels of the first and of the second convolution, in `features`.
        groups: Groups of channels in the 3x3 convolution.
        stride_in_1x1: The first 1x1 convolution takes the step, or the 3x3 does.
        shortcut_size: Window of the projection, 1 or 3.
        conv: Makes a convolution without bias.
        norm: Makes a normalization; in training hand in `partial(BatchNorm, use_running_average=False)`.
        se: Makes the SE block.
    """

    features: int
    strides: int = 1
    widths: tuple[int, int] = (1, 1)
    groups: int = 1
    stride_in_1x1: bool = True
    shortcut_size: int = 1
    conv: Callable[..., nn.Module] = _conv
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)
    se: Callable[..., nn.Module] = SqueezeExcite

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), 4 * features]`."""
        one, two = (self.features * width for width in self.widths)
        out = 4 * self.features
        first, second = (self.strides, 1) if self.stride_in_1x1 else (1, self.strides)
        y = self.conv(one, (1, 1), strides=first, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(
            two, (3, 3), strides=second, padding=SAME3, feature_group_count=self.groups, name="conv2"
        )(y)  # fmt: skip
        y = nn.relu(self.norm(name="bn2")(y))
        y = self.norm(name="bn3")(self.conv(out, (1, 1), name="conv3")(y))
        if self.strides != 1 or x.shape[-1] != out:
            size, pad = self.shortcut_size, self.shortcut_size // 2
            x = self.conv(out, (size, size), strides=self.strides, padding=((pad, pad),) * 2, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return nn.relu(self.se(name="se")(y) + x)


class SENetBackbone(Backbone):
    """The trunk of an SE-ResNet or of SENet-154: stem at stride 2, stages at 4, 8, 16, 32.

    The pool behind the stem rounds up and does not pad: stage1 has one row less than ResNet's `ceil(H / 4)` where H is
    `4k + 1` or `4k + 2`, and columns likewise.

    Attributes:
        stage_sizes: Residual units of each stage.
        features: Their width in each stage.
        bottleneck: Units are `SEBottleneck` (output `4 * features`) or `SEBasicBlock`.
        stem_features: Channels of the stem's convolutions: one is 7x7, more are 3x3. The first has stride 2.
        widths: See `SEBottleneck`.
        groups: See `SEBottleneck`.
        stride_in_1x1: See `SEBottleneck`.
        shortcut_size: Window of the projections behind the first stage.
        reduction: Channels per hidden unit of the SE blocks.
        axis_name: Device axis over which BatchNorm averages under `pmap`.
        dtype: Of the computation.
        param_dtype: Of the parameters.
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
    axis_name: str | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage."""
        return {"stem": 2} | {f"stage{i}": 2 ** (i + 1) for i in range(1, len(self.stage_sizes) + 1)}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]`, at least 5x5, to a dict of `[N, H / stride, W / stride, features]`."""
        check_images(x)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(Conv, use_bias=False, kernel_init=_he_fan_out, **types)
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            axis_name=self.axis_name,
            **types,
        )
        se = functools.partial(SqueezeExcite, reduction=self.reduction, kernel_init=_he_fan_out, **types)
        unit: Callable[..., nn.Module] = SEBasicBlock
        if self.bottleneck:
            unit = functools.partial(
                SEBottleneck, widths=self.widths, groups=self.groups, stride_in_1x1=self.stride_in_1x1
            )

        size = 7 if len(self.stem_features) == 1 else 3
        for i, width in enumerate(self.stem_features, start=1):
            padding = ((size // 2, size // 2),) * 2
            x = conv(width, (size, size), strides=2 if i == 1 else 1, padding=padding, name=f"stem_conv{i}")(x)
            x = nn.relu(norm(name=f"stem_bn{i}")(x))
        stages = {"stem": x}
        x = max_pool(x, 3, 2, ceil_mode=True)
        for stage, (blocks, width) in enumerate(zip(self.stage_sizes, self.features, strict=True), start=1):
            for block in range(1, blocks + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                more: dict[str, Any] = {"shortcut_size": self.shortcut_size} if self.bottleneck and strides > 1 else {}
                name = f"stage{stage}_block{block}"
                x = unit(width, strides, conv=conv, norm=norm, se=se, name=name, **more)(x)
            stages[f"stage{stage}"] = x
        return stages


class SENet(SENetBackbone):
    """An SE-ResNet or SENet-154: trunk, global average pool, dropout, linear classifier.

    Attributes:
        num_classes: Outputs; 0 gives the pooled features, four times the last width with bottlenecks.
        dropout_rate: Of the pooled features before the classifier.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.2

    @nn.nowrap  # so that it works outside of a module too
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """The trunk; its parameters are `params["backbone"]`."""
        return part_of(self, SENetBackbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:  # type: ignore[override]
        """Maps images `[N, H, W, C]`, 224x224x3 as published, to logits `[N, num_classes]` float32."""
        x = global_avg_pool(self.make_backbone()(x, train=train)[f"stage{len(self.stage_sizes)}"])
        if self.num_classes:
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            x = nn.Dense(self.num_classes, kernel_init=_dense_init, name="head", **types)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


_SENET154 = {
    "stem_features": (64, 64, 128),
    "widths": (2, 4),
    "groups": 64,
    "stride_in_1x1": False,
    "shortcut_size": 3,
}
# Units per stage, bottleneck, what else differs, parameters.
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
        defaults={"stage_sizes": _sizes, "bottleneck": _bottleneck, **_more},
        task="classification",
        paper="Hu et al. 2018, Squeeze-and-excitation networks",
        year=2017,
        input_size=(224, 224),
        channels=3,
        params=_params,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        weights=("timm/in1k",),
    )
