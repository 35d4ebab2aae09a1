"""Reads darknet's `.cfg` files and builds the networks that they describe."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from flaxvision.models import darknet_cfg as net
from flaxvision.models.yolo_heads import BOX_LOSSES, RegionHead, YoloHead
from flaxvision.weights.cfg_sections import Section, sections_of
from flaxvision.weights.convert import Variables, flat, nested
from flaxvision.weights.darknet import FORK, load_darknet, read_darknet

Shape = tuple[int, ...]
_log = logging.getLogger(__name__)


def read_cfg(path: str | os.PathLike[str], **overrides: Any) -> net.CfgDetector | net.CfgNetwork:
    """Builds the network that a `.cfg` file describes.

    It supports the sections that the cfg files of YOLO v1 to v4 use: convolutional, maxpool, avgpool, route, shortcut,
    upsample, reorg, local, connected, dropout, softmax, cost, region, yolo and detection (raw output only).

    Args:
        path: The file.
        **overrides: Fields of the module, such as `epsilon`, `dtype` or `input_size`.

    Returns:
        A `CfgDetector` if the network has heads, otherwise a `CfgNetwork`. Use `load_cfg` to read the variables too.

    Raises:
        ValueError: A section is unknown, an option is not supported or has an invalid value, or the shapes of layers do
            not fit together. The message names the section and the line.
        FileNotFoundError: There is no such file.
        TypeError: The module has no such field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be an existing file; got {path}")
    return parse_cfg(path.read_text(encoding="utf-8-sig", errors="replace"), path.name, **overrides)


def load_cfg(
    cfg: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    anchors: tuple[tuple[float, float], ...] | None = None,
    rng: jax.Array | None = None,
    **overrides: Any,
) -> tuple[net.CfgDetector | net.CfgNetwork, Variables]:
    """Reads a network that was trained with darknet, and its variables.

    Args:
        cfg: The `.cfg` file.
        weights: The `.weights` file.
        num_classes: Number of classes of a detector. If it differs from that of the file, the convolution before each
            head is newly initialized. None keeps the number of the file.
        anchors: Width and height in pixels of new anchors, see `CfgDetector.with_classes`. None keeps those of the
            file. New anchors alone do not change the variables.
        rng: Key for newly initialized layers; None for `jax.random.key(0)`.
        **overrides: As for `read_cfg`. `epsilon` defaults to 1e-5 if the header of the weights is that of the fork of
            A. Bochkovskiy.

    Returns:
        The model and its variables.

    Raises:
        ValueError, FileNotFoundError, TypeError: As `read_cfg`, `load_darknet` and `CfgDetector.with_classes`.
    """
    if read_darknet(weights).version == FORK:
        overrides = {"epsilon": 1e-5, **overrides}
    model = read_cfg(cfg, **overrides)
    variables = load_darknet(model, weights)
    if num_classes is None and anchors is None:
        return model, variables
    if not isinstance(model, net.CfgDetector):
        raise ValueError(
            f"num_classes and anchors must be None for a network without heads; got {num_classes}, {anchors}"
        )
    wide = model.with_classes(num_classes or model.num_labels, anchors)
    if wide.num_labels == model.num_labels:
        return wide, variables
    image = jnp.zeros((1, *wide.input_size, wide.channels))
    shapes = flat(jax.eval_shape(wide.init, jax.random.key(0), image))
    leaves = flat(variables)
    fresh = [path for path, leaf in shapes.items() if leaf.shape != leaves[path].shape]
    _log.warning("%s: newly initialized for %d classes: %s", cfg, num_classes, ", ".join(fresh))

    @jax.jit
    def init(key: jax.Array) -> dict[str, jax.Array]:
        made = flat(wide.init(key, image))
        return {path: made[path] for path in fresh}  # the compiler removes the computation of all others

    new = init(jax.random.key(0) if rng is None else rng)
    return wide, nested({path: np.asarray(new.get(path, leaves[path])) for path in leaves})


def parse_cfg(text: str, name: str = "cfg", **overrides: Any) -> net.CfgDetector | net.CfgNetwork:
    """Builds the network that the text of a `.cfg` file describes.

    Args:
        text: The content of the file.
        name: The name of the file, for error messages.
        **overrides: Fields of the module.

    Returns:
        As `read_cfg`.

    Raises:
        ValueError, TypeError: As `read_cfg`.
    """
    sections = sections_of(text, name)
    if not sections or sections[0].kind != "net":
        found = f"[{sections[0].kind}] in line {sections[0].line}" if sections else "no section"
        raise ValueError(f"{name} must begin with the section [net]; got {found}")
    first = sections[0]
    size, channels = (first.integer("height", 0), first.integer("width", 0)), first.integer("channels", 0)
    if min(*size, channels) < 1:
        first.fail("height, width and channels must be positive", f"{size[0]}, {size[1]} and {channels}")
    layers: list[net.Layer] = []
    shapes: list[Shape] = []
    for section in sections[1:]:
        if section.kind not in _BUILDERS:
            section.fail(f"section must be one of {', '.join(_BUILDERS)}", f"[{section.kind}]")
        layer, shape = _BUILDERS[section.kind](section, shapes, shapes[-1] if shapes else (*size, channels), size)
        section.check_options()
        if min(shape) < 1:
            section.fail("the output must have a positive size", f"{shape}, since the image is too small")
        layers.append(layer)
        shapes.append(shape)
    if not layers:
        raise ValueError(f"{name} must have layers after [net]; got none")
    heads = [layer for layer in layers if isinstance(layer, net.Head)]
    classes = {head.grid.num_classes for head in heads if head.grid is not None}
    if len(classes) > 1:
        raise ValueError(f"classes of all heads of {name} must be equal; got {', '.join(map(str, sorted(classes)))}")
    module = net.CfgDetector if heads else net.CfgNetwork
    fields = {"layers": tuple(layers), "input_size": size, "channels": channels}
    return module(**{**fields, **overrides})


@overload
def _image(section: Section, shape: Shape, rank: Literal[3] = 3) -> tuple[int, int, int]: ...
@overload
def _image(section: Section, shape: Shape, rank: int) -> Shape: ...
def _image(section: Section, shape: Shape, rank: int = 3) -> Shape:
    if len(shape) != rank:
        section.fail("the layer before this one must give a feature map", f"a vector of {shape[0]} values")
    return shape


def _out(extent: int, size: int, stride: int, padding: int) -> int:
    """Returns the size of an output; `padding` is the total of both sides."""
    return (extent + padding - size) // stride + 1


def _convolutional(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    h, w, c = _image(section, shape)
    features, size = section.integer("filters", 1, 1), section.integer("size", 1, 1)
    stride = section.integer("stride", 1, 1)
    strides = (section.integer("stride_y", stride, 1), section.integer("stride_x", stride, 1))
    padding = section.integer("padding", 0, 0)
    padding = size // 2 if section.integer("pad", 0) else padding
    groups, dilation = section.integer("groups", 1, 1), section.integer("dilation", 1, 1)
    dilation = 1 if size == 1 else dilation
    if c % groups or features % groups:
        section.fail(f"groups must divide the {c} input channels and the {features} filters", groups, "groups")
    if dilation > 1 and 2 * padding != size - 1:
        section.fail("padding must be (size - 1) / 2 for a dilated convolution", padding, "dilation")
    norm = bool(section.integer("batch_normalize", 0))
    layer = net.Convolution(
        section.kind, features, size, strides, padding, groups, dilation, norm, section.activation("logistic")
    )
    return layer, (_out(h, size, strides[0], 2 * padding), _out(w, size, strides[1], 2 * padding), features)


def _maxpool(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    h, w, c = _image(section, shape)
    stride = section.integer("stride", 1, 1)
    for option in ("stride_x", "stride_y"):
        if section.integer(option, stride) != stride:
            section.fail(f"{option} must equal the stride, {stride}", section.text(option, ""), option)
    size = section.integer("size", stride, 1)
    padding = section.integer("padding", size - 1, 0)
    return net.Pool(section.kind, size, stride, padding), (
        _out(h, size, stride, padding),
        _out(w, size, stride, padding),
        c,
    )


def _avgpool(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    return net.Layer(section.kind), (1, 1, _image(section, shape)[2])


def _route(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    layers = section.references("layers", shapes)
    groups, group = section.integer("groups", 1, 1), section.integer("group_id", 0, 0)
    parts = [_image(section, shapes[i]) for i in layers]
    if len({part[:2] for part in parts}) > 1:
        sizes = ", ".join(f"{i}: {part[0]}x{part[1]}" for i, part in zip(layers, parts, strict=True))
        section.fail("layers must have feature maps of the same size", sizes, "layers")
    if group >= groups or any(part[2] % groups for part in parts):
        channels = ", ".join(str(part[2]) for part in parts)
        section.fail(
            f"groups must divide the channels {channels} and exceed group_id", f"{groups} and {group}", "groups"
        )
    return net.Route(section.kind, layers, groups, group), (*parts[0][:2], sum(part[2] // groups for part in parts))


def _shortcut(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    h, w, _c = _image(section, shape)
    layers = section.references("from", shapes)
    for i in layers:
        height, width, _c = _image(section, shapes[i])
        same = (height, width) == (h, w)
        scaled = height * w == width * h and (height % h == 0 or h % height == 0)
        if not (same or (scaled and len(layers) == 1)):
            section.fail(f"from must name a layer of {h}x{w} pixels or a multiple", f"{i}: {height}x{width}", "from")
    alpha, beta = section.number("alpha", 1.0), section.number("beta", 1.0)
    return net.Shortcut(section.kind, layers, alpha, beta, section.activation("linear")), shape


def _upsample(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    h, w, c = _image(section, shape)
    stride = section.integer("stride", 2, 1)
    return net.Upsample(section.kind, stride, section.number("scale", 1.0)), (h * stride, w * stride, c)


def _reorg(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    h, w, c = _image(section, shape)
    stride = section.integer("stride", 1, 1)
    if h % stride or w % stride or c % (stride * stride):
        section.fail(f"stride must divide the map {h}x{w}, and its square the {c} channels", stride, "stride")
    return net.Reorg(section.kind, stride), (h // stride, w // stride, c * stride * stride)


def _local(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    h, w, _c = _image(section, shape)
    features, size = section.integer("filters", 1, 1), section.integer("size", 1, 1)
    stride, pad = section.integer("stride", 1, 1), section.integer("pad", 0, 0)
    if pad and (pad, size) != (1, 3):
        section.fail("pad must be 0, or 1 for a size of 3", f"{pad} for a size of {size}", "pad")
    layer = net.Local(section.kind, features, size, stride, pad, section.activation("logistic"))
    return layer, (_out(h, size, stride, 2 * pad), _out(w, size, stride, 2 * pad), features)


def _connected(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    features, norm = section.integer("output", 1, 1), bool(section.integer("batch_normalize", 0))
    return net.Connected(section.kind, features, norm, section.activation("logistic")), (features,)


def _dropout(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    rate = section.number("probability", 0.5)
    if not 0 <= rate < 1:
        section.fail("probability must be in [0, 1)", rate, "probability")
    return net.Dropout(section.kind, rate), shape


def _passing(section: Section, shapes: list[Shape], shape: Shape, _) -> tuple[net.Layer, Shape]:
    return net.Layer(section.kind), shape


def _anchors(section: Section) -> tuple[tuple[float, float], ...]:
    numbers, wanted = section.numbers("anchors"), section.integer("num", 1, 1)
    if len(numbers) < 2 * wanted:
        section.fail(f"anchors must be {2 * wanted} numbers, 2 for each of num={wanted}", len(numbers), "anchors")
    if min(numbers) <= 0:
        section.fail("anchors must be positive", min(numbers), "anchors")
    return tuple(zip(numbers[: 2 * wanted : 2], numbers[1 : 2 * wanted : 2], strict=True))


def _grid(section: Section, shape: Shape, size: Shape, anchors: int, classes: int) -> int:
    """Checks the layer before a head and returns the stride of the head."""
    h, w, c = _image(section, shape)
    if c != anchors * (5 + classes):
        section.fail(
            f"filters of the layer before must be {anchors * (5 + classes)}, {anchors} anchors times"
            f" (5 + {classes} classes)",
            c,
        )
    stride = size[0] // h
    if (stride * h, stride * w) != size:
        section.fail(f"height and width of [net] must be multiples of the map {h}x{w}", f"{size[0]}x{size[1]}")
    return stride


def _yolo(section: Section, shapes: list[Shape], shape: Shape, size: Shape) -> tuple[net.Layer, Shape]:
    anchors, classes = _anchors(section), section.integer("classes", 20, 1)
    mask = section.integers("mask") or tuple(range(len(anchors)))
    if not set(mask) <= set(range(len(anchors))) or len(set(mask)) < len(mask):
        section.fail(f"mask must hold indices of the {len(anchors)} anchors", section.text("mask", ""), "mask")
    if section.number("scale_x_y", 1.0) <= 0:
        section.fail("scale_x_y must be positive", section.text("scale_x_y", ""), "scale_x_y")
    loss = section.text("iou_loss", "mse")
    if loss not in BOX_LOSSES:
        section.fail(f"iou_loss must be one of {', '.join(BOX_LOSSES)}", loss, "iou_loss")
    if section.number("truth_thresh", 1.0) < 1:
        section.fail("truth_thresh must be 1", section.text("truth_thresh", ""), "truth_thresh")
    head = YoloHead(
        anchors,
        mask,
        classes,
        _grid(section, shape, size, len(mask), classes),
        scale_xy=section.number("scale_x_y", 1.0),
        ignore_threshold=section.number("ignore_thresh", 0.5),
        iou_threshold=section.number("iou_thresh", 1.0),
        box_loss=loss,
        box_weight=section.number("iou_normalizer", 1.0),
        object_weight=section.number("obj_normalizer", 1.0),
        class_weight=section.number("cls_normalizer", 1.0),
    )
    return net.Head(section.kind, head), shape


def _region(section: Section, shapes: list[Shape], shape: Shape, size: Shape) -> tuple[net.Layer, Shape]:
    anchors, classes = _anchors(section), section.integer("classes", 20, 1)
    stride = _grid(section, shape, size, len(anchors), classes)
    head = RegionHead(
        anchors,
        classes,
        stride,
        softmax=bool(section.integer("softmax", 0)),
        match_anchors=bool(section.integer("bias_match", 0)),
        rescore=bool(section.integer("rescore", 0)),
        ignore_threshold=section.number("thresh", 0.5),
        coord_scale=section.number("coord_scale", 1.0),
        object_scale=section.number("object_scale", 1.0),
        noobject_scale=section.number("noobject_scale", 1.0),
        class_scale=section.number("class_scale", 1.0),
    )
    # The classes of YOLO9000 form a tree, which is stored in another file. Only the raw output is supported.
    tree, _labels = section.text("tree", ""), section.text("map", "")
    return net.Head(section.kind, None if tree or _labels else head), shape


def _detection(section: Section, shapes: list[Shape], shape: Shape, size: Shape) -> tuple[net.Layer, Shape]:
    side, boxes, classes = section.integer("side", 7), section.integer("num", 1), section.integer("classes", 1)
    wanted, found = side * side * (5 * boxes + classes), 1
    for extent in shape:
        found *= extent
    if found != wanted:
        section.fail(f"outputs of the layer before must be {wanted}, side^2 (5 num + classes)", found)
    return net.Head(section.kind, None), shape


_BUILDERS: dict[str, Callable[[Section, list[Shape], Shape, Shape], tuple[net.Layer, Shape]]] = {
    "convolutional": _convolutional,
    "maxpool": _maxpool,
    "avgpool": _avgpool,
    "route": _route,
    "shortcut": _shortcut,
    "upsample": _upsample,
    "reorg": _reorg,
    "local": _local,
    "connected": _connected,
    "dropout": _dropout,
    "softmax": _passing,
    "cost": _passing,
    "yolo": _yolo,
    "region": _region,
    "detection": _detection,
}
