"""Metrics as sums and weights: they add up over batches, devices and processes; the host divides, last."""

from flaxvision.metrics.classification import confusion_matrix, correct, top_k_correct
from flaxvision.metrics.sums import add, divide

__all__ = ["add", "confusion_matrix", "correct", "divide", "top_k_correct"]
