"""AlexNet in torchvision, Caffe and pytorchcv."""

from __future__ import annotations

from flaxvision.weights.layout import Layout

_TORCHVISION = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc6": "classifier.1",
    "fc7": "classifier.4",
    "head": "classifier.6",
}
_PYTORCHCV = {
    "conv1": "features.stage1.unit1.conv",
    "conv2": "features.stage2.unit1.conv",
    "conv3": "features.stage3.unit1.conv",
    "conv4": "features.stage3.unit2.conv",
    "conv5": "features.stage3.unit3.conv",
    "fc6": "output.fc1.fc",
    "fc7": "output.fc2.fc",
    "head": "output.fc3",
}


def torchvision(path: str) -> str:
    """Returns the name of a module in torchvision."""
    return _TORCHVISION[path.rpartition("/")[2]]


def pytorchcv(path: str) -> str:
    """Returns the name of a module in pytorchcv."""
    return _PYTORCHCV[path.rpartition("/")[2]]


def caffe(path: str) -> str:
    """Returns the name of a layer in Caffe's `bvlc_alexnet`, which has our names except for the head."""
    return "fc8" if path == "head" else path.rpartition("/")[2]


_SHARED = {"flatten": {"fc6": (6, 6, 256)}, "first": "backbone/conv1"}
# Caffe and torch divide the alpha of local response normalization by the size of the window.
LAYOUTS = (
    Layout("torchvision", ("alexnet_tv",), torchvision, **_SHARED),
    Layout("caffe", ("alexnet",), caffe, fields={"lrn": (5, 1e-4 / 5, 0.75, 1.0)}, **_SHARED),
    Layout("pytorchcv", ("alexnet_ungrouped",), pytorchcv, fields={"lrn": (5, 1e-4 / 5, 0.75, 2.0)}, **_SHARED),
)
