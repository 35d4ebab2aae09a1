"""Objectives: one pure function for each task, which gives the loss and the metrics; see `objectives.base`."""

from flaxvision.train.objectives.base import Objective, PerExample, explain_loss
from flaxvision.train.objectives.capsule import capsule
from flaxvision.train.objectives.classification import binary, classification, multilabel
from flaxvision.train.objectives.detection import average_precision, detection
from flaxvision.train.objectives.regression import regression
from flaxvision.train.objectives.segmentation import segmentation

__all__ = [
    "Objective",
    "PerExample",
    "average_precision",
    "binary",
    "capsule",
    "classification",
    "detection",
    "explain_loss",
    "multilabel",
    "regression",
    "segmentation",
]
