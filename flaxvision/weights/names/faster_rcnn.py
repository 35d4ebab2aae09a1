"""Names of torchvision's Faster R-CNN and Mask R-CNN."""

from __future__ import annotations

import re

from flaxvision.weights.layout import Layout, Tensors
from flaxvision.weights.names import resnet

_HEADS = {
    "rpn/conv": "rpn.head.conv.0.0",
    "rpn/objectness": "rpn.head.cls_logits",
    "rpn/deltas": "rpn.head.bbox_pred",
    "box_head/fc1": "roi_heads.box_head.fc6",
    "box_head/fc2": "roi_heads.box_head.fc7",
    "box_head/classes": "roi_heads.box_predictor.cls_score",
    "box_head/deltas": "roi_heads.box_predictor.bbox_pred",
    "mask_head/upsample": "roi_heads.mask_predictor.conv5_mask",
    "mask_head/logits": "roi_heads.mask_predictor.mask_fcn_logits",
}
_PYRAMID = re.compile(r"fpn/(inner|layer)_stage(\d+)")
_MASK_CONV = re.compile(r"mask_head/conv(\d+)")
_OLD = re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+|rpn\.head\.conv)\.(weight|bias)")
_OLD_MASK_CONV = re.compile(r"roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)")


def torchvision_name(path: str) -> str:
    """Returns torchvision's name of a module, such as `backbone.fpn.inner_blocks.2.0` for `fpn/inner_stage3`."""
    if path in _HEADS:
        return _HEADS[path]
    if found := _PYRAMID.fullmatch(path):
        return f"backbone.fpn.{found[1]}_blocks.{int(found[2]) - 1}.0"
    if found := _MASK_CONV.fullmatch(path):
        return f"roi_heads.mask_head.{int(found[1]) - 1}.0"
    return f"backbone.body.{resnet.torchvision_name(path)}"


def current_names(tensors: Tensors) -> Tensors:
    """Renames tensors of files from before torchvision 0.13, whose convolutions were not in a `Sequential`."""

    def renamed(name: str) -> str:
        if found := _OLD_MASK_CONV.fullmatch(name):
            return f"roi_heads.mask_head.{int(found[1]) - 1}.0.{found[2]}"
        found = _OLD.fullmatch(name)
        if found is None:
            return name
        return f"{found[1]}.0{'.0' if found[1] == 'rpn.head.conv' else ''}.{found[2]}"

    return {renamed(name): tensor for name, tensor in tensors.items()}


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "torchvision",
        ("faster_rcnn_resnet50_fpn",),
        torchvision_name,
        flatten={"box_head/fc1": (7, 7, 0)},
        adapt=current_names,
        head=("box_head/classes", "box_head/deltas"),
        first="backbone/stem_conv",
    ),
    Layout(
        "torchvision",
        ("mask_rcnn_resnet50_fpn",),
        torchvision_name,
        flatten={"box_head/fc1": (7, 7, 0)},
        adapt=current_names,
        head=("box_head/classes", "box_head/deltas", "mask_head/logits"),
        first="backbone/stem_conv",
    ),
)
