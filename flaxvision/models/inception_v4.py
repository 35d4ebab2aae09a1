"""Inception-v4 and Inception-ResNet-v2.

C. Szegedy, S. Ioffe, V. Vanhoucke and A. Alemi, "Inception-v4, Inception-ResNet and the Impact of Residual Connections
on Learning", 2016, figures 3 to 9 for v4, 7 and 15 to 20 for Inception-ResNet-v2. Modules are called as in the authors'
release.

Deviations from the paper, all of them the authors' own release of Inception-ResNet-v2, which timm and Keras follow: the
stem is that of Inception-v3, one inception module (5b) precedes the residual units, whose maps are 320, 1088 and 2080;
there are 10, 20 and 10 of them, the last neither scaled nor followed by ReLU, and a 1x1 convolution of 1536 maps comes
before the pool.

Average pools do not count their padding. `se_inception_resnet_v2` has squeeze-and-excitation blocks (Hu, Shen and Sun
2018, section 3.3): after the modules and, in the residual units, on the residual before it is added, as their figure 3
has it for residual networks. It has no published original.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv, ConvNorm, SqueezeExcite, global_avg_pool, max_pool
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.models.googlenet import conv_chain
from flaxvision.models.inception_v3 import InceptionV3A, avg_pool_3x3, inception_stem
from flaxvision.registry import register

Dtype = Any
Unit = Callable[..., Any]

# The residual branches at 35x35 (figure 16), 17x17 (17) and 8x8 (19), and the factor of the residual.
BLOCK35 = (("branch1x1", (32, 1)), ("branch3x3", (32, 1), (32, 3)), ("branch3x3dbl", (32, 1), (48, 3), (64, 3))), 0.17
BLOCK17 = (("branch1x1", (192, 1)), ("branch7x7", (128, 1), (160, (1, 7)), (192, (7, 1)))), 0.1
BLOCK8 = (("branch1x1", (192, 1)), ("branch3x3", (192, 1), (224, (1, 3)), (256, (3, 1)))), 0.2


class InceptionV4A(nn.Module):
    """The module at 35x35 (figure 4): 1x1, 3x3, double 3x3, average pool, 96 maps each.

    Attributes:
        unit: Makes a convolution and what follows it: `partial(ConvNorm, conv=..., norm=...)`.
    """

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, 384]`."""
        branches = [
            conv_chain(self.unit, x, "branch1x1", (96, 1)),
            conv_chain(self.unit, x, "branch3x3", (64, 1), (96, 3)),
            conv_chain(self.unit, x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            conv_chain(self.unit, avg_pool_3x3(x, False), "branch_pool", (96, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV4B(nn.Module):
    """The module at 17x17 (figure 5): 7x7 convolutions in their factors 1x7 and 7x1.

    Attributes:
        unit: Makes a convolution and what follows it.
    """

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, 1024]`."""
        row, column = (1, 7), (7, 1)
        double = (192, 1), (192, column), (224, row), (224, column), (256, row)
        branches = [
            conv_chain(self.unit, x, "branch1x1", (384, 1)),
            conv_chain(self.unit, x, "branch7x7", (192, 1), (224, row), (256, column)),
            conv_chain(self.unit, x, "branch7x7dbl", *double),
            conv_chain(self.unit, avg_pool_3x3(x, False), "branch_pool", (128, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV4C(nn.Module):
    """The module at 8x8 (figure 6): 3x3 convolutions fork into 1x3 and 3x1.

    Attributes:
        unit: Makes a convolution and what follows it.
    """

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, 1536]`."""
        row, column = (1, 3), (3, 1)
        single = conv_chain(self.unit, x, "branch3x3_1", (384, 1))
        double = conv_chain(self.unit, x, "branch3x3dbl", (384, 1), (448, column), (512, row))
        branches = [
            conv_chain(self.unit, x, "branch1x1", (256, 1)),
            conv_chain(self.unit, single, "branch3x3_2a", (256, row)),
            conv_chain(self.unit, single, "branch3x3_2b", (256, column)),
            conv_chain(self.unit, double, "branch3x3dbl_4a", (256, row)),
            conv_chain(self.unit, double, "branch3x3dbl_4b", (256, column)),
            conv_chain(self.unit, avg_pool_3x3(x, False), "branch_pool", (256, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class ReductionA(nn.Module):
    """The reduction from 35x35 to 17x17 (figure 7), of both networks by table 1's letters.

    Attributes:
        k: Width of the 1x1 before the double 3x3.
        l: Width of its first 3x3.
        m: Width of its second.
        n: Width of the single 3x3.
        unit: Makes a convolution and what follows it.
    """

    k: int
    l: int
    m: int
    n: int
    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, (H - 1) // 2, (W - 1) // 2, n + m + C]`."""
        branches = [
            conv_chain(self.unit, x, "branch3x3", (self.n, 3, 2, "VALID")),
            conv_chain(self.unit, x, "branch3x3dbl", (self.k, 1), (self.l, 3), (self.m, 3, 2, "VALID")),
            max_pool(x, 3, 2),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV4ReductionB(nn.Module):
    """Inception-v4's reduction from 17x17 to 8x8 (figure 8).

    Attributes:
        unit: Makes a convolution and what follows it.
    """

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, (H - 1) // 2, (W - 1) // 2, 512 + C]`."""
        branches = [
            conv_chain(self.unit, x, "branch3x3", (192, 1), (192, 3, 2, "VALID")),
            conv_chain(self.unit, x, "branch7x7x3", (256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3, 2, "VALID")),
            max_pool(x, 3, 2),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionResNetReductionB(nn.Module):
    """Inception-ResNet-v2's reduction from 17x17 to 8x8 (figure 18).

    Attributes:
        unit: Makes a convolution and what follows it.
    """

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, (H - 1) // 2, (W - 1) // 2, 992 + C]`."""
        branches = [
            conv_chain(self.unit, x, "branch3x3", (256, 1), (384, 3, 2, "VALID")),
            conv_chain(self.unit, x, "branch3x3b", (256, 1), (288, 3, 2, "VALID")),
            conv_chain(self.unit, x, "branch3x3dbl", (256, 1), (288, 3), (320, 3, 2, "VALID")),
            max_pool(x, 3, 2),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionResNetUnit(nn.Module):
    """`relu(x + scale * conv1x1(branches(x)))`: figures 16, 17, 19 and, for the scale, 20.

    Attributes:
        branches: `(name, layer, layer, ...)` each, a layer as in `conv_chain`; such as `BLOCK35[0]`.
        scale: Factor of the residual.
        unit: Makes a convolution and what follows it.
        conv: Makes the 1x1 convolution, with a bias and without normalization, that restores the width.
        se: Makes what weighs the residual's channels, such as `partial(SqueezeExcite, 16)`.
        activation: What comes last.
    """

    branches: tuple[tuple, ...]
    scale: float
    unit: Unit
    conv: Callable[..., Any] = Conv
    se: Callable[..., Any] | None = None
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to the same shape."""
        y = jnp.concatenate([conv_chain(self.unit, x, name, *layers) for name, *layers in self.branches], axis=-1)
        y = self.conv(x.shape[-1], (1, 1), name="up")(y)
        if self.se is not None:
            y = self.se(name="se")(y)
        return self.activation(x + self.scale * y)


class InceptionV4Backbone(Backbone):
    """Inception-v4 without its head: `stem` (64 maps), `stage1` (192), 384, 1024 and `stage4` (1536).

    Attributes:
        se_reduction: Channels per hidden unit of a squeeze-and-excitation block after every module; None for no blocks.
        epsilon: Of BatchNorm.
        momentum: Of BatchNorm's running statistics: 0.9 in timm, 0.99 in Keras.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        axis_name: Axis over which BatchNorm averages, under `pmap`.
    """

    se_reduction: int | None = None
    epsilon: float = 1e-3
    momentum: float = 0.9
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each map."""
        return {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}

    @nn.nowrap
    def policy(self, train: bool) -> tuple[Unit, Callable[..., Any], Callable[..., Any] | None]:
        """The network's unit, its plain convolution and its squeeze-and-excitation block."""
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(Conv, kernel_init=nn.initializers.he_normal(), **policy)
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            **policy,
        )
        unit = partial(ConvNorm, conv=partial(conv, use_bias=False), norm=norm)
        return unit, conv, partial(SqueezeExcite, self.se_reduction, **policy) if self.se_reduction else None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False):
        """Maps images `[N, H, W, C]` to a dict of feature maps, finest first.

        Raises:
            ValueError: Images of less than 75x75 pixels.
        """
        check_images(x)
        if min(x.shape[1:3]) < 75:
            raise ValueError(f"the Inceptions want images of at least 75x75 pixels; got {x.shape[1]}x{x.shape[2]}")
        unit, _, se = self.policy(train)
        maps = {}
        x = conv_chain(unit, x, "conv1a", (32, 3, 2, "VALID"))
        x = conv_chain(unit, x, "conv2a", (32, 3, 1, "VALID"))
        x = maps["stem"] = conv_chain(unit, x, "conv2b", (64, 3))
        # Figure 3: filter concatenations in the stem.
        x = jnp.concatenate([max_pool(x, 3, 2), conv_chain(unit, x, "mixed3a", (96, 3, 2, "VALID"))], axis=-1)
        y = conv_chain(unit, x, "mixed4a_branch3x3", (64, 1), (96, 3, 1, "VALID"))
        z = conv_chain(unit, x, "mixed4a_branch7x7x3", (64, 1), (64, (1, 7)), (64, (7, 1)), (96, 3, 1, "VALID"))
        x = maps["stage1"] = jnp.concatenate([y, z], axis=-1)
        x = jnp.concatenate([conv_chain(unit, x, "mixed5a", (192, 3, 2, "VALID")), max_pool(x, 3, 2)], axis=-1)
        modules = {
            **dict.fromkeys(["mixed5b", "mixed5c", "mixed5d", "mixed5e"], InceptionV4A),
            "mixed6a": partial(ReductionA, 192, 224, 256, 384),
            **dict.fromkeys([f"mixed6{letter}" for letter in "bcdefgh"], InceptionV4B),
            "mixed7a": InceptionV4ReductionB,
            **dict.fromkeys(["mixed7b", "mixed7c", "mixed7d"], InceptionV4C),
        }
        ends = {"mixed5e": "stage2", "mixed6h": "stage3", "mixed7d": "stage4"}
        for name, module in modules.items():
            x = module(unit=unit, name=name)(x)
            x = se(name=f"{name}_se")(x) if se else x
            if name in ends:
                maps[ends[name]] = x
        return maps


class InceptionResNetV2Backbone(InceptionV4Backbone):
    """Inception-ResNet-v2 without its head, `stem` (64 maps), `stage1` (192), 320, 1088 and `stage4` (1536).

    The fields are those of `InceptionV4Backbone`.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False):
        """Maps images `[N, H, W, C]` to a dict of feature maps, finest first.

        Raises:
            ValueError: Images of less than 75x75 pixels.
        """
        check_images(x)
        unit, conv, se = self.policy(train)
        maps = {}

        def mixed(x, name, module):
            x = module(unit=unit, name=name)(x)
            return se(name=f"{name}_se")(x) if se else x

        def blocks(x, name, block, count):
            for i in range(1, count + 1):
                x = InceptionResNetUnit(block[0], block[1], unit, conv, se, name=f"{name}_{i}")(x)
            return x

        maps["stem"], maps["stage1"] = inception_stem(unit, x)
        x = mixed(
            max_pool(maps["stage1"], 3, 2),
            "mixed5b",
            partial(InceptionV3A, pool_features=64, count_include_pad=False, features=96),
        )
        x = maps["stage2"] = blocks(x, "block35", BLOCK35, 10)
        x = mixed(x, "mixed6a", partial(ReductionA, 256, 256, 384, 384))
        x = maps["stage3"] = blocks(x, "block17", BLOCK17, 20)
        x = blocks(mixed(x, "mixed7a", InceptionResNetReductionB), "block8", BLOCK8, 9)
        x = InceptionResNetUnit(BLOCK8[0], 1.0, unit, conv, se, lambda y: y, name="block8_10")(x)
        maps["stage4"] = conv_chain(unit, x, "conv7b", (1536, 1))
        return maps


class InceptionV4(InceptionV4Backbone):
    """The classifier: `InceptionV4Backbone`, global average pool, dropout, dense.

    Attributes:
        num_classes: Outputs; 0 gives the 1536 pooled features.
        dropout_rate: Before the head; figures 9 and 15 keep 0.8.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.2

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Builds the trunk."""
        return part_of(self, InceptionV4Backbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]`, float32 at least.

        Raises:
            ValueError: Images of less than 75x75 pixels.
        """
        x = global_avg_pool(self.make_backbone()(x, train=train)["stage4"])
        if self.num_classes:
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            x = nn.Dense(self.num_classes, dtype=self.dtype, param_dtype=self.param_dtype, name="head")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class InceptionResNetV2(InceptionV4):
    """The classifier on `InceptionResNetV2Backbone`; fields and call are those of `InceptionV4`."""

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Builds the trunk."""
        return part_of(self, InceptionResNetV2Backbone, name)


_PUBLISHED = {
    "task": "classification",
    "paper": "Szegedy et al. 2016, Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    "year": 2016,
    "input_size": (299, 299),
    "channels": 3,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
register(InceptionV4, "inception_v4", params=42_679_816, weights=("timm/tf_in1k",), **_PUBLISHED)
_TAGS = ("timm/tf_in1k", "keras/imagenet")
register(InceptionResNetV2, "inception_resnet_v2", params=55_843_464, weights=_TAGS, **_PUBLISHED)
register(InceptionResNetV2, "se_inception_resnet_v2", defaults={"se_reduction": 16}, params=65_092_718, **_PUBLISHED)
