"""Inception with BatchNorm in pytorchcv."""

from __future__ import annotations

from flaxvision.weights.layout import Layout

_STEM = {"conv1": "conv1", "conv2_1": "conv2.conv1", "conv2_2": "conv2.conv2"}
_UNITS = {
    "inception3a": "stage1.unit1",
    "inception3b": "stage1.unit2",
    "inception3c": "stage2.unit1",
    "inception4a": "stage2.unit2",
    "inception4b": "stage2.unit3",
    "inception4c": "stage2.unit4",
    "inception4d": "stage2.unit5",
    "inception4e": "stage3.unit1",
    "inception5a": "stage3.unit2",
    "inception5b": "stage3.unit3",
}
_STRIDED = ("inception3c", "inception4e")


def _pytorchcv(path: str) -> str:
    if path == "head":
        return "output"
    parts = path.split("/")
    if len(parts) == 3:
        return f"features.init_block.{_STEM[parts[1]]}.{parts[2]}"
    _, module, unit, leaf = parts
    # Modules of stride 2 have no 1x1 branch, so their numbering starts at the 3x3 branch.
    kind, _, step = unit.rpartition("_") if unit[-1].isdigit() and "_" in unit else (unit, "", "")
    number = {"branch1x1": 1, "branch3x3": 2, "branch3x3dbl": 3, "branch_pool": 4}[kind] - (module in _STRIDED)
    layer = f".conv{step}" if step else ".conv" if kind == "branch_pool" else ""
    return f"features.{_UNITS[module]}.branches.branch{number}{layer}.{leaf}"


LAYOUTS: tuple[Layout, ...] = (
    Layout(source="pytorchcv", models=("bn_inception",), module=_pytorchcv, first="backbone/conv1/conv"),
)
