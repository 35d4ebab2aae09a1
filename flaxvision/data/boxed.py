"""Augmentations of images with boxes: crops that keep objects, expansion, scale jitter and mosaic.

The image array keeps its shape. If an example has `size` [2], the height and width of the valid region at the top left,
only that region is used, and `size` is updated. Objects of which too little is left get `valid` 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flaxvision.data.geometry import affine, move
from flaxvision.data.pixels import PerChannel, per_channel, shape_of

_OBJECT_KEYS = ("boxes", "labels", "valid", "crowd", "difficult")


def random_iou_crop(
    key: Array,
    example: Mapping[str, Any],
    *,
    min_ious: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
    scales: tuple[float, float] = (0.3, 1.0),
    ratios: tuple[float, float] = (0.5, 2.0),
    tries: int = 40,
    fill: PerChannel = 0.0,
) -> dict[str, Any]:
    """Crops a window that overlaps an object, and resizes it to the image array (Liu et al. 2016, SSD, section 2.2).

    One of `min_ious` is drawn as the minimum IoU. Then `tries` random windows are drawn. The first one is used that has
    at least this IoU with the box of some object and contains the centre of some object. If there is none, or if the
    minimum IoU is 1 or more, the image is not changed. Objects with the centre outside of the window are dropped; crowd
    boxes are kept while a part of them is visible. If the example has `size`, the aspect ratio of the window is kept.
    Otherwise the window is stretched.

    Args:
        key: PRNG key of this op and example.
        example: The example, with `boxes` and `valid`.
        min_ious: Minimum IoUs, of which one is drawn; 1 or more keeps the image.
        scales: Lowest and highest height and width of a window, as fractions of those of the image.
        ratios: Lowest and highest ratio of width to height of a window.
        tries: Number of windows to try.
        fill: Value of the pixels outside of the new image.

    Raises:
        ValueError: The example has no boxes.
    """
    if "boxes" not in example:
        raise ValueError(f"example must hold boxes for random_iou_crop; got the keys {sorted(example)}")
    height, width, _ = shape_of(example["image"])
    size = _size_of(example)
    boxes = jnp.asarray(example["boxes"], jnp.float32)
    crowd = _crowd_of(example)
    real = jnp.asarray(example["valid"]).astype(bool) & ~crowd
    key_option, key_extent, key_place = jax.random.split(key, 3)
    least = jnp.asarray(min_ious, jnp.float32)[jax.random.randint(key_option, (), 0, len(min_ious))]
    extent = size[None] * jax.random.uniform(key_extent, (tries, 2), minval=scales[0], maxval=scales[1])
    corner = (size[None] - extent) * jax.random.uniform(key_place, (tries, 2))
    low, high = corner[:, None, ::-1], (corner + extent)[:, None, ::-1]  # xy
    inner = jnp.minimum(high, boxes[None, :, 2:]) - jnp.maximum(low, boxes[None, :, :2])
    shared = jnp.prod(jnp.maximum(inner, 0.0), -1)
    areas = jnp.prod(boxes[:, 2:] - boxes[:, :2], -1)
    iou = shared / jnp.maximum(jnp.prod(extent, -1)[:, None] + areas[None] - shared, 1e-9)
    centres = (boxes[:, :2] + boxes[:, 2:])[None] / 2
    inside = jnp.all((centres > low) & (centres < high), -1) & real[None]
    ratio = extent[:, 1] / extent[:, 0]
    fits = (ratio >= ratios[0]) & (ratio <= ratios[1]) & inside.any(1) & (jnp.where(real[None], iou, 0).max(1) >= least)
    first = jnp.argmax(fits)
    cropped = fits[first] & (least < 1)
    corner = jnp.where(cropped, corner[first], 0.0)
    extent = jnp.where(cropped, extent[first], size)
    canvas = jnp.asarray([height, width], jnp.float32)
    if "size" in example:
        zoom = jnp.where(cropped, jnp.min(canvas / extent), 1.0) * jnp.ones(2)
        new_size = jnp.clip(jnp.round(extent * zoom), 1, canvas)
    else:
        zoom, new_size = canvas / extent, canvas
    moved = _zoomed("random_iou_crop", example, zoom, -corner * zoom, new_size, fill)
    kept = jnp.where(cropped, inside[first] | crowd, True)
    return {**moved, "valid": _cleared(moved["valid"], ~kept)}


def random_expand(
    key: Array,
    example: Mapping[str, Any],
    *,
    ratios: tuple[float, float] = (1.0, 4.0),
    probability: float = 0.5,
    fill: PerChannel = 0.0,
) -> dict[str, Any]:
    """Shrinks the image and places it at random on an empty image of the same size (Liu et al. 2016, SSD, section 3.6).

    Args:
        key: PRNG key of this op and example.
        example: The example.
        ratios: Lowest and highest ratio of the side of the empty image to that of the shrunken image.
        probability: Probability that the image is shrunk.
        fill: Value of the empty image; the paper uses the mean of the data.
    """
    key_apply, key_ratio, key_place = jax.random.split(key, 3)
    ratio = jax.random.uniform(key_ratio, minval=ratios[0], maxval=ratios[1])
    ratio = jnp.where(jax.random.bernoulli(key_apply, probability), ratio, 1.0)
    size = _size_of(example)
    zoom = jnp.ones(2) / ratio
    shift = size * (1 - zoom) * jax.random.uniform(key_place, (2,))
    return _zoomed("random_expand", example, zoom, shift, size, fill)


def random_zoom(
    key: Array,
    example: Mapping[str, Any],
    *,
    factors: tuple[float, float] = (0.5, 2.0),
    min_visible: float = 0.25,
    fill: PerChannel = 0.0,
) -> dict[str, Any]:
    """Resizes the image by a random factor, and crops it at random if it exceeds the array (scale jitter).

    Args:
        key: PRNG key of this op and example.
        example: The example.
        factors: Lowest and highest factor. The logarithm of the factor is uniform.
        min_visible: Minimum fraction of the area of a box that stays in the image. Objects with less are dropped.
        fill: Value of the pixels outside of the new image.
    """
    height, width, _ = shape_of(example["image"])
    key_factor, key_place = jax.random.split(key)
    log_low, log_high = jnp.log(jnp.asarray(factors, jnp.float32))
    factor = jnp.exp(jax.random.uniform(key_factor, minval=log_low, maxval=log_high))
    canvas, size = jnp.asarray([height, width], jnp.float32), _size_of(example)
    whole = jnp.maximum(jnp.round(size * factor), 1.0)
    zoom, new_size = whole / size, jnp.minimum(whole, canvas)
    shift = -(whole - new_size) * jax.random.uniform(key_place, (2,))
    moved = _zoomed("random_zoom", example, zoom, shift, new_size, fill)
    return _drop_hidden(moved, example, zoom, min_visible)


def mosaic(
    rng: Array,
    batch: Mapping[str, Any],
    *,
    factors: tuple[float, float] = (0.5, 1.0),
    centre: tuple[float, float] = (0.3, 0.7),
    probability: float = 1.0,
    min_visible: float = 0.25,
    max_objects: int | None = None,
    fill: PerChannel = 0.0,
) -> dict[str, Any]:
    """Combines each image with three random images of the batch (Bochkovskiy et al. 2020, YOLOv4).

    This is a batch transform, for the argument `mix` of `make_transform`. Each of the four images is resized by its own
    random factor. A corner of each lies at a random point that all four share. Rows that are padding (`mask` 0) are not
    used.

    Args:
        rng: PRNG key of the batch.
        batch: `image` float [N, H, W, C], `boxes` [N, M, 4], `labels`, `valid` [N, M], and optionally `size` [N, 2],
            `crowd`, `difficult` [N, M] and `mask` [N].
        factors: Lowest and highest factor.
        centre: Lowest and highest coordinate of the point, as a fraction of the height and width.
        probability: Probability that a row becomes a mosaic.
        min_visible: Minimum fraction of the area of a box that stays visible. Objects with less are dropped.
        max_objects: Number of objects per row of the result; further ones are dropped. None for 4 M.
        fill: Value of the pixels that no image covers.

    Returns:
        The batch with new images and objects, without `scale` and `area`. `size` of a mosaic is the whole array.

    Raises:
        ValueError: The batch has no boxes, or has masks, label maps or key points.
    """
    if other := sorted({"masks", "keypoints", "visible", "label"} & set(batch)):
        raise ValueError(f"batch must hold boxes and no {other[0]} for mosaic; got the keys {sorted(batch)}")
    if missing := sorted({"boxes", "labels", "valid"} - set(batch)):
        raise ValueError(f"batch must hold {missing[0]} for mosaic; got the keys {sorted(batch)}")
    image = jnp.asarray(batch["image"])
    rows = image.shape[0]
    key_partners, key_rows = jax.random.split(rng)
    real = jnp.ones(rows, bool) if batch.get("mask") is None else jnp.asarray(batch["mask"]) > 0
    # The real rows come first in `shuffled`, in random order.
    shuffled = jnp.argsort(jnp.where(real, jax.random.uniform(key_partners, (rows,)), 2.0))
    rank, count = jnp.cumsum(real) - 1, jnp.maximum(real.sum(), 1)
    own = jnp.arange(rows)
    partners = [own, *(jnp.where(real, shuffled[(rank + j) % count], own) for j in range(3))]
    used = [key for key in ("image", "size", *_OBJECT_KEYS) if key in batch]
    parts = [{key: jnp.asarray(batch[key])[partner] for key in used} for partner in partners]
    options = {"factors": factors, "centre": centre, "min_visible": min_visible, "fill": fill}

    def one(key: Array, *four: dict[str, Array]) -> dict[str, Array]:
        key_apply, key_rest = jax.random.split(key)
        made, kept = _mosaic(key_rest, four, **options), four[0]
        missing = len(made["valid"]) - len(kept["valid"])
        kept = {k: _grown(v, missing) if k in _OBJECT_KEYS else v for k, v in kept.items()}
        chosen = jax.random.bernoulli(key_apply, probability)
        result = {k: jnp.where(chosen, made[k], kept[k].astype(made[k].dtype)) for k in made}
        if max_objects is not None:
            first = jnp.argsort(~result["valid"].astype(bool), stable=True)[:max_objects]
            result |= {k: result[k][first] for k in _OBJECT_KEYS if k in result}
        return result

    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key_rows, own)
    return {**{k: v for k, v in batch.items() if k not in ("scale", "area")}, **jax.vmap(one)(keys, *parts)}


def _mosaic(key, four, factors, centre, min_visible, fill):
    height, width, _ = shape_of(four[0]["image"])
    canvas = jnp.asarray([height, width], jnp.float32)
    key_point, key_factors = jax.random.split(key)
    point = jnp.round(canvas * jax.random.uniform(key_point, (2,), minval=centre[0], maxval=centre[1]))
    zooms = jax.random.uniform(key_factors, (4,), minval=factors[0], maxval=factors[1])
    background = per_channel("fill", fill, four[0]["image"])
    image = jnp.broadcast_to(background, four[0]["image"].shape)
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None]
    pieces = []
    for k, part in enumerate(four):
        below, right = k // 2, k % 2
        zoom = zooms[k] * jnp.ones(2)
        extent = _size_of(part) * zoom
        sides = jnp.asarray([below, right], jnp.float32)
        moved = _zoomed("mosaic", part, zoom, point - (1 - sides) * extent, canvas, fill)
        mine = ((y >= point[0]) == bool(below)) & ((x >= point[1]) == bool(right))
        image = jnp.where(mine[..., None], moved["image"], image)
        low, high = sides * point, jnp.where(sides > 0, canvas, point)
        moved = _clipped(moved, low, high)
        pieces.append(_drop_hidden(moved, part, zoom, min_visible))
    made = {k: jnp.concatenate([piece[k] for piece in pieces]) for k in _OBJECT_KEYS if k in pieces[0]}
    made["image"] = image
    if "size" in four[0]:
        made["size"] = canvas.astype(four[0]["size"].dtype)
    return made


def _grown(array, count):
    return jnp.concatenate([array, jnp.zeros((count, *array.shape[1:]), array.dtype)])


def _size_of(example):
    """Returns the height and width of the valid region, float32 [2]."""
    size = example.get("size")
    return jnp.asarray(example["image"].shape[:2] if size is None else size, jnp.float32)


def _zoomed(op, example, zoom, shift, size, fill):
    """Maps the valid region by `p -> zoom * p + shift`, in (y, x), to a valid region of `size` in the same array."""
    image = example["image"]
    height, width, _ = shape_of(image)
    background = per_channel("fill", fill, image)
    content = jnp.where(_within(height, width, _size_of(example)), image - background, 0.0)
    shape = image.shape
    content = jax.image.scale_and_translate(content, shape, (0, 1), zoom, shift, "linear", antialias=True)
    # Linear interpolation mixes the border with the background, over half a pixel.
    content = jnp.where(_within(height, width, size), content, 0.0) + background
    keeps = example.get("size")
    new_size = None if keeps is None else size.astype(jnp.asarray(keeps).dtype)
    moved = move(op, example, content, affine(zoom[1], shift[1], zoom[0], shift[0]), size=new_size)
    # What `move` sampled beyond the new image is part of the old one.
    if "masks" in moved:
        rows, columns = moved["masks"].shape[1:]
        inside = _within(rows, columns, size * jnp.asarray([rows / height, columns / width]))[..., 0]
        moved["masks"] = jnp.where(inside[None], moved["masks"], jnp.zeros((), moved["masks"].dtype))
    if jnp.ndim(moved.get("label", 0)) == 2:
        moved["label"] = jnp.where(_within(height, width, size)[..., 0], moved["label"], 255)
    return _clipped(moved, jnp.zeros(2), size) if "boxes" in moved else moved


def _within(height, width, size):
    """Returns which pixels have their first corner within `size`, bool [height, width, 1]."""
    return ((jnp.arange(height)[:, None] < size[0]) & (jnp.arange(width)[None] < size[1]))[..., None]


def _clipped(example, low, high):
    """Clips boxes to a window, given by two corners (y, x), and drops those that lie outside of it."""
    low, high = (jnp.tile(corner[::-1], 2)[None] for corner in (low, high))
    boxes = jnp.clip(example["boxes"], low, high)
    empty = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
    return {**example, "boxes": boxes, "valid": _cleared(example["valid"], empty)}


def _drop_hidden(moved, before, zoom, min_visible):
    """Drops the objects with less than the fraction `min_visible` of their area left."""
    if "boxes" not in moved:
        return moved
    old = jnp.asarray(before["boxes"], jnp.float32)
    whole = jnp.prod(old[:, 2:] - old[:, :2], -1) * jnp.prod(zoom)
    left = jnp.prod(moved["boxes"][:, 2:] - moved["boxes"][:, :2], -1)
    hidden = (left < min_visible * whole) & ~_crowd_of(before)
    return {**moved, "valid": _cleared(moved["valid"], hidden)}


def _crowd_of(example):
    """Returns which objects are crowds, bool [M]."""
    none = jnp.zeros(jnp.shape(example["valid"]), bool)
    return jnp.asarray(example.get("crowd", none)).astype(bool)


def _cleared(valid, wrong):
    valid = jnp.asarray(valid)
    return jnp.where(wrong, jnp.zeros_like(valid), valid)
