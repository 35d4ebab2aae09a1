"""The pixel weights of U-Net, which emphasize the borders between close objects."""

from __future__ import annotations

import numpy as np


def border_weights(instances: np.ndarray, *, w0: float = 10.0, sigma: float = 5.0, balance: bool = True) -> np.ndarray:
    """Computes U-Net's weight map (Ronneberger et al. 2015, equation 2).

    Background pixels have the weight `w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2))`, where d1 and d2 are
    the distances to the nearest and the second nearest object in pixels. Pixels of objects have the weight `w_c`. With
    fewer than two objects, the second term is 0.

    Args:
        instances: Object number of every pixel, integers [H, W]; 0 for the background.
        w0: Weight of the borders.
        sigma: Width of the borders in pixels.
        balance: Whether `w_c` balances background and objects. It is then the number of pixels divided by twice the
            number of pixels of the same class. False sets it to 1. The paper does not say how it balances the classes.

    Returns:
        Weights [H, W], float32.

    Raises:
        ValueError: `instances` is not of rank 2 or not of integers, or `sigma` is not positive.
    """
    from scipy.ndimage import distance_transform_edt

    instances = np.asarray(instances)
    if instances.ndim != 2 or not np.issubdtype(instances.dtype, np.integer):
        raise ValueError(f"instances must be integers [H, W]; got {instances.dtype} {list(instances.shape)}")
    if sigma <= 0:
        raise ValueError(f"sigma must be positive; got {sigma}")
    inside = instances > 0
    count = int(inside.sum())
    weights = np.ones(instances.shape)
    if balance and 0 < count < inside.size:
        weights = np.where(inside, inside.size / (2 * count), inside.size / (2 * (inside.size - count)))
    numbers = np.unique(instances[inside])
    if len(numbers) > 1:
        # Keep the two smallest distances of each pixel to the objects so far.
        near = np.full((2, *instances.shape), np.inf)
        for number in numbers:
            distance = np.asarray(distance_transform_edt(instances != number))
            near = np.concatenate([near, distance[None]])
            near.sort(axis=0)
            near = near[:2]
        border = w0 * np.exp(-np.square(near.sum(0)) / (2 * sigma**2))
        weights = weights + np.where(inside, 0, border)
    return weights.astype(np.float32)
