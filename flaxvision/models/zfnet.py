"""ZFNet.

M. Zeiler, R. Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, figure 3: AlexNet without
groups, with a 7x7 first convolution of stride 2 and a second convolution of stride 2.

The paper does not give the constants of its contrast normalization across maps; those of AlexNet are used here. The
paper also constrains the norm of the first layer's filters during training, which is left to the optimizer. Pools round
their output size up, which gives the map sizes of figure 3.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax

from flaxvision.layers import Conv, local_response_norm, max_pool
from flaxvision.models.backbone import Backbone, Classifier, Initializer, as_float32
from flaxvision.registry import register

_normal = nn.initializers.normal(0.01)


class ZFNetBackbone(Backbone):
    """The five convolutions of ZFNet, each with its ReLU. Between the stages are 3x3 max-pools of stride 2.

    The stages are the outputs of the first, second and fifth convolution, before their pools. The other fields are
    those of `Backbone`.

    Attributes:
        features: Output channels of the five convolutions.
        lrn: Size, alpha, beta and k of `layers.local_response_norm`, None for no normalization.
        lrn_first: Whether to normalize before the first two pools, as pytorchcv and AlexNet do, or after them.
    """

    features: tuple[int, int, int, int, int] = (96, 256, 384, 384, 256)
    lrn: tuple[int, float, float, float] | None = (5, 1e-4, 0.75, 2.0)
    lrn_first: bool = False

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {"stage1": 2, "stage2": 8, "stage3": 16}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the outputs of the first, second and fifth convolution, before their pools."""
        conv = functools.partial(Conv, kernel_init=_normal, **self.dtypes)

        def lrn(x):
            if self.lrn is None:
                return x
            size, alpha, beta, k = self.lrn
            return local_response_norm(x, size=size, alpha=alpha, beta=beta, k=k)

        def pool(x):
            x = max_pool(x, 3, 2, ceil_mode=True)
            return x if self.lrn_first else lrn(x)

        c1, c2, c3, c4, c5 = self.features
        x = nn.relu(conv(c1, (7, 7), strides=2, padding=1, name="conv1")(x))
        x = lrn(x) if self.lrn_first else x
        yield "stage1", x
        x = nn.relu(conv(c2, (5, 5), strides=2, padding=0, name="conv2")(pool(x)))
        x = lrn(x) if self.lrn_first else x
        yield "stage2", x
        x = nn.relu(conv(c3, (3, 3), padding=1, name="conv3")(pool(x)))
        x = nn.relu(conv(c4, (3, 3), padding=1, name="conv4")(x))
        yield "stage3", nn.relu(conv(c5, (3, 3), padding=1, name="conv5")(x))


class ZFNet(Classifier):
    """ZFNet: the last pool and three dense layers on a `ZFNetBackbone`.

    The maps are flattened at the size that they have, so the parameters fit one image size: 224 or 225 pixels as
    published, 47 or more in general. The other fields are those of `Classifier`.

    Attributes:
        hidden_features: Units of the two hidden dense layers, fc6 and fc7.
        dropout_rate: Rate of the dropout after each hidden dense layer.
    """

    hidden_features: int = 4096
    dropout_rate: float = 0.5

    @property
    def default_kernel_init(self) -> Initializer:
        """Initializer of the head unless `kernel_init` is set."""
        return _normal

    @nn.compact
    def apply_head(self, features: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, num_classes]`; to the features of fc7 if there are none."""
        init = self.kernel_init or self.default_kernel_init
        dense = functools.partial(nn.Dense, kernel_init=init, **self.backbone.dtypes)
        x = max_pool(self.last_stage(features), 3, 2, ceil_mode=True)
        x = x.reshape((x.shape[0], -1))
        for name in ("fc6", "fc7"):
            x = nn.relu(dense(self.hidden_features, name=name)(x))
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        return as_float32(dense(self.num_classes, name="head")(x) if self.num_classes else x)


register(
    ZFNet,
    "zfnet",
    backbone=ZFNetBackbone,
    task="classification",
    paper="Zeiler, Fergus 2014, Visualizing and Understanding Convolutional Networks",
    year=2014,
    input_size=(224, 224),
    channels=3,
    params=62_357_608,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
