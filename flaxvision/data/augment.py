"""Augmentations on the device: pure functions that run under ``jit`` inside the train step.

An *example* is a dict with `image`, float32 [H, W, C] in [0, 1], and optionally

* `boxes` [M, 4], xyxy in pixels, with `valid` [M], 0 for padding;
* `masks` [M, h, w], which cover the image at a resolution of their own;
* `label` [H, W], the class of every pixel, 255 where it is unknown (a label of lower rank belongs to the whole image);
* `instances` [H, W], the number of the object of every pixel, and `weight` [H, W], the weight of every pixel;
* `keypoints` [..., 2], xy in pixels, optionally with `visible` [...].

An *op* is ``(key, example) -> example``. Photometric ops change the image only. Geometric ops move everything that
lies in the image; when traced, they raise ValueError for arrays that they cannot move. A *transform* is
``(rng, batch) -> batch`` for a dict of arrays with a batch dimension. `make_transform` builds a transform from ops::

    transform = make_transform(
        random_flip,
        partial(random_crop, padding=4),
        partial(random_hue, max_delta=0.05),
        mix=partial(cutmix, num_classes=10),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )
    batch = transform(jax.random.fold_in(rng, state.step), batch)  # uint8 images in, standardized float32 out
    batch = make_transform(mean=..., std=...)(rng, batch)          # evaluation

Example i draws from ``fold_in(rng, i)``, where i is its row in the global batch, so under ``jit`` over a mesh the
images do not depend on the number of devices. Under ``pmap``, rows are counted within each device: fold the index of
the device into ``rng`` first.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flaxvision.data.boxed import mosaic, random_expand, random_iou_crop, random_zoom
from flaxvision.data.colour import (
    add_lighting,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    cutout,
    photometric,
    random_brightness,
    random_contrast,
    random_cutout,
    random_hue,
    random_lighting,
    random_saturation,
)
from flaxvision.data.elastic import displacements, random_elastic
from flaxvision.data.geometry import (
    crop,
    move,
    random_crop,
    random_flip,
    random_rotation,
    random_scale,
    random_shift,
    rotate,
    scale,
    translate,
)
from flaxvision.data.mixing import cutmix, mixing, mixup
from flaxvision.data.pixels import PerChannel, Size, pair, per_channel, standardize, to_float
from flaxvision.data.resizing import (
    draw_crop_box,
    random_resized_crop,
    resize_or_pad,
    resized_crop,
    size_matrix,
    to_size,
)

__all__ = [
    "add_lighting",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "augment_batch",
    "compose",
    "crop",
    "cutmix",
    "cutout",
    "displacements",
    "draw_crop_box",
    "make_transform",
    "mixing",
    "mixup",
    "mosaic",
    "move",
    "photometric",
    "random_brightness",
    "random_contrast",
    "random_crop",
    "random_cutout",
    "random_elastic",
    "random_expand",
    "random_flip",
    "random_hue",
    "random_iou_crop",
    "random_lighting",
    "random_resized_crop",
    "random_rotation",
    "random_saturation",
    "random_scale",
    "random_shift",
    "random_zoom",
    "resize_or_pad",
    "resized_crop",
    "rotate",
    "scale",
    "standardize",
    "to_float",
    "to_size",
    "translate",
]

Example = Mapping[str, Any]
Op = Callable[[Array, Example], dict[str, Any]]
Transform = Callable[[Array, Mapping[str, Any]], dict[str, Any]]


def make_transform(
    *ops: Op,
    size: Size | None = None,
    mix: Transform | None = None,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
    padding: PerChannel | None = None,
) -> Transform:
    """Builds a transform ``(rng, batch) -> batch``.

    It converts images to floats, applies `ops` to each example, brings them to `size`, applies `mix` to the batch, and
    standardizes the images.

    Args:
        *ops: Ops in the order in which they apply; none for evaluation.
        size: Height and width of the model's input, reached by `resize_or_pad`; None leaves the size as it is.
        mix: A transform of the whole batch before standardisation, such as ``partial(mixup, num_classes=10)``.
        mean: Mean of the pixels in [0, 1], one number or one per channel.
        std: Standard deviation of the pixels, one number or one per channel.
        padding: Value of the standardized pixels beyond the `size` of each image, in batches that have it; None leaves
            them as they are.

    Returns:
        The transform. It keeps the keys that the ops do not change.
    """

    def transform(rng, batch):
        batch = augment_batch(jax.random.fold_in(rng, 0), batch, ops)
        if size is not None:
            batch = _to_size(batch, pair(size))
        if mix is not None:
            batch = mix(jax.random.fold_in(rng, 1), batch)
        image = standardize(batch["image"], mean, std)
        if padding is not None and "size" in batch:
            sides = (jnp.arange(n)[None] < batch["size"][:, i, None] for i, n in enumerate(image.shape[1:3]))
            rows, columns = sides
            inside = (rows[:, :, None] & columns[:, None])[..., None]
            image = jnp.where(inside, image, per_channel("padding", padding, image))
        return {**batch, "image": image}

    return transform


def augment_batch(rng: Array, batch: Mapping[str, Any], ops: Sequence[Op]) -> dict[str, Any]:
    """Applies ops to every example of a batch.

    Args:
        rng: Key of the batch; example i uses ``fold_in(rng, i)``.
        batch: `image` [N, H, W, C], uint8 or floats, and other arrays with N rows.
        ops: The ops, in order.

    Returns:
        The batch with float32 images.

    Raises:
        ValueError: The images are not [N, H, W, C], or an op cannot move something in the batch.
    """
    batch = {**batch, "image": to_float(batch["image"])}
    if batch["image"].ndim != 4:
        raise ValueError(f"batch['image'] must be [N, H, W, C]; got shape {batch['image'].shape}")
    if not ops:
        return batch
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.arange(len(batch["image"])))
    return jax.vmap(compose(*ops))(keys, batch)


def compose(*ops: Op) -> Op:
    """Chains ops into one; the i-th draws from ``fold_in(key, i)``."""

    def op(key, example):
        for i, each in enumerate(ops):
            example = each(jax.random.fold_in(key, i), example)
            if not isinstance(example, Mapping):
                raise TypeError(
                    f"an op must return an example, a dict (`photometric` makes an op from a function of an image); "
                    f"got {type(example).__name__} from {getattr(each, '__name__', each)}"
                )
        return dict(example)

    return op


def _to_size(batch, size):
    """Brings a batch to `size`. All images are resized in one call."""
    have = batch["image"].shape[1:3]
    if have == size:
        return batch
    image = resize_or_pad(batch["image"], size)
    moved = functools.partial(move, "make_transform(size=...)", matrix=size_matrix(have, size))
    return jax.vmap(moved)(batch, image)
