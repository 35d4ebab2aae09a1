"""Describes how a library stores the tensors of a family of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from flaxvision.data.preprocessing import Preprocessing

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one library stores one family of models.

    The flaxvision variable `backbone/stage3_block2/conv1/kernel` belongs to the module `backbone/stage3_block2/conv1`.
    `module` gives the library's name of that module. `style` determines the names and the axis order of its tensors.

    Attributes:
        source: Name of the library: "torchvision", "timm", "keras", ...
        models: Registry names of the models that this layout describes.
        module: Maps the path of a flaxvision module to the library's name of the module.
        style: `"torch"`: `NAME.weight` (OIHW kernels, `[out, in]` matrices), `NAME.bias`, `NAME.running_mean`,
            `NAME.running_var`; `"keras"`: `NAME/kernel` (HWIO; depthwise `[kh, kw, C, multiplier]`), `NAME/bias`,
            `NAME/gamma`, `NAME/beta`, `NAME/moving_mean`, `NAME/moving_variance`. With `"keras"`, `module` may return
            a name that ends in `/depthwise_kernel` or `/pointwise_kernel` to name the kernel itself.
        fields: Fields of the flaxvision module that make it the library's network.
        fields_by_classes: Further such fields of the published network with a number of classes, such as the anchors of
            its data set, which are not in the file.
        flatten: `(H, W, C)` by module path, for dense layers that follow a feature map which the library flattens in
            the order C, H, W. A C of 0 stands for whatever the model has.
        conv1x1: Module paths (fnmatch patterns) of dense layers that the library stores as 1x1 convolutions.
        constant: Values of variables that the library lacks, by fnmatch pattern of the variable's path. Example: the
            Inceptions of Keras have no BatchNorm scale.
        ignore: Patterns of the library's tensors that have no counterpart. `*.num_batches_tracked` is always ignored.
        adapt: Rewrites the library's tensors before their names are looked up: folding, dequantization, old names.
        restore: Inverts `adapt` after an export, as far as the format allows.
        head: Modules with variables that depend on `num_classes`.
        first: The module that sees the image; the shape of its kernel depends on the number of channels.
        preprocessing: Evaluation transform of the published weights, for sources without tags.
        class_list: Class names of the published weights, for sources without tags: a file of
            `published/class_names/` without its ending.
    """

    source: str
    models: tuple[str, ...]
    module: Callable[[str], str]
    style: str = "torch"
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    fields_by_classes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    flatten: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    conv1x1: tuple[str, ...] = ()
    constant: dict[str, float] = dataclasses.field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    adapt: Callable[[Tensors], Tensors] | None = None
    restore: Callable[[Tensors], Tensors] | None = None
    head: tuple[str, ...] = ("head",)
    first: str = ""
    preprocessing: Preprocessing | None = None
    class_list: str = ""
