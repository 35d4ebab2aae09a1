"""Average precision of detectors: COCO's, computed by pycocotools, and PASCAL VOC's.

`CocoAP.of(batch, found, num_classes)`, `CocoMaskAP.of(...)` and `VocAP.of(...)` hold the detections and the ground
truth of one batch on the device. `to_host` turns them into `DetectionRecords`, which keeps one record per image. It
computes the average precision, the metrics of each class, bootstrap intervals over images, precision-recall curves and
the kinds of false positives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flaxvision.data import rle
from flaxvision.metrics import average_precision as ap
from flaxvision.metrics.accumulator import Accumulator
from flaxvision.ops.masks import iter_masks


@struct.dataclass
class DetectionAP(Accumulator):
    """The detections and the ground truth of a batch; see `CocoAP` and `VocAP`.

    Use it in evaluation only: merging on the device appends rows, so the arrays grow.

    Attributes:
        rows: Arrays by name, with one row per image.
        protocol: How the average precision is computed: "coco", "coco_masks", "voc_11" or "voc_area".
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
                `mask` [N] (0 for padding), `index` [N], the position of each image in its data set, and `scale` [N, 2],
                the factors by which the image was resized in y and x. With `scale`, boxes and areas are computed in
                pixels of the original image. `area` must be in these pixels too.
            found: Detections as from `flaxvision.detect`: `boxes` [N, D, 4], `scores`, `labels` and `valid` [N, D].
            num_classes: Number of classes K.
            **options: Fields of the accumulator.

        Raises:
            ValueError: `found` does not have the N rows of `batch`.
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
            # Without an index, images keep the order of the batches.
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
        made = cls(arrays, num_classes=num_classes, **options)
        return made if made.protocol != "coco_masks" else made.replace(rows=arrays | _mask_rows(batch, found, scale))

    def merge(self, other: DetectionAP) -> DetectionAP:
        """Appends the rows of another batch, which must have the same M and D."""
        return self.replace(rows=jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self.rows, other.rows))

    def all_reduce(self, axis_name: str) -> DetectionAP:
        """Collects the rows of all devices, in the order of the devices."""
        return self.replace(rows=jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), self.rows))

    def to_host(self) -> DetectionRecords:
        """Copies the rows to the host and removes padding."""
        rows = {key: np.asarray(value) for key, value in jax.device_get(self.rows).items()}
        records = []
        for i in np.flatnonzero(rows["mask"]):
            real, found = rows["valid"][i], rows["found_valid"][i]
            record: dict[str, Any] = {key: rows[key][i][real] for key in ("boxes", "labels", "crowd", "difficult")}
            record |= {key: rows[key][i][found] for key in ("found_boxes", "found_scores", "found_labels")}
            sides = record["boxes"][:, 2:] - record["boxes"][:, :2]
            if "masks" in rows:
                size = tuple(np.rint(rows["size"][i] / rows["scale"][i]).astype(int).tolist())
                record |= {"size": size, "masks": _encode_truth(rows["masks"][i][real], rows["size"][i], size)}
                record["found_masks"] = _encode_found(rows["found_masks"][i][found], record["found_boxes"], size)
                sides = np.array([[rle.area(mask)] for mask in record["masks"]], np.float32).reshape(-1, 1)
            record["area"] = rows["area"][i][real] if "area" in rows else sides.prod(-1)
            records.append({"index": int(rows["index"][i]), **record})
        return DetectionRecords(records, self.protocol, self.num_classes)

    def compute(self) -> dict[str, float]:
        """Computes the metrics of all rows on the host."""
        return self.to_host().compute()


@struct.dataclass
class CocoAP(DetectionAP):
    """COCO's average precision, computed by pycocotools: `CocoAP.of(batch, found, num_classes)`.

    Detections that match a crowd box are not counted. Difficult objects, which COCO does not have, count like any other
    object; see `VocAP`. `compute` returns the twelve metrics of COCO by name: `ap`, `ap50`, `ap75`, `ap_small`,
    `ap_medium`, `ap_large`, `ar1`, `ar10`, `ar100`, `ar_small`, `ar_medium` and `ar_large`. A metric is -1 if it is not
    defined.
    """


@struct.dataclass
class CocoMaskAP(DetectionAP):
    """COCO's average precision of masks, computed by pycocotools: `CocoMaskAP.of(batch, found, num_classes)`.

    The batch must hold `masks` [N, M, H, W], which cover the canvas at its resolution, and `found` must have masks. The
    metrics have the same names as in `CocoAP`.

    Masks are compared in pixels of the original image. Detected masks are pasted into it at a threshold of 0.5. If
    `scale` is given, the masks of the batch are resized back to it by nearest neighbour. Thin objects then differ from
    the original ones. `DetectionRecords.with_truth` replaces the resized masks with the masks of the data set.
    """

    @classmethod
    def of(cls, batch: Mapping[str, Any], found: Any, num_classes: int, **options: Any) -> DetectionAP:
        """Returns the accumulator of one batch; see `DetectionAP.of`.

        Raises:
            ValueError: The batch or the detections have no masks, or the masks do not have the shape above.
        """
        return super().of(batch, found, num_classes, **{"protocol": "coco_masks", **options})


@struct.dataclass
class VocAP(DetectionAP):
    """PASCAL VOC's mean average precision at an IoU of 0.5: `VocAP.of(batch, found, num_classes)`.

    Detections that match a difficult object are not counted. `compute` returns `map50`, the average precision averaged
    over the classes with objects. The average precision is the area under the precision-recall curve (VOC 2010 and
    later). With `protocol="voc_11"`, it is the mean of the curve at eleven points (VOC 2007). The width of a box is
    x2 - x1, whereas VOC's devkit adds a pixel to the width and height.
    """

    @classmethod
    def of(cls, batch: Mapping[str, Any], found: Any, num_classes: int, **options: Any) -> DetectionAP:
        """Returns the accumulator of one batch; see `DetectionAP.of`."""
        return super().of(batch, found, num_classes, **{"protocol": "voc_area", **options})


class DetectionRecords:
    """The detections and the ground truth of every image, on the host.

    Args:
        records: For each image, a mapping with `index`, `boxes` [M, 4], `labels`, `crowd`, `difficult` and `area` [M],
            `found_boxes` [D, 4], `found_scores` and `found_labels` [D]; and for the protocol "coco_masks" `size`, the
            height and width of the image, and compressed RLEs of size M in `masks` and of size D in `found_masks`; see
            `flaxvision.data.rle`.
        protocol: How `compute` computes the average precision: "coco", "coco_masks", "voc_11" or "voc_area".
        num_classes: Number of classes K.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], protocol: str, num_classes: int):
        self._records, self.protocol, self.num_classes = list(records), protocol, num_classes

    def __len__(self) -> int:
        return len(self._records)

    def merge(self, other: DetectionRecords) -> DetectionRecords:
        """Appends the images of another batch."""
        return DetectionRecords([*self._records, *other._records], self.protocol, self.num_classes)

    def with_truth(self, source: Any) -> DetectionRecords:
        """Returns the records with the objects of a data set, in pixels of its images.

        Args:
            source: The data set. `source.objects(i)`, or else `source[i]`, are the objects of the image with index i.

        Raises:
            ValueError: The index of an image is not known, or masks of another size are compared.
        """
        records = []
        for record in self.records:
            if (index := record["index"]) < 0:
                raise ValueError("index must be in the batches to find the objects of an image; got none")
            example = source.objects(index) if hasattr(source, "objects") else source[index]
            valid = np.asarray(example["valid"], bool)
            truth: dict[str, Any] = {
                key: np.asarray(example[key])[valid] for key in ("boxes", "labels", "crowd", "difficult")
            }
            sides = truth["boxes"][:, 2:] - truth["boxes"][:, :2]
            if self._masked:
                masks = np.asarray(example["masks"])[valid]
                if masks.shape[1:] != tuple(record["size"]):
                    raise ValueError(f"masks of image {index} must be {record['size']}; got {masks.shape[1:]}")
                truth["masks"] = rle.encode(masks)
                sides = masks.sum((1, 2), dtype=np.float32)[:, None]
            truth["area"] = np.asarray(example["area"])[valid] if "area" in example else sides.prod(-1)
            records.append({**record, **truth})
        return DetectionRecords(records, self.protocol, self.num_classes)

    @property
    def _masked(self) -> bool:
        return self.protocol == "coco_masks"

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The records, sorted by `index`, so that the metrics do not depend on the order of the batches.

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
        """Returns the metrics of the protocol; see `CocoAP`, `CocoMaskAP` and `VocAP`."""
        if self.protocol.startswith("coco"):
            return self.coco()
        return {"map50": self.voc()}

    def coco(self) -> dict[str, float]:
        """Returns the twelve metrics of COCO by name, of masks for the protocol "coco_masks"; -1 if not defined."""
        stats = ap.coco_evaluation(self.records, self.num_classes, self._masked).stats
        return dict(zip(ap.COCO_NAMES, map(float, stats), strict=True))

    def voc(self, *, eleven_points: bool | None = None, iou_threshold: float = 0.5) -> float:
        """Returns the mean average precision of PASCAL VOC, of boxes; NaN if there are no objects.

        Args:
            eleven_points: Whether to use the eleven points of VOC 2007; None follows `protocol`.
            iou_threshold: Minimum IoU of a detection with its object.
        """
        points = self.protocol == "voc_11" if eleven_points is None else eleven_points
        values = [
            ap.voc_average_precision(*curve, eleven_points=points)
            for curve in self.curves(iou_threshold)
            if curve is not None
        ]
        return float(np.mean(values)) if values else float("nan")

    def curves(self, iou_threshold: float = 0.5) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """Returns the precision-recall curve of each class, of boxes.

        A curve is a pair of recall [D] and precision [D] after each detection, by decreasing score. Difficult and crowd
        objects, and the detections that match them, are left out. The curve of a class without objects is None.
        """
        return [
            None if outcomes.positives == 0 else outcomes.curve()
            for outcomes in ap.match_classes(self.records, self.num_classes, iou_threshold)
        ]

    def per_class(self, classes: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Returns the metrics of each class: `name`, `objects`, COCO's `ap` and `ap50`, and `voc`, VOC's area.

        For the protocol "coco_masks", `ap` and `ap50` are computed from masks, and there is no `voc`.

        Args:
            classes: Names of the classes; None for their numbers.
        """
        return ap.class_table(self.records, self.num_classes, classes, self._masked)

    def bootstrap(
        self,
        figure: Literal["ap", "ap50", "map50"] | None = None,
        *,
        resamples: int = 1000,
        level: float = 0.95,
        seed: int = 0,
    ) -> tuple[float, float]:
        """Returns a bootstrap confidence interval of a metric over images (percentile method).

        Images are drawn with replacement. Each metric is averaged over the classes that have objects in the resample.

        Args:
            figure: The metric: COCO's "ap" or "ap50", computed from masks for the protocol "coco_masks", or PASCAL
                VOC's "map50", computed as an area. None for "ap50" with a COCO protocol, and "map50" otherwise.
            resamples: Number of resamples.
            level: Confidence level: the fraction of the resamples within the interval.
            seed: Seed of the resampling.

        Returns:
            The lower and the upper end of the interval.

        Raises:
            ValueError: `figure` is not one of these, a number is out of range, or there are no images.
        """
        figure = figure or ("ap50" if self.protocol.startswith("coco") else "map50")
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
            matched = ap.coco_outcomes(ap.coco_evaluation(self.records, self.num_classes, self._masked))
            matched = matched if figure == "ap" else matched[:1]
        values = ap.resampled(matched, resamples, seed, coco=figure != "map50")
        low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def false_positives(self) -> dict[str, np.ndarray]:
        """Counts the kinds of correct and wrong detections of each class, by their boxes (Hoiem et al. 2012).

        Only the detections with the highest scores are counted, as many as the class has objects. Detections that match
        a difficult or crowd object are left out. The kinds are:

        * `correct`: an IoU of at least 0.5 with an object of the class that no earlier detection matched;
        * `duplicate`: an IoU of at least 0.5 with an object of the class that an earlier detection matched;
        * `localization`: an IoU of 0.1 to 0.5 with an object of the class;
        * `confusion`: an IoU of at least 0.1 with an object of another class;
        * `background`: all others.

        Returns:
            The number of detections of each class, [K], by kind.
        """
        return ap.false_positive_kinds(self.records, self.num_classes)


def _mask_rows(batch: Mapping[str, Any], found: Any, scale: jax.Array) -> dict[str, jax.Array]:
    """Returns the rows that the protocol "coco_masks" needs besides those of boxes."""
    masks, shape = batch.get("masks"), (*batch["valid"].shape, *batch["image"].shape[1:3])
    if found.masks is None or masks is None or masks.shape != shape:
        got = "none" if masks is None else masks.shape
        raise ValueError(
            f"batch must hold masks {list(shape)}, and found must have masks; got {got} and "
            f"{'none' if found.masks is None else found.masks.shape}"
        )
    size = batch.get("size", jnp.broadcast_to(jnp.asarray([shape[2:]]), (shape[0], 2)))
    masks = jnp.asarray(masks, bool)
    return {"masks": masks, "found_masks": found.masks.astype(jnp.float32), "size": size, "scale": scale}


def _encode_truth(masks: np.ndarray, valid: np.ndarray, size: tuple[int, int]) -> tuple[bytes, ...]:
    """Crops masks [M, H, W] to the valid region, resizes them to the original image, and encodes them."""
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * have / n).astype(int), have - 1) for n, have in zip(size, valid, strict=True)
    )
    return rle.encode(masks[:, rows][:, :, columns])


def _encode_found(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> tuple[bytes, ...]:
    return tuple(rle.encode(mask[None])[0] for mask in iter_masks(masks, boxes, size))
