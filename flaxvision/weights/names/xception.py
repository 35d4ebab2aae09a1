"""Xception in Keras and timm."""

from __future__ import annotations

import re
from collections.abc import Iterator

from flaxvision.weights.layout import Layout, Tensors

_BLOCK = re.compile(r"backbone/stage(\d)_block(\d+)/(\w+?)(\d?)(/.*)?")
_EXIT = re.compile(r"backbone/stage4_(sepconv|bn)(\d)(/.*)?")
_FIRST = {1: 1, 2: 2, 3: 3, 4: 12}  # index of the first block of each stage
_STRIDED = (1, 2, 3, 12)


def _in_block(path: str) -> tuple[int, str, str, str | None]:
    """Returns the index of the block, the kind and number of the layer, and the part of a separable convolution."""
    found = _BLOCK.fullmatch(path)
    if found is None:
        raise ValueError(f"path must be a module of Xception; got {path!r}")
    stage, block, kind, number, part = found.groups()
    return _FIRST[int(stage)] + int(block) - 1, kind, number, part


def keras(path: str) -> str:
    """Returns the name of a layer in Keras. Its block 1 holds the first convolutions."""
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
    if kind.startswith("shortcut"):  # Keras numbers these layers, which have no name of their own
        order = _STRIDED.index(place)
        return ("conv2d" if kind == "shortcut_conv" else "batch_normalization") + (f"_{order}" if order else "")
    return f"block{place + 1}_sepconv{number}" + ("_bn" if kind == "bn" else kernel[(part or "")[1:]])


def _ordered() -> Iterator[str]:
    """Yields Keras' layers in the order of its files. Within a block the shortcut comes last."""
    yield from ("block1_conv1", "block1_conv1_bn", "block1_conv2", "block1_conv2_bn")
    for block in range(2, 15):
        for i in range(1, 4 if 5 <= block <= 12 else 3):
            yield from (f"block{block}_sepconv{i}", f"block{block}_sepconv{i}_bn")
        if block - 1 in _STRIDED:
            order = _STRIDED.index(block - 1)
            yield from (f"{kind}_{order}" if order else kind for kind in ("conv2d", "batch_normalization"))
    yield "predictions"


# Names that Keras 1 gave to layers without a name, and patterns of their current names.
_KINDS = {
    "convolution2d": re.compile(r"block1_conv\d|conv2d(_\d)?"),
    "separableconvolution2d": re.compile(r".*_sepconv\d"),
    "batchnormalization": re.compile(r".*_bn|batch_normalization(_\d)?"),
    "dense": re.compile(r"predictions"),
}


def named(tensors: Tensors) -> Tensors:
    """Renames the layers of the published file, which have no names of their own, by their order, as Keras does.

    Other tensors keep their names. So do all layers of a kind if their number is not the expected one.
    """
    layers = list(dict.fromkeys(name.rpartition("/")[0] for name in tensors))
    if not any(layer.startswith("separableconvolution2d") for layer in layers):
        return tensors
    names: dict[str, str] = {}
    for kind, pattern in _KINDS.items():
        old = [layer for layer in layers if re.fullmatch(rf"{kind}(_\d+)?", layer)]
        new = [layer for layer in _ordered() if pattern.fullmatch(layer)]
        names |= dict(zip(old, new, strict=True)) if len(old) == len(new) else {}
    names = {old: new for old, new in names.items() if new not in layers}
    out: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition("/")
        out[f"{names[layer]}/{leaf}" if layer in names else name] = tensor
    return out


def timm(path: str) -> str:
    """Returns the name of a module in timm."""
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
    # The sequence is ReLU, convolution, BatchNorm, ...; block 1 has no ReLU at the start.
    index = 3 * (int(number) - 1) + (kind == "bn") + (place != 1)
    return f"block{place}.rep.{index}{part[kernel]}"


LAYOUTS = (
    Layout("keras", ("xception",), keras, style="keras", adapt=named, first="backbone/stem_conv1"),
    Layout(
        "timm",
        ("xception",),
        timm,
        fields={"pool_padding": ((1, 1), (1, 1)), "epsilon": 1e-5, "momentum": 0.9},
        first="backbone/stem_conv1",
    ),
)
