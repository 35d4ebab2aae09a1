"""SqueezeNet in torchvision and in the authors' compressed release."""

from __future__ import annotations

from flaxvision.data.preprocessing import Preprocessing
from flaxvision.weights.layout import Layout, Tensors

# Index of each fire module in torchvision's sequence; pools take the indices between.
_FIRES = {"fire2": 3, "fire3": 4, "fire4": 5, "fire5": 7, "fire6": 8, "fire7": 9, "fire8": 10, "fire9": 12}
_COMPRESSED = {"squeeze": "conv1x1_1", "expand1x1": "conv1x1_2", "expand3x3": "conv3x3_2"}


def torchvision(path: str) -> str:
    """Returns the name of a module in torchvision."""
    if path == "head":
        return "classifier.1"
    if path == "backbone/stem_conv":
        return "features.0"
    _, fire, layer = path.split("/")
    return f"features.{_FIRES[fire]}.{layer}"


def deep_compression(path: str) -> str:
    """Returns the name of a Caffe layer in the release of Han's deep compression."""
    if path in ("head", "backbone/stem_conv"):
        return "conv_final" if path == "head" else "conv1"
    _, fire, layer = path.split("/")
    return f"{fire}/{_COMPRESSED[layer]}"


def with_dots(tensors: Tensors) -> Tensors:
    """Renames `LAYER/weight` to `LAYER.weight`."""
    return {".".join(name.rsplit("/", 1)): tensor for name, tensor in tensors.items()}


def with_slashes(tensors: Tensors) -> Tensors:
    """Inverts `with_dots`."""
    return {"/".join(name.rsplit(".", 1)): tensor for name, tensor in tensors.items()}


LAYOUTS = (
    Layout("torchvision", ("squeezenet1_0",), torchvision, first="backbone/stem_conv"),
    Layout(
        "deep_compression",
        ("squeezenet1_0",),
        deep_compression,
        fields={"classifier_padding": 1},
        adapt=with_dots,
        restore=with_slashes,
        first="backbone/stem_conv",
        preprocessing=Preprocessing(
            crop=227, resize=256, mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0), divisor=1.0, order="BGR"
        ),
        class_list="imagenet1k",
    ),
)
