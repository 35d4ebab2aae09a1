"""ZFNet in pytorchcv.

pytorchcv normalizes before it pools and divides the alpha of local response normalization by the size of the window.
"""

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
