"""Augmentations on the device: pure functions that run under ``jit`` inside the train step.

There are two kinds of function. An *op* is ``(key, image) -> image`` for one float32 image ``[H, W, C]`` in [0, 1];
its drawn strength goes to a deterministic function beside it (`random_rotation` draws, `rotate` turns). A *transform*
is ``(rng, batch) -> batch`` for a dict of arrays. `make_transform` builds the one from the other::

    transform = make_transform(
        random_flip,
        partial(random_crop, padding=4),
        partial(random_hue, max_delta=0.05),
        mix=partial(cutmix, num_classes=10),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )
    batch = transform(jax.random.fold_in(rng, state.step), batch)  # uint8 images in, standardised float32 out
    batch = make_transform(mean=..., std=...)(rng, batch)          # evaluation

Example i draws from ``fold_in(rng, i)`` with i its row in the global batch, so that under ``jit`` over a mesh the
images do not depend on the number of devices. Under ``pmap`` a row is counted within its device: fold the device's
index into ``rng`` first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates
from jax.typing import ArrayLike

from flaxvision.data.mixing import cutmix as cutmix
from flaxvision.data.mixing import mixing as mixing
from flaxvision.data.mixing import mixup as mixup

Op = Callable[[Array, Array], Array]
Transform = Callable[[Array, Mapping[str, Any]], dict[str, Any]]
PerChannel = float | Sequence[float] | Array
Size = int | tuple[int, int]

# Eigenvalues and, as columns, eigenvectors of the RGB covariance of ImageNet's training pixels in [0, 1]. Krizhevsky
# 2012 gives the method but not the values; these are the ones in use since fb.resnet.torch (datasets/imagenet.lua).
IMAGENET_EIGENVALUES = (0.2175, 0.0188, 0.0045)
IMAGENET_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def make_transform(
    *ops: Op,
    size: Size | None = None,
    mix: Transform | None = None,
    mean: PerChannel = 0.0,
    std: PerChannel = 1.0,
) -> Transform:
    """Builds ``(rng, batch) -> batch``: float images, then `ops` per example, `size`, `mix`, and `normalize` last.

    Args:
        *ops: Ops in the order in which they apply; none for evaluation.
        size: Height and width the model wants, reached by `resize_or_pad`; None leaves the images as they are.
        mix: A transform on the whole batch before normalisation, such as ``partial(mixup, num_classes=10)``.
        mean: Mean in [0, 1], one for all channels or one each.
        std: Standard deviation, in the same way.

    Returns:
        The transform. It replaces ``image`` [N, H, W, C] (and ``label`` if `mix` does) and keeps every other key.
    """

    def transform(rng, batch):
        batch = augment_batch(jax.random.fold_in(rng, 0), batch, ops)
        if size is not None:
            batch["image"] = resize_or_pad(batch["image"], size)
        if mix is not None:
            batch = mix(jax.random.fold_in(rng, 1), batch)
        return {**batch, "image": normalize(batch["image"], mean, std)}

    return transform


def augment_batch(rng: Array, batch: Mapping[str, Any], ops: Sequence[Op]) -> dict[str, Any]:
    """Applies `ops` to each image [N, H, W, C] of a batch, example i with ``fold_in(rng, i)``; gives float32."""
    images = to_float(batch["image"])
    if images.ndim != 4:
        raise ValueError(f"batch['image'] has shape {images.shape}; expected [N, H, W, C].")
    if ops:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.arange(images.shape[0]))
        images = jax.vmap(compose(*ops))(keys, images)
    return {**batch, "image": images}


def compose(*ops: Op) -> Op:
    """Chains ops into one; the i-th draws from ``fold_in(key, i)``."""

    def op(key, image):
        for i, each in enumerate(ops):
            image = each(jax.random.fold_in(key, i), image)
        return image

    return op


def to_float(image: Array) -> Array:
    """Converts uint8 [..., H, W, C] to float32 in [0, 1] (by 1/255); floats are only cast to float32.

    Raises:
        TypeError: for any other dtype, whose range is unknown.
    """
    image = jnp.asarray(image)
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image.astype(jnp.float32)
    raise TypeError(f"image has dtype {image.dtype}; expected uint8 (0 to 255) or floats (0 to 1).")


def normalize(image: Array, mean: PerChannel, std: PerChannel) -> Array:
    """Scales uint8 by 1/255, then standardises to ``(image - mean) / std``, float32 [..., H, W, C].

    Raises:
        ValueError: if `mean` or `std` is neither a number nor one number per channel.
    """
    image = to_float(image)
    return (image - _per_channel("mean", mean, image)) / _per_channel("std", std, image)


def resize_or_pad(image: Array, size: Size) -> Array:
    """Brings [..., H, W, C] to `size` (height, width), keeping the dtype.

    An image at most 4 pixels too small per axis is centred in zeros (28x28 digits in LeNet-5's 32x32; the odd pixel
    goes to the bottom and right), anything else is resized bilinearly with antialiasing, an equal size is left alone.
    """
    target = _pair(size)
    missing = [want - have for want, have in zip(target, image.shape[-3:-1], strict=True)]
    if missing == [0, 0]:
        return image
    if all(0 <= m <= 4 for m in missing):
        around = [(m // 2, m - m // 2) for m in missing]
        return jnp.pad(image, [(0, 0)] * (image.ndim - 3) + around + [(0, 0)])
    shape = (*image.shape[:-3], *target, image.shape[-1])
    resized = jax.image.resize(image.astype(jnp.float32), shape, "linear", antialias=True)
    if jnp.issubdtype(image.dtype, jnp.integer):
        resized = jnp.round(resized)  # a weighted mean stays within the range of its inputs
    return resized.astype(image.dtype)


# Geometry


def random_flip(key: Array, image: Array, *, probability: float = 0.5) -> Array:
    """Mirrors left and right with this probability."""
    return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)


def crop(image: Array, top: ArrayLike, left: ArrayLike, size: tuple[int, int]) -> Array:
    """Cuts `size` (height, width) at row `top` and column `left`, which may be traced."""
    # Under vmap this is a gather, and the fastest form on a CPU: 0.4 ms for 128 crops of 32x32x3 with their flips and
    # draws, against 1.6 ms as one-hot matrix products and 2.9 ms as shifts by powers of two.
    return jax.lax.dynamic_slice(image, (top, left, 0), (*size, image.shape[-1]))


def random_crop(key: Array, image: Array, *, padding: int = 4, size: Size | None = None, mode: str = "zero") -> Array:
    """Pads every side by `padding` pixels and crops `size` (None: the image's own) anywhere.

    `mode` says what the padding holds: "zero", or "reflect" for the mirrored image. Another one raises ValueError, as
    does a `size` larger than the padded image.
    """
    if mode not in ("zero", "reflect"):
        raise ValueError(f"mode is {mode!r}; expected 'zero' or 'reflect'.")
    height, width, _ = _shape(image)
    target = (height, width) if size is None else _pair(size)
    spare = (height + 2 * padding - target[0], width + 2 * padding - target[1])
    if min(spare) < 0:
        raise ValueError(f"size is {target}, larger than the {height}x{width} image with padding {padding}.")
    around = ((padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(image, around, mode="constant" if mode == "zero" else mode)
    top, left = jax.random.randint(key, (2,), 0, jnp.asarray(spare) + 1)
    return crop(padded, top, left, target)


def translate(image: Array, dy: ArrayLike, dx: ArrayLike, fill: PerChannel = 0.0) -> Array:
    """Moves the content `dy` whole pixels down and `dx` to the right; `fill` comes in behind it."""
    height, width, _ = _shape(image)
    rows, columns = jnp.arange(height) - dy, jnp.arange(width) - dx
    moved = jnp.asarray(image)[jnp.clip(rows, 0, height - 1)[:, None], jnp.clip(columns, 0, width - 1)[None]]
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
    return jnp.where(inside[..., None], moved, _per_channel("fill", fill, image))


def random_shift(key: Array, image: Array, *, max_shift: int = 2, fill: PerChannel = 0.0) -> Array:
    """Translates by whole pixels, each axis uniform in [-max_shift, max_shift]."""
    dy, dx = jax.random.randint(key, (2,), -max_shift, max_shift + 1)
    return translate(image, dy, dx, fill)


def resized_crop(image: Array, box: Sequence[Any] | Array, size: Size) -> Array:
    """Resizes the part under `box` (top, left, height, width in pixels) to `size`, bilinear with antialiasing.

    Pixels just outside the box weigh in at its border (as in Pillow's ``resize(box=)``), where torchvision, which
    cuts first, repeats the border.
    """
    corner, extent = jnp.split(jnp.asarray(box, jnp.float32), 2)
    shape = (*_pair(size), _shape(image)[-1])
    zoom = jnp.asarray(shape[:2]) / extent
    return jax.image.scale_and_translate(image, shape, (0, 1), zoom, -corner * zoom, "linear", antialias=True)


def draw_crop_box(
    key: Array, height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], tries: int = 10
) -> Array:
    """Draws a box as torchvision's RandomResizedCrop: uniform area, log-uniform aspect ratio, uniform place.

    The first of `tries` draws that fits wins; if none does, the box is the largest centred one within `ratio`.

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
    image: Array,
    *,
    size: Size,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """Resizes a random part to `size` (Szegedy 2014, section 6).

    The part has a share of the area in `area` (lowest, highest) and width by height in `ratio`; see `draw_crop_box`.
    """
    height, width, _ = _shape(image)
    return resized_crop(image, draw_crop_box(key, height, width, area, ratio), size)


def rotate(image: Array, degrees: ArrayLike, fill: PerChannel = 0.0) -> Array:
    """Turns counter-clockwise about the centre, bilinear, same size; `fill` where the source lies outside."""
    # dm-pix's rotate interpolates over the channels too, which takes 50 times as long on a CPU.
    height, width, _ = _shape(image)
    cos, sin = (f(jnp.deg2rad(jnp.asarray(degrees, jnp.float32))) for f in (jnp.cos, jnp.sin))
    y = (jnp.arange(height) - (height - 1) / 2)[:, None]
    x = (jnp.arange(width) - (width - 1) / 2)[None]
    from_y = cos * y + sin * x + (height - 1) / 2
    from_x = cos * x - sin * y + (width - 1) / 2
    turned = jax.vmap(lambda plane: map_coordinates(plane, [from_y, from_x], 1, "nearest"), -1, -1)(image)
    inside = (from_y >= -0.5) & (from_y < height - 0.5) & (from_x >= -0.5) & (from_x < width - 0.5)
    return jnp.where(inside[..., None], turned, _per_channel("fill", fill, image))


def random_rotation(key: Array, image: Array, *, max_degrees: float = 15.0, fill: PerChannel = 0.0) -> Array:
    """Rotates by an angle uniform in [-max_degrees, max_degrees]."""
    return rotate(image, _symmetric(key, "max_degrees", max_degrees), fill)


def scale(image: Array, factor: ArrayLike, fill: PerChannel = 0.0) -> Array:
    """Zooms about the centre, same size, bilinear with antialiasing: above 1 enlarges, below 1 leaves `fill` around."""
    height, width, _ = _shape(image)
    background = _per_channel("fill", fill, image)
    zoom = jnp.stack([jnp.asarray(factor, jnp.float32)] * 2)
    offset = (1 - zoom) * jnp.asarray([height / 2, width / 2])
    centred = image - background  # what lies outside comes in as zero
    zoomed = jax.image.scale_and_translate(centred, image.shape, (0, 1), zoom, offset, "linear", antialias=True)
    return zoomed + background


def random_scale(
    key: Array, image: Array, *, factors: tuple[float, float] = (0.9, 1.1), fill: PerChannel = 0.0
) -> Array:
    """Zooms by a factor uniform in `factors` (lowest, highest)."""
    return scale(image, jax.random.uniform(key, minval=factors[0], maxval=factors[1]), fill)


def cutout(image: Array, y: ArrayLike, x: ArrayLike, size: int, fill: PerChannel = 0.0) -> Array:
    """Fills the square of `size` pixels whose middle is pixel (y, x), as far as it lies in the image."""
    height, width, _ = _shape(image)
    rows, columns = jnp.arange(height) - y + size // 2, jnp.arange(width) - x + size // 2
    hole = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))[None]
    return jnp.where(hole[..., None], _per_channel("fill", fill, image), image)


def random_cutout(key: Array, image: Array, *, size: int, fill: PerChannel = 0.0) -> Array:
    """Cuts out a square centred on any pixel (DeVries 2017), so that part of it may fall outside.

    The paper cuts after normalisation, where zero is the mean: give the data's mean as `fill` for that.
    """
    y, x = jax.random.randint(key, (2,), 0, jnp.asarray(image.shape[:2]))
    return cutout(image, y, x, size, fill)


# Colour. Every result is clipped to [0, 1], as the next op expects.


def adjust_brightness(image: Array, delta: ArrayLike) -> Array:
    """Adds `delta`, a part of the full range, to every channel."""
    return jnp.clip(image + delta, 0, 1)


def adjust_contrast(image: Array, factor: ArrayLike) -> Array:
    """Multiplies the distance of each channel from its mean over the image by `factor`, as tf.image does."""
    import dm_pix

    return jnp.clip(dm_pix.adjust_contrast(image, jnp.asarray(factor)), 0, 1)


def adjust_saturation(image: Array, factor: ArrayLike) -> Array:
    """Multiplies the saturation (the S of HSV, at most 1) of an RGB image by `factor`, as tf.image does."""
    import dm_pix

    _shape(image, channels=3)
    return jnp.clip(dm_pix.adjust_saturation(image, jnp.asarray(factor)), 0, 1)


def adjust_hue(image: Array, delta: ArrayLike) -> Array:
    """Turns the hue of an RGB image by `delta` of the full circle (1/3 makes red green)."""
    import dm_pix

    _shape(image, channels=3)
    return jnp.clip(dm_pix.adjust_hue(image, jnp.asarray(delta)), 0, 1)


def add_lighting(image: Array, alpha: Sequence[float] | Array) -> Array:
    """Adds `alpha` [3] times ImageNet's RGB eigenvalues along their eigenvectors, one shift for the whole image."""
    _shape(image, channels=3)
    # A product, not `sum(a * b)`: jaxlib 0.10.2 fuses that into the addition below and gets it wrong (jax issue 39103).
    weights = jnp.asarray(alpha) * jnp.asarray(IMAGENET_EIGENVALUES)
    shift = jnp.dot(jnp.asarray(IMAGENET_EIGENVECTORS), weights, precision="highest")
    return jnp.clip(image + shift[None, None], 0, 1)


def random_brightness(key: Array, image: Array, *, max_delta: float = 0.2) -> Array:
    """Adds a brightness uniform in [-max_delta, max_delta]."""
    return adjust_brightness(image, _symmetric(key, "max_delta", max_delta))


def random_contrast(key: Array, image: Array, *, strength: float = 0.2) -> Array:
    """Changes the contrast by a factor uniform in [1 - strength, 1 + strength]."""
    return adjust_contrast(image, 1 + _symmetric(key, "strength", strength))


def random_saturation(key: Array, image: Array, *, strength: float = 0.2) -> Array:
    """Changes the saturation by a factor uniform in [1 - strength, 1 + strength]."""
    return adjust_saturation(image, 1 + _symmetric(key, "strength", strength))


def random_hue(key: Array, image: Array, *, max_delta: float = 0.05) -> Array:
    """Turns the hue by a part of the circle uniform in [-max_delta, max_delta]."""
    return adjust_hue(image, _symmetric(key, "max_delta", max_delta))


def random_lighting(key: Array, image: Array, *, std: float = 0.1) -> Array:
    """AlexNet's colour shift (Krizhevsky 2012, section 4.1) with normal weights of deviation `std`; here clipped."""
    return add_lighting(image, std * jax.random.normal(key, (3,)))


def _symmetric(key, name, bound):
    """A number uniform in [-bound, bound]; `name` is the argument's name for the error."""
    if bound < 0:
        raise ValueError(f"{name} is {bound}; expected a number of at least 0.")
    return jax.random.uniform(key, minval=-bound, maxval=bound)


def _pair(size: Size) -> tuple[int, int]:
    """(height, width) from one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _shape(image, channels=None):
    """The (H, W, C) of one float image; refuses anything else."""
    if image.ndim != 3 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"image is {image.dtype}{list(image.shape)}; expected one float image [H, W, C] in [0, 1] "
            "(`augment_batch` applies ops to a batch)."
        )
    if channels is not None and image.shape[-1] != channels:
        raise ValueError(f"image has {image.shape[-1]} channels; this op needs {channels} (red, green, blue).")
    return image.shape


def _per_channel(name, value, image):
    """`value` in a shape that broadcasts against `image` [..., C] without rank promotion."""
    value = jnp.asarray(value, jnp.float32)
    if value.ndim == 0:
        return value
    if value.shape != image.shape[-1:]:
        raise ValueError(
            f"{name} has shape {value.shape}; expected a number or one for each of the {image.shape[-1]} channels."
        )
    return value.reshape((1,) * (image.ndim - 1) + value.shape)
