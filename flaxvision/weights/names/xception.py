"""Xception's tensors in Keras and in timm."""

from __future__ import annotations

import re

from flaxvision.weights.layout import Layout

_BLOCK = re.compile(r"backbone/stage(\d)_block(\d+)/(\w+?)(\d?)(/.*)?")
_EXIT = re.compile(r"backbone/stage4_(sepconv|bn)(\d)(/.*)?")
_FIRST = {1: 1, 2: 2, 3: 3, 4: 12}  # place of each stage's first block
_STRIDED = (1, 2, 3, 12)


def _in_block(path: str) -> tuple[int, str, str, str | None]:
    """The place of a block among the twelve, the kind and number of its layer, and the part of a separable one."""
    found = _BLOCK.fullmatch(path)
    if found is None:
        raise ValueError(f"{path} is no module of Xception")
    stage, block, kind, number, part = found.groups()
    return _FIRST[int(stage)] + int(block) - 1, kind, number, part


def keras(path: str) -> str:
    """The Keras layer of one of our modules; Keras counts from block 1, the first convolutions."""
    kernel = {"depthwise": "/depthwise_kernel", "pointwise": "/pointwise_kernel"}
    if path == "head":
        return "predictions"
    if path.startswith("backbone/stem_"):
        number, norm = path[-1], "_bn" if "_bn" in path else ""
        return f"block1_conv{number}{norm}"
    if found := _EXIT.fullmatch(path):
        kind, number, part = found.groups()
        return f"block14_sepconv{number}" + ("_bn" if kind == "bn" else kernel[(part or "")[1:]])
    place, kind, number, part = _in_block(path)
    if kind.startswith("shortcut"):  # these layers have no name of their own, and Keras numbers them
        order = _STRIDED.index(place)
        return ("conv2d" if kind == "shortcut_conv" else "batch_normalization") + (f"_{order}" if order else "")
    return f"block{place + 1}_sepconv{number}" + ("_bn" if kind == "bn" else kernel[(part or "")[1:]])


def timm(path: str) -> str:
    """The timm module of one of ours."""
    part = {"/depthwise": ".conv1", "/pointwise": ".pointwise", None: ""}
    if path == "head":
        return "fc"
    if path.startswith("backbone/stem_"):
        return path.removeprefix("backbone/stem_")
    if found := _EXIT.fullmatch(path):
        kind, number, kernel = found.groups()
        return f"{'bn' if kind == 'bn' else 'conv'}{int(number) + 2}{part[kernel]}"
    place, kind, number, kernel = _in_block(path)
    if kind.startswith("shortcut"):
        return f"block{place}.{'skip' if kind == 'shortcut_conv' else 'skipbn'}"
    # ReLU, convolution, BatchNorm, ...; block 1 has no ReLU in front.
    index = 3 * (int(number) - 1) + (kind == "bn") + (place != 1)
    return f"block{place}.rep.{index}{part[kernel]}"


LAYOUTS = (
    Layout("keras", ("xception",), keras, style="keras", first="backbone/stem_conv1"),
    Layout(
        "timm",
        ("xception",),
        timm,
        fields={"pool_padding": ((1, 1), (1, 1)), "epsilon": 1e-5, "momentum": 0.9},
        first="backbone/stem_conv1",
    ),
)
