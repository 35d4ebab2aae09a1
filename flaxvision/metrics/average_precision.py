"""Host computations of `flaxvision.metrics.detection`: matching, curves, and COCO evaluation by pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxvision.data import rle

COCO_NAMES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
_RECALLS = np.linspace(0.0, 1.0, 101)
KINDS = ("correct", "localization", "duplicate", "confusion", "background")
Record = Mapping[str, Any]


def coco_evaluation(records: Sequence[Record], num_classes: int, masks: bool = False) -> Any:
    """Evaluates records with pycocotools.

    Args:
        records: As in `DetectionRecords`. Images are numbered in this order.
        num_classes: Number of classes K.
        masks: Whether to compare masks instead of boxes.

    Returns:
        The `COCOeval` after `summarize`. Its `stats` are the twelve metrics.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = [], []
    for image, record in enumerate(records, 1):
        for k, (label, crowd, area) in enumerate(zip(record["labels"], record["crowd"], record["area"], strict=True)):
            place = _place(record["boxes"][k], record["masks"][k] if masks else None, record)
            kind = {"id": len(truth) + 1, "image_id": image, "category_id": int(label), "iscrowd": int(crowd)}
            truth.append({**place, **kind, "area": float(area)})
        for k, (label, score) in enumerate(zip(record["found_labels"], record["found_scores"], strict=True)):
            place = _place(record["found_boxes"][k], record["found_masks"][k] if masks else None, record)
            kind = {"id": len(found) + 1, "image_id": image, "category_id": int(label), "iscrowd": 0}
            found.append({**place, **kind, "score": float(score)})
    images = [
        {"id": image, **(dict(zip(("height", "width"), record["size"], strict=True)) if masks else {})}
        for image, record in enumerate(records, 1)
    ]
    categories = [{"id": k} for k in range(num_classes)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and a table
        sets = []
        for annotations in (truth, found):
            one = COCO()
            one.dataset = {"images": images, "annotations": annotations, "categories": categories}
            one.createIndex()
            sets.append(one)
        evaluation = COCOeval(*sets, iouType="segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _place(box: np.ndarray, mask: bytes | None, record: Record) -> dict[str, Any]:
    """Returns the entries of an annotation that say where its object lies."""
    x1, y1, x2, y2 = (float(v) for v in box)
    place: dict[str, Any] = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
    if mask is not None:
        place["segmentation"] = {"size": [int(side) for side in record["size"]], "counts": mask}
        place["area"] = float(rle.area(mask))
    return place


def class_table(
    records: Sequence[Record], num_classes: int, classes: Sequence[str] | None, masks: bool = False
) -> list[dict[str, Any]]:
    """Returns the metrics of each class; see `DetectionRecords.per_class`."""
    # [threshold, recall, class, area, detections]
    precision = coco_evaluation(records, num_classes, masks).eval["precision"]
    matched = match_classes(records, num_classes, 0.5)
    table = []
    for k in range(num_classes):
        every, half = precision[:, :, k, 0, -1], precision[0, :, k, 0, -1]
        positives = matched[k].positives
        table.append(
            {
                "name": str(k) if classes is None else classes[k],
                "objects": positives,
                "ap": float(every[every > -1].mean()) if (every > -1).any() else float("nan"),
                "ap50": float(half[half > -1].mean()) if (half > -1).any() else float("nan"),
                **({} if masks else {"voc": voc_average_precision(*matched[k].curve()) if positives else float("nan")}),
            }
        )
    return table


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """How the detections of one class were matched, by decreasing score.

    Attributes:
        scores: [D].
        right: bool [D], whether the detection is a true positive.
        ignored: bool [D], whether it matched a difficult or crowd object and is not counted.
        images: int [D], the image of each detection.
        objects: int [N], the number of objects in each image, without difficult and crowd ones.
    """

    scores: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    images: np.ndarray
    objects: np.ndarray

    @property
    def positives(self) -> int:
        """Number of objects."""
        return int(self.objects.sum())

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns recall and precision after each detection that is counted."""
        right = self.right[~self.ignored]
        found = np.cumsum(right)
        return found / self.positives, found / np.arange(1, len(right) + 1)


def match_classes(records: Sequence[Record], num_classes: int, iou_threshold: float) -> list[Outcomes]:
    """Matches the detections of every class by the rule of PASCAL VOC.

    By decreasing score, each detection is compared with the object of its class and image with the highest IoU. If the
    IoU is at least `iou_threshold`, the detection is a true positive, unless an earlier detection matched the object.
    It is not counted if the object is difficult. A detection that matches no object is not counted if a crowd box
    contains at least the fraction `iou_threshold` of its area.

    Returns:
        The outcomes of each class.
    """
    return [_match_class(records, label, iou_threshold) for label in range(num_classes)]


def _match_class(records: Sequence[Record], label: int, iou_threshold: float) -> Outcomes:
    scores, right, ignored, images, objects = [], [], [], [], []
    for image, record in enumerate(records):
        mine, crowd = record["labels"] == label, np.asarray(record["crowd"], bool)
        boxes = record["boxes"][mine & ~crowd]
        difficult = np.asarray(record["difficult"], bool)[mine & ~crowd]
        groups = record["boxes"][mine & crowd]
        objects.append(int((~difficult).sum()))
        chosen = record["found_labels"] == label
        found, of = record["found_boxes"][chosen], record["found_scores"][chosen]
        order = np.argsort(-of, kind="stable")
        iou, inside = box_iou(found[order], boxes), _share_inside(found[order], groups)
        taken = np.zeros(len(boxes), bool)
        for d in range(len(order)):
            best = int(np.argmax(iou[d])) if len(boxes) else -1
            hit = best >= 0 and iou[d, best] >= iou_threshold
            skip = bool(hit and difficult[best]) or bool(not hit and (inside[d] >= iou_threshold).any())
            right.append(bool(hit and not difficult[best] and not taken[best]))
            ignored.append(skip)
            if right[-1]:
                taken[best] = True
        scores += of[order].tolist()
        images += [image] * len(order)
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    return Outcomes(
        np.asarray(scores, np.float64)[order],
        np.asarray(right, bool)[order],
        np.asarray(ignored, bool)[order],
        np.asarray(images, np.int64)[order],
        np.asarray(objects, np.int64),
    )


def voc_average_precision(recall: np.ndarray, precision: np.ndarray, *, eleven_points: bool = False) -> float:
    """Returns the average precision of a precision-recall curve (Everingham et al. 2010, section 4.2).

    Args:
        recall: [D], not decreasing.
        precision: [D].
        eleven_points: Whether to average the interpolated precision at the recalls 0, 0.1, ..., 1. If False, it is the
            area under the interpolated curve. The interpolated precision is the highest one at this recall or beyond.
    """
    if eleven_points:
        # The recall of 3 in 10 objects must reach the point 0.3 despite rounding.
        points = [precision[recall >= point / 10 - 1e-12].max(initial=0.0) for point in range(11)]
        return float(np.mean(points))
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * falling))


def coco_outcomes(evaluation: Any) -> list[list[Outcomes]]:
    """Returns the matches of a `COCOeval` for objects of any size: for each threshold, the outcomes of each class."""
    images, areas = len(evaluation.params.imgIds), len(evaluation.params.areaRng)
    empty = {"dtScores": [], "gtIgnore": np.zeros(0)}
    result = []
    for t in range(len(evaluation.params.iouThrs)):
        classes = []
        for k in range(len(evaluation.params.catIds)):
            start = k * areas * images
            per_image = [each or empty for each in evaluation.evalImgs[start : start + images]]
            scores = np.array([score for each in per_image for score in each["dtScores"]], np.float64)
            order = np.argsort(-scores, kind="stable")

            def joined(key: str, per_image: list[Any] = per_image, t: int = t) -> np.ndarray:
                return np.concatenate([np.asarray(each[key][t] if key in each else [], bool) for each in per_image])

            right, ignored = joined("dtMatches")[order], joined("dtIgnore")[order]
            of = np.repeat(np.arange(images), [len(each["dtScores"]) for each in per_image])[order]
            objects = np.array([int((np.asarray(each["gtIgnore"]) == 0).sum()) for each in per_image], np.int64)
            classes.append(Outcomes(scores[order], right & ~ignored, ignored, of, objects))
        result.append(classes)
    return result


def resampled(matched: Sequence[Sequence[Outcomes]], resamples: int, seed: int, *, coco: bool) -> np.ndarray:
    """Returns the mean average precision of resamples of the images, drawn with replacement.

    Args:
        matched: For each IoU threshold, the outcomes of each class.
        resamples: Number of resamples.
        seed: Seed of the resampling.
        coco: Whether to use COCO's 101 points of recall instead of the area under the curve.

    Returns:
        [resamples]; NaN for resamples without objects.
    """
    images = len(matched[0][0].objects)
    rng = np.random.Generator(np.random.Philox(seed))
    values = np.empty(resamples)
    for sample in range(resamples):
        # How often each image is in the resample.
        values[sample] = weighted_map(matched, np.bincount(rng.integers(0, images, images), minlength=images), coco)
    return values


def weighted_map(matched: Sequence[Sequence[Outcomes]], weights: np.ndarray, coco: bool) -> float:
    """Returns the mean average precision with image `i` counted `weights[i]` times; NaN if there are no objects."""
    found = np.array([[_weighted_ap(outcomes, weights, coco) for outcomes in classes] for classes in matched])
    return float("nan") if np.isnan(found).all() else float(np.nanmean(found))


def _weighted_ap(outcomes: Outcomes, weights: np.ndarray, coco: bool) -> float:
    positives = float((outcomes.objects * weights).sum())
    if not positives:
        return float("nan")
    each = weights[outcomes.images] * ~outcomes.ignored
    counted = each > 0
    found, seen = np.cumsum(each * outcomes.right)[counted], np.cumsum(each)[counted]
    recall, precision = found / positives, found / np.maximum(seen, 1)
    if not coco:
        return voc_average_precision(recall, precision)
    falling = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(np.mean(falling[np.searchsorted(recall, _RECALLS, side="left")]))


def false_positive_kinds(records: Sequence[Record], num_classes: int) -> dict[str, np.ndarray]:
    """Returns the number of detections of each kind and class; see `DetectionRecords.false_positives`."""
    counts = {kind: np.zeros(num_classes, np.int64) for kind in KINDS}
    for label in range(num_classes):
        found: list[tuple[float, str]] = []
        objects = 0
        for record in records:
            ignored = np.asarray(record["crowd"], bool) | np.asarray(record["difficult"], bool)
            mine = record["labels"] == label
            objects += int((mine & ~ignored).sum())
            found += _kinds(record, label, mine, ignored)
        found.sort(key=lambda pair: -pair[0])
        for _, kind in found[:objects]:
            counts[kind][label] += 1
    return counts


def _kinds(record: Record, label: int, mine: np.ndarray, ignored: np.ndarray) -> list[tuple[float, str]]:
    """Returns the score and the kind of the detections of a class in an image."""
    chosen = record["found_labels"] == label
    scores = record["found_scores"][chosen]
    order = np.argsort(-scores, kind="stable")
    iou = box_iou(record["found_boxes"][chosen][order], record["boxes"])
    taken = np.zeros(len(mine), bool)
    kinds = []
    for d, score in enumerate(scores[order]):
        own, other = np.where(mine, iou[d], 0.0), np.where(mine, 0.0, iou[d])
        best = int(np.argmax(own)) if len(own) else -1
        overlap = own[best] if best >= 0 else 0.0
        if overlap >= 0.5:
            if ignored[best]:
                continue
            kinds.append((float(score), "duplicate" if taken[best] else "correct"))
            taken[best] = True
        elif overlap >= 0.1:
            kinds.append((float(score), "localization"))
        elif other.max(initial=0.0) >= 0.1:
            kinds.append((float(score), "confusion"))
        else:
            kinds.append((float(score), "background"))
    return kinds


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the IoU of boxes [A, 4] and [B, 4] as [A, B] float64; 0 where the union is empty."""
    shared = _shared(a, b)
    areas = [np.prod(np.asarray(x, np.float64)[:, 2:] - np.asarray(x, np.float64)[:, :2], axis=-1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _share_inside(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the fraction of the area of boxes [A, 4] that lies in boxes [B, 4], [A, B]."""
    shared = _shared(a, b)
    area = np.prod(np.asarray(a, np.float64)[:, 2:] - np.asarray(a, np.float64)[:, :2], axis=-1)[:, None]
    return np.divide(shared, area, out=np.zeros_like(shared), where=area > 0)


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (np.asarray(x, np.float64).reshape(-1, 4) for x in (a, b))
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.prod(np.maximum(high - low, 0.0), axis=-1)
