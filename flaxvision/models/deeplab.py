"""DeepLabv3.

L.-C. Chen, G. Papandreou, F. Schroff, H. Adam, "Rethinking atrous convolution for semantic image segmentation", 2017.

`deeplabv3_resnet50` is torchvision's definition: atrous spatial pyramid pooling (section 3.3) with rates 12, 24 and 36
at an output stride of 8, and a 3x3 convolution before the logits, which the paper does not have. The paper trains at an
output stride of 16 with rates 6, 12 and 18: `output_stride=16, rates=(6, 12, 18)`.

`deeplabv3_mobilenet_v2` is the network that Sandler et al. 2018, "MobileNetV2: Inverted residuals and linear
bottlenecks", section 6.3, recommend for mobile devices: no atrous branches, no 3x3 convolution, and no 1x1 convolution
at the end of MobileNetV2. As in TensorFlow's release, its logits are resized with aligned corners.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv
from flaxvision.models.fcn import FCNHead, linear_init
from flaxvision.models.mobilenet_v2 import MobileNetV2Backbone
from flaxvision.models.resnet import ResNetBackbone
from flaxvision.models.segmenter import Segmenter, resized
from flaxvision.registry import register


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with image-level features (section 3.3, figure 5).

    Parallel branches process the input: a 1x1 convolution, an atrous 3x3 convolution for each rate, and the mean over
    the image followed by a 1x1 convolution. A 1x1 convolution maps their concatenation to the output. Each convolution
    is followed by a normalization and ReLU.

    Attributes:
        rates: Dilations of the atrous branches.
        features: Channels of each branch and of the output.
        dropout_rate: Rate of the dropout on the output.
        pool_first: Whether the image-level branch comes first in the concatenation, as in TensorFlow's release, or
            last, as in torchvision.
        conv: Makes a convolution without bias.
        norm: Makes a normalization; for training, `partial(BatchNorm, use_running_average=False)`.
    """

    rates: tuple[int, ...] = (12, 24, 36)
    features: int = 256
    dropout_rate: float = 0.5
    pool_first: bool = False
    conv: Callable[..., nn.Module] = functools.partial(Conv, use_bias=False)
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, features]`."""

        def unit(x: jax.Array, name: str, window: int = 1, rate: int = 1) -> jax.Array:
            padding = rate * (window // 2)
            shape = (window, window)
            x = self.conv(self.features, shape, padding=padding, kernel_dilation=rate, name=f"{name}_conv")(x)
            return nn.relu(self.norm(name=f"{name}_bn")(x))

        branches = [unit(x, "point")]
        branches += [unit(x, f"atrous{i}", 3, rate) for i, rate in enumerate(self.rates, start=1)]
        pooled = unit(jnp.mean(x, (1, 2), keepdims=True), "pool")
        pooled = jnp.broadcast_to(pooled, (*x.shape[:3], self.features))
        branches = [pooled, *branches] if self.pool_first else [*branches, pooled]
        x = unit(jnp.concatenate(branches, axis=-1), "project")
        return nn.Dropout(self.dropout_rate, deterministic=not train)(x)


class DeepLabV3(Segmenter):
    """DeepLabv3 on the last stage of a backbone with an output stride.

    For the other fields, see `Segmenter`.

    Attributes:
        rates: Dilations of the atrous branches of `ASPP`; choose them for the output stride of the backbone.
        head_features: Channels of `ASPP` and of the convolution before the logits.
        head_conv: Whether there is a 3x3 convolution between `ASPP` and the logits.
        pool_first: See `ASPP`.
        dropout_rate: Rate of the dropout after `ASPP`.
        align_corners: Whether the logits are resized with aligned corners; see `layers.resize_bilinear`.
        aux_heads: Whether there is an `FCNHead` on the stage before the last. It runs in training only and sows its
            logits, at the size of the images, into the collection `aux_logits` as `aux`.
        aux_dropout_rate: Rate of the dropout in the auxiliary head.
        head_epsilon: Epsilon of BatchNorm in the heads.
        head_momentum: Decay of BatchNorm's running statistics in the heads.
    """

    rates: tuple[int, ...] = (12, 24, 36)
    head_features: int = 256
    head_conv: bool = True
    pool_first: bool = False
    dropout_rate: float = 0.5
    align_corners: bool = False
    aux_heads: bool = False
    aux_dropout_rate: float = 0.1
    head_epsilon: float = 1e-5
    head_momentum: float = 0.9

    @nn.compact
    def apply_head(
        self, features: dict[str, jax.Array], *, size: Sequence[int] | None = None, train: bool = False
    ) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, *size, K]`, float32 or wider."""
        conv = functools.partial(Conv, kernel_init=linear_init, **self.backbone.dtypes)
        norm = self.backbone.make_norm(train, epsilon=self.head_epsilon, momentum=self.head_momentum)
        if self.aux_heads and (train or self.is_initializing()):
            head = FCNHead(self.num_classes, self.aux_dropout_rate, conv=conv, norm=norm, name="aux_head")
            logits = head(self.stage(features, 2), train=train)
            if train:
                self.sow("aux_logits", "aux", resized(logits, size, align_corners=self.align_corners))
        x = ASPP(
            self.rates,
            self.head_features,
            self.dropout_rate,
            self.pool_first,
            conv=functools.partial(conv, use_bias=False),
            norm=norm,
            name="aspp",
        )(self.stage(features), train=train)
        if self.head_conv:
            x = conv(self.head_features, (3, 3), padding=1, use_bias=False, name="head_conv")(x)
            x = nn.relu(norm(name="head_bn")(x))
        logits = conv(self.num_classes, (1, 1), name="logits")(x)
        return resized(logits, size, align_corners=self.align_corners)


_PAPER = {
    "task": "segmentation",
    "paper": "Chen et al. 2017, Rethinking atrous convolution for semantic image segmentation",
    "year": 2017,
    "channels": 3,
}
register(
    DeepLabV3,
    "deeplabv3_resnet50",
    backbone=ResNetBackbone,
    defaults={"stage_sizes": (3, 4, 6, 3), "stages": ("stage3", "stage4"), "output_stride": 8},
    input_size=(520, 520),
    params=39_638_869,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    **_PAPER,
)
# TensorFlow's release expects pixels in [-1, 1].
register(
    DeepLabV3,
    "deeplabv3_mobilenet_v2",
    backbone=MobileNetV2Backbone,
    defaults={
        "output_stride": 8,
        "last_features": 0,
        "padding": "SAME",
        "epsilon": 1e-3,
        "momentum": 0.999,
        "rates": (),
        "head_conv": False,
        "pool_first": True,
        "align_corners": True,
    },
    input_size=(513, 513),
    params=2_113_557,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    **_PAPER,
)
