"""AlexNet, as printed and as three others define it.

A. Krizhevsky, I. Sutskever, G. Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012.

`alexnet` is section 3.5 of the paper: the second, fourth and fifth convolution see only the maps of their own GPU, here
two groups. `alexnet_ungrouped` is the same without the groups. `alexnet_tv` is the one tower of "One weird trick for
parallelizing convolutional neural networks" (Krizhevsky 2014) as torchvision has it. `alexnet_dli` is the one of J.
Krohn's book "Deep Learning Illustrated" (2019, chapter 10).

Deviations of the first two from the paper: the local response normalization sees all maps of a layer, where two GPUs
each saw their own; pools round their size up as Caffe's do, which changes nothing at 227 pixels and lets the 224 that
the paper prints give the same 6x6 maps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv, adaptive_avg_pool, local_response_norm, max_pool
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.registry import register

Dtype = Any
# size, alpha, beta and k of `local_response_norm`.
LRN = tuple[int, float, float, float]


class AlexNetBackbone(Backbone):
    """The five convolutions, each with its ReLU; pools of 3 at steps of 2 lie between the stages.

    The normalization comes after the first two ReLUs and before their pools (the paper's section 3.5).

    Attributes:
        features: Maps of the five convolutions.
        groups: Groups of maps of the five convolutions that do not see each other.
        first_padding: Zeros around the image; torchvision has 2.
        lrn: Size, alpha, beta and k of `layers.local_response_norm`, or None for no normalization. The paper's figures
            are the default; Caffe and torch divide alpha by the size, which is `(5, 2e-5, 0.75, k)`.
        ceil_mode: Whether pools round their size up; torchvision's round it down.
        torch_init: Kernels and biases as torch draws them, uniform within `1 / sqrt(fan_in)`. Otherwise the paper's
            section 5: kernels with a deviation of 0.01, biases of 1 in the second, fourth and fifth convolution and in
            the hidden dense layers, of 0 elsewhere.
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    features: tuple[int, int, int, int, int] = (96, 256, 384, 384, 256)
    groups: tuple[int, int, int, int, int] = (1, 2, 1, 2, 2)
    first_padding: int = 0
    lrn: LRN | None = (5, 1e-4, 0.75, 2.0)
    ceil_mode: bool = True
    torch_init: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage."""
        return {"stage1": 4, "stage2": 8, "stage3": 16}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]` to the maps of the first, second and fifth convolution, before their pools."""
        check_images(x)
        del train

        def conv(x, index, window, padding, strides=1):
            inputs = x.shape[-1] // self.groups[index]
            init = _initializers(self.torch_init, window * window * inputs, bias=float(index in (1, 3, 4)))
            layer = Conv(
                self.features[index],
                (window, window),
                strides=strides,
                padding=padding,
                feature_group_count=self.groups[index],
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"conv{index + 1}",
                **init,
            )
            return nn.relu(layer(x))

        def normalized(x):
            if self.lrn is None:
                return x
            size, alpha, beta, k = self.lrn
            return local_response_norm(x, size=size, alpha=alpha, beta=beta, k=k)

        pool = functools.partial(max_pool, window_shape=3, strides=2, ceil_mode=self.ceil_mode)
        stages = {"stage1": normalized(conv(x, 0, 11, self.first_padding, strides=4))}
        stages["stage2"] = normalized(conv(pool(stages["stage1"]), 1, 5, 2))
        x = conv(pool(stages["stage2"]), 2, 3, 1)
        x = conv(x, 3, 3, 1)
        stages["stage3"] = conv(x, 4, 3, 1)
        return stages


class AlexNet(AlexNetBackbone):
    """The backbone, its last pool and three dense layers.

    Without `pooled_size` the maps are flattened as they come: parameters belong to one image size, 227 (or 224) as
    published, at least 55.

    Attributes:
        num_classes: Outputs; 0 gives the `hidden_features` that the head sees.
        hidden_features: Units of the two hidden dense layers, fc6 and fc7.
        dropout_rate: Of the dropout at the two hidden dense layers.
        dropout_first: Drop what goes into the hidden layers (torchvision) instead of what comes out (the paper).
        pooled_size: Average the last maps to this height and width, so that any image size of 63 or more will do.
    """

    num_classes: int = 1000
    hidden_features: int = 4096
    dropout_rate: float = 0.5
    dropout_first: bool = False
    pooled_size: int | None = None

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Builds the trunk."""
        return part_of(self, AlexNetBackbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:  # type: ignore[override]
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]` float32."""
        x = self.make_backbone()(x, train=train)["stage3"]
        x = max_pool(x, 3, 2, ceil_mode=self.ceil_mode)
        if self.pooled_size is not None:
            x = adaptive_avg_pool(x, self.pooled_size)
        x = x.reshape((x.shape[0], -1))
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropout = functools.partial(nn.Dropout(self.dropout_rate), deterministic=not train)
        for name in ("fc6", "fc7"):
            init = _initializers(self.torch_init, x.shape[-1], bias=1.0)
            dense = nn.Dense(self.hidden_features, name=name, **policy, **init)
            x = nn.relu(dense(dropout(x))) if self.dropout_first else dropout(nn.relu(dense(x)))
        if self.num_classes:
            init = _initializers(self.torch_init, x.shape[-1], bias=0.0)
            x = nn.Dense(self.num_classes, name="head", **policy, **init)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class AlexNetDLIBackbone(Backbone):
    """Five VALID convolutions with ReLU; between the stages lie pools of 3 at steps of 2, each with a BatchNorm.

    Attributes:
        features: Maps of the five convolutions.
        epsilon: Of the BatchNorms; Keras' default.
        momentum: Of their running statistics; Keras' default.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        axis_name: Of the devices over which BatchNorm averages under `pmap`.
    """

    features: tuple[int, int, int, int, int] = (96, 256, 256, 384, 384)
    epsilon: float = 1e-3
    momentum: float = 0.99
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage."""
        return {"stage1": 4, "stage2": 8, "stage3": 16}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]` to the maps of the first, second and fifth convolution, before their pools."""
        check_images(x)
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": nn.initializers.glorot_uniform()}
        conv = functools.partial(Conv, padding="VALID", **policy)
        norm = _batch_norm(self, train)
        c1, c2, c3, c4, c5 = self.features
        stages = {"stage1": nn.relu(conv(c1, (11, 11), strides=4, name="conv1")(x))}
        x = norm(name="bn1")(max_pool(stages["stage1"], 3, 2))
        stages["stage2"] = nn.relu(conv(c2, (5, 5), name="conv2")(x))
        x = norm(name="bn2")(max_pool(stages["stage2"], 3, 2))
        x = nn.relu(conv(c3, (3, 3), name="conv3")(x))
        x = nn.relu(conv(c4, (3, 3), name="conv4")(x))
        stages["stage3"] = nn.relu(conv(c5, (3, 3), name="conv5")(x))
        return stages


class AlexNetDLI(AlexNetDLIBackbone):
    """The book's AlexNet: BatchNorm after each pool, no zeros around anything, dense layers with tanh.

    The maps are flattened as they come: parameters belong to one image size, 224 as published, at least 195.

    Attributes:
        num_classes: Outputs; 0 gives the `hidden_features` that the head sees. The book has the 17 Oxford flowers.
        hidden_features: Units of the two hidden dense layers, fc6 and fc7.
        dropout_rate: After each hidden dense layer.
    """

    num_classes: int = 17
    hidden_features: int = 4096
    dropout_rate: float = 0.5

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Builds the trunk."""
        return part_of(self, AlexNetDLIBackbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:  # type: ignore[override]
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]` float32."""
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": nn.initializers.glorot_uniform()}
        x = self.make_backbone()(x, train=train)["stage3"]
        x = _batch_norm(self, train)(name="bn3")(max_pool(x, 3, 2))
        x = x.reshape((x.shape[0], -1))
        for name in ("fc6", "fc7"):
            x = jnp.tanh(nn.Dense(self.hidden_features, name=name, **policy)(x))
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        if self.num_classes:
            x = nn.Dense(self.num_classes, name="head", **policy)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _batch_norm(module: AlexNetDLIBackbone, train: bool) -> Callable[..., nn.Module]:
    return functools.partial(
        BatchNorm,
        use_running_average=not train,
        momentum=module.momentum,
        epsilon=module.epsilon,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        axis_name=module.axis_name,
    )


def _initializers(torch_init: bool, fan_in: int, bias: float) -> dict[str, Any]:
    if torch_init:
        uniform = functools.partial(_uniform, limit=fan_in**-0.5)
        return {"kernel_init": uniform, "bias_init": uniform}
    return {"kernel_init": nn.initializers.normal(0.01), "bias_init": nn.initializers.constant(bias)}


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32, *, limit: float) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -limit, limit)


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
register(AlexNet, "alexnet", paper=_PAPER, year=2012, input_size=(227, 227), params=60_965_224, **_IMAGENET)
register(
    AlexNet,
    "alexnet_ungrouped",
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
    defaults=_ONE_TOWER,
    paper="Krizhevsky 2014, One weird trick for parallelizing convolutional neural networks",
    year=2014,
    input_size=(224, 224),
    params=61_100_840,
    weights=("torchvision/IMAGENET1K_V1",),
    **_IMAGENET,
)
register(
    AlexNetDLI,
    "alexnet_dli",
    task="classification",
    paper="Krohn 2019, Deep Learning Illustrated, chapter 10",
    year=2019,
    input_size=(224, 224),
    channels=3,
    params=21_881_681,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
