"""Metrics of instance segmentation by label maps, where every pixel belongs to one instance or to the background.

`InstanceRecords.of(found, truth)` counts, for each image, the pixels by found and true instance. All figures follow
from these contingency tables. `label_components` makes instances from a foreground.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flaxvision.metrics.panoptic import quality, score_segments, segment_table
from flaxvision.metrics.records import ImageRecords, known_mean, positions


class InstanceRecords(ImageRecords):
    """Figures of label maps of instances, for each image: `InstanceRecords.of(found, truth)`.

    `compute` returns:

    * `rand_error`, `rand_precision`, `rand_recall`: the adapted Rand error of the ISBI 2012 and SNEMI3D challenges
      (Arganda-Carreras et al. 2015), which leaves out the pixels of the true background;
    * `vi_split`, `vi_merge` and their sum `vi`: the variation of information in bits (Meilă 2007), with the background
      as one more segment. Splits are true instances in several parts, merges are found instances that cover several;
    * `pq`, `sq`, `rq`: panoptic, segmentation and recognition quality (Kirillov et al. 2019, section 4), with the
      instances as one class;
    * `touching`: the number of pairs of true instances with at most `gap` pixels between them;
    * `separated`: the number of touching pairs whose instances lie in two different found instances. An instance lies
      in the found instance, or the background, that shares most pixels with it; in a tie, in the one with the lower id.

    The Rand figures and the variation of information of a set are means over its images, as in the challenges. An image
    in which one is undefined (0 / 0) is left out of its mean. Matches and pairs are summed over the images.
    scikit-image computes the Rand error and the variation of information.

    Attributes:
        counts: `[N, 11]`: Rand error, precision, recall; split, merge; sum of IoU, true positives, false positives,
            false negatives; touching pairs, separated pairs.
        index: `[N]`, the position of each image in its data set, -1 if it is not known.

    Example:
        >>> truth = np.array([[1, 1, 2, 2]])
        >>> figures = InstanceRecords.of(np.array([[7, 7, 7, 7]]), truth).compute()
        >>> figures["touching"], figures["separated"], figures["vi_merge"]
        (1.0, 0.0, 1.0)
    """

    @classmethod
    def of(
        cls,
        found: np.ndarray,
        truth: np.ndarray,
        *,
        ignore: int | None = None,
        gap: int = 2,
        index: np.ndarray | None = None,
    ) -> InstanceRecords:
        """Compares the instances of one image or of a batch.

        Args:
            found: Ids of the predicted instances, integers `[H, W]` or `[N, H, W]`; 0 is the background.
            truth: Ids of the true instances, of the same shape; 0 is the background.
            ignore: The true label of unknown pixels, which are not counted. An unmatched found instance is no false
                positive if more than half of it is unknown. None if all pixels are known.
            gap: The most pixels that lie between the instances of a touching pair, in a row, a column or a diagonal;
                0 for instances that are neighbours (of eight).
            index: `[N]`, the position of each image in its data set; None if it is not known.

        Raises:
            ValueError: The maps are no integers, have negative ids or other shapes, or `gap` is negative.
        """
        found, truth = np.asarray(found), np.asarray(truth)
        if found.shape != truth.shape or truth.ndim not in (2, 3):
            raise ValueError(
                f"found and truth must have one shape [H, W] or [N, H, W]; got {found.shape} and {truth.shape}"
            )
        if gap < 0:
            raise ValueError(f"gap must be at least 0; got {gap}")
        for name, ids in (("found", found), ("truth", truth)):
            if not np.issubdtype(ids.dtype, np.integer):
                raise ValueError(f"{name} must have integers; got {ids.dtype}")
            known = ids if ignore is None or name == "found" else ids[ids != ignore]
            if known.size and known.min() < 0:
                raise ValueError(f"{name} must have ids of at least 0; got {known.min()}")
        found, truth = (x[None] if x.ndim == 2 else x for x in (found, truth))
        rows = [
            _count(p, t, t == ignore if ignore is not None else np.zeros(t.shape, bool), gap)
            for p, t in zip(found, truth, strict=True)
        ]
        return cls(np.array(rows, np.float64).reshape(len(rows), 11), positions(index, len(rows)))

    def _figures(self, counts: np.ndarray) -> dict[str, float]:
        error, precision, recall, split, merge = (known_mean(column) for column in counts[:, :5].T)
        pq, sq, rq = quality(counts[:, 5:9].sum(0))
        touching, separated = counts[:, 9:].sum(0)
        return {
            "rand_error": error,
            "rand_precision": precision,
            "rand_recall": recall,
            "vi": split + merge,
            "vi_split": split,
            "vi_merge": merge,
            "pq": float(pq),
            "sq": float(sq),
            "rq": float(rq),
            "touching": float(touching),
            "separated": float(separated),
        }


def label_components(foreground: np.ndarray, *, connectivity: int = 1, min_size: int = 0) -> np.ndarray:
    """Makes an instance of every connected part of a foreground.

    Args:
        foreground: `[H, W]` or `[N, H, W]`, True or not 0 in the foreground.
        connectivity: 1 if a pixel is connected with its four neighbours, 2 for its eight neighbours.
        min_size: Parts with fewer pixels become background.

    Returns:
        Ids of the shape of `foreground`, int32: 0 is the background, and the parts of each image are 1, 2, ...

    Raises:
        ValueError: `foreground` has another rank, or `connectivity` is neither 1 nor 2.
    """
    from scipy import ndimage

    foreground = np.asarray(foreground)
    if foreground.ndim not in (2, 3):
        raise ValueError(f"foreground must have the shape [H, W] or [N, H, W]; got {foreground.shape}")
    if connectivity not in (1, 2):
        raise ValueError(f"connectivity must be 1 or 2; got {connectivity}")
    structure = ndimage.generate_binary_structure(2, connectivity)
    labels: Any = np.zeros(foreground.shape, np.int32)
    shape = (-1, *foreground.shape[-2:])
    for image, out in zip(foreground.reshape(shape), labels.reshape(shape), strict=True):
        parts: Any = ndimage.label(image, structure)  # its type hints leave out the array
        keep = np.bincount(parts[0].ravel()) >= min_size
        keep[0] = False
        out[...] = (np.cumsum(keep) * keep)[parts[0]]
    return labels


def _count(found: np.ndarray, truth: np.ndarray, unknown: np.ndarray, gap: int) -> list[float]:
    """Returns the row of `InstanceRecords.counts` of one image."""
    from scipy import sparse
    from skimage import metrics

    table = segment_table(found[~unknown], truth[~unknown])
    column, row = np.unique(table[0], return_inverse=True)[1], np.unique(table[1], return_inverse=True)[1]
    rand, information = [np.nan] * 3, [np.nan] * 2
    real = table[1] != 0
    if real.any():
        inside = sparse.csr_array((table[2][real].astype(np.float64), (row[real], column[real])))
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 if all segments are single pixels
            rand = metrics.adapted_rand_error(table=inside)
    if table.size:  # some pixel is known
        whole = sparse.csr_array((table[2] / table[2].sum(), (row, column)))
        blank = np.zeros((1, 1), int)  # it is not read; scikit-image compares the shapes of the images it is given
        split, merge = metrics.variation_of_information(blank, blank, table=whole)
        information = [abs(split), abs(merge)]  # not -0.0
    segments = score_segments(table, segment_table(found[unknown], truth[unknown]))
    pairs = _touching(np.where(unknown, 0, truth), gap)
    order = np.lexsort((-table[0], table[2]))  # the largest overlap is the last, the lowest id among equals
    best = dict(zip(table[1][order].tolist(), table[0][order].tolist(), strict=True))
    apart = sum(best[a] != 0 and best[b] != 0 and best[a] != best[b] for a, b in pairs)
    return [*map(float, rand), *information, *segments, len(pairs), apart]


def _touching(truth: np.ndarray, gap: int) -> list[tuple[int, int]]:
    """Returns the pairs of ids with at most `gap` pixels between them."""
    (height, width), reach = truth.shape, gap + 1
    pairs: set[tuple[int, int]] = set()
    for dy in range(min(reach, height - 1) + 1):
        for dx in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            a = truth[: height - dy, max(-dx, 0) : width - max(dx, 0)]
            b = truth[dy:, max(dx, 0) : width - max(-dx, 0)]
            apart = (a != b) & (a != 0) & (b != 0)
            if apart.any():
                both = np.unique(np.sort(np.stack([a[apart], b[apart]], 1), 1), axis=0)
                pairs |= {(int(low), int(high)) for low, high in both}
    return sorted(pairs)
