"""Host records of metrics that are counted for each image by itself."""

from __future__ import annotations

from typing import Self

import numpy as np


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
        raise NotImplementedError

    def _check(self, figure: str) -> None:
        known = list(self._figures(self.counts[:0]))
        if not len(self) or figure not in known:
            raise ValueError(f"figure must be one of {', '.join(known)} of one or more images; got {figure!r}")


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
