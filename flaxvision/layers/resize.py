"""Bilinear resizing of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.image import scale_and_translate


def resize_bilinear(x: jax.Array, size: Sequence[int], *, align_corners: bool = False) -> jax.Array:
    """Resizes feature maps by bilinear interpolation, without antialiasing.

    Args:
        x: `[N, H, W, C]`.
        size: Height and width of the result.
        align_corners: True aligns the centers of the corner pixels, as TensorFlow's option of this name does. False
            aligns the outer edges of the image, as torch does by default.

    Returns:
        `[N, *size, C]`, of the dtype of `x`.

    Raises:
        ValueError: `x` is not of rank 4, or `size` is not two positive integers.
    """
    if x.ndim != 4:
        raise ValueError(f"x must have the shape [N, H, W, C]; got {x.shape}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be a height and a width of at least 1; got {tuple(size)}")
    if tuple(size) == x.shape[1:3]:
        return x
    factors, shifts = [], []
    for old, new in zip(x.shape[1:3], size, strict=True):
        # The center of pixel i is at i + 0.5, so aligned first centers need a shift of (1 - factor) / 2. If the result
        # has one pixel, it is the first one.
        factor = (new - 1) / (old - 1) if align_corners and min(old, new) > 1 else new / old
        factor = 1.0 if align_corners and (new == 1 or old == 1) else factor
        factors.append(factor)
        shifts.append((1 - factor) / 2 if align_corners else 0.0)
    shape = (x.shape[0], *size, x.shape[3])
    dtype = jnp.promote_types(x.dtype, jnp.float32)  # dtype of the interpolation weights
    scale, translation = jnp.asarray(factors, dtype), jnp.asarray(shifts, dtype)
    if align_corners:
        # A map of one row or column has no second center to interpolate with.
        for axis, (old, new) in enumerate(zip(x.shape[1:3], size, strict=True), start=1):
            if old == 1 and new > 1:
                x = jnp.repeat(x, new, axis=axis)
    return scale_and_translate(x, shape, (1, 2), scale, translation, "linear", antialias=False)
