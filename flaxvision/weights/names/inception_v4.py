"""Inception-v4 and Inception-ResNet-v2 in timm and Keras."""

from __future__ import annotations

from flaxvision.weights.layout import Layout

# timm's Inception-v4 is one list. `_V4` holds the index of each module, `_BRANCHES` our branches in timm's order.
_V4_STEM = {"conv1a": "0", "conv2a": "1", "conv2b": "2", "mixed3a": "3.conv", "mixed5a": "5.conv"}
_V4 = {f"mixed5{letter}": i for i, letter in enumerate("bcde", start=6)}
_V4 |= {f"mixed6{letter}": i for i, letter in enumerate("abcdefgh", start=10)}
_V4 |= {f"mixed7{letter}": i for i, letter in enumerate("abcd", start=18)}
_FULL = ("branch1x1", "branch3x3", "branch3x3dbl", "branch_pool")
_BRANCHES = {
    "mixed4a": ("branch3x3", "branch7x7x3"),
    "mixed5": _FULL,
    "mixed6a": ("branch3x3", "branch3x3dbl"),
    "mixed6": ("branch1x1", "branch7x7", "branch7x7dbl", "branch_pool"),
    "mixed7a": ("branch3x3", "branch7x7x3"),
    "mixed7": _FULL,
}
_RESNET_BRANCHES = {
    "mixed5b": ("branch1x1", "branch5x5", "branch3x3dbl", "branch_pool"),
    "block35": ("branch1x1", "branch3x3", "branch3x3dbl"),
    "mixed6a": ("branch3x3", "branch3x3dbl"),
    "block17": ("branch1x1", "branch7x7"),
    "mixed7a": ("branch3x3", "branch3x3b", "branch3x3dbl"),
    "block8": ("branch1x1", "branch3x3"),
}
_REPEAT = {"block35": "repeat", "block17": "repeat_1", "block8": "repeat_2"}


def _branch(unit: str, branches: tuple[str, ...]) -> str:
    """Converts `branch3x3_2`, the second layer of its branch. The first layer of a pooled branch is the pool."""
    kind, _, step = ("branch_pool", "", "2") if unit == "branch_pool" else unit.partition("_")
    return f"branch{branches.index(kind)}" + (f".{int(step) - 1}" if step else "")


def _forked(unit: str) -> str:
    """Converts a unit of the last modules of Inception-v4. These fork, so timm names their layers: `branch2_3a`."""
    if unit in ("branch1x1", "branch_pool"):
        return _branch(unit, _FULL)
    kind, _, step = unit.partition("_")
    return f"branch{_FULL.index(kind)}_{int(step[0]) - 1}{step[1:]}"


def _timm_v4(path: str) -> str:
    if path == "head":
        return "last_linear"
    _, name, *rest = path.split("/")
    if name in _V4_STEM:
        return ".".join(["features", _V4_STEM[name], *rest])
    if name.startswith("mixed4a"):
        return ".".join(["features.4", _branch(name.removeprefix("mixed4a_"), _BRANCHES["mixed4a"]), *rest])
    unit, leaf = rest
    if name in ("mixed7b", "mixed7c", "mixed7d"):
        return f"features.{_V4[name]}.{_forked(unit)}.{leaf}"
    return f"features.{_V4[name]}.{_branch(unit, _BRANCHES.get(name) or _BRANCHES[name[:-1]])}.{leaf}"


def _timm_resnet(path: str) -> str:
    if path == "head":
        return "classif"
    _, name, *rest = path.split("/")
    if name.startswith("conv"):
        return ".".join([f"conv2d_{name.removeprefix('conv')}", *rest])
    kind, _, number = name.partition("_")
    if name == "block8_10":
        module = "block8"
    else:
        module = f"{_REPEAT[kind]}.{int(number) - 1}" if number else name.replace("mixed", "mixed_")
    if rest == ["up"]:
        return f"{module}.conv2d"
    unit, leaf = rest
    return f"{module}.{_branch(unit, _RESNET_BRANCHES[kind])}.{leaf}"


# Keras numbers layers without a name in the order in which its network definition creates them.
_UNITS = {
    "mixed5b": "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool",
    "block35": "branch1x1 branch3x3_1 branch3x3_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "mixed6a": "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "block17": "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3",
    "mixed7a": "branch3x3_1 branch3x3_2 branch3x3b_1 branch3x3b_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "block8": "branch1x1 branch3x3_1 branch3x3_2 branch3x3_3",
}
_COUNTS = {"block35": 10, "block17": 20, "block8": 10}
_ORDER = [f"backbone/{name}" for name in ("conv1a", "conv2a", "conv2b", "conv3b", "conv4a")]
for _name, _units in _UNITS.items():
    for _module in [f"{_name}_{i + 1}" for i in range(_COUNTS[_name])] if _name in _COUNTS else [_name]:
        _ORDER += [f"backbone/{_module}/{unit}" for unit in _units.split()]
_NUMBER = {path: f"_{i}" if i else "" for i, path in enumerate(_ORDER)}
_NAMED = {"head": "predictions", "backbone/conv7b/conv": "conv_7b", "backbone/conv7b/bn": "conv_7b_bn"}


def _keras_resnet(path: str) -> str:
    if path in _NAMED:
        return _NAMED[path]
    unit, _, leaf = path.rpartition("/")
    if leaf == "up":
        return f"{unit.removeprefix('backbone/')}_conv"
    return {"conv": "conv2d", "bn": "batch_normalization"}[leaf] + _NUMBER[unit]


_FIRST = "backbone/conv1a/conv"
LAYOUTS: tuple[Layout, ...] = (
    Layout(source="timm", models=("inception_v4",), module=_timm_v4, first=_FIRST),
    Layout(source="timm", models=("inception_resnet_v2",), module=_timm_resnet, first=_FIRST),
    Layout(
        source="keras",
        models=("inception_resnet_v2",),
        module=_keras_resnet,
        style="keras",
        fields={"momentum": 0.99},
        constant={"*/bn/scale": 1.0},
        first=_FIRST,
    ),
)
