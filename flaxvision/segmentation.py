"""`segment` labels every pixel of images of any size, in one pass or tile by tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flaxvision.layers.resize import resize_bilinear
from flaxvision.models.segmenter import Segmenter


def segment(
    model: Segmenter,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    tile: int | None = None,
    overlap: int = 0,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    probabilities: bool = False,
) -> jax.Array:
    """Labels every pixel of images. A pure function that can be compiled with `jax.jit`.

    With `tile`, the network sees one square of the images at a time (the overlap-tile strategy, Ronneberger et al.
    2015, figure 2). Apart from the images and the result, the memory does not depend on the size of the images. Tiles
    give the same result as whole images under two conditions: half of `overlap` is at least the radius of the receptive
    field, and `tile`, `overlap / 2` and the size of the images are multiples of the stride of the network. A network
    that pools over the whole image, such as DeepLabv3, has an unbounded receptive field.

    A network without padding, such as `unet`, gives no logits at the margin of its input. `segment` then mirrors the
    images at their borders, and tiles need no `overlap`.

    Args:
        model: A model of the task segmentation.
        variables: Its variables.
        images: Normalized images `[N, H, W, C]`.
        tile: Height and width of the squares in pixels; None for whole images.
        overlap: Number of pixels that neighbouring tiles share; even. Each tile supplies the half nearer to its center.
        scales: Factors by which the images are resized. Probabilities are averaged over the factors.
        flip: Whether to average also over the horizontally mirrored images.
        probabilities: Whether to return the probabilities of the classes instead of the labels.

    Returns:
        Labels `[N, H, W]` int32, or probabilities `[N, H, W, K]`.

    Raises:
        ValueError: `images` is not of rank 4; the network does not accept squares of size `tile`; `overlap` is
            negative, odd, too large for `tile`, or given without `tile`; or `scales` is empty, not positive, or not
            `(1.0,)` for a network without padding.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have the shape [N, H, W, C] (images[None] for one image); got {images.shape}")
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be one or more positive factors; got {tuple(scales)}")
    if tile is None and overlap:
        raise ValueError(f"overlap must be 0 without tile; got {overlap}")
    height, width = images.shape[1:3]

    if model.margin and tuple(scales) != (1.0,):
        raise ValueError(f"scales must be (1.0,) for a network without padding; got {tuple(scales)}")

    def infer(x: jax.Array) -> jax.Array:
        if tuple(scales) == (1.0,) and not flip:
            logits: Any = model.apply(variables, x)
            return jax.nn.softmax(logits) if probabilities else lax.argmax(logits, 3, jnp.int32)
        average = _averaged(model, variables, x, scales, flip)
        return average if probabilities else lax.argmax(average, 3, jnp.int32)

    if tile is not None:
        return _tiled(infer, model, images, tile, overlap)
    margin = model.margin
    if margin == 0:
        return infer(images)
    shape = (model.input_extent(height), model.input_extent(width))
    return infer(_window(images, (-margin, -margin), shape))[:, :height, :width]


def _tiled(infer: Any, model: Segmenter, images: jax.Array, tile: int, overlap: int) -> jax.Array:
    """Applies `infer` to one tile at a time and writes its pixels into the result."""
    margin, size = model.margin, images.shape[1:3]
    if overlap < 0 or overlap % 2 or overlap >= tile - 2 * margin:
        raise ValueError(f"overlap must be an even number from 0 to below {tile - 2 * margin}; got {overlap}")
    if margin and model.input_extent(tile - 2 * margin) != tile:
        right = model.input_extent(max(1, tile - 2 * margin))
        raise ValueError(f"tile must be a size that the network takes, such as {right}; got {tile}")
    # Without a margin, tiles stay within the image. With a margin, tiles may reach beyond the image, which is mirrored
    # there. They start at multiples of the network's stride, so that their feature maps align with those of the image.
    shape = (tile, tile) if margin else (min(tile, size[0]), min(tile, size[1]))
    given = (shape[0] - 2 * margin, shape[1] - 2 * margin)
    stride = list(model.backbone.strides.values())[-1] if margin else 1
    step = (tile - 2 * margin - overlap) // stride * stride
    if step < 1:
        raise ValueError(f"tile must be at least {2 * margin + overlap + stride} with overlap {overlap}; got {tile}")
    counts = [max(1, -(-(extent - overlap) // step)) for extent in size]
    like = jax.eval_shape(infer, jax.ShapeDtypeStruct((len(images), *shape, images.shape[3]), images.dtype))
    block = [min(extent, full) for extent, full in zip(given, size, strict=True)]

    def one(index: jax.Array, result: jax.Array) -> jax.Array:
        places = [i * step for i in divmod(index, counts[1])]
        if not margin:
            places = [jnp.minimum(place, full - n) for place, full, n in zip(places, size, given, strict=True)]
        found = infer(_window(images, [place - margin for place in places], shape))
        # Only the part of a tile within the image is written. The first half of an overlap keeps the values of the
        # previous tile.
        starts = [jnp.minimum(place, full - n) for place, full, n in zip(places, size, block, strict=True)]
        old = lax.dynamic_slice(result, (0, *starts, *[0] * (result.ndim - 3)), (len(images), *block, *like.shape[3:]))
        new, keep = found, []
        for axis, (place, start, n) in enumerate(zip(places, starts, block, strict=True), start=1):
            rows = jnp.arange(n) - (place - start)
            new = jnp.take(new, jnp.clip(rows, 0), axis=axis)
            keep.append(rows < jnp.where(place > 0, overlap // 2, 0))
        kept = (keep[0][:, None] | keep[1][None, :]).reshape(1, *block, *[1] * (result.ndim - 3))
        return lax.dynamic_update_slice(result, jnp.where(kept, old, new), (0, *starts, *[0] * (result.ndim - 3)))

    return lax.fori_loop(0, counts[0] * counts[1], one, jnp.zeros((len(images), *size, *like.shape[3:]), like.dtype))


def _window(images: jax.Array, corner: Sequence[Any], shape: Sequence[int]) -> jax.Array:
    """Cuts a window out of images. Beyond their borders, images are mirrored without repeating the last pixel.

    Args:
        images: `[N, H, W, C]`.
        corner: Row and column of the top left pixel; they may be negative.
        shape: Height and width of the window.
    """
    for axis, (start, extent) in enumerate(zip(corner, shape, strict=True), start=1):
        full = images.shape[axis]
        # Reflection has the period 2 (n - 1).
        place = jnp.abs(jnp.mod(start + jnp.arange(extent) + full - 1, max(1, 2 * (full - 1))) - (full - 1))
        images = jnp.take(images, place, axis=axis)
    return images


def _averaged(
    model: Segmenter, variables: Mapping[str, Any], images: jax.Array, scales: Sequence[float], flip: bool
) -> jax.Array:
    """Returns the probabilities `[N, H, W, K]`, averaged over scales and mirror images."""
    found = []
    for scale in scales:
        scaled = resize_bilinear(images, [max(1, round(extent * scale)) for extent in images.shape[1:3]])
        for step in (1, -1)[: 1 + flip]:
            logits: Any = model.apply(variables, scaled[:, :, ::step])
            y = jax.nn.softmax(logits)[:, :, ::step]
            found.append(y if scale == 1 else resize_bilinear(y, images.shape[1:3]))
    return sum(found[1:], found[0]) / len(found)
