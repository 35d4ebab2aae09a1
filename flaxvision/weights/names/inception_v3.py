"""Inception-v3 in torchvision, timm and Keras."""

from __future__ import annotations

from flaxvision.weights.layout import Layout

_STEM = {
    "conv1a": "Conv2d_1a_3x3",
    "conv2a": "Conv2d_2a_3x3",
    "conv2b": "Conv2d_2b_3x3",
    "conv3b": "Conv2d_3b_1x1",
    "conv4a": "Conv2d_4a_3x3",
}
_AUX = {"conv1": "conv0", "conv2": "conv1", "head": "fc"}


def _torchvision(path: str) -> str:
    if path == "head":
        return "fc"
    root, name, *rest = path.split("/")
    if root == "aux_head1":
        return ".".join(["AuxLogits", _AUX[name], *rest])
    return ".".join([_STEM.get(name) or f"Mixed_{name.removeprefix('mixed')}", *rest])


# Keras numbers its layers in the order in which its network definition creates them.
_A = "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool"
_B = "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
_C = (
    "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3"
    " branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 branch_pool"
)
_D = "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4"
_E = (
    "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b"
    " branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b branch_pool"
)
_MODULES = {f"5{letter}": _A for letter in "bcd"} | {"6a": _B} | {f"6{letter}": _C for letter in "bcde"}
_MODULES |= {"7a": _D, "7b": _E, "7c": _E}
_ORDER = [f"backbone/{name}" for name in _STEM]
_ORDER += [f"backbone/mixed{name}/{unit}" for name, units in _MODULES.items() for unit in units.split()]
_NUMBER = {path: f"_{i}" if i else "" for i, path in enumerate(_ORDER)}


def _keras(path: str) -> str:
    if path == "head":
        return "predictions"
    unit, _, leaf = path.rpartition("/")
    return {"conv": "conv2d", "bn": "batch_normalization"}[leaf] + _NUMBER[unit]


_TORCH = {
    "models": ("inception_v3",),
    "module": _torchvision,
    "ignore": ("AuxLogits.*",),
    "head": ("head", "aux_head1/head"),
    "first": "backbone/conv1a/conv",
}
LAYOUTS: tuple[Layout, ...] = (
    Layout(source="torchvision", **_TORCH),
    Layout(source="timm", **_TORCH),
    Layout(
        source="keras",
        models=("inception_v3",),
        module=_keras,
        style="keras",
        fields={"count_include_pad": False, "momentum": 0.99},
        constant={"*/bn/scale": 1.0},
        first="backbone/conv1a/conv",
    ),
)
