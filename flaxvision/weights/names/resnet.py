"""ResNets in torchvision, timm and Keras, and the CIFAR ResNets of akamaster."""

from __future__ import annotations

import re

import numpy as np

from flaxvision.data.preprocessing import Preprocessing
from flaxvision.weights.layout import Layout, Tensors

_IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_CIFAR = ("resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "resnet110_cifar")
_UNIT = re.compile(r"backbone/stage(\d+)_block(\d+)/(\w+)")


def _torch(path: str, head: str) -> str:
    fixed = {"backbone/stem_conv": "conv1", "backbone/stem_bn": "bn1", "head": head}
    if path in fixed:
        return fixed[path]
    stage, block, leaf = _parts(path)
    leaf = {"shortcut_conv": "downsample.0", "shortcut_bn": "downsample.1"}.get(leaf, leaf)
    return f"layer{stage}.{block - 1}.{leaf}"


def _parts(path: str) -> tuple[int, int, str]:
    match = _UNIT.fullmatch(path)
    if match is None:
        raise ValueError(f"path must be a module of a ResNet; got {path!r}")
    return int(match[1]), int(match[2]), match[3]


def torchvision_name(path: str) -> str:
    """Returns `layer3.0.downsample.0` for `backbone/stage3_block1/shortcut_conv`; timm uses the same names."""
    return _torch(path, "fc")


def akamaster_name(path: str) -> str:
    """Returns torchvision's name, but `linear` for the head. Shortcuts of option A have no parameters."""
    return _torch(path, "linear")


def keras_name(path: str) -> str:
    """Returns `conv4_block2_1_conv` for `backbone/stage3_block2/conv1`; the number of a shortcut is 0."""
    fixed = {"backbone/stem_conv": "conv1_conv", "backbone/stem_bn": "conv1_bn", "head": "predictions"}
    if path in fixed:
        return fixed[path]
    stage, block, leaf = _parts(path)
    number = 0 if leaf.startswith("shortcut") else leaf[-1]
    return f"conv{stage + 1}_block{block}_{number}_{'bn' if 'bn' in leaf else 'conv'}"


def fold_biases(tensors: Tensors) -> Tensors:
    """Moves the biases of Keras' convolutions into the means of the BatchNorms that follow them.

    `gamma * (y + bias - mean) / std + beta` is the same network with the mean `mean - bias` and no bias. The head,
    which the published files call `probs`, gets its current name `predictions`.

    Args:
        tensors: Keras' tensors by name.

    Returns:
        The tensors without the biases of the convolutions. A bias without a mean of its shape stays, so that the
        strict lookup of names reports it.

    Raises:
        ValueError: Convolutions have no bias; all are listed.
    """
    tensors = {name.removesuffix(":0"): tensor for name, tensor in tensors.items()}
    if "predictions/kernel" not in tensors:
        tensors = {re.sub("^probs/", "predictions/", name): tensor for name, tensor in tensors.items()}
    bare = [name for name in tensors if name.endswith("_conv/kernel") and name[:-6] + "bias" not in tensors]
    if bare:
        missing = ", ".join(name[:-6] + "bias" for name in bare)
        raise ValueError(f"tensors must hold a bias for every convolution of a Keras ResNet; got none for {missing}")
    out = dict(tensors)
    for name, bias in tensors.items():
        mean = name.removesuffix("_conv/bias") + "_bn/moving_mean"
        if name.endswith("_conv/bias") and mean in out and np.shape(out[mean]) == np.shape(bias):
            out[mean] = out[mean] - out.pop(name)
    return out


def zero_biases(tensors: Tensors) -> Tensors:
    """Adds biases of zero to Keras' convolutions. `fold_biases` moved the original ones into the means."""
    out = dict(tensors)
    for name, kernel in tensors.items():
        if name.endswith("_conv/kernel"):
            out[name[:-6] + "bias"] = np.zeros(kernel.shape[-1], kernel.dtype)
    return out


LAYOUTS: tuple[Layout, ...] = (
    Layout("torchvision", _IMAGENET, torchvision_name, first="backbone/stem_conv"),
    Layout("timm", _IMAGENET, torchvision_name, first="backbone/stem_conv"),
    Layout(
        "keras",
        ("resnet50", "resnet101", "resnet152"),
        keras_name,
        style="keras",
        fields={"stride_in_1x1": True, "epsilon": 1.001e-5, "momentum": 0.99},
        adapt=fold_biases,
        restore=zero_biases,
        first="backbone/stem_conv",
    ),
    Layout(
        "akamaster",
        _CIFAR,
        akamaster_name,
        first="backbone/stem_conv",
        preprocessing=Preprocessing(crop=32, resize=None),
        class_list="cifar10",
    ),
)
