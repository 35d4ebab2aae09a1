"""Elastic deformation of images and their label maps."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates

from flaxvision.data.pixels import shape_of

_MOVED = {"label": 0, "instances": 0, "weight": 1}  # interpolation order of the maps that move with the image


def displacements(key: Array, height: int, width: int, *, grid: int = 3, sigma: float = 10.0) -> Array:
    """Draws a smooth displacement of every pixel (Ronneberger et al. 2015, section 3.1).

    Vectors are drawn from a normal distribution on a coarse grid, whose outer points lie on the borders of the image.
    Bicubic interpolation gives the vector of every pixel.

    Args:
        key: PRNG key.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        grid: Points of the grid along each side, at least 2.
        sigma: Standard deviation of the vectors in pixels.

    Returns:
        Displacements in y and x [H, W, 2].
    """
    coarse = sigma * jax.random.normal(key, (grid, grid, 2))
    zoom = jnp.asarray([(height - 1) / (grid - 1), (width - 1) / (grid - 1)], jnp.float32)
    shape = (height, width, 2)
    return jax.image.scale_and_translate(coarse, shape, (0, 1), zoom, (1 - zoom) / 2, "cubic", antialias=False)


def random_elastic(
    key: Array, example: Mapping[str, Any], *, grid: int = 3, sigma: float = 10.0, probability: float = 1.0
) -> dict[str, Any]:
    """Deforms an image and its label maps by a smooth random field. They are mirrored beyond their borders.

    `image` and `weight` [H, W] are interpolated bilinearly, and `label` and `instances` [H, W] by nearest neighbour.
    See `displacements`.

    Args:
        key: Key of this op and example.
        example: The example.
        grid: Points of the grid along each side, at least 2.
        sigma: Standard deviation of the displacements of the grid in pixels.
        probability: Probability that the example is deformed.

    Returns:
        The deformed example.

    Raises:
        ValueError: `grid` is below 2, or the example holds `boxes`, `masks`, `keypoints` or `size`, which this op does
            not move.
    """
    if grid < 2:
        raise ValueError(f"grid must be at least 2; got {grid}")
    if refused := {"boxes", "masks", "keypoints", "size"} & set(example):
        raise ValueError(f"example must not hold {sorted(refused)[0]} for random_elastic; got {sorted(example)}")
    image = example["image"]
    height, width, _ = shape_of(image)
    field = displacements(key, height, width, grid=grid, sigma=sigma)
    field = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1), probability), field, 0)
    places = [jnp.arange(height)[:, None] + field[..., 0], jnp.arange(width)[None] + field[..., 1]]
    moved = {**example, "image": jax.vmap(lambda x: map_coordinates(x, places, 1, "mirror"), -1, -1)(image)}
    for name, order in _MOVED.items():
        if name in example and jnp.ndim(example[name]) == 2:
            moved[name] = map_coordinates(jnp.asarray(example[name]), places, order, "mirror")
    return moved
