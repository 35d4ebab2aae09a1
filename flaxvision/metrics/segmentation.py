"""Metrics of semantic segmentation and their bootstrap intervals, computed from one confusion matrix per image.

`SegmentationMetrics.of(predictions, labels, num_classes)` counts the pixels of one batch on the device. `to_host` turns
it into `SegmentationRecords`, which keeps the matrix of every image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flaxvision.metrics.accumulator import Accumulator
from flaxvision.metrics.confusion import ConfusionMatrix


@struct.dataclass
class SegmentationMetrics(Accumulator):
    """Counts of pixels by image, label and prediction: `SegmentationMetrics.of(predictions, labels, num_classes)`.

    Use it in evaluation only: merging on the device appends rows, so the arrays grow. `compute` returns `accuracy`,
    `mean_accuracy`, `mean_iou`, `frequency_weighted_iou` and `dice`, of all pixels together; see `ConfusionMatrix`.

    Attributes:
        counts: `[N, K, K]` integers; rows of a matrix are labels, columns are predictions.
        mask: `[N]` bool, False for rows that are padding.
        index: `[N]`, the position of each image in its data set, -1 if it is not known.
    """

    counts: Any
    mask: Any
    index: Any

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
        if predictions.shape != labels.shape or labels.ndim != 3:
            raise ValueError(
                f"predictions and labels must have one shape [N, H, W]; got {predictions.shape} and {labels.shape}"
            )
        rows, matrix = len(labels), ConfusionMatrix.init(num_classes)
        counts = jax.vmap(lambda p, t: matrix.update(p, t).counts)(predictions, labels)
        real = jnp.ones(rows, bool) if mask is None else mask > 0
        return cls(counts, real, jnp.full(rows, -1, jnp.int32) if index is None else index.astype(jnp.int32))

    def merge(self, other: SegmentationMetrics) -> SegmentationMetrics:
        """Appends the rows of another batch."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self, other)

    def all_reduce(self, axis_name: str) -> SegmentationMetrics:
        """Collects the rows of all devices, in the order of the devices."""
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), self)

    def to_host(self) -> SegmentationRecords:
        """Copies the counts to the host and removes padding."""
        counts, mask, index = (np.asarray(x) for x in jax.device_get((self.counts, self.mask, self.index)))
        return SegmentationRecords(counts[mask].astype(np.int64), index[mask])

    def compute(self) -> dict[str, float]:
        """Computes the metrics of all rows on the host."""
        return self.to_host().compute()


class SegmentationRecords:
    """The confusion matrix of every image, on the host.

    Attributes:
        counts: `[N, K, K]` int64; rows of a matrix are labels, columns are predictions.
        index: `[N]`, the position of each image in its data set, -1 if it is not known.
    """

    def __init__(self, counts: np.ndarray, index: np.ndarray):
        self.counts, self.index = counts, index

    def __len__(self) -> int:
        return len(self.counts)

    def merge(self, other: SegmentationRecords) -> SegmentationRecords:
        """Combines two sets of images."""
        pairs = ((self.counts, other.counts), (self.index, other.index))
        return SegmentationRecords(*(np.concatenate(pair) for pair in pairs))

    @property
    def matrix(self) -> ConfusionMatrix:
        """The confusion matrix of all images together."""
        return ConfusionMatrix(self.counts.sum(0))

    def compute(self) -> dict[str, float]:
        """Returns the metrics of all images together by name."""
        return _figures(self.matrix)

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
        return np.array([_figures(ConfusionMatrix(one))[figure] for one in self.counts])

    def bootstrap(
        self, figure: str = "mean_iou", *, resamples: int = 1000, level: float = 0.95, seed: int = 0
    ) -> tuple[float, float]:
        """Returns the bootstrap interval of a figure of `compute` over the images.

        Args:
            figure: Name of the figure.
            resamples: Number of times that as many images are drawn with replacement.
            level: Share of the resamples that the interval covers.
            seed: Seed of the drawing.

        Raises:
            ValueError: There are no images, or no such figure.
        """
        known = list(_figures(ConfusionMatrix.init(1)))
        if not len(self) or figure not in known:
            raise ValueError(f"figure must be one of {', '.join(known)} of one or more images; got {figure!r}")
        rng, order = np.random.default_rng(seed), np.argsort(self.index, kind="stable")
        counts = self.counts[order]  # the interval does not depend on the order of the batches
        values = [
            _figures(ConfusionMatrix(counts[rng.integers(0, len(counts), len(counts))].sum(0)))[figure]
            for _ in range(resamples)
        ]
        low, high = np.nanquantile(values, ((1 - level) / 2, (1 + level) / 2))
        return float(low), float(high)


_FIGURES: dict[str, Callable[[ConfusionMatrix], float]] = {
    "accuracy": lambda matrix: matrix.accuracy,
    "mean_accuracy": lambda matrix: matrix.mean_accuracy,
    "mean_iou": lambda matrix: matrix.mean_iou,
    "frequency_weighted_iou": lambda matrix: matrix.frequency_weighted_iou,
    "dice": lambda matrix: matrix.mean_dice,
}


def _figures(matrix: ConfusionMatrix) -> dict[str, float]:
    return {name: of(matrix) for name, of in _FIGURES.items()}
