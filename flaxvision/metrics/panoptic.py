"""Panoptic quality (Kirillov et al. 2019, "Panoptic Segmentation", section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from flaxvision.metrics.records import ImageRecords, known_mean, positions

VOID = 255


class PanopticRecords(ImageRecords):
    """Panoptic quality of maps of class and instance: `PanopticRecords.of(found, truth, num_classes, things=...)`.

    A found and a true segment of one class match if their IoU is above 0.5. `compute` returns the panoptic quality
    `pq`, the segmentation quality `sq` (mean IoU of the matches) and the recognition quality `rq` (F1 of the segments).
    They are means over the classes that occur in the truth or the prediction. `pq_things`, `pq_stuff` and so on are
    means over the classes of one kind. A mean over no class is NaN.

    Attributes:
        counts: `[N, K, 4]`: sum of IoU, true positives, false positives, false negatives of each class.
        index: `[N]`, the position of each image in its data set, -1 if it is not known.
        things: `[K]` bool, True for classes with instances.
    """

    def __init__(self, counts: np.ndarray, index: np.ndarray, things: np.ndarray):
        super().__init__(counts, index)
        self.things = things

    @classmethod
    def of(
        cls,
        found: np.ndarray,
        truth: np.ndarray,
        num_classes: int,
        *,
        things: Sequence[int],
        index: np.ndarray | None = None,
    ) -> PanopticRecords:
        """Compares the segments of one image or of a batch.

        Args:
            found: Class and instance of every pixel, integers `[H, W, 2]` or `[N, H, W, 2]`. A pixel of class 255 has
                no segment.
            truth: The same of the truth. Pixels of class 255 are void: they count in no union, and an unmatched found
                segment is no false positive if more than half of it is void. Label crowds as void.
            num_classes: K, at most 255.
            things: The classes with instances. All pixels of another class are one segment, whatever their instance.
            index: `[N]`, the position of each image in its data set; None if it is not known.

        Raises:
            ValueError: A map has another shape, type or class, or a class of `things` is out of range.
        """
        found, truth = np.asarray(found), np.asarray(truth)
        if found.shape != truth.shape or truth.ndim not in (3, 4) or truth.shape[-1] != 2:
            raise ValueError(
                f"found and truth must have one shape [H, W, 2] or [N, H, W, 2]; got {found.shape} and {truth.shape}"
            )
        if not 1 <= num_classes <= VOID:
            raise ValueError(f"num_classes must be from 1 to {VOID}; got {num_classes}")
        if not all(0 <= k < num_classes for k in things):
            raise ValueError(f"things must be classes from 0 to {num_classes - 1}; got {list(things)}")
        is_thing = np.isin(np.arange(num_classes), list(things))
        segments = []
        for name, maps in (("found", found), ("truth", truth)):
            if not np.issubdtype(maps.dtype, np.integer):
                raise ValueError(f"{name} must have integers; got {maps.dtype}")
            kind, instance = maps[..., 0].astype(np.int64), maps[..., 1].astype(np.int64)
            wrong = (kind != VOID) & ((kind < 0) | (kind >= num_classes))
            if wrong.any():
                raise ValueError(
                    f"{name} must have classes from 0 to {num_classes - 1}, or {VOID}; got {kind[wrong][0]}"
                )
            if instance.size and not 0 <= instance.min() <= instance.max() < 2**48:
                raise ValueError(f"{name} must have instances from 0 to 2^48 - 1; got {instance.min()}")
            # Segment 0 is no segment, and a segment's number modulo 256 is its class plus 1.
            one = np.isin(kind, np.flatnonzero(is_thing))
            segments.append(np.where(kind == VOID, 0, kind + 1 + (VOID + 1) * np.where(one, instance, 0)))
        height, width = truth.shape[-3:-1]
        segments = [x.reshape(-1, height, width) for x in segments]
        counts = np.zeros((len(segments[0]), num_classes, 4))
        for row, p, t in zip(counts, *segments, strict=True):
            void = t == 0
            known, unknown = segment_table(p[~void], t[~void]), segment_table(p[void], t[void])
            for k in range(num_classes):
                row[k] = score_segments(known, unknown, k)
        return cls(counts, positions(index, len(counts)), is_thing)

    def per_class(self, classes: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Returns for each class `name`, `segments` of the truth, `pq`, `sq` and `rq`; NaN where it was not seen."""
        counts = self.counts.sum(0)
        names = [str(k) for k in range(len(counts))] if classes is None else list(classes)
        values = zip(names, (counts[:, 1] + counts[:, 3]).astype(int).tolist(), *quality(counts).tolist(), strict=True)
        return [dict(zip(("name", "segments", "pq", "sq", "rq"), row, strict=True)) for row in values]

    def merge(self, other: Self) -> Self:
        """Combines two sets of images.

        Raises:
            ValueError: The sets have other classes or other things.
        """
        if not np.array_equal(self.things, other.things):
            raise ValueError(
                f"other must have the things {np.flatnonzero(self.things)} of {len(self.things)} classes; "
                f"got {np.flatnonzero(other.things)} of {len(other.things)}"
            )
        return super().merge(other)

    def _with(self, counts: np.ndarray, index: np.ndarray) -> Self:
        return type(self)(counts, index, self.things)

    def _figures(self, counts: np.ndarray) -> dict[str, float]:
        values = dict(zip(("pq", "sq", "rq"), quality(counts.sum(0)), strict=True))
        kinds = {"": np.ones_like(self.things), "_things": self.things, "_stuff": ~self.things}
        return {name + end: known_mean(x[which]) for end, which in kinds.items() for name, x in values.items()}


def quality(counts: np.ndarray) -> np.ndarray:
    """Returns panoptic, segmentation and recognition quality.

    Args:
        counts: `[..., 4]`: sum of IoU, true positives, false positives, false negatives.

    Returns:
        `[3, ...]`; NaN without segments, and 0 if there are segments and no match.
    """
    overlap, matched, extra, missed = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    size = matched + (extra + missed) / 2
    size = np.where(size > 0, size, np.nan)
    sq = overlap / np.maximum(matched, 1) + 0 * size
    return np.stack([overlap / size, sq, matched / size])


def segment_table(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Counts pixels by found and true segment.

    Args:
        found: Ids of segments, of any shape.
        truth: Ids of the same shape.

    Returns:
        `[3, M]` int64: found id, true id and number of pixels of every pair that occurs.
    """
    pairs = np.stack([found.ravel(), truth.ravel()]).astype(np.int64)
    ids, where = zip(*(np.unique(x, return_inverse=True) for x in pairs), strict=True)
    keys, sizes = np.unique(where[0] * len(ids[1]) + where[1], return_counts=True)
    return np.stack([ids[0][keys // max(len(ids[1]), 1)], ids[1][keys % max(len(ids[1]), 1)], sizes])


def score_segments(known: np.ndarray, unknown: np.ndarray, kind: int | None = None) -> tuple[float, int, int, int]:
    """Matches the segments of one image.

    Args:
        known: `segment_table` of the pixels whose truth is known; id 0 is no segment.
        unknown: `segment_table` of the other pixels.
        kind: The class to be matched, where an id modulo 256 is a class plus 1. None for all segments as one class.

    Returns:
        Sum of IoU of the matches, true positives, false positives, false negatives.
    """
    mine = lambda ids: ids != 0 if kind is None else (ids != 0) & (ids % (VOID + 1) == kind + 1)
    found, in_found = np.unique(known[0], return_inverse=True)
    truth, in_truth = np.unique(known[1], return_inverse=True)
    found_size, truth_size = np.bincount(in_found, known[2]), np.bincount(in_truth, known[2])
    pair = mine(known[0]) & mine(known[1])
    both = known[2][pair]
    iou = both / (found_size[in_found[pair]] + truth_size[in_truth[pair]] - both)
    match = iou > 0.5
    matched = set(known[0][pair][match].tolist())
    sizes = dict(zip(found.tolist(), found_size.tolist(), strict=True))
    void: dict[int, int] = {}
    for segment, size in zip(unknown[0].tolist(), unknown[2].tolist(), strict=True):
        void[segment] = void.get(segment, 0) + size
    extra = sum(
        segment not in matched and void.get(segment, 0) <= sizes[segment]
        for segment in found[mine(found)].tolist()  # one that is wholly unknown is none
    )
    return float(iou[match].sum()), len(matched), extra, int(mine(truth).sum()) - len(matched)
