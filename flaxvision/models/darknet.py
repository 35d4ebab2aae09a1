"""The classifiers of darknet: Darknet-19, Darknet-53 and Tiny Darknet.

J. Redmon, A. Farhadi, "YOLO9000: Better, faster, stronger", CVPR 2017, table 6 (Darknet-19); J. Redmon, A. Farhadi,
"YOLOv3: An incremental improvement", arXiv:1804.02767, table 1 (Darknet-53); and
https://pjreddie.com/darknet/tiny-darknet (Tiny Darknet). The papers do not specify padding, the slope of the leaky
ReLU, and BatchNorm. The definitions are those of the cfg files that come with darknet.

darknet's CPU code divides by `sqrt(var) + 1e-6` in BatchNorm. Here, `epsilon=1e-6` is added under the square root. The
relative difference is below 1e-6 for variances above 0.2 and grows for smaller ones. darknet's GPU code and its fork by
A. Bochkovskiy add 1e-5 under the square root. darknet's running variances are unbiased; ours are biased, as in Linen.

Darknet-19 and Tiny Darknet end in a linear 1x1 convolution and a global average pool. Here the pool comes first, which
gives the same logits up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax

from flaxvision.layers import Conv, ConvNorm, max_pool
from flaxvision.layers.darknet import darknet_max_pool
from flaxvision.models.backbone import Backbone, Classifier, Initializer
from flaxvision.registry import register

Rows = tuple[tuple[tuple[int, int], ...], ...]

# Features and kernel size of the convolutions between max-pools of stride 2.
DARKNET19: Rows = (
    ((32, 3),),
    ((64, 3),),
    ((128, 3), (64, 1), (128, 3)),
    ((256, 3), (128, 1), (256, 3)),
    ((512, 3), (256, 1), (512, 3), (256, 1), (512, 3)),
    ((1024, 3), (512, 1), (1024, 3), (512, 1), (1024, 3)),
)
TINY_DARKNET: Rows = (
    ((16, 3),),
    ((32, 3),),
    ((16, 1), (128, 3), (16, 1), (128, 3)),
    ((32, 1), (256, 3), (32, 1), (256, 3)),
    ((64, 1), (512, 3), (64, 1), (512, 3), (128, 1)),
)
TINY_YOLO: Rows = (((16, 3),), ((32, 3),), ((64, 3),), ((128, 3),), ((256, 3),), ((512, 3), (1024, 3)))

_he = nn.initializers.he_normal()
leaky = functools.partial(nn.leaky_relu, negative_slope=0.1)


def darknet_unit(backbone: Backbone, train: bool) -> Callable[..., ConvNorm]:
    """Returns a constructor of darknet's unit: convolution, BatchNorm, leaky ReLU of slope 0.1.

    Args:
        backbone: Provides the dtypes, the mode of BatchNorm, its epsilon and its momentum. A backbone without these two
            fields, of another family, gets those of darknet.
        train: Whether BatchNorm uses the statistics of the batch.
    """
    conv = functools.partial(Conv, use_bias=False, kernel_init=_he, **backbone.dtypes)
    epsilon, momentum = getattr(backbone, "epsilon", 1e-6), getattr(backbone, "momentum", 0.99)
    norm = backbone.make_norm(train, epsilon=epsilon, momentum=momentum)
    return functools.partial(ConvNorm, conv=conv, norm=norm, activation=leaky)


class DarknetBackbone(Backbone):
    """Convolutions with BatchNorm and leaky ReLU between max-pools of stride 2: Darknet-19 and smaller networks.

    The stages are `stem` at stride 1, `stage1` at stride 2, and so on. The other fields are those of `Backbone`.

    Attributes:
        convs: For each stage, the features and the kernel size of its convolutions.
        last_pool: Whether a 2x2 max-pool of stride 1 follows the first convolution of the last stage (tiny YOLO). It is
            padded at the bottom and at the right.
        epsilon: Epsilon of BatchNorm.
        momentum: Decay of BatchNorm's running statistics.
    """

    convs: Rows = DARKNET19
    last_pool: bool = False
    epsilon: float = 1e-6
    momentum: float = 0.99

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {f"stage{i}" if i else "stem": 2**i for i in range(len(self.convs))}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the last feature map of each stage."""
        unit = darknet_unit(self, train)
        for number, (stage, rows) in enumerate(zip(self.stage_strides, self.convs, strict=True)):
            x = max_pool(x, 2, padding="SAME") if number else x
            for i, (features, size) in enumerate(rows, start=1):
                x = unit(features, (size, size), padding=size // 2, name=f"{stage}_conv{i}")(x)
                if self.last_pool and i == 1 and number == len(self.convs) - 1:
                    x = darknet_max_pool(x, 2, 1)
            yield stage, x


class Darknet53Backbone(Backbone):
    """Darknet-53 without its head: residual blocks of a 1x1 and a 3x3 convolution, and convolutions of stride 2.

    The stages are `stem` at stride 1, `stage1` at stride 2, and so on. The other fields are those of `Backbone`.

    Attributes:
        stage_sizes: Number of residual blocks of each stage.
        stem_features: Channels of the first convolution; every stage doubles them.
        epsilon: Epsilon of BatchNorm.
        momentum: Decay of BatchNorm's running statistics.
    """

    stage_sizes: tuple[int, ...] = (1, 2, 8, 8, 4)
    stem_features: int = 32
    epsilon: float = 1e-6
    momentum: float = 0.99

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {f"stage{i}" if i else "stem": 2**i for i in range(len(self.stage_sizes) + 1)}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the last feature map of each stage."""
        unit = darknet_unit(self, train)
        features = self.stem_features
        x = unit(features, (3, 3), padding=1, name="stem_conv")(x)
        yield "stem", x
        for number, blocks in enumerate(self.stage_sizes, start=1):
            features *= 2
            x = unit(features, (3, 3), strides=2, padding=1, name=f"stage{number}_conv")(x)
            for i in range(1, blocks + 1):
                name = f"stage{number}_block{i}"
                y = unit(features // 2, (1, 1), padding=0, name=f"{name}_conv1")(x)
                x = x + unit(features, (3, 3), padding=1, name=f"{name}_conv2")(y)
            yield f"stage{number}", x


class Darknet(Classifier):
    """A classifier on a `DarknetBackbone` or a `Darknet53Backbone`. The fields are those of `Classifier`."""

    kernel_init: Initializer | None = _he


_info = {"task": "classification", "channels": 3, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
register(
    Darknet,
    "darknet19",
    backbone=DarknetBackbone,
    paper="Redmon and Farhadi 2017, YOLO9000: Better, faster, stronger",
    year=2017,
    input_size=(256, 256),
    params=20_842_376,
    **_info,
)
register(
    Darknet,
    "darknet53",
    backbone=Darknet53Backbone,
    paper="Redmon and Farhadi 2018, YOLOv3: An incremental improvement",
    year=2018,
    input_size=(256, 256),
    params=41_609_928,
    **_info,
)
register(
    Darknet,
    "tiny_darknet",
    backbone=DarknetBackbone,
    defaults={"convs": TINY_DARKNET},
    paper="Redmon 2016, Tiny Darknet, https://pjreddie.com/darknet/tiny-darknet",
    year=2016,
    input_size=(224, 224),
    params=1_042_104,
    **_info,
)
