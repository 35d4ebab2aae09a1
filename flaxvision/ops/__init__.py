"""Detection operators on fixed-size arrays: boxes, anchors, non-maximum suppression, RoI pooling and matching.

The box functions accept leading batch dimensions. The functions for matching, suppression and RoI pooling take the
arrays of one image; use `jax.vmap` for a batch. Where the number of boxes varies, a mask tells which of them exist. All
functions are pure and compile under `jit`, except `kmeans_anchors` and `iter_masks`, which run on the host in NumPy.
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
from flaxvision.ops.masks import iter_masks, paste_masks
from flaxvision.ops.matching import match, sample
from flaxvision.ops.nms import nms, soft_nms, top_k
from flaxvision.ops.roi import crop_masks, multiscale_roi_align, roi_align, roi_max_pool

__all__ = [
    "box_area",
    "box_ciou",
    "box_diou",
    "box_giou",
    "box_iou",
    "clip_boxes",
    "crop_masks",
    "decode_boxes",
    "encode_boxes",
    "from_centers",
    "iter_masks",
    "kmeans_anchors",
    "level_anchors",
    "match",
    "multiscale_roi_align",
    "nms",
    "paired_iou",
    "paste_masks",
    "roi_align",
    "roi_max_pool",
    "sample",
    "soft_nms",
    "to_centers",
    "top_k",
]
