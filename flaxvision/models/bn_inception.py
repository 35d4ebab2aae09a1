"""Inception with BatchNorm, and with squeeze-and-excitation.

S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
2015, figure 5: two 3x3 for each 5x5, modules 3c and 4e of stride 2, average pools but in the last module, no dropout.

`bn_inception` is the network as its published weights have it (pretrained-models, pytorchcv): its convolutions keep
biases, which BatchNorm makes superfluous: in training they get no gradient beyond rounding. `use_bias=False` drops
them. `se_bn_inception` follows the SENet authors' prototxt "SE-BN-Inception" (Hu, Shen and Sun 2018): no biases, a
squeeze-and-excitation block of reduction 16 after every module, those of stride 2 included. Both have Caffe's BatchNorm
epsilon of 1e-5.

Deviations: the figure's first 7x7 convolution, of depth multiplier 8 on the three channels, is a plain one, as in all
published weights; the last pool is global. Where a strided module meets an odd extent its pool pads as its
convolutions do; Caffe's rule would give maps of different sizes there, and the two agree wherever Caffe's works.
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
from flaxvision.models.googlenet import conv_chain, max_pool_ceil
from flaxvision.registry import register

Dtype = Any
Unit = Callable[..., Any]

# Figure 5: 1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, pool projection; zeros in the modules of stride 2.
MODULES = {
    "inception3a": (64, 64, 64, 64, 96, 32),
    "inception3b": (64, 64, 96, 64, 96, 64),
    "inception3c": (0, 128, 160, 64, 96, 0),
    "inception4a": (224, 64, 96, 96, 128, 128),
    "inception4b": (192, 96, 128, 96, 128, 128),
    "inception4c": (160, 128, 160, 128, 160, 128),
    "inception4d": (96, 128, 192, 160, 192, 128),
    "inception4e": (0, 128, 192, 192, 256, 0),
    "inception5a": (352, 192, 320, 160, 224, 128),
    "inception5b": (352, 192, 320, 192, 224, 128),
}
_ENDS = {"inception3b": "stage2", "inception4d": "stage3", "inception5b": "stage4"}


class BNInceptionModule(nn.Module):
    """The module of figure 5: 1x1, 3x3, double 3x3 and pooled branches side by side.

    Without a 1x1 branch (its width 0) it is the module of stride 2: 3x3, double 3x3 and a max-pool as it is.

    Attributes:
        features: 1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, pool projection.
        unit: Makes a convolution and what follows it: `partial(ConvNorm, conv=..., norm=...)`.
        pool: `"avg"` or `"max"`, for the module of stride 1.
    """

    features: tuple[int, int, int, int, int, int]
    unit: Unit
    pool: str = "avg"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, F]`, or to `[N, ceil(H / 2), ceil(W / 2), F]` at stride 2.

        Raises:
            ValueError: Another `pool`.
        """
        if self.pool not in ("avg", "max"):
            raise ValueError(f"pool must be 'avg' or 'max'; got {self.pool!r}")
        f1, r3, f3, rd, fd, fp = self.features
        strides = 1 if f1 else 2
        branches = [conv_chain(self.unit, x, "branch1x1", (f1, 1))] if f1 else []
        branches += [
            conv_chain(self.unit, x, "branch3x3", (r3, 1), (f3, 3, strides)),
            conv_chain(self.unit, x, "branch3x3dbl", (rd, 1), (fd, 3), (fd, 3, strides)),
        ]
        y = avg_pool(x, 3, 1, "SAME") if f1 and self.pool == "avg" else max_pool(x, 3, strides, "SAME")
        branches.append(conv_chain(self.unit, y, "branch_pool", (fp, 1)) if f1 else y)
        return jnp.concatenate(branches, axis=-1)


class BNInceptionBackbone(Backbone):
    """Inception with BatchNorm without its head: `stem` (64 maps), `stage1` (192), `stage2` (320), ... `stage4` (1024).

    Attributes:
        use_bias: Whether the convolutions have biases.
        se_reduction: Channels per hidden unit of a squeeze-and-excitation block after every module; None for no blocks.
        epsilon: Of BatchNorm.
        momentum: Of BatchNorm's running statistics.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        axis_name: Axis over which BatchNorm averages, under `pmap`.
    """

    use_bias: bool = True
    se_reduction: int | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each map."""
        return {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False):
        """Maps images `[N, H, W, C]` to a dict of feature maps, finest first."""
        check_images(x)
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(Conv, use_bias=self.use_bias, kernel_init=nn.initializers.he_uniform(), **policy)
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            **policy,
        )
        unit = partial(ConvNorm, conv=conv, norm=norm)
        maps = {}
        x = maps["stem"] = conv_chain(unit, x, "conv1", (64, 7, 2))
        x = maps["stage1"] = conv_chain(unit, max_pool_ceil(x, 3), "conv2", (64, 1), (192, 3))
        x = max_pool_ceil(x, 3)
        for name, features in MODULES.items():
            x = BNInceptionModule(features, unit, "max" if name == "inception5b" else "avg", name=name)(x)
            if self.se_reduction:
                x = SqueezeExcite(self.se_reduction, name=f"{name}_se", **policy)(x)
            if name in _ENDS:
                maps[_ENDS[name]] = x
        return maps


class BNInception(BNInceptionBackbone):
    """The classifier: `BNInceptionBackbone`, global average pool, dense.

    Attributes:
        num_classes: Outputs; 0 gives the 1024 pooled features.
    """

    num_classes: int = 1000

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Builds the trunk."""
        return part_of(self, BNInceptionBackbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]`, float32 at least."""
        x = global_avg_pool(self.make_backbone()(x, train=train)["stage4"])
        if self.num_classes:
            x = nn.Dense(self.num_classes, dtype=self.dtype, param_dtype=self.param_dtype, name="head")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


_IMAGENET = {
    "task": "classification",
    "input_size": (224, 224),
    "channels": 3,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
register(
    BNInception,
    "bn_inception",
    paper="Ioffe and Szegedy 2015, Batch Normalization",
    year=2015,
    params=11_295_240,
    **_IMAGENET,
)
register(
    BNInception,
    "se_bn_inception",
    defaults={"use_bias": False, "se_reduction": 16},
    paper="Hu, Shen and Sun 2018, Squeeze-and-Excitation Networks",
    year=2018,
    params=11_931_622,
    **_IMAGENET,
)
