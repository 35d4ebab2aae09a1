"""MobileNetV2.

M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen, "MobileNetV2: Inverted residuals and linear bottlenecks", CVPR
2018, table 2.

The definition is torchvision's: zeros on both sides alike, BatchNorm's epsilon 1e-5, kernels drawn by He's rule over
their outputs, dropout before the classifier. The authors' network in TensorFlow and Keras pads as "SAME", at the end
first where the step is 2, and has epsilon 1e-3: `padding="SAME", epsilon=1e-3, momentum=0.999`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv, DepthwiseConv, global_avg_pool
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.registry import register

Dtype = Any
Padding = str | tuple[tuple[int, int], ...]

SYMMETRIC = ((1, 1), (1, 1))
# Table 2 by resolution: expansion factor, output channels, repetitions and the step of the first of each row.
BLOCKS = {
    "stem": ((1, 16, 1, 1),),
    "stage1": ((6, 24, 2, 2),),
    "stage2": ((6, 32, 3, 2),),
    "stage3": ((6, 64, 4, 2), (6, 96, 3, 1)),
    "stage4": ((6, 160, 3, 2), (6, 320, 1, 1)),
}

_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def rounded(channels: float) -> int:
    """The multiple of 8 next to `channels`, at least 8 and not below 90 % of it."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


class InvertedResidual(nn.Module):
    """The bottleneck residual block (section 3.4, table 1): expand by 1x1, filter each channel by 3x3, project by 1x1.

    ReLU6 after the first two, none after the projection; the input is added where the shape stays.

    Attributes:
        features: Output channels.
        expansion: Channels inside per input channel; 1 leaves the expanding convolution out.
        strides: Step of the depthwise convolution, 1 or 2.
        padding: Of the depthwise convolution.
        conv: Makes a convolution without bias.
        depthwise: Makes a depthwise convolution without bias.
        norm: Makes a normalization; in training hand in `partial(BatchNorm, use_running_average=False)`.
    """

    features: int
    expansion: int = 6
    strides: int = 1
    padding: Padding = SYMMETRIC
    conv: Callable[..., nn.Module] = functools.partial(Conv, use_bias=False)
    depthwise: Callable[..., nn.Module] = functools.partial(DepthwiseConv, use_bias=False)
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), features]`."""
        channels, y = x.shape[-1], x
        if self.expansion != 1:
            y = self.conv(self.expansion * channels, (1, 1), name="expand_conv")(y)
            y = nn.relu6(self.norm(name="expand_bn")(y))
        y = self.depthwise((3, 3), strides=self.strides, padding=self.padding, name="depthwise_conv")(y)
        y = nn.relu6(self.norm(name="depthwise_bn")(y))
        y = self.norm(name="project_bn")(self.conv(self.features, (1, 1), name="project_conv")(y))
        return x + y if self.strides == 1 and channels == self.features else y


class MobileNetV2Backbone(Backbone):
    """A 3x3 convolution, 17 bottleneck blocks and a 1x1 convolution.

    Attributes:
        width_multiplier: Scales the channels, to multiples of 8; the last convolution's are never fewer than 1280.
        padding: Of the 3x3 convolutions: one zero on every side (torchvision), or "SAME" (TensorFlow, Keras).
        epsilon: Of BatchNorm: 1e-5 (torchvision), 1e-3 (TensorFlow, Keras).
        momentum: Decay of BatchNorm's running statistics: 0.9 (torchvision), 0.999 (Keras).
        dtype: Of the computation.
        param_dtype: Of the parameters.
        axis_name: The mapped axis over which BatchNorm takes its statistics, under `pmap`.
    """

    width_multiplier: float = 1.0
    padding: Padding = SYMMETRIC
    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage."""
        return {stage: 2 ** (i + 1) for i, stage in enumerate(BLOCKS)}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]` to the last map of each stage: of 16, 24, 32, 96 and 1280 channels."""
        check_images(x)
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(Conv, use_bias=False, kernel_init=_he_fan_out, **policy)
        depthwise = functools.partial(DepthwiseConv, use_bias=False, kernel_init=_he_fan_out, **policy)
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            **policy,
        )
        stem = conv(rounded(32 * self.width_multiplier), (3, 3), strides=2, padding=self.padding, name="stem_conv")
        x = nn.relu6(norm(name="stem_bn")(stem(x)))
        stages = {}
        for stage, rows in BLOCKS.items():
            number = 1
            for expansion, channels, repetitions, strides in rows:
                for i in range(repetitions):
                    x = InvertedResidual(
                        rounded(channels * self.width_multiplier),
                        expansion,
                        strides if i == 0 else 1,
                        self.padding,
                        conv,
                        depthwise,
                        norm,
                        name=f"{stage}_block{number}",
                    )(x)
                    number += 1
            stages[stage] = x
        x = conv(rounded(1280 * max(1.0, self.width_multiplier)), (1, 1), name="stage4_conv")(x)
        stages["stage4"] = nn.relu6(norm(name="stage4_bn")(x))
        return stages


class MobileNetV2(MobileNetV2Backbone):
    """The backbone, the mean over its last map, dropout and a linear classifier.

    Attributes:
        num_classes: Outputs; 0 gives the 1280 means.
        dropout_rate: Before the classifier.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.2

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Makes the trunk alone, of the same fields."""
        return part_of(self, MobileNetV2Backbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:  # type: ignore[override]
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]` float32."""
        x = global_avg_pool(self.make_backbone()(x, train=train)["stage4"])
        if self.num_classes:
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
            head = nn.Dense(
                self.num_classes,
                kernel_init=nn.initializers.normal(0.01),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="head",
            )
            x = head(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


register(
    MobileNetV2,
    "mobilenet_v2",
    task="classification",
    paper="Sandler et al. 2018, MobileNetV2: Inverted residuals and linear bottlenecks",
    year=2018,
    input_size=(224, 224),
    channels=3,
    params=3_504_872,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    weights=("torchvision/IMAGENET1K_V1", "torchvision/IMAGENET1K_V2", "timm/ra_in1k", "keras/imagenet"),
)
