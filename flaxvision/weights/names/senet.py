"""SE-ResNets and SENet-154 in timm (`legacy_seresnet*`, `legacy_senet154`)."""

from __future__ import annotations

import re

from flaxvision.weights.layout import Layout

_STEM = re.compile(r"backbone/stem_(conv|bn)(\d)")
_UNIT = re.compile(r"backbone/stage(\d+)_block(\d+)/([\w/]+)")
_LEAVES = {
    "shortcut_conv": "downsample.0",
    "shortcut_bn": "downsample.1",
    "se/reduce": "se_module.fc1",
    "se/expand": "se_module.fc2",
}


def timm_name(path: str) -> str:
    """Returns `layer3.1.se_module.fc1` for `backbone/stage3_block2/se/reduce`."""
    if path == "head":
        return "last_linear"
    if stem := _STEM.fullmatch(path):
        return f"layer0.{stem[1]}{stem[2]}"
    unit = _UNIT.fullmatch(path)
    if unit is None:
        raise ValueError(f"path must be a module of an SE-ResNet; got {path!r}")
    return f"layer{unit[1]}.{int(unit[2]) - 1}.{_LEAVES.get(unit[3], unit[3])}"


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "timm",
        ("se_resnet18", "se_resnet34", "se_resnet50", "se_resnet101", "se_resnet152", "senet154"),
        timm_name,
        conv1x1=("*/se/reduce", "*/se/expand"),
        first="backbone/stem_conv1",
    ),
)
