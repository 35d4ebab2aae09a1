"""Geometric augmentations that change the size of the image: resizing, padding and resized crops."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flaxvision.data.geometry import affine, move
from flaxvision.data.pixels import Size, pair, shape_of


def resize_or_pad(image: Array, size: Size) -> Array:
    """Pads or resizes images [..., H, W, C] to `size` (height, width); keeps the dtype.

    Images that are 0 to 4 pixels too small on each axis are padded with zeros on all sides, with an odd pixel at the
    bottom or right (28x28 digits become 32x32 for LeNet-5). Others are resized bilinearly with antialiasing.
    """
    target = pair(size)
    around = _padding(image.shape[-3:-1], target)
    if around is not None:
        if not any(map(any, around)):
            return image
        return jnp.pad(image, [(0, 0)] * (image.ndim - 3) + around + [(0, 0)])
    shape = (*image.shape[:-3], *target, image.shape[-1])
    resized = jax.image.resize(image.astype(jnp.float32), shape, "linear", antialias=True)
    if jnp.issubdtype(image.dtype, jnp.integer):
        resized = jnp.round(resized)  # a weighted mean stays within the range of its inputs
    return resized.astype(image.dtype)


def _padding(have, want):
    """Zeros before and after each axis, or None where `resize_or_pad` resizes."""
    missing = [w - h for w, h in zip(want, have, strict=True)]
    return [(m // 2, m - m // 2) for m in missing] if all(0 <= m <= 4 for m in missing) else None


def to_size(key: Array | None, example: Mapping[str, Any], *, size: Size) -> dict[str, Any]:
    """Brings an example to `size` (height, width) by `resize_or_pad`; the key is not used."""
    image = resize_or_pad(example["image"], size)
    return move("to_size", example, image, size_matrix(example["image"].shape[:2], pair(size)))


def size_matrix(have: tuple[int, ...], want: tuple[int, int]) -> Array:
    """Returns the affine map of `resize_or_pad` from size `have` to size `want` (height, width), for `move`."""
    around = _padding(have, want)
    if around is not None:
        return affine(1, around[1][0], 1, around[0][0])
    return affine(want[1] / have[1], 0, want[0] / have[0], 0)


def resized_crop(image: Array, box: Sequence[Any] | Array, size: Size) -> Array:
    """Resizes the part inside `box` (top, left, height, width in pixels) to `size`, bilinearly with antialiasing.

    Near the border of the box, pixels outside of it contribute too, as in Pillow's ``resize(box=)``. torchvision crops
    first, so there only pixels inside the box contribute.
    """
    corner, extent = jnp.split(jnp.asarray(box, jnp.float32), 2)
    shape = (*pair(size), shape_of(image)[-1])
    zoom = jnp.asarray(shape[:2]) / extent
    return jax.image.scale_and_translate(image, shape, (0, 1), zoom, -corner * zoom, "linear", antialias=True)


def draw_crop_box(
    key: Array, height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], tries: int = 10
) -> Array:
    """Draws a box like torchvision's RandomResizedCrop: uniform area, log-uniform aspect ratio, uniform position.

    The first of `tries` draws that fits into the image is used, else the largest centred box with a ratio in `ratio`.

    Returns:
        int32 (top, left, height, width) in pixels.
    """
    key_area, key_ratio, key_place = jax.random.split(key, 3)
    areas = height * width * jax.random.uniform(key_area, (tries,), minval=area[0], maxval=area[1])
    log_low, log_high = jnp.log(jnp.asarray(ratio))
    ratios = jnp.exp(jax.random.uniform(key_ratio, (tries,), minval=log_low, maxval=log_high))
    widths = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = jnp.argmax(fits)
    whole = min(max(width / height, ratio[0]), ratio[1])
    fallback = jnp.asarray([round(min(height, width / whole)), round(min(width, height * whole))], jnp.int32)
    extent = jnp.where(fits[first], jnp.stack([heights[first], widths[first]]), fallback)
    spare = jnp.asarray([height, width], jnp.int32) - extent
    place = jnp.where(fits[first], jax.random.randint(key_place, (2,), 0, spare + 1), spare // 2)
    return jnp.concatenate([place, extent])


def random_resized_crop(
    key: Array,
    example: Mapping[str, Any],
    *,
    size: Size,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> dict[str, Any]:
    """Resizes a random part to `size` (Szegedy 2014, section 6).

    `area` is the range of the part's area as a fraction of the image, and `ratio` is the range of its width divided by
    its height; see `draw_crop_box`.
    """
    image = example["image"]
    box = draw_crop_box(key, *shape_of(image)[:2], area, ratio)
    top, left, height, width = (box[i].astype(jnp.float32) for i in range(4))
    zoom_y, zoom_x = pair(size)[0] / height, pair(size)[1] / width
    matrix = affine(zoom_x, -left * zoom_x, zoom_y, -top * zoom_y)
    return move("random_resized_crop", example, resized_crop(image, box, size), matrix)
