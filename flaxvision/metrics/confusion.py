"""The confusion matrix, and the metrics of classification and segmentation that follow from it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flaxvision.metrics.accumulator import Accumulator


@struct.dataclass
class ConfusionMatrix(Accumulator):
    """Counts of examples or pixels by label and prediction.

    Counts are int32 on the device, so a cell overflows above 2^31 - 1. They are int64 on the host.

    Attributes:
        counts: `[K, K]` integers; rows are labels, columns are predictions.

    Example:
        >>> matrix = ConfusionMatrix.init(2).update(jnp.asarray([0, 1, 1]), jnp.asarray([0, 0, 1]))
        >>> matrix.counts.tolist(), matrix.iou.tolist()
        ([[1, 1], [0, 1]], [0.5, 0.5])
    """

    counts: Any

    @classmethod
    def init(cls, num_classes: int) -> ConfusionMatrix:
        """Creates an empty matrix.

        Args:
            num_classes: K.

        Returns:
            A matrix of zeros.

        Raises:
            ValueError: `num_classes` is below 1.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {num_classes}")
        return cls(jnp.zeros((num_classes, num_classes), jnp.int32))

    def update(self, predictions: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> ConfusionMatrix:
        """Counts a batch.

        Args:
            predictions: Integers of any shape, such as `[N]` or `[N, H, W]`.
            labels: Integers of the same shape. An entry is not counted if its label or its prediction lies outside
                [0, K), such as a label of 255 in segmentation.
            mask: `[N]`, or other leading dimensions of `labels`. Only entries with a mask above 0 are counted. None
                counts all entries.

        Returns:
            The matrix with the counts of the batch added.

        Raises:
            ValueError: The shapes do not fit.
        """
        if predictions.shape != labels.shape:
            raise ValueError(f"predictions must have the labels' shape {labels.shape}; got {predictions.shape}")
        size = len(self.counts)
        counted = (labels >= 0) & (labels < size) & (predictions >= 0) & (predictions < size)
        if mask is not None:
            if mask.shape != labels.shape[: mask.ndim]:
                raise ValueError(f"mask must have the leading dimensions of labels {labels.shape}; got {mask.shape}")
            counted &= mask.reshape(mask.shape + (1,) * (labels.ndim - mask.ndim)) > 0
        row, column = (jnp.where(counted, x, 0).reshape(-1) for x in (labels, predictions))
        return ConfusionMatrix(self.counts.at[row, column].add(counted.reshape(-1).astype(self.counts.dtype)))

    @property
    def accuracy(self) -> float:
        """Share of the examples that are predicted correctly; NaN without examples."""
        return _ratio(np.trace(self._counts), self._counts.sum())

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each class, `[K]`; NaN for a class without labels and predictions."""
        counts = self._counts
        intersection = np.diagonal(counts)
        union = counts.sum(0) + counts.sum(1) - intersection
        return np.divide(intersection, union, out=np.full(len(counts), np.nan), where=union > 0)

    @property
    def dice(self) -> np.ndarray:
        """Dice coefficient (F1) of each class, `[K]`; NaN for a class without labels and predictions."""
        return 2 * self.iou / (1 + self.iou)

    @property
    def mean_dice(self) -> float:
        """Mean of `dice` over the classes that were seen; NaN if none was."""
        dice = self.dice[~np.isnan(self.dice)]
        return float(dice.mean()) if dice.size else float("nan")

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that were seen; NaN if none was."""
        iou = self.iou[~np.isnan(self.iou)]
        return float(iou.mean()) if iou.size else float("nan")

    @property
    def mean_accuracy(self) -> float:
        """Mean recall of the classes that have examples; NaN if there are none."""
        counts = self._counts
        totals = counts.sum(1)
        found = np.diagonal(counts)[totals > 0] / totals[totals > 0]
        return float(found.mean()) if found.size else float("nan")

    @property
    def frequency_weighted_iou(self) -> float:
        """Mean of `iou` weighted by the number of examples of each class; NaN if there are none."""
        totals = self._counts.sum(1)
        return _ratio(float(np.sum(totals * np.nan_to_num(self.iou))), totals.sum())

    def compute(self) -> dict[str, float]:
        """Returns the accuracy and the mean IoU. The other metrics are properties."""
        return {"accuracy": self.accuracy, "mean_iou": self.mean_iou}

    @property
    def _counts(self) -> np.ndarray:
        return np.asarray(jax.device_get(self.counts), np.int64)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
