"""AlexNet, as published and in three other definitions.

A. Krizhevsky, I. Sutskever, G. Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012.

`alexnet` is the network of section 3.5: the second, fourth and fifth convolution see only the maps of their own GPU,
which are two groups here. `alexnet_ungrouped` is the same network without the groups. `alexnet_tv` is the single tower
of "One weird trick for parallelizing convolutional neural networks" (Krizhevsky 2014), as defined by torchvision.
`alexnet_dli` is the network of J. Krohn's book "Deep Learning Illustrated" (2019, chapter 10).

Deviations of the first two from the paper: local response normalization sees all maps of a layer, whereas each of the
paper's GPUs saw its own. Pools round their output size up, as in Caffe. This has no effect at 227 pixels, and 224
pixels, the size that the paper gives, then yield the same 6x6 maps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, adaptive_avg_pool, local_response_norm, max_pool
from flaxvision.models.backbone import Backbone, Classifier, Dtype, Initializer, as_float32
from flaxvision.registry import register

# size, alpha, beta and k of `local_response_norm`.
LRN = tuple[int, float, float, float]


class AlexNetBackbone(Backbone):
    """The five convolutions of AlexNet, each with its ReLU. Between the stages are 3x3 max-pools of stride 2.

    The first two convolutions have a local response normalization after their ReLU (section 3.5). The stages are the
    outputs of the first, second and fifth convolution, before their pools. The other fields are those of `Backbone`.

    Attributes:
        features: Output channels of the five convolutions.
        groups: Groups of channels of the five convolutions.
        first_padding: Padding of the first convolution; torchvision uses 2.
        lrn: Size, alpha, beta and k of `layers.local_response_norm`, None for no normalization. The defaults are the
            paper's. Caffe and torch divide alpha by the size: `(5, 2e-5, 0.75, k)` in these units.
        ceil_mode: Whether pools round their output size up; torchvision rounds down.
        torch_init: Whether to initialize kernels and biases as torch does, uniformly within `1 / sqrt(fan_in)`. The
            default is the paper's section 5: kernels have a standard deviation of 0.01; biases are 1 in the second,
            fourth and fifth convolution and in the hidden dense layers, and 0 elsewhere.
    """

    features: tuple[int, int, int, int, int] = (96, 256, 384, 384, 256)
    groups: tuple[int, int, int, int, int] = (1, 2, 1, 2, 2)
    first_padding: int = 0
    lrn: LRN | None = (5, 1e-4, 0.75, 2.0)
    ceil_mode: bool = True
    torch_init: bool = False

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {"stage1": 4, "stage2": 8, "stage3": 16}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the outputs of the first, second and fifth convolution, before their pools."""

        def conv(x, index, window, padding, strides=1):
            inputs = x.shape[-1] // self.groups[index]
            init = _initializers(self.torch_init, window * window * inputs, bias=float(index in (1, 3, 4)))
            layer = Conv(
                self.features[index],
                (window, window),
                strides=strides,
                padding=padding,
                feature_group_count=self.groups[index],
                name=f"conv{index + 1}",
                **init,
                **self.dtypes,
            )
            return nn.relu(layer(x))

        def lrn(x):
            if self.lrn is None:
                return x
            size, alpha, beta, k = self.lrn
            return local_response_norm(x, size=size, alpha=alpha, beta=beta, k=k)

        pool = functools.partial(max_pool, window_shape=3, strides=2, ceil_mode=self.ceil_mode)
        x = lrn(conv(x, 0, 11, self.first_padding, strides=4))
        yield "stage1", x
        x = lrn(conv(pool(x), 1, 5, 2))
        yield "stage2", x
        x = conv(pool(x), 2, 3, 1)
        x = conv(x, 3, 3, 1)
        yield "stage3", conv(x, 4, 3, 1)


class AlexNet(Classifier):
    """AlexNet: the last pool and three dense layers on an `AlexNetBackbone`.

    Without `pooled_size` the maps are flattened at the size that they have. The parameters then fit one image size:
    227 (or 224) pixels as published, 39 or more in general. The other fields are those of `Classifier`; by default the
    kernels are initialized as `AlexNetBackbone.torch_init` says.

    Attributes:
        hidden_features: Units of the two hidden dense layers, fc6 and fc7.
        dropout_rate: Rate of the dropout at the two hidden dense layers.
        dropout_first: Whether to drop the inputs of the hidden layers (torchvision) or their outputs (the paper).
        pooled_size: Height and width to which the last maps are averaged. With it the parameters fit every image size
            from 63 pixels.
    """

    hidden_features: int = 4096
    dropout_rate: float = 0.5
    dropout_first: bool = False
    pooled_size: int | None = None

    @property
    def default_kernel_init(self) -> Initializer:
        """Initializer of the head unless `kernel_init` is set."""
        return _uniform_by_fan_in if self.backbone.torch_init else nn.initializers.normal(0.01)

    @nn.compact
    def apply_head(self, features: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, num_classes]`; to the features of fc7 if there are none."""
        backbone = self.backbone
        x = max_pool(self.last_stage(features), 3, 2, ceil_mode=backbone.ceil_mode)
        if self.pooled_size is not None:
            x = adaptive_avg_pool(x, self.pooled_size)
        x = x.reshape((x.shape[0], -1))
        dropout = functools.partial(nn.Dropout(self.dropout_rate), deterministic=not train)

        def dense(x, features, name, bias):
            init = _initializers(backbone.torch_init, x.shape[-1], bias)
            init["kernel_init"] = self.kernel_init or self.default_kernel_init
            return nn.Dense(features, name=name, **init, **backbone.dtypes)(x)

        for name in ("fc6", "fc7"):
            if self.dropout_first:
                x = nn.relu(dense(dropout(x), self.hidden_features, name, bias=1.0))
            else:
                x = dropout(nn.relu(dense(x, self.hidden_features, name, bias=1.0)))
        return as_float32(dense(x, self.num_classes, "head", bias=0.0) if self.num_classes else x)


class AlexNetDLIBackbone(Backbone):
    """Five unpadded convolutions with ReLU. Between the stages are 3x3 max-pools of stride 2, each with a BatchNorm.

    The stages are the outputs of the first, second and fifth convolution, before their pools. The other fields are
    those of `Backbone`.

    Attributes:
        features: Output channels of the five convolutions.
        epsilon: Epsilon of BatchNorm; the default is Keras'.
        momentum: Decay of BatchNorm's running statistics; the default is Keras'.
    """

    features: tuple[int, int, int, int, int] = (96, 256, 256, 384, 384)
    epsilon: float = 1e-3
    momentum: float = 0.99

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {"stage1": 4, "stage2": 8, "stage3": 16}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the outputs of the first, second and fifth convolution, before their pools."""
        conv = functools.partial(Conv, padding="VALID", kernel_init=nn.initializers.glorot_uniform(), **self.dtypes)
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        c1, c2, c3, c4, c5 = self.features
        x = nn.relu(conv(c1, (11, 11), strides=4, name="conv1")(x))
        yield "stage1", x
        x = norm(name="bn1")(max_pool(x, 3, 2))
        x = nn.relu(conv(c2, (5, 5), name="conv2")(x))
        yield "stage2", x
        x = norm(name="bn2")(max_pool(x, 3, 2))
        x = nn.relu(conv(c3, (3, 3), name="conv3")(x))
        x = nn.relu(conv(c4, (3, 3), name="conv4")(x))
        yield "stage3", nn.relu(conv(c5, (3, 3), name="conv5")(x))


class AlexNetDLI(Classifier):
    """AlexNet as in Krohn's book: a BatchNorm after each pool, no padding, and dense layers with tanh.

    The maps are flattened at the size that they have, so the parameters fit one image size: 224 pixels as published,
    195 or more in general. The other fields are those of `Classifier`.

    Attributes:
        num_classes: Number of logits; 0 returns the features of fc7. The book classifies the 17 Oxford flowers.
        hidden_features: Units of the two hidden dense layers, fc6 and fc7.
        dropout_rate: Rate of the dropout after each hidden dense layer.
    """

    num_classes: int = 17
    hidden_features: int = 4096
    dropout_rate: float = 0.5

    @property
    def default_kernel_init(self) -> Initializer:
        """Initializer of the head unless `kernel_init` is set."""
        return nn.initializers.glorot_uniform()

    @nn.compact
    def apply_head(self, features: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, num_classes]`; to the features of fc7 if there are none."""
        backbone = self.backbone
        init = self.kernel_init or self.default_kernel_init
        dense = functools.partial(nn.Dense, kernel_init=init, **backbone.dtypes)
        norm = backbone.make_norm(train, epsilon=backbone.epsilon, momentum=backbone.momentum)
        x = norm(name="bn3")(max_pool(self.last_stage(features), 3, 2))
        x = x.reshape((x.shape[0], -1))
        for name in ("fc6", "fc7"):
            x = jnp.tanh(dense(self.hidden_features, name=name)(x))
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        return as_float32(dense(self.num_classes, name="head")(x) if self.num_classes else x)


def _initializers(torch_init: bool, fan_in: int, bias: float) -> dict[str, Any]:
    if torch_init:
        uniform = functools.partial(_uniform, limit=fan_in**-0.5)
        return {"kernel_init": uniform, "bias_init": uniform}
    return {"kernel_init": nn.initializers.normal(0.01), "bias_init": nn.initializers.constant(bias)}


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32, *, limit: float) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def _uniform_by_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
    return _uniform(key, shape, dtype, limit=shape[0] ** -0.5)


_IMAGENET = {
    "task": "classification",
    "channels": 3,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
_PAPER = "Krizhevsky, Sutskever, Hinton 2012, ImageNet Classification with Deep Convolutional Neural Networks"
_ONE_TOWER = {
    "features": (64, 192, 384, 256, 256),
    "groups": (1, 1, 1, 1, 1),
    "first_padding": 2,
    "lrn": None,
    "ceil_mode": False,
    "torch_init": True,
    "dropout_first": True,
    "pooled_size": 6,
}
register(
    AlexNet,
    "alexnet",
    backbone=AlexNetBackbone,
    paper=_PAPER,
    year=2012,
    input_size=(227, 227),
    params=60_965_224,
    **_IMAGENET,
)
register(
    AlexNet,
    "alexnet_ungrouped",
    backbone=AlexNetBackbone,
    defaults={"groups": (1, 1, 1, 1, 1)},
    paper=_PAPER,
    year=2012,
    input_size=(227, 227),
    params=62_378_344,
    **_IMAGENET,
)
register(
    AlexNet,
    "alexnet_tv",
    backbone=AlexNetBackbone,
    defaults=_ONE_TOWER,
    paper="Krizhevsky 2014, One weird trick for parallelizing convolutional neural networks",
    year=2014,
    input_size=(224, 224),
    params=61_100_840,
    **_IMAGENET,
)
register(
    AlexNetDLI,
    "alexnet_dli",
    backbone=AlexNetDLIBackbone,
    task="classification",
    paper="Krohn 2019, Deep Learning Illustrated, chapter 10",
    year=2019,
    input_size=(224, 224),
    channels=3,
    params=21_881_681,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
