"""SqueezeNet 1.0.

F. Iandola, S. Han, M. Moskewicz, K. Ashraf, W. Dally, K. Keutzer, "SqueezeNet: AlexNet-level accuracy with 50x fewer
parameters and <0.5MB model size", arXiv:1602.07360, table 1.

The definition is torchvision's. The authors' Caffe network has one row of zeros around the input of its last
convolution (`classifier_padding=1`), so that the mean over the map includes a border of the biases' ReLUs, and sees 227
pixels instead of 224. Kernels start as torchvision's.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, global_avg_pool, max_pool
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.registry import register

Dtype = Any

# Table 1: s1x1 and e1x1 = e3x3 of fire2 to fire9, by the pools between them.
FIRES = (
    ((16, 64), (16, 64), (32, 128)),
    ((32, 128), (48, 192), (48, 192), (64, 256)),
    ((64, 256),),
)


class Fire(nn.Module):
    """The fire module (section 3.2): a 1x1 convolution to few maps, then 1x1 and 3x3 ones side by side.

    Attributes:
        squeeze_features: Maps of the squeeze layer.
        expand_features: Maps of each of the two expand layers; the output has twice as many.
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    squeeze_features: int
    expand_features: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, 2 * expand_features]`, those of the 1x1 filters first."""
        conv = functools.partial(
            Conv,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.he_uniform(),
        )
        x = nn.relu(conv(self.squeeze_features, (1, 1), name="squeeze")(x))
        one = conv(self.expand_features, (1, 1), name="expand1x1")(x)
        three = conv(self.expand_features, (3, 3), padding=1, name="expand3x3")(x)
        return nn.relu(jnp.concatenate([one, three], axis=-1))


class SqueezeNetBackbone(Backbone):
    """One convolution and eight fire modules, with pools of 3 at steps of 2 between the stages.

    Attributes:
        stem_features: Maps of the first convolution.
        fires: For each stage, for each fire module: maps of the squeeze layer and of each expand layer.
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    stem_features: int = 96
    fires: tuple[tuple[tuple[int, int], ...], ...] = FIRES
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage."""
        return {"stem": 2} | {f"stage{i}": 2 ** (i + 1) for i in range(1, len(self.fires) + 1)}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]`, 21x21 or more, to the first convolution's maps and the last of each stage."""
        check_images(x)
        del train
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.he_uniform()
        conv1 = Conv(
            self.stem_features, (7, 7), strides=2, padding="VALID", kernel_init=init, name="stem_conv", **policy
        )
        x = nn.relu(conv1(x))
        stages, number = {"stem": x}, 2
        for stage, fires in enumerate(self.fires, start=1):
            x = _pooled(x)
            for squeeze, expand in fires:
                x = Fire(squeeze, expand, name=f"fire{number}", **policy)(x)
                number += 1
            stages[f"stage{stage}"] = x
        return stages


class SqueezeNet(SqueezeNetBackbone):
    """The backbone, dropout, a 1x1 convolution to the classes with ReLU, and the mean over the map.

    Attributes:
        num_classes: Outputs; 0 gives the means of the last fire module's maps.
        dropout_rate: Before the last convolution.
        classifier_padding: Zeros around its input; the authors' Caffe network has 1.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.5
    classifier_padding: int = 0

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Builds the trunk."""
        return part_of(self, SqueezeNetBackbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:  # type: ignore[override]
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]` float32, none of them negative."""
        x = self.make_backbone()(x, train=train)[f"stage{len(self.fires)}"]
        if self.num_classes:
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
            head = Conv(
                self.num_classes,
                (1, 1),
                padding=self.classifier_padding,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.normal(0.01),
                name="head",
            )
            x = nn.relu(head(x))
        x = global_avg_pool(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pooled(x: jax.Array) -> jax.Array:
    # Caffe's rounding up, written as padding, which also pools a map of 2x2.
    return max_pool(x, 3, 2, padding=[(0, 1 - n % 2) for n in x.shape[1:3]])


register(
    SqueezeNet,
    "squeezenet1_0",
    task="classification",
    paper="Iandola et al. 2016, SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size",
    year=2016,
    input_size=(224, 224),
    channels=3,
    params=1_248_424,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    weights=("torchvision/IMAGENET1K_V1",),
)
