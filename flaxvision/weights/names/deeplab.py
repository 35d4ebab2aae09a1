"""Names of DeepLabv3 on MobileNetV2 in TensorFlow's release, read from a TFLite file whose BatchNorms are folded."""

from __future__ import annotations

import numpy as np

from flaxvision.data.preprocessing import Preprocessing
from flaxvision.weights.layout import Layout, Tensors
from flaxvision.weights.names import mobilenet_v2

_HEADS = {"aspp/pool": "image_pooling", "aspp/point": "aspp0", "aspp/project": "concat_projection"}
_EPSILONS = {"backbone": 1e-3, "head": 1e-5}


def tensorflow_name(path: str) -> str:
    """Returns the name of a layer. A BatchNorm, which the file does not have, has the name of its layer and `_bn`."""
    if path == "logits":
        return "logits/semantic"
    base, norm = (path.removesuffix("_bn"), "_bn") if path.endswith("_bn") else (path.removesuffix("_conv"), "")
    if base in _HEADS:
        return f"{_HEADS[base]}{norm}"
    if base == "backbone/stem":
        return f"MobilenetV2/Conv{norm}"
    block, layer = mobilenet_v2.block_and_layer(path)
    return f"MobilenetV2/expanded_conv{f'_{block}' if block else ''}/{layer}{norm}"


def unfolded(tensors: Tensors) -> Tensors:
    """Returns kernels without biases, and BatchNorms that add the biases and change nothing else.

    Raises:
        ValueError: A layer has no kernel or no bias.
    """
    out: Tensors = {}
    for name in sorted({name.rpartition("/")[0] for name in tensors}):
        if wrong := [leaf for leaf in ("kernel", "bias") if f"{name}/{leaf}" not in tensors]:
            raise ValueError(f"tensors must be a kernel and a bias per layer; got no {wrong[0]} of {name}")
        kernel, bias = tensors[f"{name}/kernel"], tensors[f"{name}/bias"]
        if name.endswith("/depthwise"):
            kernel = np.swapaxes(kernel, 2, 3)
        out[f"{name}/kernel"] = kernel
        if name == "logits/semantic":
            out[f"{name}/bias"] = bias
            continue
        epsilon = _epsilon(name)
        out[f"{name}_bn/gamma"] = np.full_like(bias, np.sqrt(1 + epsilon))
        out[f"{name}_bn/beta"] = bias
        out[f"{name}_bn/moving_mean"] = np.zeros_like(bias)
        out[f"{name}_bn/moving_variance"] = np.ones_like(bias)
    return out


def folded(tensors: Tensors) -> Tensors:
    """Folds every BatchNorm into its convolution."""
    out: Tensors = {}
    for name, kernel in tensors.items():
        layer, _, leaf = name.rpartition("/")
        if leaf != "kernel":
            continue
        bias = tensors.get(f"{layer}/bias")
        if layer.endswith("/depthwise"):
            kernel = np.swapaxes(kernel, 2, 3)
        if bias is None:
            gamma, beta, mean, var = (
                tensors[f"{layer}_bn/{leaf}"] for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
            )
            factor = gamma / np.sqrt(var + _epsilon(layer))
            kernel, bias = (kernel * factor, beta - mean * factor)
            if layer.endswith("/depthwise"):
                kernel = kernel.reshape(*kernel.shape[:2], 1, -1)
        out |= {f"{layer}/kernel": kernel, f"{layer}/bias": np.asarray(bias)}
    return out


def _epsilon(layer: str) -> float:
    return _EPSILONS["backbone" if layer.startswith("MobilenetV2/") else "head"]


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "tflite",
        ("deeplabv3_mobilenet_v2",),
        tensorflow_name,
        style="keras",
        fields={"width_multiplier": 0.5, "channel_multiple": 4},
        adapt=unfolded,
        restore=folded,
        head=("logits",),
        first="backbone/stem_conv",
        preprocessing=Preprocessing(crop=(257, 257), resize=(257, 257), mean=(0.5,) * 3, std=(0.5,) * 3),
        class_list="voc21",
    ),
)
