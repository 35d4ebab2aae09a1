"""Decodes, resizes and converts images on the host."""

import errno
import os
from typing import IO, Any

import numpy as np

# ITU-R BT.601, as Pillow uses for uint8.
_LUMA = np.array([0.299, 0.587, 0.114])
# Errors of the file system that say nothing about the content of a file.
_FAILURES = frozenset(
    getattr(errno, name)
    for name in (
        *(
            "EACCES",
            "EAGAIN",
            "EBUSY",
            "ECONNABORTED",
            "ECONNREFUSED",
            "ECONNRESET",
            "EHOSTDOWN",
            "EHOSTUNREACH",
            "EIO",
        ),
        *("EMFILE", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENFILE", "ENODEV", "ENOMEM", "ENOTCONN", "ENXIO", "EPERM"),
        *("EPIPE", "EREMOTEIO", "ESHUTDOWN", "ESTALE", "ETIMEDOUT"),
    )
    if hasattr(errno, name)
)


def decode_image(
    file: str | os.PathLike[str] | IO[bytes],
    *,
    channels: int = 3,
    image_size: int | None = None,
    orient: bool = True,
    name: str | None = None,
) -> np.ndarray:
    """Decodes an image file.

    Palettes and CMYK are converted to RGB. Of 16-bit grayscale the upper eight bits are kept.

    Args:
        file: Path or open binary file, in any format that Pillow reads. Of several frames the first is decoded.
        channels: 3 for RGB, 1 for grayscale.
        image_size: Height and width of the result in pixels: the shorter side is resized (bilinear with antialiasing)
            and the center square is cropped. None keeps the size of the file.
        orient: Whether to apply the EXIF orientation. Published accuracies on ImageNet do not apply it.
        name: Name of the image in error messages. None uses `file`.

    Returns:
        [H, W, C] uint8 pixels.

    Raises:
        ValueError: The file is missing, truncated or damaged.
        OSError: The file system fails, which says nothing about the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            opened.load()
            picture: Any = ImageOps.exif_transpose(opened) if orient else opened
            if picture.mode.startswith("I"):
                picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            mode = "RGB" if channels == 3 else "L"
            picture = picture if picture.mode == mode else picture.convert(mode)
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FAILURES:
            raise
        # Depending on the format and the damage, Pillow raises OSError, SyntaxError, ValueError, struct.error and more.
        raise ValueError(f"{name or file} is not a readable image: {error}") from error
    pixels = np.asarray(picture if image_size is None else _resize(picture, image_size))
    return pixels if channels == 3 else pixels[..., None]


def adapt_image(image: np.ndarray, *, channels: int | None = None, image_size: int | None = None) -> np.ndarray:
    """Brings an image in memory to another number of channels and another size.

    Args:
        image: [H, W, C] pixels, uint8 or floating point, with 1 or 3 channels.
        channels: 3 repeats a grayscale image, 1 takes the luma of an RGB image, None keeps the channels.
        image_size: As in `decode_image`.

    Returns:
        [H, W, C] pixels of the same dtype.
    """
    from PIL import Image

    if channels == 1 and image.shape[-1] == 3:
        grey = image @ _LUMA
        image = (np.round(grey) if image.dtype == np.uint8 else grey).astype(image.dtype)[..., None]
    if image_size is not None and image.shape[:2] != (image_size, image_size):
        single = np.uint8 if image.dtype == np.uint8 else np.float32
        planes = [_resize(Image.fromarray(plane.astype(single)), image_size) for plane in np.moveaxis(image, -1, 0)]
        image = np.stack([np.asarray(plane) for plane in planes], axis=-1).astype(image.dtype)
    if channels == 3 and image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return image


def check_channels(channels: int | None) -> None:
    """Raises ValueError unless `channels` is None, 1 or 3."""
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 3 for RGB or 1 for grayscale; got {channels!r}")


def check_image_size(image_size: int | None) -> None:
    """Raises ValueError unless `image_size` is None or at least 1."""
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1; got {image_size}")


def _resize(picture: Any, image_size: int) -> Any:
    """Resizes the shorter side of a Pillow image and crops the center square."""
    from PIL import Image

    width, height = picture.size
    scale = image_size / min(width, height)
    size = max(image_size, int(width * scale)), max(image_size, int(height * scale))
    left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    return picture.crop((left, top, left + image_size, top + image_size))
