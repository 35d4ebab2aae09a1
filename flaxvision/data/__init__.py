"""Data sources, their validation, and batches for training and evaluation.

Importing this package imports only NumPy. TFDS, Pillow and scikit-learn are imported by the functions that use them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flaxvision.data import augment, cropping
    from flaxvision.data.annotation_files import load_coco, load_voc, load_yolo
    from flaxvision.data.annotations import DetectionSource
    from flaxvision.data.arrays import ArraySource, Mapped, Source, Subset, stratified_split, subset
    from flaxvision.data.canvas import Canvases, CanvasSource, on_canvases
    from flaxvision.data.detection_sets import load_detection
    from flaxvision.data.folder import FolderSource
    from flaxvision.data.instances import InstanceSource
    from flaxvision.data.pipeline import EvalBatches, TrainBatches, describe_changes, eval_batches, train_batches
    from flaxvision.data.preprocessing import DetectionPreprocessing, Preprocessing
    from flaxvision.data.segmentation_sets import ShapesMaps, load_segmentation
    from flaxvision.data.segmentation_source import SegmentationSource, read_mask
    from flaxvision.data.shapes import ShapesSource
    from flaxvision.data.sources import load
    from flaxvision.data.statistics import channel_statistics
    from flaxvision.data.tfds import TfdsSource
    from flaxvision.data.validation import validate
    from flaxvision.data.weight_maps import border_weights

_HOME = {
    "ArraySource": "arrays",
    "CanvasSource": "canvas",
    "Canvases": "canvas",
    "DetectionPreprocessing": "preprocessing",
    "DetectionSource": "annotations",
    "EvalBatches": "pipeline",
    "FolderSource": "folder",
    "InstanceSource": "instances",
    "Mapped": "arrays",
    "Preprocessing": "preprocessing",
    "SegmentationSource": "segmentation_source",
    "ShapesMaps": "segmentation_sets",
    "ShapesSource": "shapes",
    "Source": "arrays",
    "Subset": "arrays",
    "TfdsSource": "tfds",
    "TrainBatches": "pipeline",
    "border_weights": "weight_maps",
    "channel_statistics": "statistics",
    "describe_changes": "pipeline",
    "eval_batches": "pipeline",
    "load": "sources",
    "load_coco": "annotation_files",
    "load_detection": "detection_sets",
    "load_segmentation": "segmentation_sets",
    "load_voc": "annotation_files",
    "load_yolo": "annotation_files",
    "on_canvases": "canvas",
    "read_mask": "segmentation_source",
    "stratified_split": "arrays",
    "subset": "arrays",
    "train_batches": "pipeline",
    "validate": "validation",
}

__all__ = [
    "ArraySource",
    "CanvasSource",
    "Canvases",
    "DetectionPreprocessing",
    "DetectionSource",
    "EvalBatches",
    "FolderSource",
    "InstanceSource",
    "Mapped",
    "Preprocessing",
    "SegmentationSource",
    "ShapesMaps",
    "ShapesSource",
    "Source",
    "Subset",
    "TfdsSource",
    "TrainBatches",
    "augment",
    "border_weights",
    "channel_statistics",
    "cropping",
    "describe_changes",
    "eval_batches",
    "load",
    "load_coco",
    "load_detection",
    "load_segmentation",
    "load_voc",
    "load_yolo",
    "on_canvases",
    "read_mask",
    "stratified_split",
    "subset",
    "train_batches",
    "validate",
]


def __getattr__(name: str):
    if name in ("augment", "cropping"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
