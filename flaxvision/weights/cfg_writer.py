"""Writes networks as darknet's `.cfg` files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from flaxvision.atomic import replacing
from flaxvision.models import darknet_cfg as net
from flaxvision.models.yolo_heads import RegionHead, YoloHead

Options = Mapping[str, object]


def save_cfg(path: str | os.PathLike[str], model: net.CfgModule) -> None:
    """Writes a network as a `.cfg` file, which darknet and OpenCV read with the `.weights` file of `save_darknet`.

    `read_cfg` builds the same layers from it. The file has neither training options, such as the learning rate, nor the
    other fields of the module, such as `epsilon`.

    Args:
        path: The file. An existing file is only replaced once the new one is complete.
        model: A network from `read_cfg` or `load_cfg`.

    Raises:
        ValueError: The network has a head of YOLO v1 or YOLO9000, whose options are not stored in the module.
    """
    text = cfg_text(model)
    with replacing(Path(path)) as temporary:
        temporary.write_text(text)


def cfg_text(model: net.CfgModule) -> str:
    """Returns the text of the `.cfg` file of a network.

    Args:
        model: A network from `read_cfg` or `load_cfg`.

    Raises:
        ValueError: As `save_cfg`.
    """
    height, width = model.input_size
    sections = [_section("net", {"batch": 1, "width": width, "height": height, "channels": model.channels})]
    for layer in model.layers:
        sections.append(_section(layer.kind, _options(layer)))
    return "\n".join(sections)


def _section(kind: str, options: Options) -> str:
    return "".join([f"[{kind}]\n", *(f"{name}={_text(value)}\n" for name, value in options.items())])


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return repr(int(value)) if value == int(value) else repr(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(_text(each) for each in value)
    return str(value)


def _options(layer: net.Layer) -> Options:
    """Returns the options of a section. Some with darknet's default value are left out."""
    match layer:
        case net.Convolution():
            options = {
                "batch_normalize": layer.batch_norm,
                "filters": layer.features,
                "size": layer.size,
                "stride": layer.strides[0],
                **({"pad": 1} if layer.padding == layer.size // 2 else {"padding": layer.padding}),
                "activation": layer.activation,
            }
            if layer.strides[0] != layer.strides[1]:
                options |= {"stride_y": layer.strides[0], "stride_x": layer.strides[1]}
            extra = {"groups": layer.groups, "dilation": layer.dilation}
            return options | {name: value for name, value in extra.items() if value != 1}
        case net.Connected():
            return {"batch_normalize": layer.batch_norm, "output": layer.features, "activation": layer.activation}
        case net.Local():
            return {
                "filters": layer.features,
                "size": layer.size,
                "stride": layer.stride,
                "pad": layer.padding,
                "activation": layer.activation,
            }
        case net.Pool():
            return {"size": layer.size, "stride": layer.stride, "padding": layer.padding}
        case net.Route():
            parts = {"groups": layer.groups, "group_id": layer.group} if layer.groups > 1 else {}
            return {"layers": layer.layers, **parts}
        case net.Shortcut():
            factors = {"alpha": layer.alpha, "beta": layer.beta} if (layer.alpha, layer.beta) != (1, 1) else {}
            return {"from": layer.layers, **factors, "activation": layer.activation}
        case net.Upsample():
            return {"stride": layer.stride, **({"scale": layer.scale} if layer.scale != 1 else {})}
        case net.Reorg():
            return {"stride": layer.stride}
        case net.Dropout():
            return {"probability": layer.rate}
        case net.Head(grid=YoloHead() as head):
            return {
                "mask": head.mask,
                "anchors": sum(head.anchors, ()),
                "num": len(head.anchors),
                "classes": head.num_classes,
                "scale_x_y": head.scale_xy,
                "ignore_thresh": head.ignore_threshold,
                "truth_thresh": 1,
                "iou_thresh": head.iou_threshold,
                "iou_loss": head.box_loss,
                "iou_normalizer": head.box_weight,
                "obj_normalizer": head.object_weight,
                "cls_normalizer": head.class_weight,
            }
        case net.Head(grid=RegionHead() as head):
            return {
                "anchors": sum(head.anchors, ()),
                "num": len(head.anchors),
                "classes": head.num_classes,
                "coords": 4,
                "softmax": head.softmax,
                "bias_match": head.match_anchors,
                "rescore": head.rescore,
                "thresh": head.ignore_threshold,
                "coord_scale": head.coord_scale,
                "object_scale": head.object_scale,
                "noobject_scale": head.noobject_scale,
                "class_scale": head.class_scale,
            }
        case net.Head():
            raise ValueError(f"model must have heads of YOLOv2 or YOLOv3 to be written; got one of [{layer.kind}]")
    return {}
