"""U-Net.

O. Ronneberger, P. Fischer, T. Brox, "U-Net: convolutional networks for biomedical image segmentation", MICCAI 2015.

`unet` is the paper's network, with cropped skips and with dropout at the end of the contracting path. Its convolutions
have no padding, so an image of 572x572 pixels gives logits of 388x388. The paper does not specify the dropout further.
Here it follows each of the last two stages, with a rate of 0.5, as in the authors' release.

The other names are variants that are common today: padded convolutions with BatchNorm, and logits of the size of the
image. `unet_same` keeps the paper's stages and upsampling. `UNetSame` takes any backbone as its encoder. With
`upsampling="nearest"` and a 3x3 convolution for the logits it is the U-Net of segmentation_models_pytorch:
`unet_resnet34` and `unet_mobilenet_v2`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, ConvNorm, ConvTranspose, max_pool, upsample_nearest
from flaxvision.models.backbone import Backbone, as_float32
from flaxvision.models.mobilenet_v2 import MobileNetV2Backbone
from flaxvision.models.resnet import ResNetBackbone
from flaxvision.models.segmenter import Segmenter
from flaxvision.registry import register

# Section 3: a standard deviation of sqrt(2 / N) for N incoming connections.
_he_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class UNetBackbone(Backbone):
    """The contracting path: stages of two 3x3 convolutions with ReLU, and 2x2 max-pools between the stages.

    For the other fields, see `Backbone`.

    Attributes:
        features: Channels of each stage.
        padded: Whether convolutions keep the size and have BatchNorm instead of biases, and pools round up. The paper
            does not pad.
        dropout_rate: Rate of the dropout after each of the last two stages.
        epsilon: Epsilon of BatchNorm.
        momentum: Decay of BatchNorm's running statistics.
    """

    features: tuple[int, ...] = (64, 128, 256, 512, 1024)
    padded: bool = False
    dropout_rate: float = 0.5
    epsilon: float = 1e-5
    momentum: float = 0.9

    @property
    def stage_strides(self) -> dict[str, int]:
        """Published stride of each stage, in pixels of the image."""
        return {f"stage{i + 1}": 2**i for i in range(len(self.features))}

    @nn.nowrap
    def iter_stages(self, x: jax.Array, train: bool) -> Iterator[tuple[str, jax.Array]]:
        """Yields the output of the second convolution of each stage, after dropout.

        Raises:
            ValueError: `padded` is False, and the images are too small, or their size gives an odd map before a pool.
        """
        if not self.padded:
            for extent in x.shape[1:3]:
                _check_extent(extent, len(self.features))
        norm = self.make_norm(train, epsilon=self.epsilon, momentum=self.momentum)
        for i, features in enumerate(self.features, start=1):
            if i > 1:
                x = max_pool(x, 2, ceil_mode=self.padded)
            for number in (1, 2):
                name = f"stage{i}_conv{number}"
                if self.padded:
                    conv = functools.partial(Conv, use_bias=False, kernel_init=_he_fan_in, **self.dtypes)
                    x = ConvNorm(features, (3, 3), padding=1, conv=conv, norm=norm, name=name)(x)
                else:
                    x = nn.relu(_conv3(self, features, name)(x))
            if i > len(self.features) - 2:
                x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            yield f"stage{i}", x


class UNet(Segmenter):
    """The paper's U-Net on a `UNetBackbone`: logits are smaller than the images by 184 pixels at five stages.

    The logits belong to the central pixels of the image. For the fields, see `Segmenter`.
    """

    @property
    def margin(self) -> int:
        """Pixels at each border of the images that have no logits."""
        return 2 * (3 * 2 ** (len(self.backbone.strides) - 1) - 2)

    @nn.nowrap
    def input_extent(self, extent: int) -> int:
        """Returns the smallest height or width of images whose logits cover `extent` pixels."""
        period, lost, least = _extents(len(self.backbone.strides))
        return max(least, lost + -(-(extent + 2 * self.margin - lost) // period) * period)

    @nn.compact
    def apply_head(
        self, features: dict[str, jax.Array], *, size: Sequence[int] | None = None, train: bool = False
    ) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, H', W', K]`, float32 or wider; ignores `size`."""
        del size, train
        names = list(self.backbone.strides)
        x = self.stage(features)
        for name in reversed(names[:-1]):
            skip = features[name]
            width = skip.shape[-1]
            up = functools.partial(ConvTranspose, kernel_init=_he_fan_in, **self.backbone.dtypes)
            x = up(width, (2, 2), strides=(2, 2), padding="VALID", name=f"{name}_up")(x)
            x = jnp.concatenate([_center(skip, x.shape[1:3]), x], axis=-1)
            for number in (1, 2):
                x = nn.relu(_conv3(self.backbone, width, f"{name}_conv{number}")(x))
        conv = functools.partial(Conv, kernel_init=_he_fan_in, **self.backbone.dtypes)
        return as_float32(conv(self.num_classes, (1, 1), name="logits")(x))


class UNetSame(Segmenter):
    """A U-Net whose encoder is any backbone, and whose logits have the size of the images.

    From coarse to fine, the maps are upsampled by 2, cropped to the next stage, concatenated with it and convolved
    twice. If the finest stage is coarser than the image, further steps without a skip follow. For the other fields,
    see `Segmenter`.

    Attributes:
        decoder_features: Channels of each step of the decoder, coarsest first.
        upsampling: `"transpose"` for a 2x2 transposed convolution to `decoder_features`, as in the paper, or
            `"nearest"` for nearest neighbour.
        head_window: Kernel size of the convolution that computes the logits.

    Raises:
        ValueError: `upsampling` has another value, the strides of the stages are not successive powers of 2, or
            `decoder_features` does not have one entry for each step.
    """

    decoder_features: tuple[int, ...] = (512, 256, 128, 64)
    upsampling: str = "transpose"
    head_window: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.upsampling not in ("transpose", "nearest"):
            raise ValueError(f"upsampling must be 'transpose' or 'nearest'; got {self.upsampling!r}")
        strides = list(self.backbone.strides.values())
        if any(fine * 2 != coarse for fine, coarse in itertools.pairwise(strides)):
            raise ValueError(f"the strides of the backbone must double from stage to stage; got {strides}")
        steps = strides[-1].bit_length() - 1
        if len(self.decoder_features) != steps:
            raise ValueError(
                f"decoder_features must have {steps} entries for a stride of {strides[-1]}; got {self.decoder_features}"
            )

    @nn.compact
    def apply_head(
        self, features: dict[str, jax.Array], *, size: Sequence[int] | None = None, train: bool = False
    ) -> jax.Array:
        """Maps the stages of the backbone to logits.

        Args:
            features: Result of `features`.
            size: Height and width of the images, to which the logits are cropped; None does not crop them.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            `[N, *size, K]`, float32 or wider.
        """
        dtypes = self.backbone.dtypes
        conv = functools.partial(Conv, use_bias=False, kernel_init=_he_fan_in, **dtypes)
        norm = self.backbone.make_norm(train, epsilon=1e-5, momentum=0.9)
        unit = functools.partial(ConvNorm, kernel_size=(3, 3), padding=1, conv=conv, norm=norm)
        skips = [features[name] for name in reversed(list(self.backbone.strides)[:-1])]
        x = self.stage(features)
        for i, width in enumerate(self.decoder_features):
            name = f"decoder{i + 1}"
            if self.upsampling == "transpose":
                up = functools.partial(ConvTranspose, kernel_init=_he_fan_in, padding="VALID", **dtypes)
                x = up(width, (2, 2), strides=(2, 2), name=f"{name}_up")(x)
            else:
                x = upsample_nearest(x, (2 * x.shape[1], 2 * x.shape[2]))
            if i < len(skips):
                x = _corner(x, skips[i].shape[1:3])
                # The skip comes first as in the paper's figure, or last as in segmentation_models_pytorch.
                x = jnp.concatenate([skips[i], x] if self.upsampling == "transpose" else [x, skips[i]], axis=-1)
            for number in (1, 2):
                x = unit(width, name=f"{name}_conv{number}")(x)
        window = (self.head_window, self.head_window)
        head = functools.partial(Conv, padding=self.head_window // 2, kernel_init=_he_fan_in, **dtypes)
        logits = as_float32(head(self.num_classes, window, name="logits")(x))
        return logits if size is None else _corner(logits, size)


def _corner(x: jax.Array, size: Sequence[int]) -> jax.Array:
    if x.shape[1] < size[0] or x.shape[2] < size[1]:
        raise ValueError(
            "backbone must give stages of the image's size divided by their stride, rounded up;"
            f" got a map of {tuple(size)} after one that is upsampled to {x.shape[1:3]}"
        )
    return x[:, : size[0], : size[1]]


def _conv3(backbone: Backbone, features: int, name: str) -> Conv:
    return Conv(features, (3, 3), padding="VALID", kernel_init=_he_fan_in, name=name, **backbone.dtypes)


def _center(x: jax.Array, size: Sequence[int]) -> jax.Array:
    top, left = (x.shape[1] - size[0]) // 2, (x.shape[2] - size[1]) // 2
    return x[:, top : top + size[0], left : left + size[1]]


def _extents(stages: int) -> tuple[int, int, int]:
    """Returns the period, the offset and the minimum of the heights and widths that the paper's network accepts.

    The convolutions of the contracting path consume `offset` pixels. The rest must be a multiple of `period` for the
    pools. Below the minimum, the expansive path would leave no logits.
    """
    period, offset = 2 ** (stages - 1), 4 * (2**stages - 1)
    return period, offset, offset + period * (int(4 - 4 / period) + 1)


def _check_extent(extent: int, stages: int) -> None:
    period, offset, least = _extents(stages)
    if extent >= least and (extent - offset) % period == 0:
        return
    below = max(least, extent - (extent - offset) % period)
    right = f"{below} or {below + period}" if extent > least else str(least)
    raise ValueError(
        f"images must have a height and a width of {offset % period} + {period} n pixels, {least} or more (nearest:"
        f" {right}), for a U-Net of {stages} stages without padding; got {extent}"
    )


for _name, _padded, _params in (("unet", False, 31_030_658), ("unet_same", True, 31_036_546)):
    register(
        UNetSame if _padded else UNet,
        _name,
        backbone=UNetBackbone,
        defaults={"padded": _padded, "num_classes": 2, **({"dropout_rate": 0.0} if _padded else {})},
        task="segmentation",
        paper="Ronneberger, Fischer, Brox 2015, U-Net: convolutional networks for biomedical image segmentation",
        year=2015,
        input_size=(512, 512) if _padded else (572, 572),
        channels=1,
        params=_params,
    )
# The U-Nets of segmentation_models_pytorch, by encoder.
for _name, _backbone, _fields, _params in (
    ("unet_resnet34", ResNetBackbone, {"stage_sizes": (3, 4, 6, 3), "bottleneck": False}, 24_436_514),
    ("unet_mobilenet_v2", MobileNetV2Backbone, {}, 6_629_090),
):
    register(
        UNetSame,
        _name,
        backbone=_backbone,
        defaults={
            "num_classes": 2,
            "decoder_features": (256, 128, 64, 32, 16),
            "upsampling": "nearest",
            "head_window": 3,
            **_fields,
        },
        task="segmentation",
        paper="Ronneberger, Fischer, Brox 2015, U-Net: convolutional networks for biomedical image segmentation",
        year=2015,
        input_size=(512, 512),
        channels=3,
        params=_params,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
