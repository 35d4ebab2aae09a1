"""VGG.

K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, table 1:
columns A (`vgg11`), B (`vgg13`), D (`vgg16`) and E (`vgg19`). The `_bn` variants are torchvision's, with a BatchNorm
after every convolution. `vgg16_dli` is the network of J. Krohn's book "Deep Learning Illustrated" (2019, chapter 10),
with a BatchNorm after every pool.

Deviations from the paper: for images of another size than 224 pixels, the last maps are averaged to 7x7, as in
torchvision; `dense_evaluation` follows the paper's section 3.2 instead. Kernels are initialized as in torchvision,
whereas the paper initializes them from a trained network A.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, adaptive_avg_pool, global_avg_pool, max_pool
from flaxvision.models.backbone import Backbone, Classifier, as_float32
from flaxvision.registry import register

# Height and width of the maps after the five pools, for an image of 224 pixels.
_POOLED = 7


class VGGBackbone(Backbone):
    """Stages of 3x3 convolutions with ReLU. Between the stages are 2x2 max-pools.

    The stages are the outputs of their last convolutions, before the pools. The other fields are those of `Backbone`.

    Attributes:
        stage_sizes: Number of convolutions in each stage.
        features: Channels of each stage.
        norm: `"conv"` for a BatchNorm between each convolution and its ReLU, `"pool"` for one after each pool together
            with the initializers of Keras, None for no normalization.
        epsilon: Epsilon of BatchNorm.
        momentum: Decay of BatchNorm's running statistics.
        ceil_mode: Whether the pools round an odd size up, as in Caffe.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 3, 3, 3)
    features: tuple[int, ...] = (64, 128, 256, 512, 512)
    norm: str | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9
    ceil_mode: bool = False

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {f"stage{i + 1}": 2**i for i in range(len(self.stage_sizes))}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the output of the last convolution of each stage.

        Raises:
            ValueError: `norm` has another value.
        """
        if self.norm not in (None, "conv", "pool"):
            raise ValueError(f"norm must be None, 'conv' or 'pool'; got {self.norm!r}")
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        init = nn.initializers.glorot_uniform() if self.norm == "pool" else init
        conv = functools.partial(Conv, kernel_size=(3, 3), padding=1, kernel_init=init, **self.dtypes)
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        for stage, (size, features) in enumerate(zip(self.stage_sizes, self.features, strict=True), start=1):
            if stage > 1:
                x = max_pool(x, 2, ceil_mode=self.ceil_mode)
                x = norm(name=f"pool{stage - 1}_bn")(x) if self.norm == "pool" else x
            for i in range(1, size + 1):
                x = conv(features, name=f"stage{stage}_conv{i}")(x)
                x = norm(name=f"stage{stage}_bn{i}")(x) if self.norm == "conv" else x
                x = nn.relu(x)
            yield f"stage{stage}", x


class VGG(Classifier):
    """VGG: the last pool and three dense layers on a `VGGBackbone`. Images must have 32 pixels or more.

    The other fields are those of `Classifier`.

    Attributes:
        hidden_features: Units of the two hidden dense layers, fc6 and fc7.
        dropout_rate: Rate of the dropout after each hidden dense layer.
        dense_evaluation: How to handle last maps larger than 7x7, which images from 256 pixels have. False averages
            the maps to 7x7, as in torchvision. True applies the dense layers at every position, as convolutions, and
            averages their outputs: section 3.2 of the paper, and timm. The parameters are the same.
    """

    hidden_features: int = 4096
    dropout_rate: float = 0.5
    dense_evaluation: bool = False

    @nn.compact
    def apply_head(self, features: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, num_classes]`; to the features of fc7 if there are none."""
        backbone = self.backbone
        x = max_pool(self.last_stage(features), 2)
        if backbone.norm == "pool":
            norm = backbone.make_norm(train, epsilon=backbone.epsilon, momentum=backbone.momentum)
            last = list(backbone.strides)[-1]
            x = norm(name=f"{last.replace('stage', 'pool')}_bn")(x)
        h, w = (max(_POOLED, n) if self.dense_evaluation else _POOLED for n in x.shape[1:3])
        if (h, w) != x.shape[1:3]:
            x = adaptive_avg_pool(x, (h, w))
        x = _windows(x, _POOLED)
        init = nn.initializers.glorot_uniform() if backbone.norm == "pool" else nn.initializers.normal(0.01)
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init or init, **backbone.dtypes)
        for name in ("fc6", "fc7"):
            x = nn.relu(dense(self.hidden_features, name=name)(x))
            if name == "fc7":
                # Before dropout, so that the positions of a dense evaluation share one mask.
                x = global_avg_pool(x)
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        return as_float32(dense(self.num_classes, name="head")(x) if self.num_classes else x)


def _windows(x: jax.Array, size: int) -> jax.Array:
    """Flattens every square window of `x [N, H, W, C]`: `[N, H - size + 1, W - size + 1, size * size * C]`."""
    n, h, w, c = x.shape
    if (h, w) == (size, size):
        return x.reshape((n, 1, 1, size * size * c))
    rows, columns = h - size + 1, w - size + 1
    return jnp.concatenate(
        [x[:, i : i + rows, j : j + columns] for i in range(size) for j in range(size)],
        axis=-1,
    )


# Table 1 of the paper: convolutions of each stage. Below, parameters without and with BatchNorm.
STAGE_SIZES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
_PARAMS = {
    "vgg11": (132_863_336, 132_868_840),
    "vgg13": (133_047_848, 133_053_736),
    "vgg16": (138_357_544, 138_365_992),
    "vgg19": (143_667_240, 143_678_248),
}
_SHARED = {"task": "classification", "input_size": (224, 224), "channels": 3}
_PAPER = "Simonyan, Zisserman 2015, Very Deep Convolutional Networks for Large-Scale Image Recognition"
for _name, _sizes in STAGE_SIZES.items():
    for _norm, _suffix, _params in zip((None, "conv"), ("", "_bn"), _PARAMS[_name], strict=True):
        register(
            VGG,
            _name + _suffix,
            backbone=VGGBackbone,
            defaults={"stage_sizes": _sizes, "norm": _norm},
            paper=_PAPER,
            year=2015,
            params=_params,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            **_SHARED,
        )
register(
    VGG,
    "vgg16_dli",
    backbone=VGGBackbone,
    defaults={"norm": "pool", "epsilon": 1e-3, "momentum": 0.99, "num_classes": 17},
    paper="Krohn 2019, Deep Learning Illustrated, chapter 10",
    year=2019,
    params=134_333_137,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    **_SHARED,
)
