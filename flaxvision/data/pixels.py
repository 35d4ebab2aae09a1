"""Pixels: their range, their standardisation, and the arguments that augmentations share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

PerChannel = float | Sequence[float] | Array
Size = int | tuple[int, int]


def to_float(image: Array) -> Array:
    """Converts uint8 [..., H, W, C] to float32 in [0, 1] (divided by 255); floats are only cast to float32.

    Raises:
        TypeError: The dtype is another one; the range of its values is unknown.
    """
    image = jnp.asarray(image)
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image.astype(jnp.float32)
    raise TypeError(f"image must be uint8 (0 to 255) or floats (0 to 1); got {image.dtype}")


def standardize(image: Array, mean: PerChannel, std: PerChannel) -> Array:
    """Converts [..., H, W, C] with `to_float` and returns ``(image - mean) / std``.

    Raises:
        ValueError: `mean` or `std` is neither one number nor one number per channel.
    """
    image = to_float(image)
    return (image - per_channel("mean", mean, image)) / per_channel("std", std, image)


def symmetric(key: Array, name: str, bound: float) -> Array:
    """Draws a number uniform in [-bound, bound]; `name` is the name of the argument, for the error."""
    if bound < 0:
        raise ValueError(f"{name} must be at least 0; got {bound}")
    return jax.random.uniform(key, minval=-bound, maxval=bound)


def pair(size: Size) -> tuple[int, int]:
    """Returns (height, width) for one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def shape_of(image: Array, channels: int | None = None) -> tuple[int, int, int]:
    """Returns the (H, W, C) of one float image, and refuses anything else."""
    if image.ndim != 3 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"image must be one float image [H, W, C] in [0, 1] (augment_batch applies ops to a batch); got "
            f"{image.dtype}{list(image.shape)}"
        )
    if channels is not None and image.shape[-1] != channels:
        raise ValueError(f"image must have {channels} channels (red, green, blue); got {image.shape[-1]} channels")
    height, width, depth = image.shape
    return height, width, depth


def per_channel(name: str, value: PerChannel, image: Array) -> Array:
    """Returns `value` in a shape that broadcasts against `image` [..., C] without rank promotion."""
    value = jnp.asarray(value, jnp.float32)
    if value.ndim == 0:
        return value
    if value.shape != image.shape[-1:]:
        raise ValueError(
            f"{name} must be a number or one for each of the {image.shape[-1]} channels; got shape {value.shape}"
        )
    return value.reshape((1,) * (image.ndim - 1) + value.shape)
