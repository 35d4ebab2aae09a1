"""Layouts of darknet's networks. `.weights` files have no names, so `weights.darknet` uses those of our modules."""

from __future__ import annotations

from flaxvision.data.preprocessing import Preprocessing
from flaxvision.models.yolo_v2 import COCO_ANCHORS
from flaxvision.weights.layout import Layout


def same(path: str) -> str:
    """Returns the path of a module unchanged."""
    return path


def resized(size: int) -> Preprocessing:
    """Returns darknet's transform for classifiers: shorter side `size`, central crop, pixels in [0, 1]."""
    return Preprocessing(crop=size, resize=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def classifier(model: str, first: str, size: int) -> Layout:
    """Returns the layout of a classifier whose first convolution is `first`, for images of `size` pixels."""
    return Layout(
        "darknet",
        (model,),
        same,
        first=f"backbone/{first}/conv",
        preprocessing=resized(size),
        class_list="imagenet1k_darknet",
    )


LAYOUTS = (
    classifier("darknet19", "stem_conv1", 256),
    classifier("tiny_darknet", "stem_conv1", 224),
    classifier("darknet53", "stem_conv", 256),
    Layout(
        "darknet",
        ("yolo_v2", "yolo_v2_tiny"),
        same,
        fields_by_classes={80: {"anchors": COCO_ANCHORS}},
        head=("head_out",),
        first="backbone/stem_conv1/conv",
    ),
    Layout(
        "darknet",
        ("yolo_v3", "yolo_v3_spp"),
        same,
        head=("head32_out", "head16_out", "head8_out"),
        first="backbone/stem_conv/conv",
    ),
    Layout("darknet", ("yolo_v3_tiny",), same, head=("head32_out", "head16_out"), first="backbone/stem_conv1/conv"),
)
