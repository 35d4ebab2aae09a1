"""VGG in torchvision, timm and Keras."""

from __future__ import annotations

import functools
import re

from flaxvision.models.vgg import STAGE_SIZES
from flaxvision.weights.layout import Layout, Tensors

_DENSE = {
    "torchvision": {"fc6": "classifier.0", "fc7": "classifier.3", "head": "classifier.6"},
    "timm": {"fc6": "pre_logits.fc1", "fc7": "pre_logits.fc2", "head": "head.fc"},
    "keras": {"fc6": "fc1", "fc7": "fc2", "head": "predictions"},
}
_MODULE = re.compile(r"backbone/stage(\d+)_(conv|bn)(\d+)")


def torch_module(path: str, *, source: str, stage_sizes: tuple[int, ...], norm: bool) -> str:
    """Returns the name of a module in torchvision or timm, which number all layers in one sequence."""
    if path in _DENSE[source]:
        return _DENSE[source][path]
    stage, kind, number = _parts(path)
    units = sum(stage_sizes[: stage - 1]) + number - 1
    return f"features.{units * (3 if norm else 2) + stage - 1 + (kind == 'bn')}"


def keras_module(path: str) -> str:
    """Returns the name of a layer in Keras."""
    if path in _DENSE["keras"]:
        return _DENSE["keras"][path]
    stage, kind, number = _parts(path)
    return f"block{stage}_{kind}{number}"


def _parts(path: str) -> tuple[int, str, int]:
    if not (match := _MODULE.fullmatch(path)):
        raise ValueError(f"path must be a module of a VGG; got {path!r}")
    return int(match[1]), match[2], int(match[3])


def flat_windows(tensors: Tensors) -> Tensors:
    """Reshapes timm's first dense layer, a 7x7 convolution, to the matrix that it equals at 224 pixels."""
    name = "pre_logits.fc1.weight"
    return {**tensors, name: tensors[name].reshape(tensors[name].shape[0], -1)} if name in tensors else tensors


def square_windows(tensors: Tensors) -> Tensors:
    """Inverts `flat_windows`."""
    name = "pre_logits.fc1.weight"
    return {**tensors, name: tensors[name].reshape(tensors[name].shape[0], -1, 7, 7)} if name in tensors else tensors


def _torch(source: str, name: str, norm: bool) -> Layout:
    timm = {
        "fields": {"dense_evaluation": True},
        "conv1x1": ("fc7",),
        "adapt": flat_windows,
        "restore": square_windows,
    }
    return Layout(
        source,
        (f"{name}_bn" if norm else name,),
        functools.partial(torch_module, source=source, stage_sizes=STAGE_SIZES[name], norm=norm),
        flatten={"fc6": (7, 7, 512)},
        first="backbone/stage1_conv1",
        **(timm if source == "timm" else {}),
    )


LAYOUTS = (
    *(
        _torch(source, name, norm)
        for source in ("torchvision", "timm")
        for name in STAGE_SIZES
        for norm in (False, True)
    ),
    Layout("keras", ("vgg16", "vgg19"), keras_module, style="keras", first="backbone/stage1_conv1"),
)
