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
        crop: Height and width of the result; an int for a square; None to keep the size after the resize.
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

    crop: int | tuple[int, int] | None = 224
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
            `[crop, crop, 3]` float32, or `[crop, crop, 1]` with `order="L"`; without a crop, of the resized height and
            width.

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
        if self.crop is None:
            return image
        height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        # An image smaller than the crop is padded first. An odd pixel goes to the end.
        left, top = (-((w - s) // 2) if s < w else 0 for s, w in zip(image.size, (width, height), strict=True))
        full_width, full_height = max(image.size[0], width), max(image.size[1], height)
        left += round((full_width - width) / 2)
        top += round((full_height - height) / 2)
        return image.crop((left, top, left + width, top + height))


@dataclasses.dataclass(frozen=True)
class DetectionPreprocessing:
    """Resizes an image for a detector, normalizes it, and pads it at the bottom and right with zeros.

    The shorter side becomes `min_size`, unless the longer one would exceed `max_size`. This is the transform of
    torchvision's R-CNNs: `(pixels / divisor - mean) / std`, then bilinear interpolation without antialiasing.

    Attributes:
        min_size: Length of the shorter side in pixels.
        max_size: Largest length of the longer side in pixels.
        multiple: The sides of the result are multiples of it; 1 for no padding.
        mean: Mean per channel, in units of the divided pixels.
        std: Standard deviation per channel, in the same units.
        divisor: Number that the pixels, 0 to 255, are divided by before normalization.

    Raises:
        ValueError: `min_size` exceeds `max_size`, or a size or `multiple` is below 1.
    """

    min_size: int = 800
    max_size: int = 1333
    multiple: int = 32
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    divisor: float = 255.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_size <= self.max_size:
            raise ValueError(f"min_size must be from 1 to max_size, {self.max_size}; got {self.min_size}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1; got {self.multiple}")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that an image is resized to."""
        scale = min(self.min_size / min(height, width), self.max_size / max(height, width))
        return int(height * scale), int(width * scale)

    def __call__(self, image: Any) -> tuple[np.ndarray, tuple[int, int]]:
        """Turns an image into the input of a detector.

        Args:
            image: A PIL image of any mode, or a uint8 array `[H, W, 3]`, `[H, W, 1]` or `[H, W]`.

        Returns:
            `[h, w, 3]` float32 with sides that are multiples of `multiple`, and the height and width of the part that
            the image fills.

        Raises:
            TypeError: The array has another dtype.
            ValueError: The array has another shape, or the image has no pixels.
        """
        pixels = np.asarray(_pil(image, "RGB"), np.float32) / np.float32(self.divisor)
        pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        size = self.size(*pixels.shape[:2])
        for axis, extent in enumerate(size):
            pixels = _interpolated(pixels, axis, extent)
        after = [(0, -extent % self.multiple) for extent in size]
        return np.pad(pixels, [*after, (0, 0)]), size


def _interpolated(pixels: np.ndarray, axis: int, extent: int) -> np.ndarray:
    have = pixels.shape[axis]
    # Rounded once, as by torch's fused multiply-add: at a place of 1000, a unit in the last place is 6e-5 pixels.
    place = ((np.arange(extent) + 0.5) * np.float64(np.float32(have / extent)) - 0.5).astype(np.float32)
    place = np.maximum(place, 0)
    low = np.minimum(place.astype(np.int64), have - 1)
    weight = (place - low).astype(np.float32)
    weight = weight.reshape([-1 if i == axis else 1 for i in range(pixels.ndim)])
    return pixels.take(low, axis) * (1 - weight) + pixels.take(np.minimum(low + 1, have - 1), axis) * weight


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
