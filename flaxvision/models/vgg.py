"""VGG.

K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, table 1:
columns A (`vgg11`), B (`vgg13`), D (`vgg16`) and E (`vgg19`). The `_bn` variants are torchvision's, with a BatchNorm
after every convolution; `vgg16_dli` is the one of J. Krohn's book "Deep Learning Illustrated" (2019, chapter 10), with
a BatchNorm after every pool.

Deviations from the paper: an image of another size than 224 has its last maps averaged to 7x7, as in torchvision;
`dense_evaluation` is the paper's section 3.2. Kernels start as torchvision's (the paper starts from a trained
network A).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import BatchNorm, Conv, adaptive_avg_pool, global_avg_pool, max_pool
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.registry import register

Dtype = Any

# The last maps, after five pools, of an image of 224 pixels.
_POOLED = 7


class VGGBackbone(Backbone):
    """Stages of 3x3 convolutions with ReLU; between the stages lie pools of 2.

    Attributes:
        stage_sizes: Convolutions of each stage.
        features: Maps of each stage.
        norm: `"conv"` for a BatchNorm between each convolution and its ReLU; `"pool"` for one after each pool, and for
            Keras' initializers; None for none.
        epsilon: Of the BatchNorms.
        momentum: Of their running statistics.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        axis_name: Of the devices over which BatchNorm averages under `pmap`.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 3, 3, 3)
    features: tuple[int, ...] = (64, 128, 256, 512, 512)
    norm: str | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage."""
        return {f"stage{i + 1}": 2**i for i in range(len(self.stage_sizes))}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]` to the last maps of each stage, before its pool.

        Raises:
            ValueError: `norm` is none of its values.
        """
        check_images(x)
        if self.norm not in (None, "conv", "pool"):
            raise ValueError(f"norm must be None, 'conv' or 'pool'; got {self.norm!r}")
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        conv = functools.partial(
            Conv,
            kernel_size=(3, 3),
            padding=1,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.glorot_uniform() if self.norm == "pool" else init,
        )
        norm = _batch_norm(self, train)
        stages: dict[str, jax.Array] = {}
        for stage, (size, features) in enumerate(zip(self.stage_sizes, self.features, strict=True), start=1):
            if stages:
                x = max_pool(x, 2)
                x = norm(name=f"pool{stage - 1}_bn")(x) if self.norm == "pool" else x
            for i in range(1, size + 1):
                x = conv(features, name=f"stage{stage}_conv{i}")(x)
                x = norm(name=f"stage{stage}_bn{i}")(x) if self.norm == "conv" else x
                x = nn.relu(x)
            stages[f"stage{stage}"] = x
        return stages


class VGG(VGGBackbone):
    """The backbone, its last pool and three dense layers. Wants images of 32 pixels or more.

    Attributes:
        num_classes: Outputs; 0 gives the `hidden_features` that the head sees.
        hidden_features: Units of the two hidden dense layers, fc6 and fc7.
        dropout_rate: After each hidden dense layer.
        dense_evaluation: What becomes of an image whose last maps exceed 7x7, from 256 pixels on. False averages them
            to 7x7, as torchvision. True moves the dense layers over them as if they were convolutions and averages what
            they give: the paper's section 3.2, and timm. The parameters are the same.
    """

    num_classes: int = 1000
    hidden_features: int = 4096
    dropout_rate: float = 0.5
    dense_evaluation: bool = False

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Builds the trunk."""
        return part_of(self, VGGBackbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:  # type: ignore[override]
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]` float32."""
        last = len(self.stage_sizes)
        x = max_pool(self.make_backbone()(x, train=train)[f"stage{last}"], 2)
        if self.norm == "pool":
            x = _batch_norm(self, train)(name=f"pool{last}_bn")(x)
        h, w = (max(_POOLED, n) if self.dense_evaluation else _POOLED for n in x.shape[1:3])
        if (h, w) != x.shape[1:3]:
            x = adaptive_avg_pool(x, (h, w))
        x = _windows(x, _POOLED)
        init = nn.initializers.glorot_uniform() if self.norm == "pool" else nn.initializers.normal(0.01)
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=init)
        for name in ("fc6", "fc7"):
            x = nn.relu(dense(self.hidden_features, name=name)(x))
            if name == "fc7":
                # Dropout acts on what the head sees, be it one window or the mean of many.
                x = global_avg_pool(x)
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        if self.num_classes:
            x = dense(self.num_classes, name="head")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _windows(x: jax.Array, size: int) -> jax.Array:
    """Every square window of `x [N, H, W, C]`, flattened: `[N, H - size + 1, W - size + 1, size * size * C]`."""
    n, h, w, c = x.shape
    if (h, w) == (size, size):
        return x.reshape((n, 1, 1, size * size * c))
    rows, columns = h - size + 1, w - size + 1
    return jnp.concatenate(
        [x[:, i : i + rows, j : j + columns] for i in range(size) for j in range(size)],
        axis=-1,
    )


def _batch_norm(module: VGGBackbone, train: bool) -> Callable[..., nn.Module]:
    return functools.partial(
        BatchNorm,
        use_running_average=not train,
        momentum=module.momentum,
        epsilon=module.epsilon,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        axis_name=module.axis_name,
    )


# Table 1 of the paper: convolutions of each stage. Then parameters without and with BatchNorm.
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
_WEIGHTS = {
    "vgg16": ("torchvision/IMAGENET1K_V1", "torchvision/IMAGENET1K_FEATURES", "timm/tv_in1k", "keras/imagenet"),
    "vgg19": ("torchvision/IMAGENET1K_V1", "timm/tv_in1k", "keras/imagenet"),
}
_SHARED = {"task": "classification", "input_size": (224, 224), "channels": 3}
_PAPER = "Simonyan, Zisserman 2015, Very Deep Convolutional Networks for Large-Scale Image Recognition"
for _name, _sizes in STAGE_SIZES.items():
    for _norm, _suffix, _params in zip((None, "conv"), ("", "_bn"), _PARAMS[_name], strict=True):
        register(
            VGG,
            _name + _suffix,
            defaults={"stage_sizes": _sizes, "norm": _norm},
            paper=_PAPER,
            year=2015,
            params=_params,
            weights=_WEIGHTS.get(_name + _suffix, ("torchvision/IMAGENET1K_V1", "timm/tv_in1k")),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            **_SHARED,
        )
register(
    VGG,
    "vgg16_dli",
    defaults={"norm": "pool", "epsilon": 1e-3, "momentum": 0.99, "num_classes": 17},
    paper="Krohn 2019, Deep Learning Illustrated, chapter 10",
    year=2019,
    params=134_333_137,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    **_SHARED,
)
