"""MobileNetV2 in torchvision, timm, Keras and the 8-bit release for Coral's Edge TPU."""

from __future__ import annotations

import re

import numpy as np

from flaxvision.data.preprocessing import Preprocessing
from flaxvision.weights.layout import Layout, Tensors

# Our blocks in the order of table 2 of the paper.
_BLOCKS = tuple(
    f"{stage}_block{i}"
    for stage, count in {"stem": 1, "stage1": 2, "stage2": 3, "stage3": 7, "stage4": 4}.items()
    for i in range(1, count + 1)
)
# The stages of timm are the rows of that table.
_ROWS = tuple((row, i) for row, count in enumerate((1, 2, 3, 4, 3, 3, 1)) for i in range(count))
_LAYERS = ("expand", "depthwise", "project")
_EPSILON = 1e-3


def _parts(path: str) -> tuple[int, int, bool]:
    """Returns the index of the block, the index of the layer, and whether the path names its BatchNorm."""
    _, block, layer = path.split("/")
    return _BLOCKS.index(block), _LAYERS.index(layer.split("_")[0]), layer.endswith("_bn")


def block_and_layer(path: str) -> tuple[int, str]:
    """Returns the number of a block, from 0, and the kind of one of its layers: expand, depthwise or project."""
    block, layer, _ = _parts(path)
    return block, _LAYERS[layer]


def torchvision(path: str) -> str:
    """Returns the name of a module in torchvision."""
    ends = {"head": "classifier.1", "backbone/stem": "features.0", "backbone/stage4": "features.18"}
    if path == "head" or path.count("/") == 1:
        base, _, kind = path.partition("_")
        return ends[base] + {"": "", "conv": ".0", "bn": ".1"}[kind]
    block, layer, norm = _parts(path)
    place = layer - (block == 0)  # the first block has no expansion
    if layer == 2:
        return f"features.{block + 1}.conv.{place + norm}"
    return f"features.{block + 1}.conv.{place}.{int(norm)}"


def timm(path: str) -> str:
    """Returns the name of a module in timm."""
    if path == "head" or path.count("/") == 1:
        return {
            "head": "classifier",
            "backbone/stem_conv": "conv_stem",
            "backbone/stem_bn": "bn1",
            "backbone/stage4_conv": "conv_head",
            "backbone/stage4_bn": "bn2",
        }[path]
    block, layer, norm = _parts(path)
    row, i = _ROWS[block]
    first = block == 0
    name = f"bn{layer + 1 - first}" if norm else ("conv_pw", "conv_dw", "conv_pw" if first else "conv_pwl")[layer]
    return f"blocks.{row}.{i}.{name}"


def keras(path: str) -> str:
    """Returns the name of a layer in Keras."""
    if path == "head" or path.count("/") == 1:
        return {
            "head": "predictions",
            "backbone/stem_conv": "Conv1",
            "backbone/stem_bn": "bn_Conv1",
            "backbone/stage4_conv": "Conv_1",
            "backbone/stage4_bn": "Conv_1_bn",
        }[path]
    block, layer, norm = _parts(path)
    return f"{f'block_{block}' if block else 'expanded_conv'}_{_LAYERS[layer]}{'_BN' if norm else ''}"


def renamed(tensors: Tensors) -> Tensors:
    """Renames the layers of the published file (`mobl3_conv_3_expand`, `Logits`, ...) to the current names."""

    def now(name: str) -> str:
        layer, slash, leaf = name.rpartition("/")
        if layer == "Logits":
            return f"predictions/{leaf}"
        if found := re.fullmatch(r"(?:mobl|bn)(\d+)_conv_\1_(bn_)?(expand|depthwise|project)", layer):
            number, norm, kind = found.groups()
            layer = f"{f'block_{number}' if number != '0' else 'expanded_conv'}_{kind}{'_BN' if norm else ''}"
        return f"{layer}{slash}{leaf}"

    return {name if now(name) in tensors else now(name): tensor for name, tensor in tensors.items()}


def coral(path: str) -> str:
    """Returns the name of a layer in the 8-bit release. It has no BatchNorm; `dequantized` adds one named `..._bn`."""
    if path == "head" or path.count("/") == 1:
        base, _, kind = path.partition("_")
        name = {"head": "classifier", "backbone/stem": "stem", "backbone/stage4": "head"}[base]
        return f"{name}_bn" if kind == "bn" else name
    block, layer, norm = _parts(path)
    return f"block{block + 1:02d}/{_LAYERS[layer]}{'_bn' if norm else ''}"


def dequantized(tensors: Tensors) -> Tensors:
    """Returns float kernels, `q * scale`, and BatchNorms that add the biases and change nothing else.

    Raises:
        ValueError: A layer lacks `kernel_q`, `scale` or `bias`, or there are other tensors.
    """
    layers = sorted({name.rpartition("/")[0] for name in tensors})
    wanted = {f"{layer}/{leaf}" for layer in layers for leaf in ("kernel_q", "scale", "bias")}
    if wrong := sorted(wanted ^ set(tensors)):
        raise ValueError(
            f"tensors must be kernel_q, scale and bias per layer; got these missing or unexpected: {', '.join(wrong)}"
        )
    out: Tensors = {}
    for layer in layers:
        q, scale, bias = (tensors[f"{layer}/{leaf}"] for leaf in ("kernel_q", "scale", "bias"))
        kernel = q.astype(np.float32) * scale
        if layer == "classifier":
            out |= {f"{layer}/kernel": kernel.reshape(kernel.shape[-2:]), f"{layer}/bias": bias}
            continue
        if layer.endswith("/depthwise"):
            kernel = np.swapaxes(kernel, 2, 3)
        out[f"{layer}/kernel"] = kernel
        out[f"{layer}_bn/gamma"] = np.full_like(bias, np.sqrt(1 + _EPSILON))
        out[f"{layer}_bn/beta"] = bias
        out[f"{layer}_bn/moving_mean"] = np.zeros_like(bias)
        out[f"{layer}_bn/moving_variance"] = np.ones_like(bias)
    return out


def quantized(tensors: Tensors) -> Tensors:
    """Folds every BatchNorm into its convolution and rounds the kernels to 8 bits with one scale per channel."""
    out: Tensors = {}
    for name, kernel in tensors.items():
        layer, _, leaf = name.rpartition("/")
        if leaf != "kernel":
            continue
        if layer == "classifier":
            kernel, bias = kernel[None, None], tensors[f"{layer}/bias"]
        else:
            gamma, beta, mean, var = (
                tensors[f"{layer}_bn/{leaf}"] for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
            )
            if layer.endswith("/depthwise"):
                kernel = np.swapaxes(kernel, 2, 3)
            factor = gamma / np.sqrt(var + _EPSILON)
            kernel, bias = kernel * factor, beta - mean * factor
        largest = np.abs(kernel).max((0, 1, 2))
        scale = (np.where(largest > 0, largest, 1) / 127).astype(np.float32)
        out[f"{layer}/kernel_q"] = np.rint(kernel / scale).astype(np.int8)
        out[f"{layer}/scale"] = scale
        out[f"{layer}/bias"] = np.asarray(bias, np.float32)
    return out


_FIRST = "backbone/stem_conv"
_TENSORFLOW = {"padding": "SAME", "epsilon": _EPSILON, "momentum": 0.999}

LAYOUTS = (
    Layout("torchvision", ("mobilenet_v2",), torchvision, first=_FIRST),
    Layout("timm", ("mobilenet_v2",), timm, first=_FIRST),
    Layout("keras", ("mobilenet_v2",), keras, style="keras", fields=_TENSORFLOW, adapt=renamed, first=_FIRST),
    # Class 0 is the background; the classes of ImageNet follow.
    Layout(
        "coral",
        ("mobilenet_v2",),
        coral,
        style="keras",
        fields=_TENSORFLOW | {"num_classes": 1001},
        adapt=dequantized,
        restore=quantized,
        first=_FIRST,
        preprocessing=Preprocessing(mean=(127.0, 127.0, 127.0), std=(1 / 0.0078431377,) * 3, divisor=1.0),
        class_list="imagenet1001",
    ),
)
