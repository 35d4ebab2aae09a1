"""Evaluation transforms: from an image of any size to the input of a network."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resizes an image, crops its centre and normalizes it: `(pixels / divisor - mean) / std` in float32.

    Pillow does the resizing. Its bilinear and bicubic filters are antialiased when they shrink an image. Sizes and
    offsets are rounded like those of torchvision's `Resize` and `CenterCrop`. An image smaller than the crop is padded
    with zeros.

    Attributes:
        crop: Height and width of the result; an int for a square.
        resize: Length of the shorter side before the crop, keeping the aspect ratio; or height and width; None to keep
            the size of the image.
        interpolation: `"nearest"`, `"bilinear"` or `"bicubic"`.
        mean: Mean per channel, in units of the divided pixels and in the order of `order`.
        std: Standard deviation per channel, in the same units and order.
        divisor: Number that the pixels, 0 to 255, are divided by before normalization.
        order: Order of the channels: `"RGB"`, `"BGR"` (Caffe's networks) or `"L"` (grey).

    Raises:
        ValueError: `interpolation` or `order` is none of these values.
    """

    crop: int | tuple[int, int] = 224
    resize: int | tuple[int, int] | None = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    divisor: float = 255.0
    order: str = "RGB"

    def __post_init__(self) -> None:
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(_INTERPOLATIONS)}; got {self.interpolation!r}")
        if self.order not in ("RGB", "BGR", "L"):
            raise ValueError(f"order must be RGB, BGR or L; got {self.order!r}")

    def __call__(self, image: Any) -> np.ndarray:
        """Turns an image into the input of a network.

        Args:
            image: A PIL image of any mode, or a uint8 array `[H, W, 3]`, `[H, W, 1]` or `[H, W]`.

        Returns:
            `[crop, crop, 3]` float32, or `[crop, crop, 1]` with `order="L"`.

        Raises:
            TypeError: The array has another dtype.
            ValueError: The array has another shape, or the image has no pixels.
        """
        pixels = np.asarray(self.resized(image), np.float32)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = pixels[..., ::-1] if self.order == "BGR" else pixels
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        return np.ascontiguousarray((pixels / np.float32(self.divisor) - mean) / std)

    def resized(self, image: Any) -> Any:
        """Resizes and crops an image without normalizing its pixels.

        Args:
            image: As for `__call__`.

        Returns:
            A PIL image.

        Raises:
            TypeError: The array has another dtype.
            ValueError: The array has another shape, or the image has no pixels.
        """
        from PIL import Image

        image = _pil(image, "L" if self.order == "L" else "RGB")
        if self.resize is not None:
            size = _resized(image.size, self.resize)
            image = image.resize(size, getattr(Image.Resampling, self.interpolation.upper()))
        height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        # An image smaller than the crop is padded first. An odd pixel goes to the end.
        left, top = (-((w - s) // 2) if s < w else 0 for s, w in zip(image.size, (width, height), strict=True))
        full_width, full_height = max(image.size[0], width), max(image.size[1], height)
        left += round((full_width - width) / 2)
        top += round((full_height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def _pil(image: Any, mode: str) -> Any:
    from PIL import Image

    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8:
            raise TypeError(f"image must be a PIL image or a uint8 array; got an array of {array.dtype}")
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
            raise ValueError(f"image must have the shape [H, W, 3], [H, W, 1] or [H, W]; got {list(array.shape)}")
        if 0 in array.shape:
            raise ValueError(f"image must have at least one pixel; got the shape {list(array.shape)}")
        image = Image.fromarray(array)
    return image if image.mode == mode else image.convert(mode)


def _resized(size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(resize, int):
        return resize[1], resize[0]
    width, height = size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize
