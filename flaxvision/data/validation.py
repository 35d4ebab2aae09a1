"""The check of a source before any training: one clear error instead of a failure inside a compiled step."""

from typing import Any

import numpy as np

from flaxvision.data.arrays import ArraySource, Source

_CHUNK = 1024
_SAMPLES = 64


def validate(
    source: Source,
    *,
    channels: int | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    verify: bool = True,
) -> None:
    """Checks that a source can be trained on.

    A source in memory is checked whole. Of another one all labels are checked if it has an attribute `label`, and the
    images of at most 64 examples spread evenly; if it has a method `verify`, as a folder of pictures does, that runs
    too.

    Args:
        source: What to check.
        channels: Number of channels that every image must have; None accepts any.
        num_classes: Labels must lie in 0..num_classes-1; None takes the number of the source's classes.
        image_size: Height and width that every image must have, in pixels; None accepts any.
        verify: Whether to call the source's `verify`; decoding ImageNet once takes an hour or more.

    Raises:
        ValueError: On the first fault: an empty source, images that are not [H, W, C] of uint8 or of floats in 0..1 (or
            standardised), other channels or another size than asked for, NaN or infinite pixels, labels that are no
            integers or out of range, images and labels of different number, files that cannot be decoded.
    """
    if len(source) == 0:
        raise ValueError(f"source: {source.name!r} is empty; it must hold at least one example")
    num_classes = num_classes or len(source.classes)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(source, ArraySource):
        if source.label.shape != (len(source),):
            raise ValueError(
                f"label: received the shape {list(source.label.shape)} for {len(source)} images in {source.name!r}; "
                "there must be one class index per image"
            )
        _check_images(source.image, source.name, channels, size)
        _check_labels(source.label, source.name, num_classes)
        return
    labels = getattr(source, "label", None)
    if labels is not None:
        _check_labels(np.asarray(labels), source.name, num_classes)
    verify_all = getattr(source, "verify", None)
    if verify and verify_all is not None:
        verify_all()
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLES).astype(int)):
        example = source[int(index)]
        where = f"{source.name}[{index}]"
        _check_images(np.asarray(example["image"])[None], where, channels, size)
        _check_labels(np.asarray(example["label"])[None], where, num_classes)


def _check_images(image: np.ndarray, name: str, channels: int | None, size: tuple[int, int] | None) -> None:
    if image.ndim != 4:
        raise ValueError(
            f"image: received {image.ndim - 1} dimensions {list(image.shape[1:])} in {name!r}; "
            "an image must have three, [H, W, C]"
        )
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"image: received {image.dtype} pixels in {name!r}; they must be uint8 or floating point")
    if 0 in image.shape:
        raise ValueError(f"image: received the shape {list(image.shape[1:])} in {name!r}; no side may be 0")
    if channels is not None and image.shape[3] != channels:
        raise ValueError(f"image: received {image.shape[3]} channels in {name!r}; they must be {channels}")
    if size is not None and image.shape[1:3] != tuple(size):
        received = "x".join(map(str, image.shape[1:3]))
        raise ValueError(f"image: received {received} pixels in {name!r}; they must be {size[0]}x{size[1]}")
    if np.issubdtype(image.dtype, np.floating):
        if image.min() >= 0 and image.max() > 2:  # standardised pixels have negative ones
            raise ValueError(
                f"image: received floating point pixels from {image.min():g} to {image.max():g} in {name!r}; "
                "they must be in [0, 1], or uint8 in 0..255"
            )
        for start in range(0, len(image), _CHUNK):
            finite = np.isfinite(image[start : start + _CHUNK]).all(axis=(1, 2, 3))
            if not finite.all():
                at = start + int(np.argmin(finite))
                value = image[at][~np.isfinite(image[at])][0]
                raise ValueError(
                    f"image: received {value} among the pixels of {name!r} at index {at}; all must be finite"
                )


def _check_labels(label: np.ndarray, name: str, num_classes: int) -> None:
    if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
        received: Any = f"{label.dtype} {list(label.shape[1:])}" if label.ndim > 1 else label.dtype
        raise ValueError(f"label: received {received} in {name!r}; a label must be one integer class index")
    wrong = (label < 0) | (label >= num_classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"label: received {label[at]} in {name!r} at index {at}; "
            f"it must lie between 0 and {num_classes - 1} ({num_classes} classes)"
        )
