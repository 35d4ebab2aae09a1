"""Xception.

F. Chollet, "Xception: Deep learning with depthwise separable convolutions", CVPR 2017, figure 5: 34 separable layers,
the first convolutions and the projections of the shortcuts aside.

The definition is Keras', the author's own: pools padded as "SAME", BatchNorm's epsilon 1e-3. timm's `legacy_xception`,
whose weights were converted from TensorFlow, pads the pools by one on both sides and has epsilon 1e-5:
`pool_padding=((1, 1), (1, 1)), epsilon=1e-5, momentum=0.9`. The paper has dropout of 0.5 before the classifier on
ImageNet (section 4.3); both libraries leave it out: `dropout_rate=0.5` brings it back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv, SeparableConv, global_avg_pool, max_pool
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.registry import register

Dtype = Any
Padding = str | tuple[tuple[int, int], ...]

MIDDLE_BLOCKS = 8
_glorot = nn.initializers.glorot_uniform()


class XceptionBlock(nn.Module):
    """Separable 3x3 convolutions with a shortcut around them (figure 5): ReLU, convolution, BatchNorm, each.

    Attributes:
        features: Output channels of each convolution.
        strides: 2 ends in a max-pool of 3 at steps of 2, beside a 1x1 projection of the input; 1 adds the input itself.
        first_relu: Whether the first convolution has its ReLU before it.
        pool_padding: Of the max-pool.
        conv: Makes a convolution without bias.
        separable: Makes a separable convolution without bias.
        norm: Makes a normalization; in training hand in `partial(BatchNorm, use_running_average=False)`.
    """

    features: tuple[int, ...]
    strides: int = 1
    first_relu: bool = True
    pool_padding: Padding = "SAME"
    conv: Callable[..., nn.Module] = functools.partial(Conv, use_bias=False)
    separable: Callable[..., nn.Module] = functools.partial(SeparableConv, use_bias=False)
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, ceil(H / strides), ceil(W / strides), features[-1]]`."""
        y = x
        for i, features in enumerate(self.features, start=1):
            y = nn.relu(y) if i > 1 or self.first_relu else y
            y = self.separable(features, (3, 3), name=f"sepconv{i}")(y)
            y = self.norm(name=f"bn{i}")(y)
        if self.strides != 1:
            y = max_pool(y, 3, self.strides, padding=self.pool_padding)
        if self.strides != 1 or x.shape[-1] != self.features[-1]:
            x = self.conv(self.features[-1], (1, 1), strides=self.strides, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return x + y


class XceptionBackbone(Backbone):
    """The entry flow, the middle flow of eight equal blocks and the exit flow.

    Attributes:
        pool_padding: Of the max-pools: "SAME" (Keras), or one on every side (timm's `legacy_xception`).
        epsilon: Of BatchNorm: 1e-3 (Keras), 1e-5 (timm).
        momentum: Decay of BatchNorm's running statistics: 0.99 (Keras), 0.9 (timm).
        dtype: Of the computation.
        param_dtype: Of the parameters.
        axis_name: The mapped axis over which BatchNorm takes its statistics, under `pmap`.
    """

    pool_padding: Padding = "SAME"
    epsilon: float = 1e-3
    momentum: float = 0.99
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage."""
        return {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]`, at least 7x7, to the last map of each stage.

        They have 64, 128, 256, 728 and 2048 channels; the first three after the stem end in a sum, without a ReLU.
        """
        check_images(x)
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(Conv, use_bias=False, kernel_init=_glorot, **policy)
        separable = functools.partial(SeparableConv, use_bias=False, kernel_init=_glorot, **policy)
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            **policy,
        )
        block = functools.partial(
            XceptionBlock, pool_padding=self.pool_padding, conv=conv, separable=separable, norm=norm
        )
        stages = {}
        x = nn.relu(norm(name="stem_bn1")(conv(32, (3, 3), strides=2, padding="VALID", name="stem_conv1")(x)))
        stages["stem"] = x = nn.relu(norm(name="stem_bn2")(conv(64, (3, 3), padding="VALID", name="stem_conv2")(x)))
        stages["stage1"] = x = block((128, 128), strides=2, first_relu=False, name="stage1_block1")(x)
        stages["stage2"] = x = block((256, 256), strides=2, name="stage2_block1")(x)
        x = block((728, 728), strides=2, name="stage3_block1")(x)
        for i in range(MIDDLE_BLOCKS):
            x = block((728, 728, 728), name=f"stage3_block{i + 2}")(x)
        stages["stage3"] = x
        x = block((728, 1024), strides=2, name="stage4_block1")(x)
        for i, features in enumerate((1536, 2048), start=1):
            x = separable(features, (3, 3), name=f"stage4_sepconv{i}")(x)
            x = nn.relu(norm(name=f"stage4_bn{i}")(x))
        stages["stage4"] = x
        return stages


class Xception(XceptionBackbone):
    """The backbone, the mean over its last map and a linear classifier.

    Attributes:
        num_classes: Outputs; 0 gives the 2048 means.
        dropout_rate: Before the classifier.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.0

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Makes the trunk alone, of the same fields."""
        return part_of(self, XceptionBackbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:  # type: ignore[override]
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]` float32."""
        x = global_avg_pool(self.make_backbone()(x, train=train)["stage4"])
        if self.num_classes:
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
            head = nn.Dense(
                self.num_classes, kernel_init=_glorot, dtype=self.dtype, param_dtype=self.param_dtype, name="head"
            )
            x = head(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


register(
    Xception,
    "xception",
    task="classification",
    paper="Chollet 2017, Xception: Deep learning with depthwise separable convolutions",
    year=2017,
    input_size=(299, 299),
    channels=3,
    params=22_855_952,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    weights=("keras/imagenet", "timm/tf_in1k"),
)
