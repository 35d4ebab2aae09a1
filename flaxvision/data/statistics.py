"""Mean and standard deviation of the pixels of a data set."""

import numpy as np

from flaxvision.data.arrays import Source


def channel_statistics(source: Source, *, samples: int = 2000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measures the mean and standard deviation of each channel, in [0, 1].

    The result is what `flaxvision.data.augment.make_transform` takes as `mean` and `std`.

    Args:
        source: uint8 or float images.
        samples: Approximate number of images to measure, evenly spaced over the source.

    Returns:
        The means and the deviations, one number per channel; a deviation is at least 1e-3.
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
