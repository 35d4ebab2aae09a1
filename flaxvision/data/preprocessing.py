"""The published evaluation transforms: from a picture to what a network was evaluated on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from flaxvision.registry import model_info

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resizes, crops the centre, and normalizes: `(pixels / divisor - mean) / std` in float32.

    Resizing is Pillow's, whose bilinear and bicubic filters widen when they shrink a picture (antialiasing). Sizes and
    offsets are rounded as torchvision's `Resize` and `CenterCrop` round them, and a picture that is smaller than the
    crop gets zeros around it.

    Attributes:
        crop: Height and width of the result; an int for a square.
        resize: What the shorter side becomes before the crop, the aspect ratio kept; or height and width; None leaves
            the picture as it is.
        interpolation: `"nearest"`, `"bilinear"` or `"bicubic"`.
        mean: Per channel, in units of the divided pixels and in `order`.
        std: Per channel, likewise.
        divisor: What the pixels, 0 to 255, are divided by first.
        order: `"RGB"`, `"BGR"` (Caffe's networks) or `"L"` (grey).
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
            raise ValueError(f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {self.interpolation!r}")
        if self.order not in ("RGB", "BGR", "L"):
            raise ValueError(f"order must be RGB, BGR or L, got {self.order!r}")

    def __call__(self, image: Any) -> np.ndarray:
        """Maps a picture to a network's input.

        Args:
            image: A PIL image of any mode, or a uint8 array `[H, W, 3]`, `[H, W, 1]` or `[H, W]`.

        Returns:
            `[crop, crop, 3]` float32, or `[crop, crop, 1]` with `order="L"`.

        Raises:
            TypeError: The array is of another dtype.
            ValueError: The array is of another shape, or the picture has no pixels.
        """
        pixels = np.asarray(self.resized(image), np.float32)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = pixels[..., ::-1] if self.order == "BGR" else pixels
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        return np.ascontiguousarray((pixels / np.float32(self.divisor) - mean) / std)

    def resized(self, image: Any) -> Any:
        """The resized and cropped PIL image, before its pixels are normalized; arguments and errors as of a call."""
        from PIL import Image

        image = _pil(image, "L" if self.order == "L" else "RGB")
        if self.resize is not None:
            size = _resized(image.size, self.resize)
            image = image.resize(size, getattr(Image.Resampling, self.interpolation.upper()))
        height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        # A smaller picture is first padded to the crop, the odd pixel at the end.
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
            raise TypeError(f"an array must be uint8, pixels from 0 to 255; got {array.dtype}")
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
            raise ValueError(f"an array must be [H, W, 3], [H, W, 1] or [H, W]; got {array.shape}")
        if 0 in array.shape:
            raise ValueError(f"the picture has no pixels: {array.shape}")
        image = Image.fromarray(array)
    return image if image.mode == mode else image.convert(mode)


def _resized(size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(resize, int):
        return resize[1], resize[0]
    width, height = size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def preprocessing_for(name: str, weights: str | None = None) -> Preprocessing:
    """The evaluation transform of published weights.

    Args:
        name: A registry name.
        weights: A tag of `model_info(name).weights`, such as `"torchvision/IMAGENET1K_V1"`; a source, such as
            `"akamaster"` (CIFAR ResNets), `"deep_compression"` (SqueezeNet), `"coral"` (MobileNetV2), or a library
            whose tags for the model agree; or the path of a bundle, whose card may hold a transform. None takes the
            first tag. Where none of these tells it, the input size, mean and std of `model_info` (of a bundle its own
            input), with the usual margin: the shorter side becomes 1 / 0.875 of the crop, or the crop itself up to 64
            pixels.

    Returns:
        A callable that maps a PIL image or a uint8 array to float32 `[H, W, 3]`.

    Raises:
        ValueError: There is no such model, tag, source or bundle, or the model takes no pictures.
    """
    from flaxvision.weights.tags import preprocessing_of

    info = model_info(name)
    if weights is not None or info.weights:
        known = preprocessing_of(name, weights or info.weights[0])
        if known is not None:
            return known
    return usual_preprocessing(name)


def usual_preprocessing(
    name: str, input_size: tuple[int, ...] | None = None, channels: int | None = None
) -> Preprocessing:
    """What `preprocessing_for` falls back on, for images of another size or number of channels too."""
    info = model_info(name)
    size = tuple(input_size or info.input_size)
    if len(size) != 2:
        raise ValueError(f"{name} takes feature vectors {size}, not pictures")
    side = min(size)
    grey = (channels or info.channels) == 1
    return Preprocessing(
        crop=size if size[0] != size[1] else side,
        resize=side if side <= 64 else round(side / 0.875),
        mean=info.mean[:1] if grey else info.mean,
        std=info.std[:1] if grey else info.std,
        order="L" if grey else "RGB",
    )
