"""Inception-v3.

C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens and Z. Wojna, "Rethinking the Inception Architecture for Computer Vision",
2016, table 1 and figures 5, 6, 7 and 10. Modules are named as in the authors' release: 5b to 5d at 35x35, 6a to 6e at
17x17, 7a to 7c at 8x8.

Deviations from the paper. They are those of the authors' own release, which torchvision, timm and Keras follow: the
stem has a 1x1 convolution of 80 channels and a max-pool where table 1 has a strided convolution, the modules at 35x35
keep one 5x5 branch where figure 5 has two 3x3 convolutions, and the auxiliary classifier ends in a 5x5 convolution.

The 3x3 average pools of torchvision and timm count their padding; those of Keras and of the authors do not. See
`count_include_pad`. `se_inception_v3` has a squeeze-and-excitation block (Hu, Shen and Sun 2018, section 3.3) after
every module, including the reductions; no trained original was published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, ConvNorm, SqueezeExcite, avg_pool, conv_chain, global_avg_pool, max_pool
from flaxvision.models.backbone import Backbone, Classifier, Dtype, Initializer, as_float32
from flaxvision.registry import register

Unit = Callable[..., Any]


def avg_pool_3x3(x: jax.Array, count_include_pad: bool) -> jax.Array:
    """Average pool of the Inception networks, 3x3 at stride 1: `[N, H, W, C]` to the same shape."""
    return avg_pool(x, 3, 1, "SAME", count_include_pad=count_include_pad)


class InceptionV3A(nn.Module):
    """Module at 35x35 (figure 5, but with one 5x5): 1x1, 5x5, double 3x3, average pool.

    Attributes:
        pool_features: Width of the pooled branch.
        unit: Makes a convolution with its activation, for example `partial(ConvNorm, conv=..., norm=...)`.
        count_include_pad: Whether the pool counts its padding.
        features: Width of the 1x1 branch; 96 in Inception-ResNet-v2.
    """

    pool_features: int
    unit: Unit
    count_include_pad: bool = True
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, features + 160 + pool_features]`."""
        branches = [
            conv_chain(self.unit, x, "branch1x1", (self.features, 1)),
            conv_chain(self.unit, x, "branch5x5", (48, 1), (64, 5)),
            conv_chain(self.unit, x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            conv_chain(self.unit, avg_pool_3x3(x, self.count_include_pad), "branch_pool", (self.pool_features, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3B(nn.Module):
    """Reduction from 35x35 to 17x17 (figure 10): 3x3, double 3x3, max-pool.

    Attributes:
        unit: Makes a convolution with its activation.
    """

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, (H - 1) // 2, (W - 1) // 2, 480 + C]`."""
        branches = [
            conv_chain(self.unit, x, "branch3x3", (384, 3, 2, "VALID")),
            conv_chain(self.unit, x, "branch3x3dbl", (64, 1), (96, 3), (96, 3, 2, "VALID")),
            max_pool(x, 3, 2),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3C(nn.Module):
    """Module at 17x17 (figure 6): 7x7 convolutions factored into 1x7 and 7x1.

    Attributes:
        features: Width of the inner convolutions.
        unit: Makes a convolution with its activation.
        count_include_pad: Whether the pool counts its padding.
    """

    features: int
    unit: Unit
    count_include_pad: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, 768]`."""
        f, row, column = self.features, (1, 7), (7, 1)
        double = (f, 1), (f, column), (f, row), (f, column), (192, row)
        branches = [
            conv_chain(self.unit, x, "branch1x1", (192, 1)),
            conv_chain(self.unit, x, "branch7x7", (f, 1), (f, row), (192, column)),
            conv_chain(self.unit, x, "branch7x7dbl", *double),
            conv_chain(self.unit, avg_pool_3x3(x, self.count_include_pad), "branch_pool", (192, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3D(nn.Module):
    """Reduction from 17x17 to 8x8: 3x3, 7x7 then 3x3, max-pool.

    Attributes:
        unit: Makes a convolution with its activation.
    """

    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, (H - 1) // 2, (W - 1) // 2, 512 + C]`."""
        branches = [
            conv_chain(self.unit, x, "branch3x3", (192, 1), (320, 3, 2, "VALID")),
            conv_chain(self.unit, x, "branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, "VALID")),
            max_pool(x, 3, 2),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3E(nn.Module):
    """Module at 8x8 (figure 7): 3x3 convolutions fork into 1x3 and 3x1.

    Attributes:
        unit: Makes a convolution with its activation.
        count_include_pad: Whether the pool counts its padding.
    """

    unit: Unit
    count_include_pad: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, 2048]`."""
        single = conv_chain(self.unit, x, "branch3x3_1", (384, 1))
        double = conv_chain(self.unit, x, "branch3x3dbl", (448, 1), (384, 3))
        branches = [
            conv_chain(self.unit, x, "branch1x1", (320, 1)),
            conv_chain(self.unit, single, "branch3x3_2a", (384, (1, 3))),
            conv_chain(self.unit, single, "branch3x3_2b", (384, (3, 1))),
            conv_chain(self.unit, double, "branch3x3dbl_3a", (384, (1, 3))),
            conv_chain(self.unit, double, "branch3x3dbl_3b", (384, (3, 1))),
            conv_chain(self.unit, avg_pool_3x3(x, self.count_include_pad), "branch_pool", (192, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3Aux(nn.Module):
    """Auxiliary classifier on the 17x17 maps (figure 8): pool, 1x1 and 5x5 convolutions, linear layer.

    Attributes:
        num_classes: Number of logits.
        unit: Makes a convolution with its activation.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    num_classes: int
    unit: Unit
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to logits `[N, num_classes]`, float32 or wider.

        Raises:
            ValueError: The maps are smaller than 17x17.
        """
        if min(x.shape[1:3]) < 17:
            raise ValueError(
                "x must be at least 17x17 for the auxiliary classifier, so images must be at least 299x299 pixels;"
                f" got {x.shape[1]}x{x.shape[2]}"
            )
        x = conv_chain(self.unit, avg_pool(x, 5, 3), "conv1", (128, 1))
        small = partial(Conv, use_bias=False, kernel_init=nn.initializers.normal(0.01))
        conv = partial(small, dtype=self.dtype, param_dtype=self.param_dtype)
        x = global_avg_pool(conv_chain(partial(self.unit, conv=conv), x, "conv2", (768, 5, 1, "VALID")))
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.001), name="head", **policy)(x)
        return as_float32(x)


def check_extent(x: jax.Array) -> None:
    """Checks that the images `x [N, H, W, C]` are large enough for the Inception networks.

    Raises:
        ValueError: The images have fewer than 75x75 pixels.
    """
    if min(x.shape[1:3]) < 75:
        raise ValueError(f"images must be at least 75x75 pixels; got {x.shape[1]}x{x.shape[2]}")


def inception_stem(unit: Unit, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
    """Stem of Inception-v3 and of Inception-ResNet-v2. Iterate within a compact method, which owns the submodules.

    Args:
        unit: Makes a convolution with its activation.
        x: Images `[N, H, W, C]` of at least 75x75 pixels.

    Yields:
        `"stem"` and its 64 channels at stride 2, then `"stage1"` and its 192 channels at stride 4, before the pool
        that follows.

    Raises:
        ValueError: The images are smaller.
    """
    check_extent(x)
    x = conv_chain(unit, x, "conv1a", (32, 3, 2, "VALID"))
    x = conv_chain(unit, x, "conv2a", (32, 3, 1, "VALID"))
    x = conv_chain(unit, x, "conv2b", (64, 3))
    yield "stem", x
    x = conv_chain(unit, max_pool(x, 3, 2), "conv3b", (80, 1))
    yield "stage1", conv_chain(unit, x, "conv4a", (192, 3, 1, "VALID"))


class InceptionV3Backbone(Backbone):
    """Inception-v3 without its head, for images of 75x75 pixels or more.

    The stages are `stem` (64 channels), `stage1` (192), `stage2` (288), `stage3` (768) and `stage4` (2048). The other
    fields are those of `Backbone`.

    Attributes:
        count_include_pad: Whether the 3x3 average pools count their padding: yes in torchvision, no in Keras.
        se_reduction: Reduction of a squeeze-and-excitation block after every module, None for no blocks.
        epsilon: Epsilon of BatchNorm.
        momentum: Decay of BatchNorm's running statistics: 0.9 in torchvision, 0.99 in Keras.
    """

    count_include_pad: bool = True
    se_reduction: int | None = None
    epsilon: float = 1e-3
    momentum: float = 0.9

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}

    @nn.nowrap
    def make_unit(self, train: bool) -> Unit:
        """Returns a constructor of convolutions with their normalization and activation."""
        conv = partial(Conv, use_bias=False, kernel_init=nn.initializers.normal(0.1), **self.dtypes)
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        return partial(ConvNorm, conv=conv, norm=norm)

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the last maps at each stride.

        Raises:
            ValueError: The images have fewer than 75x75 pixels.
        """
        unit, pad = self.make_unit(train), self.count_include_pad
        modules = {
            "mixed5b": partial(InceptionV3A, 32, unit, pad),
            "mixed5c": partial(InceptionV3A, 64, unit, pad),
            "mixed5d": partial(InceptionV3A, 64, unit, pad),
            "mixed6a": partial(InceptionV3B, unit),
            "mixed6b": partial(InceptionV3C, 128, unit, pad),
            "mixed6c": partial(InceptionV3C, 160, unit, pad),
            "mixed6d": partial(InceptionV3C, 160, unit, pad),
            "mixed6e": partial(InceptionV3C, 192, unit, pad),
            "mixed7a": partial(InceptionV3D, unit),
            "mixed7b": partial(InceptionV3E, unit, pad),
            "mixed7c": partial(InceptionV3E, unit, pad),
        }
        stages = {"mixed5d": "stage2", "mixed6e": "stage3", "mixed7c": "stage4"}

        stem = inception_stem(unit, x)
        for stage, x in stem:
            yield stage, x
        x = max_pool(x, 3, 2)
        for name, module in modules.items():
            x = module(name=name)(x)
            if self.se_reduction:
                x = SqueezeExcite(self.se_reduction, name=f"{name}_se", **self.dtypes)(x)
            if name in stages:
                yield stages[name], x


class InceptionV3(Classifier):
    """Inception-v3: global average pool, dropout and linear layer on an `InceptionV3Backbone`.

    The other fields are those of `Classifier`.

    Attributes:
        dropout_rate: Rate of the dropout before the linear layer.
        aux_heads: Whether there is an auxiliary classifier. It runs in training only and sows its logits into the
            collection `aux_logits` as `aux1`. It requires images of at least 299x299 pixels, at `init` too.
    """

    dropout_rate: float = 0.5
    kernel_init: Initializer | None = nn.initializers.normal(0.1)
    aux_heads: bool = False

    @nn.compact
    def apply_head(self, features: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, num_classes]`, float32 or wider.

        Raises:
            ValueError: There is an auxiliary classifier, and the image is smaller than 299x299 pixels or the backbone
                does not return `stage3`.
        """
        backbone = self.backbone
        if self.aux_heads and self.num_classes and (train or self.is_initializing()):
            if "stage3" not in features:
                raise ValueError(f"stages must include stage3 if aux_heads is set; got {', '.join(features)}")
            aux = InceptionV3Aux(self.num_classes, backbone.make_unit(train), name="aux_head1", **backbone.dtypes)
            logits = aux(features["stage3"])
            if not self.is_initializing():  # at init, the logits would become part of the variables
                self.sow("aux_logits", "aux1", logits)
        return self.linear(global_avg_pool(self.last_stage(features)), train=train)


# All published weights expect images in [-1, 1]; torchvision converts to that range by `transform_input`.
_PUBLISHED = {
    "task": "classification",
    "paper": "Szegedy et al. 2016, Rethinking the Inception Architecture for Computer Vision",
    "year": 2016,
    "input_size": (299, 299),
    "channels": 3,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
register(InceptionV3, "inception_v3", backbone=InceptionV3Backbone, params=23_834_568, **_PUBLISHED)
register(
    InceptionV3,
    "se_inception_v3",
    backbone=InceptionV3Backbone,
    defaults={"se_reduction": 16},
    params=25_496_188,
    **_PUBLISHED,
)
