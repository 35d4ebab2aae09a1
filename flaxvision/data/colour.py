"""Photometric augmentations: they change pixels and move nothing.

`adjust_*`, `add_lighting` and `cutout` take an image and a strength. The ``random_*`` functions beside them draw the
strength and are ops, ``(key, example) -> example``, by the decorator `photometric`. Results are clipped to [0, 1], as
the next op expects.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from flaxvision.data.pixels import PerChannel, per_channel, shape_of, symmetric

# Eigenvalues and, as columns, eigenvectors of the RGB covariance of ImageNet's training pixels in [0, 1]. Krizhevsky
# 2012 gives the method but not the values; these are the ones in use since fb.resnet.torch (datasets/imagenet.lua).
IMAGENET_EIGENVALUES = (0.2175, 0.0188, 0.0045)
IMAGENET_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def photometric(function: Callable[..., Array]) -> Callable[..., dict[str, Any]]:
    """Makes an op from a function of an image that keeps every object at its place.

    Args:
        function: ``(key, image, **options) -> image`` on a float image [H, W, C] in [0, 1], of the same size.

    Returns:
        The op ``(key, example, **options) -> example``, which changes the image and nothing else. It raises ValueError
        if the function changes the size of the image.
    """

    @functools.wraps(function)
    def op(key: Array, example: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        image = function(key, example["image"], **options)
        if image.shape != example["image"].shape:
            raise ValueError(
                f"a photometric op must keep the image's shape {example['image'].shape}; got {image.shape} from "
                f"{getattr(function, '__name__', function)}"
            )
        return {**example, "image": image}

    return op


def adjust_brightness(image: Array, delta: ArrayLike) -> Array:
    """Adds `delta`, a share of the full range, to every channel."""
    return jnp.clip(image + delta, 0, 1)


def adjust_contrast(image: Array, factor: ArrayLike) -> Array:
    """Multiplies the distance of each channel from its mean over the image by `factor`, as tf.image does."""
    import dm_pix

    return jnp.clip(dm_pix.adjust_contrast(image, jnp.asarray(factor)), 0, 1)


def adjust_saturation(image: Array, factor: ArrayLike) -> Array:
    """Multiplies the saturation (the S of HSV, at most 1) of an RGB image by `factor`, as tf.image does."""
    import dm_pix

    shape_of(image, channels=3)
    return jnp.clip(dm_pix.adjust_saturation(image, jnp.asarray(factor)), 0, 1)


def adjust_hue(image: Array, delta: ArrayLike) -> Array:
    """Rotates the hue of an RGB image by `delta` of the full circle (1/3 turns red into green)."""
    import dm_pix

    shape_of(image, channels=3)
    return jnp.clip(dm_pix.adjust_hue(image, jnp.asarray(delta)), 0, 1)


def add_lighting(image: Array, alpha: Sequence[float] | Array) -> Array:
    """Adds `alpha` [3] times ImageNet's RGB eigenvalues along their eigenvectors, one shift for the whole image."""
    shape_of(image, channels=3)
    # A product, not `sum(a * b)`: jaxlib 0.10.2 fuses that into the addition below and gets it wrong (jax issue 39103).
    weights = jnp.asarray(alpha) * jnp.asarray(IMAGENET_EIGENVALUES)
    shift = jnp.dot(jnp.asarray(IMAGENET_EIGENVECTORS), weights, precision="highest")
    return jnp.clip(image + shift[None, None], 0, 1)


def cutout(image: Array, y: ArrayLike, x: ArrayLike, size: int, fill: PerChannel = 0.0) -> Array:
    """Fills the square of `size` pixels around pixel (y, x), as far as it lies in the image."""
    height, width, _ = shape_of(image)
    rows, columns = jnp.arange(height) - y + size // 2, jnp.arange(width) - x + size // 2
    hole = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))[None]
    return jnp.where(hole[..., None], per_channel("fill", fill, image), image)


@photometric
def random_brightness(key: Array, image: Array, *, max_delta: float = 0.2) -> Array:
    """Adds a brightness uniform in [-max_delta, max_delta]."""
    return adjust_brightness(image, symmetric(key, "max_delta", max_delta))


@photometric
def random_contrast(key: Array, image: Array, *, strength: float = 0.2) -> Array:
    """Changes the contrast by a factor uniform in [1 - strength, 1 + strength]."""
    return adjust_contrast(image, 1 + symmetric(key, "strength", strength))


@photometric
def random_saturation(key: Array, image: Array, *, strength: float = 0.2) -> Array:
    """Changes the saturation by a factor uniform in [1 - strength, 1 + strength]."""
    return adjust_saturation(image, 1 + symmetric(key, "strength", strength))


@photometric
def random_hue(key: Array, image: Array, *, max_delta: float = 0.05) -> Array:
    """Rotates the hue by a share of the circle uniform in [-max_delta, max_delta]."""
    return adjust_hue(image, symmetric(key, "max_delta", max_delta))


@photometric
def random_lighting(key: Array, image: Array, *, std: float = 0.1) -> Array:
    """Adds AlexNet's colour shift (Krizhevsky 2012, section 4.1) with normal weights of deviation `std`, clipped."""
    return add_lighting(image, std * jax.random.normal(key, (3,)))


@photometric
def random_cutout(key: Array, image: Array, *, size: int, fill: PerChannel = 0.0) -> Array:
    """Fills a square around a random pixel (DeVries 2017); part of the square may lie outside of the image.

    The paper cuts out after standardisation, where zero is the mean; pass the mean of the data as `fill` for that.
    Boxes and masks stay, as the objects are still there.
    """
    y, x = jax.random.randint(key, (2,), 0, jnp.asarray(image.shape[:2]))
    return cutout(image, y, x, size, fill)
