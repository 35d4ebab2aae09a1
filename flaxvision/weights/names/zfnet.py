"""ZFNet's tensors in pytorchcv, which normalizes before it pools and divides alpha by the window's size."""

from __future__ import annotations

from flaxvision.weights.layout import Layout
from flaxvision.weights.names.alexnet import pytorchcv

LAYOUTS = (
    Layout(
        "pytorchcv",
        ("zfnet",),
        pytorchcv,
        fields={"lrn": (5, 1e-4 / 5, 0.75, 2.0), "lrn_first": True},
        flatten={"fc6": (6, 6, 256)},
        first="backbone/conv1",
    ),
)
