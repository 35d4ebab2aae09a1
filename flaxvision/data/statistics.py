"""The mean and spread of a set's pixels."""

import numpy as np

from flaxvision.data.arrays import Source


def channel_statistics(source: Source, *, samples: int = 2000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measures the mean and standard deviation of each channel, in [0, 1], for `flaxvision.data.augment.normalize`.

    Args:
        source: Images of uint8 or of floats.
        samples: About how many images to look at, spread evenly.

    Returns:
        The means and the deviations, one number a channel; a deviation is at least 1e-3.
    """
    total, squares, count = 0.0, 0.0, 0
    for i in range(0, len(source), -(-len(source) // samples)):
        image = source[i]["image"]
        pixels = image / (255.0 if image.dtype == np.uint8 else 1.0)
        total, squares = total + pixels.sum((0, 1)), squares + (pixels**2).sum((0, 1))
        count += pixels[..., 0].size
    mean = np.asarray(total / count)
    std = np.maximum(np.sqrt(np.maximum(squares / count - mean**2, 0)), 1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())
