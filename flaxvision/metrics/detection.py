"""Average precision of detectors: COCO's by pycocotools, PASCAL VOC's by its own definition.

`CocoAP.of(batch, found)` and `VocAP.of(batch, found)` hold the detections of one batch on the device. Their host form,
`DetectionRecords`, keeps one record for each image and computes everything else: the headline figures, the figures of
each class, a bootstrap interval over images, precision-recall curves and the kinds of false positives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flaxvision.metrics import average_precision as ap
from flaxvision.metrics.accumulator import Accumulator


@struct.dataclass
class DetectionAP(Accumulator):
    """The detections and the truth of a batch; see `CocoAP` and `VocAP`.

    Use it in evaluation only: merging it on the device appends rows.

    Attributes:
        rows: Arrays with a row for each image, by name.
        protocol: How the average precision is computed: "coco", "voc_11" or "voc_area".
        num_classes: Number of classes K.
    """

    rows: Any
    protocol: str = struct.field(pytree_node=False, default="coco")
    num_classes: int = struct.field(pytree_node=False, default=1)

    @classmethod
    def of(cls, batch: Mapping[str, Any], found: Any, num_classes: int, **options: Any) -> DetectionAP:
        """Returns the accumulator of one batch.

        Args:
            batch: `boxes` [N, M, 4], `labels` and `valid` [N, M]; optionally `crowd`, `difficult` and `area` [N, M],
                `mask` [N] (0 for padding), `index` [N], the number of each image in its data set, and `scale` [N, 2],
                by which boxes were multiplied in y and x. With `scale`, areas are those of the original image.
            found: Detections as those of `flaxvision.detect`: `boxes` [N, D, 4], `scores`, `labels` and `valid` [N, D].
            num_classes: Number of classes K.
            **options: Fields of the accumulator.

        Raises:
            ValueError: A shape does not fit.
        """
        rows = len(batch["boxes"])
        for name in ("boxes", "scores", "labels", "valid"):
            if len(getattr(found, name)) != rows:
                raise ValueError(
                    f"found.{name} must have the {rows} rows of the batch; got shape {getattr(found, name).shape}"
                )
        truth = batch["labels"].shape
        flags = {key: jnp.asarray(batch.get(key, jnp.zeros(truth, bool)), bool) for key in ("crowd", "difficult")}
        scale = jnp.asarray(batch.get("scale", jnp.ones((rows, 2))), jnp.float32)
        xyxy = jnp.stack([scale[:, 1], scale[:, 0]] * 2, axis=-1)[:, None]
        arrays = {
            "mask": jnp.asarray(batch.get("mask", jnp.ones(rows)), jnp.float32) > 0,
            # Without an index the images are told apart by the order of the batches.
            "index": jnp.asarray(batch.get("index", jnp.full(rows, -1)), jnp.int32),
            "boxes": jnp.asarray(batch["boxes"], jnp.float32) / xyxy,
            "labels": jnp.asarray(batch["labels"], jnp.int32),
            "valid": jnp.asarray(batch["valid"], bool),
            **flags,
            "found_boxes": found.boxes.astype(jnp.float32) / xyxy,
            "found_scores": found.scores.astype(jnp.float32),
            "found_labels": found.labels.astype(jnp.int32),
            "found_valid": jnp.asarray(found.valid, bool),
        }
        if "area" in batch:
            arrays["area"] = jnp.asarray(batch["area"], jnp.float32)
        return cls(arrays, num_classes=num_classes, **options)

    def merge(self, other: DetectionAP) -> DetectionAP:
        """Appends the rows of another batch with equally many objects and detections."""
        return self.replace(rows=jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self.rows, other.rows))

    def all_reduce(self, axis_name: str) -> DetectionAP:
        """Collects the rows of all devices, in their order."""
        return self.replace(rows=jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), self.rows))

    def to_host(self) -> DetectionRecords:
        """Copies the rows to the host and drops padding."""
        rows = {key: np.asarray(value) for key, value in jax.device_get(self.rows).items()}
        records = []
        for i in np.flatnonzero(rows["mask"]):
            real, found = rows["valid"][i], rows["found_valid"][i]
            record = {key: rows[key][i][real] for key in ("boxes", "labels", "crowd", "difficult")}
            record |= {key: rows[key][i][found] for key in ("found_boxes", "found_scores", "found_labels")}
            sides = record["boxes"][:, 2:] - record["boxes"][:, :2]
            record["area"] = rows["area"][i][real] if "area" in rows else sides.prod(-1)
            records.append({"index": int(rows["index"][i]), **record})
        return DetectionRecords(records, self.protocol, self.num_classes)

    def compute(self) -> dict[str, float]:
        """Computes the figures of everything seen."""
        return self.to_host().compute()


@struct.dataclass
class CocoAP(DetectionAP):
    """COCO's average precision, computed by pycocotools: `CocoAP.of(batch, found, num_classes)`.

    Crowd boxes take detections without counting them. Difficult objects, which COCO does not have, count as any other:
    see `VocAP`. `compute` gives the twelve numbers of COCO by name, -1 where they
    are not defined: `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, `ar1`, `ar10`, `ar100`, `ar_small`,
    `ar_medium` and `ar_large`.
    """


@struct.dataclass
class VocAP(DetectionAP):
    """PASCAL VOC's mean average precision at an IoU of 0.5: `VocAP.of(batch, found, num_classes)`.

    Difficult objects take detections without counting them. `compute` gives `map50`, by the area under the
    precision-recall curve (VOC 2010 and later), or with `protocol="voc_11"` by its eleven points (VOC 2007). Classes
    without objects do not count. Boxes are continuous: the devkit adds a pixel to their width and height.
    """

    @classmethod
    def of(cls, batch: Mapping[str, Any], found: Any, num_classes: int, **options: Any) -> DetectionAP:
        """Returns the accumulator of one batch; see `DetectionAP.of`."""
        return super().of(batch, found, num_classes, **{"protocol": "voc_area", **options})


class DetectionRecords:
    """What a detector found in every image, on the host.

    Args:
        records: For each image `index`, `boxes` [M, 4], `labels`, `crowd`, `difficult`, `area` [M], `found_boxes`
            [D, 4], `found_scores` and `found_labels` [D].
        protocol: How `compute` computes the average precision.
        num_classes: Number of classes K.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], protocol: str, num_classes: int):
        self._records, self.protocol, self.num_classes = list(records), protocol, num_classes

    def __len__(self) -> int:
        return len(self._records)

    def merge(self, other: DetectionRecords) -> DetectionRecords:
        """Appends the images of another batch."""
        return DetectionRecords([*self._records, *other._records], self.protocol, self.num_classes)

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The records in the order of `index`, so that the order of the batches does not change a figure.

        Raises:
            ValueError: An image occurs twice.
        """
        indices = [record["index"] for record in self._records]
        known = [index for index in indices if index >= 0]
        if len(set(known)) != len(known):
            twice = next(index for index in known if known.count(index) > 1)
            raise ValueError(f"every image must be evaluated once; got image {twice} {known.count(twice)} times")
        order = np.argsort(np.array(indices, np.int64), kind="stable")
        return [self._records[i] for i in order]

    def compute(self) -> dict[str, float]:
        """Returns the figures of the protocol; see `CocoAP` and `VocAP`."""
        if self.protocol == "coco":
            return self.coco()
        return {"map50": self.voc()}

    def coco(self) -> dict[str, float]:
        """Returns the twelve figures of COCO by name, -1 where they are not defined."""
        stats = ap.coco_evaluation(self.records, self.num_classes).stats
        return dict(zip(ap.COCO_NAMES, map(float, stats), strict=True))

    def voc(self, *, eleven_points: bool | None = None, iou_threshold: float = 0.5) -> float:
        """Returns the mean average precision of PASCAL VOC; NaN without objects.

        Args:
            eleven_points: Whether to use the eleven points of VOC 2007; None for what the protocol says.
            iou_threshold: Least IoU of a detection and its object.
        """
        points = self.protocol == "voc_11" if eleven_points is None else eleven_points
        values = [
            ap.voc_average_precision(*curve, eleven_points=points)
            for curve in self.curves(iou_threshold)
            if curve is not None
        ]
        return float(np.mean(values)) if values else float("nan")

    def curves(self, iou_threshold: float = 0.5) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """Returns the precision-recall curve of each class: recall and precision after each detection by falling score.

        Difficult and crowd objects are left out, and the detections that find them. A class without objects has None.
        """
        return [
            None if outcomes.positives == 0 else outcomes.curve()
            for outcomes in ap.match_classes(self.records, self.num_classes, iou_threshold)
        ]

    def per_class(self, classes: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Returns the figures of each class: `name`, `objects`, `ap` and `ap50` of COCO, and `voc` (area).

        Args:
            classes: Names of the classes; None for their numbers.
        """
        return ap.class_table(self.records, self.num_classes, classes)

    def bootstrap(
        self,
        figure: Literal["ap", "ap50", "map50"] | None = None,
        *,
        resamples: int = 1000,
        level: float = 0.95,
        seed: int = 0,
    ) -> tuple[float, float]:
        """Returns a bootstrap interval over images (percentile method).

        Images are drawn with replacement. The mean runs over the classes that a sample has.

        Args:
            figure: COCO's "ap" or "ap50", or "map50" of PASCAL VOC by the area; None for "ap50" or "map50" by the
                protocol.
            resamples: Number of samples.
            level: Share of the samples that the interval holds.
            seed: Seed of the samples.

        Returns:
            The lower and the upper end.

        Raises:
            ValueError: `figure` is none of these, a number is out of range, or there are no images.
        """
        figure = figure or ("ap50" if self.protocol == "coco" else "map50")
        if figure not in ("ap", "ap50", "map50"):
            raise ValueError(f"figure must be 'ap', 'ap50' or 'map50'; got {figure!r}")
        if resamples < 1:
            raise ValueError(f"resamples must be at least 1; got {resamples}")
        if not 0 < level < 1:
            raise ValueError(f"level must be strictly between 0 and 1; got {level}")
        if not self._records:
            raise ValueError("the metric must have seen at least one image; got none")
        if figure == "map50":
            matched = [ap.match_classes(self.records, self.num_classes, 0.5)]
        else:
            matched = ap.coco_outcomes(ap.coco_evaluation(self.records, self.num_classes))
            matched = matched if figure == "ap" else matched[:1]
        values = ap.resampled(matched, resamples, seed, coco=figure != "map50")
        low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def false_positives(self) -> dict[str, np.ndarray]:
        """Returns how many detections of each class are right or wrong in which way, [K] by kind.

        The detections of a class with the highest scores are looked at, as many as the class has objects (Hoiem 2012).
        `correct` has an IoU of at least 0.5 with an object of the class that no better detection found, `duplicate`
        with one that was found already. `localization` has an IoU of 0.1 to 0.5 with an object of the class,
        `confusion` of at least 0.1 with one of another class, and `background` is the rest. Detections of difficult
        and crowd objects do not count.
        """
        return ap.false_positive_kinds(self.records, self.num_classes)
