"""Metrics: accumulators that are updated on the device, merged over batches and devices, and computed on the host.

An objective returns a dict of accumulators for its batch::

    logits = apply_fn({"params": params}, batch["image"])
    metrics = {
        "accuracy": fv.metrics.Mean.of(fv.metrics.correct(logits, batch["label"]), batch["mask"]),
        "confusion": fv.metrics.ConfusionMatrix.init(10).update(logits.argmax(-1), batch["label"], batch["mask"]),
    }

Steps, the loop and the checkpoints treat every accumulator alike: `merge` over batches, `all_reduce` over devices,
`compute` once, on the host. Each metric has its own weights, and padded rows weigh nothing, so the result does not
depend on the batch size or on the number of devices.
"""

from flaxvision.metrics.accumulator import Accumulator, compute, from_json, merge, to_host, to_json
from flaxvision.metrics.boundary import BoundaryMetrics, BoundaryRecords
from flaxvision.metrics.classification import correct, top_k_correct
from flaxvision.metrics.confusion import ConfusionMatrix
from flaxvision.metrics.detection import CocoAP, CocoMaskAP, DetectionAP, DetectionRecords, VocAP
from flaxvision.metrics.instances import InstanceRecords, label_components
from flaxvision.metrics.mean import Mean
from flaxvision.metrics.panoptic import PanopticRecords
from flaxvision.metrics.segmentation import SegmentationMetrics, SegmentationRecords

__all__ = [
    "Accumulator",
    "BoundaryMetrics",
    "BoundaryRecords",
    "CocoAP",
    "CocoMaskAP",
    "ConfusionMatrix",
    "DetectionAP",
    "DetectionRecords",
    "InstanceRecords",
    "Mean",
    "PanopticRecords",
    "SegmentationMetrics",
    "SegmentationRecords",
    "VocAP",
    "compute",
    "correct",
    "from_json",
    "label_components",
    "merge",
    "to_host",
    "to_json",
    "top_k_correct",
]
