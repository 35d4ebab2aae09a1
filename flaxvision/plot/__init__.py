"""Pictures: each function draws one matplotlib Figure and saves it if given a path.

The functions use neither pyplot nor its global state, so they work without a display, in notebooks and in threads.
Matplotlib is imported when the first picture is drawn. A file is written completely or not at all.
"""

from flaxvision.plot.detection import detections, false_positives, precision_recall
from flaxvision.plot.general import (
    confusion_matrix,
    curves,
    decision_boundary,
    feature_maps,
    image_grid,
    lr_range,
)
from flaxvision.plot.segmentation import overlays

__all__ = [
    "confusion_matrix",
    "curves",
    "decision_boundary",
    "detections",
    "false_positives",
    "feature_maps",
    "image_grid",
    "lr_range",
    "overlays",
    "precision_recall",
]
