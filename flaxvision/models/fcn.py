"""Fully convolutional networks (FCN).

E. Shelhamer, J. Long, T. Darrell, "Fully convolutional networks for semantic segmentation", PAMI 2017. `FCNVGG` is the
authors' released network on VGG-16 with one, two or three prediction strides: FCN-32s, FCN-16s and FCN-8s (figure 3).
`FCN` is torchvision's: a ResNet with an output stride of 8, and a head of two convolutions.

The released `FCNVGG` has details that the paper leaves out: the first convolution pads by 100 pixels, pools round up,
and the upsampled scores are cropped to the image. `score_scales` scales the maps of the finer stages before they are
scored, as the authors do to train all stages at once. Training in stages does not scale them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxvision.layers import BatchNorm, Conv, ConvTranspose, conv_transpose, max_pool
from flaxvision.models.backbone import as_float32, check_images
from flaxvision.models.resnet import ResNetBackbone
from flaxvision.models.segmenter import Segmenter, resized
from flaxvision.models.vgg import STAGE_SIZES, VGGBackbone
from flaxvision.registry import register

linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Zero padding of the image in pixels. With it, images smaller than the window of fc6 have scores too.
_PADDING = 100


class FCNHead(nn.Module):
    """3x3 convolution with normalization and ReLU, dropout, and a 1x1 convolution (torchvision).

    Attributes:
        num_classes: Number of classes K.
        dropout_rate: Rate of the dropout.
        conv: Makes a convolution.
        norm: Makes a normalization; for training, `partial(BatchNorm, use_running_average=False)`.
    """

    num_classes: int
    dropout_rate: float = 0.1
    conv: Callable[..., nn.Module] = Conv
    norm: Callable[..., nn.Module] = functools.partial(BatchNorm, use_running_average=True)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `[N, H, W, C]` to logits `[N, H, W, K]`; the hidden layer has `C / 4` channels."""
        x = self.conv(x.shape[-1] // 4, (3, 3), padding=1, use_bias=False, name="conv")(x)
        x = nn.relu(self.norm(name="bn")(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return self.conv(self.num_classes, (1, 1), name="logits")(x)


class FCN(Segmenter):
    """torchvision's FCN: an `FCNHead` on the last stage of a backbone, and bilinear upsampling.

    For the other fields, see `Segmenter`.

    Attributes:
        aux_heads: Whether there is a second `FCNHead`, on the stage before the last. It runs in training only and sows
            its logits, at the size of the images, into the collection `aux_logits` as `aux`.
        dropout_rate: Rate of the dropout in the heads.
    """

    aux_heads: bool = False
    dropout_rate: float = 0.1

    @nn.compact
    def apply_head(
        self, features: dict[str, jax.Array], *, size: Sequence[int] | None = None, train: bool = False
    ) -> jax.Array:
        """Maps the stages of the backbone to logits `[N, *size, K]`, float32 or wider."""
        head = functools.partial(
            FCNHead,
            self.num_classes,
            self.dropout_rate,
            conv=functools.partial(Conv, kernel_init=linear_init, **self.backbone.dtypes),
            norm=self.backbone.make_norm(train, epsilon=1e-5, momentum=0.9),
        )
        if self.aux_heads and (train or self.is_initializing()):
            logits = head(name="aux_head")(self.stage(features, 2), train=train)
            if train:
                self.sow("aux_logits", "aux", resized(logits, size))
        return resized(head(name="head")(self.stage(features), train=train), size)


class FCNVGG(Segmenter):
    """FCN-32s, FCN-16s or FCN-8s on the five stages of a `VGGBackbone` with `ceil_mode`, for images of any size.

    Fully connected layers become the convolutions `fc6` (7x7) and `fc7`. A 1x1 convolution scores their output. Further
    1x1 convolutions score the pooled stage 4 (FCN-16s and FCN-8s) and stage 3 (FCN-8s). Coarser scores are upsampled by
    2 and added to the finer ones. The sum is upsampled to the image (section 4.2). For the other fields, see
    `Segmenter`.

    Attributes:
        skips: Stages whose pooled maps are scored besides `fc7`, coarsest first: none, `("stage4",)` or
            `("stage4", "stage3")`.
        learned_upsampling: Whether the upsampling kernels `[k, k, K, K]` are parameters, initialized to bilinear
            interpolation. False keeps bilinear interpolation, as the authors do with a learning rate of 0.
        score_scales: Factors by which the maps of `skips` are multiplied before they are scored; None for 1. The
            authors use 0.01 and 0.0001 to train all stages at once.
        hidden_features: Channels of `fc6` and `fc7`.
        dropout_rate: Rate of the dropout after each of them.

    Raises:
        ValueError: `skips` has another value, `score_scales` does not have one entry per skip, or the backbone has no
            `ceil_mode` or does not return `stage5` and the stages in `skips`.
    """

    skips: tuple[str, ...] = ()
    learned_upsampling: bool = True
    score_scales: tuple[float, ...] | None = None
    hidden_features: int = 4096
    dropout_rate: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.skips not in ((), ("stage4",), ("stage4", "stage3")):
            raise ValueError(f"skips must be (), ('stage4',) or ('stage4', 'stage3'); got {self.skips!r}")
        if self.score_scales is not None and len(self.score_scales) != len(self.skips):
            raise ValueError(f"score_scales must have an entry for each of {self.skips}; got {self.score_scales!r}")
        missing = {*self.skips, "stage5"} - set(self.backbone.strides)
        if missing or not getattr(self.backbone, "ceil_mode", False):
            raise ValueError(
                f"backbone must be a VGGBackbone with ceil_mode and the stages stage5 and skips; got {self.backbone!r}"
            )

    def features(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Maps images `[N, H, W, C]`, padded by 100 pixels, to the stages of the backbone."""
        check_images(images)
        around = _PADDING - 1  # the first convolution itself pads by one pixel
        images = jnp.pad(images, ((0, 0), (around, around), (around, around), (0, 0)))
        return self.backbone(images, train=train)

    @nn.compact
    def apply_head(
        self, features: dict[str, jax.Array], *, size: Sequence[int] | None = None, train: bool = False
    ) -> jax.Array:
        """Maps the stages of the backbone to logits.

        Args:
            features: Result of `features`.
            size: Height and width of the images, to which the logits are cropped; None does not crop them.
            train: Whether dropout drops.

        Returns:
            `[N, *size, K]`, float32 or wider.
        """
        conv = functools.partial(Conv, padding="VALID", **self.backbone.dtypes)
        x = _pool(self.stage(features))
        for name, window in (("fc6", (7, 7)), ("fc7", (1, 1))):
            x = nn.relu(conv(self.hidden_features, window, kernel_init=nn.initializers.normal(0.01), name=name)(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        # New scores start at 0, so that training starts with the predictions of the coarser network (section 4.2).
        score = functools.partial(conv, self.num_classes, (1, 1), kernel_init=nn.initializers.zeros)
        x = as_float32(score(name="score")(x))
        stride = 32
        for stage, scale in zip(self.skips, self.score_scales or (1.0,) * len(self.skips), strict=True):
            finer = as_float32(score(name=f"score_{stage}")(scale * _pool(features[stage])))
            x = self._upsampled(x, 2, f"upsample_{stage}")
            x = x + _cropped(finer, x.shape[1:3], _OFFSETS[stage])
            stride //= 2
        x = self._upsampled(x, stride, "upsample")
        return x if size is None else _cropped(x, size, _CROPS[stride])

    @nn.nowrap
    def _upsampled(self, x: jax.Array, stride: int, name: str) -> jax.Array:
        """Upsamples `[N, H, W, K]` to `[N, (H + 1) * stride, (W + 1) * stride, K]`."""
        if self.learned_upsampling:
            up = functools.partial(ConvTranspose, kernel_init=_bilinear_init, padding="VALID", use_bias=False)
            window = (2 * stride, 2 * stride)
            layer = up(self.num_classes, window, strides=(stride, stride), name=name, **self.backbone.dtypes)
            return as_float32(layer(x))
        kernel = jnp.asarray(bilinear_kernel(stride), x.dtype)[..., None, None]
        maps = jnp.moveaxis(x, -1, 1)
        y = conv_transpose(maps.reshape(-1, *x.shape[1:3], 1), kernel, stride, "VALID")
        return jnp.moveaxis(y.reshape(*maps.shape[:2], *y.shape[1:3]), 1, -1)


# Rows and columns to crop at the top and left, which the padding of 100 pixels adds: from the scores of a pooled stage
# before the coarser scores are added, and from the final scores by the stride of the final upsampling.
_OFFSETS = {"stage4": 5, "stage3": 9}
_CROPS = {32: 19, 16: 27, 8: 31}


def _cropped(x: jax.Array, size: Sequence[int], offset: int) -> jax.Array:
    return x[:, offset : offset + size[0], offset : offset + size[1]]


def _pool(x: jax.Array) -> jax.Array:
    return max_pool(x, 2, ceil_mode=True)


def bilinear_kernel(stride: int) -> np.ndarray:
    """Returns the kernel `[2 * stride, 2 * stride]` of a transposed convolution that interpolates bilinearly."""
    tent = 1 - np.abs((np.arange(2 * stride) + 0.5) / stride - 1)
    return np.outer(tent, tent)


def _bilinear_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    del key
    return jnp.asarray(np.einsum("hw,io->hwio", bilinear_kernel(shape[0] // 2), np.eye(shape[2], shape[3])), dtype)


def start_from(params: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Starts an `FCNVGG` from a trained VGG, or from an `FCNVGG` with fewer skips (section 4.2).

    The authors train in stages: FCN-32s, then FCN-16s from FCN-32s, then FCN-8s from FCN-16s. New scores start at 0, so
    both networks compute the same scores. With bilinear upsampling, the coarser network upsamples them once. The finer
    network upsamples them by 2, and then by half the stride. Before the first training step, its logits compare to the
    logits of the coarser network as follows, along each axis:

    * In the middle half of the interval between two scores, they are equal up to rounding.
    * Near a score, the second upsampling smooths the kink of the first. At a distance of `d` scores, the logits differ
      by `max(0, 1 / 8 - d / 2)` times the second difference of the scores.

    Args:
        params: Newly initialized parameters of the `FCNVGG`.
        trained: Parameters of the trained network. The dense layers `fc6` and `fc7` of a VGG become convolutions.
            Parameters that `params` does not have, such as the `head` of a VGG, are dropped.

    Returns:
        `params`, with the values of `trained` for all common parameters except those of the final upsampling, whose
        stride differs.

    Raises:
        ValueError: A common parameter differs in size, or there are no common parameters.
    """
    fresh: dict[str, Any] = dict(flatten_dict(dict(params), sep="/"))
    given: dict[str, Any] = dict(flatten_dict(dict(trained), sep="/"))
    shared = {path for path in fresh.keys() & given.keys() if not path.startswith("upsample/")}
    wrong = [path for path in sorted(shared) if np.size(given[path]) != np.size(fresh[path])]
    if wrong or not shared:
        named = ", ".join(f"{path} {np.shape(given[path])} for {np.shape(fresh[path])}" for path in wrong)
        named = named or "none in common"
        raise ValueError(f"trained must be the parameters of a VGG or FCNVGG that fits params; got {named}")
    return unflatten_dict(
        {path: jnp.reshape(given[path], fresh[path].shape) if path in shared else fresh[path] for path in fresh},
        sep="/",
    )


_SHARED = {"task": "segmentation", "channels": 3, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# Section 5: one, two and three prediction strides.
for _name, _skips, _params in (
    ("fcn32s_vgg16", (), 136_152_917),
    ("fcn16s_vgg16", ("stage4",), 134_815_994),
    ("fcn8s_vgg16", ("stage4", "stage3"), 134_489_759),
):
    register(
        FCNVGG,
        _name,
        backbone=VGGBackbone,
        defaults={"stage_sizes": STAGE_SIZES["vgg16"], "skips": _skips, "ceil_mode": True},
        paper="Shelhamer, Long, Darrell 2017, Fully convolutional networks for semantic segmentation",
        year=2017,
        input_size=(500, 500),
        params=_params,
        **_SHARED,
    )
register(
    FCN,
    "fcn_resnet50",
    backbone=ResNetBackbone,
    defaults={"stage_sizes": (3, 4, 6, 3), "stages": ("stage3", "stage4"), "output_stride": 8},
    paper="Shelhamer, Long, Darrell 2017, Fully convolutional networks for semantic segmentation",
    year=2017,
    input_size=(520, 520),
    params=32_957_013,
    **_SHARED,
)
