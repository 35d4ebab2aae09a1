"""Inception-v3.

C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens and Z. Wojna, "Rethinking the Inception Architecture for Computer Vision",
2016, table 1 and figures 5, 6, 7 and 10. Modules are called as in the authors' release: 5b to 5d at 35x35, 6a to 6e at
17x17, 7a to 7c at 8x8.

Deviations from the paper, all of them the authors' own release, which torchvision, timm and Keras follow: in the stem
80 maps by a 1x1 convolution and a max-pool where table 1 has a strided convolution, the modules at 35x35 keep one 5x5
branch where figure 5 has two 3x3, and the auxiliary classifier ends in a 5x5 convolution.

The 3x3 average pools of torchvision and timm count their padding, Keras' (and the authors') do not:
`count_include_pad`. `se_inception_v3` has a squeeze-and-excitation block (Hu, Shen and Sun 2018, section 3.3) after
every module, reductions included; it has no published original.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv, ConvNorm, SqueezeExcite, avg_pool, global_avg_pool, max_pool
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.models.googlenet import conv_chain
from flaxvision.registry import register

Dtype = Any
Unit = Callable[..., Any]


def avg_pool_3x3(x: jax.Array, count_include_pad: bool) -> jax.Array:
    """The Inceptions' average pool, 3x3 at stride 1: `[N, H, W, C]` to the same shape."""
    return avg_pool(x, 3, 1, "SAME", count_include_pad=count_include_pad)


class InceptionV3A(nn.Module):
    """The module at 35x35 (figure 5, but with one 5x5): 1x1, 5x5, double 3x3, average pool.

    Attributes:
        pool_features: Width of the pooled branch.
        unit: Makes a convolution and what follows it: `partial(ConvNorm, conv=..., norm=...)`.
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
    """The reduction from 35x35 to 17x17 (figure 10): 3x3, double 3x3, max-pool.

    Attributes:
        unit: Makes a convolution and what follows it.
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
    """The module at 17x17 (figure 6): 7x7 convolutions in their factors 1x7 and 7x1.

    Attributes:
        features: Width of the inner convolutions.
        unit: Makes a convolution and what follows it.
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
    """The reduction from 17x17 to 8x8: 3x3, 7x7 then 3x3, max-pool.

    Attributes:
        unit: Makes a convolution and what follows it.
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
    """The module at 8x8 (figure 7): 3x3 convolutions fork into 1x3 and 3x1.

    Attributes:
        unit: Makes a convolution and what follows it.
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
    """The auxiliary classifier on the 17x17 maps (figure 8): pool, 1x1 and 5x5 convolutions, dense.

    Attributes:
        num_classes: Outputs.
        unit: Makes a convolution and what follows it.
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    num_classes: int
    unit: Unit
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to logits `[N, num_classes]`, float32 at least.

        Raises:
            ValueError: The maps are smaller than 17x17.
        """
        if min(x.shape[1:3]) < 17:
            raise ValueError(
                "Inception-v3's auxiliary classifier wants maps of at least 17x17, which images of 299x299 give;"
                f" got maps of {x.shape[1]}x{x.shape[2]}"
            )
        x = conv_chain(self.unit, avg_pool(x, 5, 3), "conv1", (128, 1))
        small = partial(Conv, use_bias=False, kernel_init=nn.initializers.normal(0.01))
        conv = partial(small, dtype=self.dtype, param_dtype=self.param_dtype)
        x = global_avg_pool(conv_chain(partial(self.unit, conv=conv), x, "conv2", (768, 5, 1, "VALID")))
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.001), name="head", **policy)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def inception_stem(unit: Unit, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stem of Inception-v3 and of Inception-ResNet-v2, within the compact method that calls this.

    Args:
        unit: Makes a convolution and what follows it.
        x: Images `[N, H, W, C]` of at least 75x75 pixels.

    Returns:
        64 maps at stride 2 and 192 at stride 4, before the pool that follows them.

    Raises:
        ValueError: The images are smaller.
    """
    if min(x.shape[1:3]) < 75:
        raise ValueError(f"the Inceptions want images of at least 75x75 pixels; got {x.shape[1]}x{x.shape[2]}")
    x = conv_chain(unit, x, "conv1a", (32, 3, 2, "VALID"))
    x = conv_chain(unit, x, "conv2a", (32, 3, 1, "VALID"))
    x = conv_chain(unit, x, "conv2b", (64, 3))
    y = conv_chain(unit, max_pool(x, 3, 2), "conv3b", (80, 1))
    return x, conv_chain(unit, y, "conv4a", (192, 3, 1, "VALID"))


class InceptionV3Backbone(Backbone):
    """Inception-v3 without its head: `stem` (64 maps), `stage1` (192), `stage2` (288), `stage3` (768), `stage4` (2048).

    Attributes:
        count_include_pad: Whether the 3x3 average pools count their padding: torchvision's do, Keras' don't.
        se_reduction: Channels per hidden unit of a squeeze-and-excitation block after every module; None for no blocks.
        epsilon: Of BatchNorm.
        momentum: Of BatchNorm's running statistics: 0.9 in torchvision, 0.99 in Keras.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        axis_name: Axis over which BatchNorm averages, under `pmap`.
    """

    count_include_pad: bool = True
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
    def unit(self, train: bool) -> Unit:
        """Makes convolutions by this network's policy."""
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(Conv, use_bias=False, kernel_init=nn.initializers.normal(0.1), **policy)
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            **policy,
        )
        return partial(ConvNorm, conv=conv, norm=norm)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False):
        """Maps images `[N, H, W, C]` to a dict of feature maps, finest first.

        Raises:
            ValueError: Images of less than 75x75 pixels.
        """
        check_images(x)
        unit, pad = self.unit(train), self.count_include_pad
        maps = {}
        maps["stem"], maps["stage1"] = inception_stem(unit, x)
        x = max_pool(maps["stage1"], 3, 2)
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
        ends = {"mixed5d": "stage2", "mixed6e": "stage3", "mixed7c": "stage4"}
        for name, module in modules.items():
            x = module(name=name)(x)
            if self.se_reduction:
                policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
                x = SqueezeExcite(self.se_reduction, name=f"{name}_se", **policy)(x)
            if name in ends:
                maps[ends[name]] = x
        return maps


class InceptionV3(InceptionV3Backbone):
    """The classifier: `InceptionV3Backbone`, global average pool, dropout, dense.

    Attributes:
        num_classes: Outputs; 0 gives the 2048 pooled features.
        dropout_rate: Before the head.
        aux_heads: Whether to train the auxiliary classifier, which sows its logits into `aux_logits` as `aux1`. It
            wants images of at least 299x299 pixels, at `init` too.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.5
    aux_heads: bool = False

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Builds the trunk."""
        return part_of(self, InceptionV3Backbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]`, float32 at least.

        Raises:
            ValueError: Images of less than 75x75 pixels, or 299x299 where there is an auxiliary classifier to train.
        """
        maps = self.make_backbone()(x, train=train)
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.aux_heads and self.num_classes and (train or self.is_initializing()):
            logits = InceptionV3Aux(self.num_classes, self.unit(train), name="aux_head1", **policy)(maps["stage3"])
            if not self.is_initializing():  # else they would stand among the variables, and the next be added to them
                self.sow("aux_logits", "aux1", logits)
        x = global_avg_pool(maps["stage4"])
        if self.num_classes:
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            x = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.1), name="head", **policy)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# All published weights want the image in [-1, 1]; torchvision's through its `transform_input`.
_PUBLISHED = {
    "task": "classification",
    "paper": "Szegedy et al. 2016, Rethinking the Inception Architecture for Computer Vision",
    "year": 2016,
    "input_size": (299, 299),
    "channels": 3,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
_TAGS = ("torchvision/IMAGENET1K_V1", "timm/tv_in1k", "keras/imagenet")
register(InceptionV3, "inception_v3", params=23_834_568, weights=_TAGS, **_PUBLISHED)
register(InceptionV3, "se_inception_v3", defaults={"se_reduction": 16}, params=25_496_188, **_PUBLISHED)
