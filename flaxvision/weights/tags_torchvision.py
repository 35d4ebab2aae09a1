"""torchvision's weights (0.28), from the metadata of its `Weights` enumerations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flaxvision.data.preprocessing import Preprocessing
from flaxvision.weights.tags import WeightsInfo

_RECIPES = "https://github.com/pytorch/vision/tree/main/references/classification#"
_NEW = "https://github.com/pytorch/vision/issues/3995#"
_V1, _V2 = "IMAGENET1K_V1", "IMAGENET1K_V2"
_HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

# name, tag, file (its ending is the beginning of its sha256), resize, crop, top-1, top-5, recipe
_WEIGHTS = (
    ("alexnet_tv", _V1, "alexnet-owt-7be5be79", 256, 224, 56.522, 79.066, _RECIPES + "alexnet-and-vgg"),
    ("vgg11", _V1, "vgg11-8a719046", 256, 224, 69.020, 88.628, _RECIPES + "alexnet-and-vgg"),
    ("vgg11_bn", _V1, "vgg11_bn-6002323d", 256, 224, 70.370, 89.810, _RECIPES + "alexnet-and-vgg"),
    ("vgg13", _V1, "vgg13-19584684", 256, 224, 69.928, 89.246, _RECIPES + "alexnet-and-vgg"),
    ("vgg13_bn", _V1, "vgg13_bn-abd245e5", 256, 224, 71.586, 90.374, _RECIPES + "alexnet-and-vgg"),
    ("vgg16", _V1, "vgg16-397923af", 256, 224, 71.592, 90.382, _RECIPES + "alexnet-and-vgg"),
    ("vgg16_bn", _V1, "vgg16_bn-6c64b313", 256, 224, 73.360, 91.516, _RECIPES + "alexnet-and-vgg"),
    ("vgg19", _V1, "vgg19-dcbb9e9d", 256, 224, 72.376, 90.876, _RECIPES + "alexnet-and-vgg"),
    ("vgg19_bn", _V1, "vgg19_bn-c79401a0", 256, 224, 74.218, 91.842, _RECIPES + "alexnet-and-vgg"),
    ("googlenet_bn", _V1, "googlenet-1378be20", 256, 224, 69.778, 89.530, _RECIPES + "googlenet"),
    ("inception_v3", _V1, "inception_v3_google-0cc3c7bd", 342, 299, 77.294, 93.450, _RECIPES + "inception-v3"),
    ("resnet18", _V1, "resnet18-f37072fd", 256, 224, 69.758, 89.078, _RECIPES + "resnet"),
    ("resnet34", _V1, "resnet34-b627a593", 256, 224, 73.314, 91.420, _RECIPES + "resnet"),
    ("resnet50", _V1, "resnet50-0676ba61", 256, 224, 76.130, 92.862, _RECIPES + "resnet"),
    ("resnet50", _V2, "resnet50-11ad3fa6", 232, 224, 80.858, 95.434, _NEW + "issuecomment-1013906621"),
    ("resnet101", _V1, "resnet101-63fe2227", 256, 224, 77.374, 93.546, _RECIPES + "resnet"),
    ("resnet101", _V2, "resnet101-cd907fc2", 232, 224, 81.886, 95.780, _NEW + "new-recipe"),
    ("resnet152", _V1, "resnet152-394f9c45", 256, 224, 78.312, 94.046, _RECIPES + "resnet"),
    ("resnet152", _V2, "resnet152-f82ba261", 232, 224, 82.284, 96.002, _NEW + "new-recipe"),
    (
        "squeezenet1_0",
        _V1,
        "squeezenet1_0-b66bff10",
        256,
        224,
        58.092,
        80.420,
        "https://github.com/pytorch/vision/pull/49#issuecomment-277560717",
    ),
    ("mobilenet_v2", _V1, "mobilenet_v2-b0353104", 256, 224, 71.878, 90.286, _RECIPES + "mobilenetv2"),
    ("mobilenet_v2", _V2, "mobilenet_v2-7ebf99e0", 232, 224, 72.154, 90.822, _NEW + "new-recipe-with-reg-tuning"),
)

# Weights ported from TensorFlow: torchvision's networks turn ImageNet's normalization into this one themselves.
_TRANSFORM_INPUT = ("googlenet_bn", "inception_v3")


def entries() -> Iterator[tuple[str, WeightsInfo]]:
    """Registry names and what is known of their weights."""
    for name, tag, file, resize, crop, top1, top5, recipe in _WEIGHTS:
        normalization = _HALF if name in _TRANSFORM_INPUT else {}
        yield name, _info(tag, file, Preprocessing(crop, resize, **normalization), top1, top5, recipe)
    features = Preprocessing(224, 256, mean=(0.48235, 0.45882, 0.40784), std=(1 / 255,) * 3)
    note = "Only the backbone was published: the classifier's tensors are not numbers."
    recipe = "https://github.com/amdegroot/ssd.pytorch#training-ssd"
    info = _info("IMAGENET1K_FEATURES", "vgg16_features-amdegroot-88682ab5", features, None, None, recipe, note)
    yield "vgg16", info


def _info(
    tag: str,
    file: str,
    preprocessing: Preprocessing,
    top1: float | None,
    top5: float | None,
    recipe: str,
    note: str = "",
) -> WeightsInfo:
    return WeightsInfo(
        tag=f"torchvision/{tag}",
        url=f"https://download.pytorch.org/models/{file}.pth",
        digest=f"sha256:{file.rpartition('-')[2]}",
        preprocessing=preprocessing,
        top1=top1,
        top5=top5,
        licence="BSD-3-Clause",
        recipe=recipe,
        note=note,
    )
