"""SqueezeNet 1.0.

F. Iandola, S. Han, M. Moskewicz, K. Ashraf, W. Dally, K. Keutzer, "SqueezeNet: AlexNet-level accuracy with 50x fewer
parameters and <0.5MB model size", arXiv:1602.07360, table 1.

The definition and the initialization are torchvision's. The authors' Caffe network takes images of 227 instead of 224
pixels and pads the input of its last convolution by one (`classifier_padding=1`), so that the global average includes a
border that depends on the biases alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, global_avg_pool, max_pool
from flaxvision.models.backbone import Backbone, Classifier, Dtype, Initializer, as_float32
from flaxvision.registry import register

# Table 1: s1x1 and e1x1 = e3x3 of fire2 to fire9, grouped by the pools between them.
FIRES = (
    ((16, 64), (16, 64), (32, 128)),
    ((32, 128), (48, 192), (48, 192), (64, 256)),
    ((64, 256),),
)


class Fire(nn.Module):
    """Fire module (section 3.2): a 1x1 convolution to few channels, then 1x1 and 3x3 convolutions in parallel.

    Attributes:
        squeeze_features: Channels of the squeeze layer.
        expand_features: Channels of each of the two expand layers; the output has twice as many.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    squeeze_features: int
    expand_features: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, C]` to `[N, H, W, 2 * expand_features]`, the output of the 1x1 convolution first."""
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
    """One convolution and eight fire modules. Between the stages are 3x3 max-pools of stride 2 that round up.

    The other fields are those of `Backbone`.

    Attributes:
        stem_features: Channels of the first convolution.
        fires: For each stage, the channels of the squeeze layer and of each expand layer of its fire modules.
    """

    stem_features: int = 96
    fires: tuple[tuple[tuple[int, int], ...], ...] = FIRES

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {"stem": 2} | {f"stage{i}": 2 ** (i + 1) for i in range(1, len(self.fires) + 1)}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the output of the first convolution and of the last module of each stage, for images from 21x21."""
        init = nn.initializers.he_uniform()
        conv = functools.partial(Conv, padding="VALID", kernel_init=init, **self.dtypes)
        x = nn.relu(conv(self.stem_features, (7, 7), strides=2, name="stem_conv")(x))
        yield "stem", x
        number = 2
        for stage, fires in enumerate(self.fires, start=1):
            x = max_pool(x, 3, 2, ceil_mode=True)
            for squeeze, expand in fires:
                x = Fire(squeeze, expand, name=f"fire{number}", **self.dtypes)(x)
                number += 1
            yield f"stage{stage}", x


class SqueezeNet(Classifier):
    """SqueezeNet: dropout, a 1x1 convolution to the classes, ReLU and global average pool on a `SqueezeNetBackbone`.

    Its logits are never negative. The other fields are those of `Classifier`.

    Attributes:
        dropout_rate: Rate of the dropout before the last convolution.
        classifier_padding: Padding of the last convolution; 1 in the authors' Caffe network.
    """

    dropout_rate: float = 0.5
    classifier_padding: int = 0

    @property
    def default_kernel_init(self) -> Initializer:
        """Initializer of the head unless `kernel_init` is set."""
        return nn.initializers.normal(0.01)

    @nn.compact
    def apply_head(self, features: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, num_classes]`; to the pooled features if there are none."""
        x = self.last_stage(features)
        if self.num_classes:
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
            init = self.kernel_init or self.default_kernel_init
            conv = functools.partial(Conv, kernel_init=init, **self.backbone.dtypes)
            x = nn.relu(conv(self.num_classes, (1, 1), padding=self.classifier_padding, name="head")(x))
        return as_float32(global_avg_pool(x))


register(
    SqueezeNet,
    "squeezenet1_0",
    backbone=SqueezeNetBackbone,
    task="classification",
    paper="Iandola et al. 2016, SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size",
    year=2016,
    input_size=(224, 224),
    channels=3,
    params=1_248_424,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
