"""timm's weights (1.0.29), from its `pretrained_cfg`; the accuracy is of its `results-imagenet.csv`.

Files on the Hugging Face hub are safetensors; the older ones lie as torch files beside timm's releases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from flaxvision.data.preprocessing import Preprocessing
from flaxvision.weights.tags import WeightsInfo

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_TV, _A1 = "https://github.com/pytorch/vision", "https://arxiv.org/abs/2110.00476"
_TF = "https://github.com/tensorflow/models/tree/master/research/slim"
_CADENE = "https://github.com/Cadene/pretrained-models.pytorch"
_TIMM = "https://github.com/huggingface/pytorch-image-models"
_RELEASES = "https://github.com/rwightman/pytorch-image-models/releases/download/"

# name, timm's name and tag, crop, crop / resize, interpolation, normalization, top-1, top-5, recipe
_HUB: tuple[tuple[Any, ...], ...] = (
    ("vgg11", "vgg11.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 69.022, 88.624, _TV),
    ("vgg11_bn", "vgg11_bn.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 70.382, 89.808, _TV),
    ("vgg13", "vgg13.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 69.932, 89.250, _TV),
    ("vgg13_bn", "vgg13_bn.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 71.588, 90.378, _TV),
    ("vgg16", "vgg16.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 71.592, 90.384, _TV),
    ("vgg16_bn", "vgg16_bn.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 73.370, 91.514, _TV),
    ("vgg19", "vgg19.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 72.378, 90.874, _TV),
    ("vgg19_bn", "vgg19_bn.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 74.216, 91.844, _TV),
    ("resnet18", "resnet18.a1_in1k", 288, 1.0, "bicubic", _IMAGENET, 73.158, 91.026, _A1),
    ("resnet18", "resnet18.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 69.760, 89.070, _TV),
    ("resnet34", "resnet34.a1_in1k", 288, 1.0, "bicubic", _IMAGENET, 77.918, 93.766, _A1),
    ("resnet34", "resnet34.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, None, None, _TV),
    ("resnet50", "resnet50.a1_in1k", 288, 1.0, "bicubic", _IMAGENET, 81.214, 95.102, _A1),
    ("resnet50", "resnet50.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 76.130, 92.858, _TV),
    ("resnet101", "resnet101.a1h_in1k", 288, 1.0, "bicubic", _IMAGENET, 82.778, 96.310, _A1),
    ("resnet101", "resnet101.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 77.376, 93.542, _TV),
    ("resnet152", "resnet152.a1h_in1k", 288, 1.0, "bicubic", _IMAGENET, 83.450, 96.538, _A1),
    ("resnet152", "resnet152.tv_in1k", 224, 0.875, "bilinear", _IMAGENET, 78.322, 94.048, _TV),
    ("inception_v3", "inception_v3.tv_in1k", 299, 0.875, "bicubic", _HALF, 77.434, 93.474, _TV),
    ("inception_v4", "inception_v4.tf_in1k", 299, 0.875, "bicubic", _HALF, 80.156, 94.968, _TF),
    ("inception_resnet_v2", "inception_resnet_v2.tf_in1k", 299, 0.8975, "bicubic", _HALF, 80.462, 95.308, _TF),
    ("mobilenet_v2", "mobilenetv2_100.ra_in1k", 224, 0.875, "bicubic", _IMAGENET, 72.976, 91.010, _TIMM),
)

# name, tag, folder and file (its ending is the beginning of its sha256), the rest as above
_FILES: tuple[tuple[Any, ...], ...] = (
    ("xception", "tf_in1k", "v0.1-cadene/xception-43020ad28", 299, 0.8975, "bicubic", _HALF, 79.040, 94.382, _CADENE),
    (
        "se_resnet18",
        "in1k",
        "v0.1-weights/seresnet18-4bb0ce65",
        224,
        0.875,
        "bicubic",
        _IMAGENET,
        71.766,
        90.332,
        _TIMM,
    ),
    (
        "se_resnet34",
        "in1k",
        "v0.1-weights/seresnet34-a4004e63",
        224,
        0.875,
        "bilinear",
        _IMAGENET,
        74.808,
        92.126,
        _TIMM,
    ),
    (
        "se_resnet50",
        "in1k",
        "v0.1-cadene/se_resnet50-ce0d4300",
        224,
        0.875,
        "bilinear",
        _IMAGENET,
        77.644,
        93.758,
        _CADENE,
    ),
    (
        "se_resnet101",
        "in1k",
        "v0.1-cadene/se_resnet101-7e38fcc6",
        224,
        0.875,
        "bilinear",
        _IMAGENET,
        78.386,
        94.262,
        _CADENE,
    ),
    (
        "se_resnet152",
        "in1k",
        "v0.1-cadene/se_resnet152-d17c99b7",
        224,
        0.875,
        "bilinear",
        _IMAGENET,
        78.660,
        94.370,
        _CADENE,
    ),
    (
        "senet154",
        "in1k",
        "v0.1-weights/legacy_senet154-e9eb9fe6",
        224,
        0.875,
        "bilinear",
        _IMAGENET,
        81.308,
        95.492,
        _CADENE,
    ),
)


def entries() -> Iterator[tuple[str, WeightsInfo]]:
    """Registry names and what is known of their weights."""
    for name, theirs, *rest in _HUB:
        tag = theirs.partition(".")[2]
        yield name, _info(tag, f"hf://timm/{theirs}/model.safetensors", None, *rest)
    for name, tag, file, *rest in _FILES:
        yield name, _info(tag, f"{_RELEASES}{file}.pth", f"sha256:{file.rpartition('-')[2]}", *rest)


def _info(
    tag: str,
    url: str,
    digest: str | None,
    crop: int,
    share: float,
    interpolation: str,
    normalization: tuple[tuple[float, ...], tuple[float, ...]],
    top1: float | None,
    top5: float | None,
    recipe: str,
) -> WeightsInfo:
    mean, std = normalization
    return WeightsInfo(
        tag=f"timm/{tag}",
        url=url,
        digest=digest,
        preprocessing=Preprocessing(crop, math.floor(crop / share), interpolation, mean, std),
        top1=top1,
        top5=top5,
        licence="BSD-3-Clause" if recipe == _TV and "inception" not in url else "Apache-2.0",
        recipe=recipe,
    )
