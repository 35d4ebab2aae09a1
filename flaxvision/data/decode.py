"""From the bytes of a picture to an [H, W, C] array."""

import os
from typing import IO, Any

import numpy as np


def decode_image(
    file: str | os.PathLike[str] | IO[bytes],
    *,
    channels: int = 3,
    image_size: int | None = None,
    orient: bool = True,
    name: str | None = None,
) -> np.ndarray:
    """Decodes a picture as it is meant to be seen.

    The EXIF orientation is applied, palettes and CMYK become RGB, 16-bit grey keeps its upper eight bits. With an
    `image_size` the shorter side is resized to it (bilinear over the covered area, so no aliasing) and the middle
    square is cut out.

    Args:
        file: Path or open binary file, in any format that Pillow reads; of several frames the first.
        channels: 3 for RGB, 1 for grey.
        image_size: Height and width of the result in pixels; None keeps the picture's own.
        orient: Whether the EXIF orientation is applied. The figures published for ImageNet are without it.
        name: What to call the picture in an error; None takes `file`.

    Returns:
        uint8 array [H, W, channels].

    Raises:
        ValueError: When the picture is missing, truncated or damaged, naming it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            opened.load()
            picture: Any = ImageOps.exif_transpose(opened) if orient else opened.copy()
            if picture.mode.startswith("I"):
                picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            mode = "RGB" if channels == 3 else "L"
            picture = picture if picture.mode == mode else picture.convert(mode)
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more, by format and damage.
        raise ValueError(f"{name or file}: not a readable image ({error})") from error
    if image_size is not None:
        width, height = picture.size
        scale = image_size / min(width, height)
        size = max(image_size, int(width * scale)), max(image_size, int(height * scale))
        left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        picture = picture.crop((left, top, left + image_size, top + image_size))
    pixels = np.asarray(picture)
    return pixels if channels == 3 else pixels[..., None]


def check_channels(channels: int) -> None:
    """Raises ValueError unless `channels` is 1 or 3."""
    if channels not in (1, 3):
        raise ValueError(f"channels: received {channels}; it must be 3 for colour or 1 for grey")


def check_image_size(image_size: int | None) -> None:
    """Raises ValueError unless `image_size` is None or at least 1."""
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: received {image_size}; it must be at least 1")
