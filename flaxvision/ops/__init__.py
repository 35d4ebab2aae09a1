"""Arithmetic of detection on arrays of fixed size: boxes, anchors, non-maximum suppression, regions and matching.

Every function but those of `boxes` takes the arrays of one image, with a mask where their number varies; `jax.vmap`
maps it over a batch. Nothing has a dynamic shape and nothing runs on the host.
"""

from flaxvision.ops.anchors import kmeans_anchors, level_anchors
from flaxvision.ops.boxes import (
    box_area,
    box_ciou,
    box_diou,
    box_giou,
    box_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    from_centers,
    paired_iou,
    to_centers,
)
from flaxvision.ops.matching import match, sample
from flaxvision.ops.nms import nms, soft_nms, top_k
from flaxvision.ops.roi import multiscale_roi_align, roi_align, roi_max_pool

__all__ = [
    "box_area",
    "box_ciou",
    "box_diou",
    "box_giou",
    "box_iou",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "from_centers",
    "kmeans_anchors",
    "level_anchors",
    "match",
    "multiscale_roi_align",
    "nms",
    "paired_iou",
    "roi_align",
    "roi_max_pool",
    "sample",
    "soft_nms",
    "to_centers",
    "top_k",
]
