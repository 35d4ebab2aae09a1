"""Metrics of semantic segmentation and their bootstrap intervals, computed from one confusion matrix per image.

`SegmentationMetrics.of(predictions, labels, num_classes)` counts the pixels of one batch on the device. `to_host` turns
it into `SegmentationRecords`, which keeps the matrix of every image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from flaxvision.metrics.confusion import ConfusionMatrix
from flaxvision.metrics.records import ImageMetrics, ImageRecords, check_label_maps

_FIGURES: dict[str, Callable[[ConfusionMatrix], float]] = {
    "accuracy": lambda matrix: matrix.accuracy,
    "mean_accuracy": lambda matrix: matrix.mean_accuracy,
    "mean_iou": lambda matrix: matrix.mean_iou,
    "frequency_weighted_iou": lambda matrix: matrix.frequency_weighted_iou,
    "dice": lambda matrix: matrix.mean_dice,
}


class SegmentationRecords(ImageRecords):
    """The confusion matrix of every image, on the host.

    Attributes:
        counts: `[N, K, K]` int64; rows of a matrix are labels, columns are predictions.
        index: `[N]`, the position of each image in its data set, -1 if it is not known.
    """

    @property
    def matrix(self) -> ConfusionMatrix:
        """The confusion matrix of all images together."""
        return ConfusionMatrix(self.counts.sum(0))

    def per_class(self, classes: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Returns for each class `name`, `pixels` of its label, `accuracy`, `iou` and `dice`; NaN where undefined."""
        matrix = self.matrix
        counts = np.asarray(matrix.counts)
        totals = counts.sum(1)
        found = np.diagonal(counts) / np.where(totals > 0, totals, np.nan)
        names = [str(k) for k in range(len(counts))] if classes is None else list(classes)
        rows = zip(names, totals.tolist(), found.tolist(), matrix.iou.tolist(), matrix.dice.tolist(), strict=True)
        return [dict(zip(("name", "pixels", "accuracy", "iou", "dice"), row, strict=True)) for row in rows]

    def per_image(self, figure: str = "mean_iou") -> np.ndarray:
        """Returns a figure of `compute` for each image by itself, `[N]`."""
        return super().per_image(figure)

    def bootstrap(self, figure: str = "mean_iou", **options: Any) -> tuple[float, float]:
        """Returns the bootstrap interval of a figure over the images; see `ImageRecords.bootstrap`."""
        return super().bootstrap(figure, **options)

    def _figures(self, counts: np.ndarray) -> dict[str, float]:
        matrix = ConfusionMatrix(counts.sum(0))
        return {name: of(matrix) for name, of in _FIGURES.items()}


@struct.dataclass
class SegmentationMetrics(ImageMetrics):
    """Counts of pixels by image, label and prediction: `SegmentationMetrics.of(predictions, labels, num_classes)`.

    Use it in evaluation only: merging on the device appends rows, so the arrays grow. `compute` returns `accuracy`,
    `mean_accuracy`, `mean_iou`, `frequency_weighted_iou` and `dice`, of all pixels together; see `ConfusionMatrix`.

    Attributes:
        counts: `[N, K, K]` integers; rows of a matrix are labels, columns are predictions.
        mask: `[N]` bool, False for rows that are padding.
        index: `[N]`, the position of each image in its data set, -1 if it is not known.
    """

    records = SegmentationRecords

    @classmethod
    def of(
        cls,
        predictions: jax.Array,
        labels: jax.Array,
        num_classes: int,
        mask: jax.Array | None = None,
        index: jax.Array | None = None,
    ) -> SegmentationMetrics:
        """Counts the pixels of a batch.

        Args:
            predictions: Class indices `[N, H, W]`.
            labels: Class indices `[N, H, W]`. A label outside [0, K), such as 255, is not counted.
            num_classes: K.
            mask: `[N]`, above 0 for real rows and 0 for padding; None for real rows only.
            index: `[N]`, the position of each image in its data set; None if it is not known.

        Raises:
            ValueError: The shapes do not fit, or `num_classes` is below 1.
        """
        check_label_maps(predictions, labels)
        matrix = ConfusionMatrix.init(num_classes)
        return cls.of_counts(jax.vmap(lambda p, t: matrix.update(p, t).counts)(predictions, labels), mask, index)
