"""Inception-v4 and Inception-ResNet-v2.

C. Szegedy, S. Ioffe, V. Vanhoucke and A. Alemi, "Inception-v4, Inception-ResNet and the Impact of Residual Connections
on Learning", 2016, figures 3 to 9 for v4, 7 and 15 to 20 for Inception-ResNet-v2. Modules are named as in the authors'
release.

Deviations from the paper. They are those of the authors' own release of Inception-ResNet-v2, which timm and Keras
follow: the stem is that of Inception-v3; an inception module (5b) precedes the residual units; the units have 320, 1088
and 2080 channels, and there are 10, 20 and 10 of them; the last unit is neither scaled nor followed by ReLU; and a 1x1
convolution of 1536 channels precedes the pool.

Average pools do not count their padding. `se_inception_resnet_v2` has squeeze-and-excitation blocks (Hu, Shen and Sun
2018, section 3.3) after the modules and on the residual of each unit before the addition, as in figure 3 of that paper.
No trained original was published.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, ConvNorm, SqueezeExcite, conv_chain, max_pool
from flaxvision.models.backbone import Backbone, Classifier
from flaxvision.models.inception_v3 import InceptionV3A, avg_pool_3x3, check_extent, inception_stem
from flaxvision.registry import register

Unit = Callable[..., Any]

# Branches of the residual units at 35x35 (figure 16), 17x17 (17) and 8x8 (19), and the scale of the residual.
BLOCK35 = (("branch1x1", (32, 1)), ("branch3x3", (32, 1), (32, 3)), ("branch3x3dbl", (32, 1), (48, 3), (64, 3))), 0.17
BLOCK17 = (("branch1x1", (192, 1)), ("branch7x7", (128, 1), (160, (1, 7)), (192, (7, 1)))), 0.1
BLOCK8 = (("branch1x1", (192, 1)), ("branch3x3", (192, 1), (224, (1, 3)), (256, (3, 1)))), 0.2


class InceptionV4A(nn.Module):
    """Module at 35x35 (figure 4): 1x1, 3x3, double 3x3, average pool, 96 channels each.

    Attributes:
        unit: Makes a convolution with its activation, for example `partial(ConvNorm, conv=..., norm=...)`.
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
    """Module at 17x17 (figure 5): 7x7 convolutions factored into 1x7 and 7x1.

    Attributes:
        unit: Makes a convolution with its activation.
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
    """Module at 8x8 (figure 6): 3x3 convolutions fork into 1x3 and 3x1.

    Attributes:
        unit: Makes a convolution with its activation.
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
    """Reduction of both networks from 35x35 to 17x17 (figure 7), with the letters of table 1.

    Attributes:
        k: Width of the 1x1 convolution before the double 3x3.
        l: Width of the first convolution of the double 3x3.
        m: Width of the second convolution of the double 3x3.
        n: Width of the single 3x3 convolution.
        unit: Makes a convolution with its activation.
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
    """Reduction of Inception-v4 from 17x17 to 8x8 (figure 8).

    Attributes:
        unit: Makes a convolution with its activation.
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
    """Reduction of Inception-ResNet-v2 from 17x17 to 8x8 (figure 18).

    Attributes:
        unit: Makes a convolution with its activation.
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
    """Residual unit `relu(x + scale * conv1x1(branches(x)))`: figures 16, 17 and 19; figure 20 for the scale.

    Attributes:
        branches: `(name, layer, layer, ...)` of each branch, with layers as in `conv_chain`; for example `BLOCK35[0]`.
        scale: Factor of the residual.
        unit: Makes a convolution with its activation.
        conv: Makes the 1x1 convolution that restores the width; it has a bias and no normalization.
        se: Makes the block that reweights the channels of the residual, for example `partial(SqueezeExcite, 16)`.
        activation: Applied last.
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


class _Layers(NamedTuple):
    unit: Unit
    conv: Callable[..., Any]
    se: Callable[..., Any] | None


class InceptionV4Backbone(Backbone):
    """Inception-v4 without its head, for images of 75x75 pixels or more.

    The stages are `stem` (64 channels), `stage1` (192), `stage2` (384), `stage3` (1024) and `stage4` (1536). The other
    fields are those of `Backbone`.

    Attributes:
        stage_sizes: Number of modules at 35x35, 17x17 and 8x8, without the reductions.
        se_reduction: Reduction of a squeeze-and-excitation block after every module, None for no blocks.
        epsilon: Epsilon of BatchNorm.
        momentum: Decay of BatchNorm's running statistics: 0.9 in timm, 0.99 in Keras.
    """

    stage_sizes: tuple[int, int, int] = (4, 7, 3)
    se_reduction: int | None = None
    epsilon: float = 1e-3
    momentum: float = 0.9

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}

    @nn.nowrap
    def make_layers(self, train: bool) -> _Layers:
        """Returns constructors of a unit, of a convolution and of a squeeze-and-excitation block."""
        conv = partial(Conv, kernel_init=nn.initializers.he_normal(), **self.dtypes)
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        unit = partial(ConvNorm, conv=partial(conv, use_bias=False), norm=norm)
        se = partial(SqueezeExcite, self.se_reduction, **self.dtypes) if self.se_reduction else None
        return _Layers(unit, conv, se)

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the last maps at each stride.

        Raises:
            ValueError: The images have fewer than 75x75 pixels.
        """
        check_extent(x)
        unit, _, se = self.make_layers(train)
        reductions = {6: partial(ReductionA, 192, 224, 256, 384), 7: InceptionV4ReductionB}
        modules = {5: InceptionV4A, 6: InceptionV4B, 7: InceptionV4C}

        def mixed(x, name, module):
            x = module(unit=unit, name=name)(x)
            return se(name=f"{name}_se")(x) if se else x

        x = conv_chain(unit, x, "conv1a", (32, 3, 2, "VALID"))
        x = conv_chain(unit, x, "conv2a", (32, 3, 1, "VALID"))
        x = conv_chain(unit, x, "conv2b", (64, 3))
        yield "stem", x
        # Figure 3 concatenates parallel branches in the stem too.
        x = jnp.concatenate([max_pool(x, 3, 2), conv_chain(unit, x, "mixed3a", (96, 3, 2, "VALID"))], axis=-1)
        y = conv_chain(unit, x, "mixed4a_branch3x3", (64, 1), (96, 3, 1, "VALID"))
        z = conv_chain(unit, x, "mixed4a_branch7x7x3", (64, 1), (64, (1, 7)), (64, (7, 1)), (96, 3, 1, "VALID"))
        x = jnp.concatenate([y, z], axis=-1)
        yield "stage1", x
        x = jnp.concatenate([conv_chain(unit, x, "mixed5a", (192, 3, 2, "VALID")), max_pool(x, 3, 2)], axis=-1)
        for (group, module), size in zip(modules.items(), self.stage_sizes, strict=True):
            if group in reductions:
                x = mixed(x, f"mixed{group}a", reductions[group])
            for letter in string.ascii_lowercase[1 : size + 1]:
                x = mixed(x, f"mixed{group}{letter}", module)
            yield f"stage{group - 3}", x


class InceptionResNetV2Backbone(InceptionV4Backbone):
    """Inception-ResNet-v2 without its head, for images of 75x75 pixels or more.

    The stages are `stem` (64 channels), `stage1` (192), `stage2` (320), `stage3` (1088) and `stage4` (1536). The other
    fields are those of `InceptionV4Backbone`.

    Attributes:
        stage_sizes: Number of residual units at 35x35, 17x17 and 8x8.
    """

    stage_sizes: tuple[int, int, int] = (10, 20, 10)

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the last maps at each stride.

        Raises:
            ValueError: The images have fewer than 75x75 pixels.
        """
        unit, conv, se = self.make_layers(train)
        size35, size17, size8 = self.stage_sizes

        def mixed(x, name, module):
            x = module(unit=unit, name=name)(x)
            return se(name=f"{name}_se")(x) if se else x

        def blocks(x, name, block, count):
            for i in range(1, count + 1):
                x = InceptionResNetUnit(block[0], block[1], unit, conv, se, name=f"{name}_{i}")(x)
            return x

        stem = inception_stem(unit, x)
        for stage, x in stem:
            yield stage, x
        x = max_pool(x, 3, 2)
        x = mixed(x, "mixed5b", partial(InceptionV3A, pool_features=64, count_include_pad=False, features=96))
        x = blocks(x, "block35", BLOCK35, size35)
        yield "stage2", x
        x = mixed(x, "mixed6a", partial(ReductionA, 256, 256, 384, 384))
        x = blocks(x, "block17", BLOCK17, size17)
        yield "stage3", x
        x = mixed(x, "mixed7a", InceptionResNetReductionB)
        x = blocks(x, "block8", BLOCK8, size8 - 1)
        x = InceptionResNetUnit(BLOCK8[0], 1.0, unit, conv, se, lambda y: y, name=f"block8_{size8}")(x)
        yield "stage4", conv_chain(unit, x, "conv7b", (1536, 1))


class InceptionV4(Classifier):
    """Inception-v4: global average pool, dropout and linear layer on an `InceptionV4Backbone`.

    The other fields are those of `Classifier`.

    Attributes:
        dropout_rate: Rate of the dropout before the linear layer; figures 9 and 15 keep 0.8.
    """

    dropout_rate: float = 0.2


class InceptionResNetV2(InceptionV4):
    """Inception-ResNet-v2: the head of `InceptionV4` on an `InceptionResNetV2Backbone`."""


_PUBLISHED = {
    "task": "classification",
    "paper": "Szegedy et al. 2016, Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    "year": 2016,
    "input_size": (299, 299),
    "channels": 3,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
register(
    InceptionV4,
    "inception_v4",
    backbone=InceptionV4Backbone,
    params=42_679_816,
    **_PUBLISHED,
)
register(
    InceptionResNetV2,
    "inception_resnet_v2",
    backbone=InceptionResNetV2Backbone,
    params=55_843_464,
    **_PUBLISHED,
)
register(
    InceptionResNetV2,
    "se_inception_resnet_v2",
    backbone=InceptionResNetV2Backbone,
    defaults={"se_reduction": 16},
    params=65_092_718,
    **_PUBLISHED,
)
