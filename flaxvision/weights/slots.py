"""Maps flaxvision variables to the names, shapes and axis orders of another library."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from flaxvision.weights.layout import Layout

Shape = tuple[int, ...]
Axes = Callable[[np.ndarray], np.ndarray]

# Names of our leaves in each style. Keras calls the bias of a BatchNorm beta.
_LEAVES = {
    "torch": {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"},
    "keras": {"kernel": "kernel", "scale": "gamma", "bias": "bias", "mean": "moving_mean", "var": "moving_variance"},
}
_KERNELS = ("/depthwise_kernel", "/pointwise_kernel")
# Keras numbers layers without a name of their own. The first number varies.
_NUMBERED = re.compile(r"(conv2d|batch_normalization|dense|depthwise_conv2d|separable_conv2d)(?:_(\d+))?/(.*)")


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one variable in a library.

    Attributes:
        path: The slash path of the flaxvision variable.
        name: The library's name of the tensor; empty for a constant.
        shape: The library's shape of the tensor.
        forward: Converts the library's array to ours.
        backward: Converts our array to the library's.
        constant: The value of a variable that the library lacks; None otherwise.
    """

    path: str
    name: str
    shape: Shape
    forward: Axes
    backward: Axes
    constant: float | None = None


def slots_of(layout: Layout, shapes: Mapping[str, Any]) -> list[Slot]:
    """Returns the places of all variables.

    Args:
        layout: The library's layout.
        shapes: Arrays or shapes by slash path.

    Returns:
        One slot per variable, in the order of `shapes`.

    Raises:
        ValueError: The layout gives two variables the same name, or a variable none.
    """
    norms = {path.partition("/")[2].rpartition("/")[0] for path in shapes if path.startswith("batch_stats/")}
    slots = [_slot(layout, path, tuple(leaf.shape), norms) for path, leaf in shapes.items()]
    if layout.style == "keras":
        names_of = canonical([slot.name for slot in slots if slot.name])
        slots = [dataclasses.replace(slot, name=names_of.get(slot.name, "")) for slot in slots]
    names = collections.Counter(slot.name for slot in slots if slot.constant is None)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"names in the {layout.source} layout of {', '.join(layout.models)} must differ;"
            f" got {', '.join(twice)} twice"
        )
    return slots


def _slot(layout: Layout, path: str, shape: Shape, norms: set[str]) -> Slot:
    module, _, leaf = path.partition("/")[2].rpartition("/")
    for pattern, value in layout.constant.items():
        if fnmatch.fnmatchcase(f"{module}/{leaf}", pattern):
            return Slot(path, "", (), _same, _same, value)
    if leaf not in _LEAVES[layout.style]:
        raise ValueError(
            f"leaf of {path} must be one of {', '.join(_LEAVES[layout.style])} in a {layout.style} layout; got {leaf!r}"
        )
    place, there = layout.module(module), _LEAVES[layout.style][leaf]
    axes = (shape, _same, _same)
    if layout.style == "torch":
        return Slot(path, f"{place}.{there}", *(_torch_axes(layout, module, shape) if leaf == "kernel" else axes))
    place, _, kernel = place.rpartition("/") if place.endswith(_KERNELS) else (place, "", "kernel")
    if leaf == "kernel":
        return Slot(path, f"{place}/{kernel}", *_keras_axes(layout, module, shape))
    return Slot(path, f"{place}/{'beta' if leaf == 'bias' and module in norms else there}", *axes)


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _reshaped(shape: Shape) -> Axes:
    return lambda array: array.reshape(shape)


def _torch_axes(layout: Layout, module: str, shape: Shape) -> tuple[Shape, Axes, Axes]:
    if len(shape) != 2:  # [*window, I, O] and [O, I, *window]
        there = (len(shape) - 1, len(shape) - 2, *range(len(shape) - 2))
        back = (*range(2, len(shape)), 1, 0)
        return tuple(shape[i] for i in there), lambda x: x.transpose(back), lambda x: x.transpose(there)
    inputs, outputs = shape
    if module in layout.flatten:
        h, w, c = layout.flatten[module]
        c = c or inputs // (h * w)
        return (
            (outputs, c * h * w),
            lambda x: x.reshape(outputs, c, h, w).transpose(2, 3, 1, 0).reshape(shape),
            lambda x: x.reshape(h, w, c, outputs).transpose(3, 2, 0, 1).reshape(outputs, c * h * w),
        )
    if matches(module, layout.conv1x1):
        return (outputs, inputs, 1, 1), lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]
    return (outputs, inputs), np.transpose, np.transpose


def _keras_axes(layout: Layout, module: str, shape: Shape) -> tuple[Shape, Axes, Axes]:
    if len(shape) == 4 and shape[2] == 1 and module != layout.first:  # depthwise: Keras has [kh, kw, C, multiplier]
        there = (*shape[:2], shape[3], 1)
        return there, _reshaped(shape), _reshaped(there)
    if len(shape) == 2 and matches(module, layout.conv1x1):
        return (1, 1, *shape), _reshaped(shape), _reshaped((1, 1, *shape))
    return shape, _same, _same


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tells whether the name matches one of the fnmatch patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Maps Keras' names to names that do not depend on the version or the session.

    * The `:0` of TensorFlow is removed.
    * A depthwise kernel without a pointwise one is called `kernel`, as in Keras 3.
    * The numbers of layers without a name of their own start at none, then 1, 2, ...

    Args:
        names: Names in the order of the file.

    Returns:
        The canonical name of each.
    """
    short = {name: name.removesuffix(":0") for name in names}
    present = set(short.values())
    for name, now in short.items():
        layer, _, leaf = now.rpartition("/")
        if leaf == "depthwise_kernel" and f"{layer}/pointwise_kernel" not in present:
            short[name] = f"{layer}/kernel"
    numbers: dict[str, int] = {}
    for now in short.values():
        if found := _NUMBERED.fullmatch(now):
            kind, number = found[1], int(found[2] or 0)
            numbers[kind] = min(numbers.get(kind, number), number)
    for name, now in short.items():
        if found := _NUMBERED.fullmatch(now):
            number = int(found[2] or 0) - numbers[found[1]]
            short[name] = f"{found[1]}_{number}/{found[3]}" if number else f"{found[1]}/{found[3]}"
    return short
