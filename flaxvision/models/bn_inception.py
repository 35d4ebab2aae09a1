"""Inception with BatchNorm, and the same network with squeeze-and-excitation.

S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
2015, figure 5: two 3x3 convolutions for each 5x5, modules 3c and 4e of stride 2, average pools in all modules but the
last, no dropout.

`bn_inception` is the network of the published weights (pretrained-models, pytorchcv). Its convolutions have biases,
which BatchNorm makes superfluous: in training their gradient is zero up to rounding. `use_bias=False` removes them.
`se_bn_inception` follows the SENet authors' prototxt "SE-BN-Inception" (Hu, Shen and Sun 2018): no biases, and a
squeeze-and-excitation block of reduction 16 after every module, including those of stride 2. Both use an epsilon of
1e-5 in BatchNorm, as in Caffe.

Deviations: the first 7x7 convolution is an ordinary one, as in all published weights, whereas the figure gives it a
depth multiplier of 8. The last pool is global. Where a module of stride 2 receives an odd extent, its pool pads as its
convolutions do. Caffe's rule would give branches of different sizes there; elsewhere the two rules agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, ConvNorm, SqueezeExcite, avg_pool, conv_chain, max_pool
from flaxvision.models.backbone import Backbone, Classifier
from flaxvision.registry import register

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
_STAGES = {"inception3b": "stage2", "inception4d": "stage3", "inception5b": "stage4"}


class BNInceptionModule(nn.Module):
    """Module of figure 5: 1x1, 3x3, double 3x3 and pooled branches in parallel.

    Without a 1x1 branch (width 0) it is the module of stride 2: 3x3, double 3x3 and a max-pool without projection.

    Attributes:
        features: Widths: 1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, pool projection.
        unit: Makes a convolution with its activation, for example `partial(ConvNorm, conv=..., norm=...)`.
        pool: Pool of the module of stride 1, `"avg"` or `"max"`.
    """

    features: tuple[int, int, int, int, int, int]
    unit: Unit
    pool: str = "avg"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, F]`, or to `[N, ceil(H / 2), ceil(W / 2), F]` at stride 2.

        Raises:
            ValueError: `pool` has another value.
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
    """Inception with BatchNorm, without its head.

    The stages are `stem` (64 channels), `stage1` (192), `stage2` (320), `stage3` (608) and `stage4` (1024). The other
    fields are those of `Backbone`.

    Attributes:
        use_bias: Whether the convolutions have biases.
        se_reduction: Reduction of a squeeze-and-excitation block after every module, None for no blocks.
        epsilon: Epsilon of BatchNorm.
        momentum: Decay of BatchNorm's running statistics.
    """

    use_bias: bool = True
    se_reduction: int | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the output of the last layer at each stride."""
        conv = partial(Conv, use_bias=self.use_bias, kernel_init=nn.initializers.he_uniform(), **self.dtypes)
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        unit = partial(ConvNorm, conv=conv, norm=norm)
        pool = partial(max_pool, window_shape=3, strides=2, ceil_mode=True)

        x = conv_chain(unit, x, "conv1", (64, 7, 2))
        yield "stem", x
        x = conv_chain(unit, pool(x), "conv2", (64, 1), (192, 3))
        yield "stage1", x
        x = pool(x)
        for name, features in MODULES.items():
            x = BNInceptionModule(features, unit, "max" if name == "inception5b" else "avg", name=name)(x)
            if self.se_reduction:
                x = SqueezeExcite(self.se_reduction, name=f"{name}_se", **self.dtypes)(x)
            if name in _STAGES:
                yield _STAGES[name], x


class BNInception(Classifier):
    """Inception with BatchNorm: global average pool and linear layer on a `BNInceptionBackbone`.

    The fields are those of `Classifier`.
    """


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
    backbone=BNInceptionBackbone,
    paper="Ioffe and Szegedy 2015, Batch Normalization",
    year=2015,
    params=11_295_240,
    **_IMAGENET,
)
register(
    BNInception,
    "se_bn_inception",
    backbone=BNInceptionBackbone,
    defaults={"use_bias": False, "se_reduction": 16},
    paper="Hu, Shen and Sun 2018, Squeeze-and-Excitation Networks",
    year=2018,
    params=11_931_622,
    **_IMAGENET,
)
