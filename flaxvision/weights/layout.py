"""How a library stores a family's tensors: names as data, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One library's storage of one family of models.

    A flaxvision variable `backbone/stage3_block2/conv1/kernel` lies in the module `backbone/stage3_block2/conv1`;
    `module` gives the library's name of that module, `style` what its leaves are called and how their axes lie.

    Attributes:
        source: The library: "torchvision", "timm", "keras", ...
        models: The registry names that it has.
        module: Maps a flaxvision module path to the library's module name.
        style: `"torch"`: `NAME.weight` (OIHW kernels, `[out, in]` matrices), `NAME.bias`, `NAME.running_mean`,
            `NAME.running_var`; `"keras"`: `NAME/kernel` (HWIO; depthwise `[kh, kw, C, multiplier]`), `NAME/bias`,
            `NAME/gamma`, `NAME/beta`, `NAME/moving_mean`, `NAME/moving_variance`. A keras name may end in
            `/depthwise_kernel` or `/pointwise_kernel` to name the kernel itself.
        fields: Fields of our module that make it the library's network.
        flatten: For dense layers behind a flattened feature map, by path: its `(H, W, C)`, where the library flattens
            in the order C, H, W.
        conv1x1: Paths (fnmatch patterns) of our dense layers that the library stores as 1x1 convolutions.
        constant: Values, by fnmatch pattern of the variable's path (with the leaf), of variables that the library
            lacks: Keras' Inceptions have no BatchNorm scale.
        ignore: Patterns of the library's tensors that stand for nothing here; `*.num_batches_tracked` always does.
        adapt: Rewrites the library's tensors before the names are looked up: folds, dequantisation, legacy layouts.
        restore: Undoes `adapt` as far as the format can, after an export.
        head: Modules whose leaves depend on `num_classes`.
        first: The module that sees the image, whose kernel depends on the image's channels.
    """

    source: str
    models: tuple[str, ...]
    module: Callable[[str], str]
    style: str = "torch"
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    flatten: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    conv1x1: tuple[str, ...] = ()
    constant: dict[str, float] = dataclasses.field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    adapt: Callable[[Tensors], Tensors] | None = None
    restore: Callable[[Tensors], Tensors] | None = None
    head: tuple[str, ...] = ("head",)
    first: str = ""
