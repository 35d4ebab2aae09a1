"""The networks of darknet. Its `.weights` files have no names; `weights.darknet` gives tensors those of our modules."""

from __future__ import annotations

from flaxvision.weights.layout import Layout


def same(path: str) -> str:
    """Returns the path of a module as it is."""
    return path


LAYOUTS = (
    Layout("darknet", ("darknet19", "tiny_darknet"), same, first="backbone/stem_conv1/conv"),
    Layout("darknet", ("darknet53",), same, first="backbone/stem_conv/conv"),
    Layout("darknet", ("yolo_v2", "yolo_v2_tiny"), same, head=("head_out",), first="backbone/stem_conv1/conv"),
    Layout(
        "darknet",
        ("yolo_v3", "yolo_v3_spp"),
        same,
        head=("head32_out", "head16_out", "head8_out"),
        first="backbone/stem_conv/conv",
    ),
    Layout("darknet", ("yolo_v3_tiny",), same, head=("head32_out", "head16_out"), first="backbone/stem_conv1/conv"),
)
