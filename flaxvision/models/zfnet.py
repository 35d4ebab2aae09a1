"""ZFNet.

M. Zeiler, R. Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, figure 3: AlexNet without
groups, with a first layer of 7x7 at steps of 2 and a second at steps of 2.

The paper doesn't give the figures of its contrast normalization across maps; here they are AlexNet's. The paper
constrains the norm of the first layer's filters in training, which is the optimizer's business and not done here. Pools
round their size up, as the map sizes of figure 3 want.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, local_response_norm, max_pool
from flaxvision.models.backbone import Backbone, check_images, part_of
from flaxvision.registry import register

Dtype = Any


class ZFNetBackbone(Backbone):
    """The five convolutions, each with its ReLU; between the stages lie pools of 3 at steps of 2.

    Attributes:
        features: Maps of the five convolutions.
        lrn: Size, alpha, beta and k of `layers.local_response_norm`, or None for no normalization.
        lrn_first: Normalize before the first two pools, as pytorchcv and AlexNet, instead of after them.
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    features: tuple[int, int, int, int, int] = (96, 256, 384, 384, 256)
    lrn: tuple[int, float, float, float] | None = (5, 1e-4, 0.75, 2.0)
    lrn_first: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image per step of each stage."""
        return {"stage1": 2, "stage2": 8, "stage3": 16}

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]` to the maps of the first, second and fifth convolution, before their pools."""
        check_images(x)
        del train
        conv = functools.partial(
            Conv, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=nn.initializers.normal(0.01)
        )

        def normalized(x, here):
            if self.lrn is None or not here:
                return x
            size, alpha, beta, k = self.lrn
            return local_response_norm(x, size=size, alpha=alpha, beta=beta, k=k)

        def pooled(x):
            return normalized(max_pool(x, 3, 2, ceil_mode=True), not self.lrn_first)

        c1, c2, c3, c4, c5 = self.features
        stages = {}
        x = nn.relu(conv(c1, (7, 7), strides=2, padding=1, name="conv1")(x))
        stages["stage1"] = normalized(x, self.lrn_first)
        x = nn.relu(conv(c2, (5, 5), strides=2, padding=0, name="conv2")(pooled(stages["stage1"])))
        stages["stage2"] = normalized(x, self.lrn_first)
        x = nn.relu(conv(c3, (3, 3), padding=1, name="conv3")(pooled(stages["stage2"])))
        x = nn.relu(conv(c4, (3, 3), padding=1, name="conv4")(x))
        stages["stage3"] = nn.relu(conv(c5, (3, 3), padding=1, name="conv5")(x))
        return stages


class ZFNet(ZFNetBackbone):
    """The backbone, its last pool and three dense layers.

    The maps are flattened as they come: parameters belong to one image size, 224 or 225 as published, at least 63.

    Attributes:
        num_classes: Outputs; 0 gives the `hidden_features` that the head sees.
        hidden_features: Units of the two hidden dense layers, fc6 and fc7.
        dropout_rate: After each hidden dense layer.
    """

    num_classes: int = 1000
    hidden_features: int = 4096
    dropout_rate: float = 0.5

    @nn.nowrap
    def make_backbone(self, name: str | None = "backbone") -> nn.Module:
        """Builds the trunk."""
        return part_of(self, ZFNetBackbone, name)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:  # type: ignore[override]
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]` float32."""
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": nn.initializers.normal(0.01)}
        x = max_pool(self.make_backbone()(x, train=train)["stage3"], 3, 2, ceil_mode=True)
        x = x.reshape((x.shape[0], -1))
        for name in ("fc6", "fc7"):
            x = nn.relu(nn.Dense(self.hidden_features, name=name, **policy)(x))
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        if self.num_classes:
            x = nn.Dense(self.num_classes, name="head", **policy)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


register(
    ZFNet,
    "zfnet",
    task="classification",
    paper="Zeiler, Fergus 2014, Visualizing and Understanding Convolutional Networks",
    year=2014,
    input_size=(224, 224),
    channels=3,
    params=62_357_608,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
