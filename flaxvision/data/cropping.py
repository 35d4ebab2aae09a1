"""Random crops on the host, for the worker threads: uint8 [H, W, C] of any size to uint8 [size, size, C].

They draw from a numpy generator, such as the one that `flaxvision.data.train_batches` passes to its transform. For
crops on the device, of images of one size, see `flaxvision.data.augment`; for evaluation, see
`flaxvision.data.Preprocessing`.
"""

import math

import numpy as np


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    tries: int = 10,
) -> np.ndarray:
    """Resizes a random part (Szegedy 2014, section 6) to `size`.

    The share of the area is uniform in `area` and the width by height is log-uniform in `ratio`. The first of `tries`
    draws that fits into the image is used; if none does, the largest centred part within `ratio`, as in torchvision.

    Args:
        image: uint8 [H, W, C], C 1 or 3.
        rng: Random generator.
        size: Height and width of the result.
        area: Lowest and highest share of the area.
        ratio: Lowest and highest width by height.
        tries: Number of draws.

    Returns:
        uint8 [size, size, C].
    """
    height, width = image.shape[:2]
    log_ratio = np.log(ratio)
    for _ in range(tries):
        pixels = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return _resize(image, (left, top, left + w, top + h), size)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return _resize(image, (left, top, left + w, top + h), size)


def random_scaled_crop(
    image: np.ndarray, rng: np.random.Generator, *, size: int, shorter: tuple[int, int] = (256, 256)
) -> np.ndarray:
    """Resizes the shorter side to a whole number uniform in `shorter` and crops `size` at a random place.

    With equal bounds this is AlexNet's crop (Krizhevsky 2012, section 4.1), otherwise VGG's scale jittering (Simonyan
    2014, section 3.1).

    Args:
        image: uint8 [H, W, C], C 1 or 3.
        rng: Random generator.
        size: Height and width of the result; at most the shorter side.
        shorter: Lowest and highest length of the shorter side.

    Returns:
        uint8 [size, size, C].

    Raises:
        ValueError: Not `1 <= size <= shorter[0] <= shorter[1]`.
    """
    if not 1 <= size <= shorter[0] <= shorter[1]:
        raise ValueError(
            f"size and shorter must satisfy 1 <= size <= shorter[0] <= shorter[1]; got {size} and {shorter}"
        )
    goal, least = int(rng.integers(shorter[0], shorter[1] + 1)), min(image.shape[:2])
    height, width = (side * goal // least for side in image.shape[:2])
    top, left = rng.integers(0, height - size + 1), rng.integers(0, width - size + 1)
    # The same as resizing the whole image and cropping, without computing what is cut off.
    y, x = image.shape[0] / height, image.shape[1] / width
    box = (left * x, top * y, min((left + size) * x, image.shape[1]), min((top + size) * y, image.shape[0]))
    return _resize(image, box, size)


def _resize(image: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Resizes the part under `box` (left, top, right, bottom), bilinear with antialiasing."""
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return pixels.reshape(size, size, image.shape[-1])
