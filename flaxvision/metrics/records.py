"""Base classes of metrics that count each image by itself: on the device, and on the host."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flaxvision.metrics.accumulator import Accumulator


class ImageRecords:
    """Base class: the counts of every image, from which the figures of any set of images follow.

    A subclass defines `_figures(counts)`.

    Attributes:
        counts: `[N, ...]`, the counts of each image.
        index: `[N]`, the position of each image in its data set, -1 if it is not known.
    """

    def __init__(self, counts: np.ndarray, index: np.ndarray):
        self.counts, self.index = counts, index

    def __len__(self) -> int:
        return len(self.counts)

    def merge(self, other: Self) -> Self:
        """Combines two sets of images."""
        pairs = ((self.counts, other.counts), (self.index, other.index))
        return self._with(*(np.concatenate(pair) for pair in pairs))

    def compute(self) -> dict[str, float]:
        """Returns the figures of all images together by name; NaN where a figure is undefined."""
        return self._figures(self.counts)

    def per_image(self, figure: str) -> np.ndarray:
        """Returns a figure of `compute` for each image by itself, `[N]`."""
        self._check(figure)
        return np.array([self._figures(self.counts[i : i + 1])[figure] for i in range(len(self))])

    def bootstrap(
        self, figure: str, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
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
        self._check(figure)
        rng, order = np.random.default_rng(seed), np.argsort(self.index, kind="stable")
        counts = self.counts[order]  # the interval does not depend on the order of the batches
        draws = (rng.integers(0, len(counts), len(counts)) for _ in range(resamples))
        values = [self._figures(counts[draw])[figure] for draw in draws]
        low, high = np.nanquantile(values, ((1 - level) / 2, (1 + level) / 2))
        return float(low), float(high)

    def _with(self, counts: np.ndarray, index: np.ndarray) -> Self:
        return type(self)(counts, index)

    def _figures(self, counts: np.ndarray) -> dict[str, float]:
        """Returns the figures of images with these counts `[N, ...]`, by name."""
        raise NotImplementedError(f"{type(self).__name__} must define _figures")

    def _check(self, figure: str) -> None:
        known = list(self._figures(self.counts[:0]))
        if not len(self) or figure not in known:
            raise ValueError(f"figure must be one of {', '.join(known)} of one or more images; got {figure!r}")


@struct.dataclass
class ImageMetrics(Accumulator):
    """Base class: the counts of every image of a batch, on the device.

    Use it in evaluation only: merging on the device appends rows, so the arrays grow.

    Attributes:
        counts: `[N, ...]`, integers.
        mask: `[N]` bool, False for rows that are padding.
        index: `[N]`, the position of each image in its data set, -1 if it is not known.
        records: The class of the counts on the host.
    """

    counts: Any
    mask: Any
    index: Any
    records: ClassVar[type[ImageRecords]]

    @classmethod
    def of_counts(cls, counts: jax.Array, mask: jax.Array | None, index: jax.Array | None) -> Self:
        """Returns the accumulator of counts `[N, ...]`; see the arguments of `of`."""
        rows = len(counts)
        real = jnp.ones(rows, bool) if mask is None else mask > 0
        return cls(counts, real, jnp.full(rows, -1, jnp.int32) if index is None else index.astype(jnp.int32))

    def merge(self, other: Self) -> Self:
        """Appends the rows of another batch."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self, other)

    def all_reduce(self, axis_name: str) -> Self:
        """Collects the rows of all devices, in the order of the devices."""
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), self)

    def to_host(self) -> Any:
        """Copies the counts to the host and removes padding."""
        counts, mask, index = (np.asarray(x) for x in jax.device_get((self.counts, self.mask, self.index)))
        return self.records(counts[mask].astype(np.int64), index[mask])

    def compute(self) -> dict[str, float]:
        """Computes the metrics of all rows on the host."""
        return self.to_host().compute()


def check_label_maps(predictions: jax.Array, labels: jax.Array) -> None:
    """Raises ValueError unless both are `[N, H, W]`."""
    if predictions.shape != labels.shape or labels.ndim != 3:
        raise ValueError(
            f"predictions and labels must have one shape [N, H, W]; got {predictions.shape} and {labels.shape}"
        )


def known_mean(values: np.ndarray) -> float:
    """Returns the mean of the values that are not NaN; NaN if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def positions(index: np.ndarray | None, rows: int) -> np.ndarray:
    """Returns the positions of images, `[rows]`; -1 for each if they are not known."""
    index = np.full(rows, -1) if index is None else np.asarray(index)
    if index.shape != (rows,):
        raise ValueError(f"index must have one position for each of {rows} images; got shape {index.shape}")
    return index
