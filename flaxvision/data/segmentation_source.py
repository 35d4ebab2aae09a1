"""Segmentation data from image files and mask files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision.data.decode import decode_image

IGNORED = 255
Colours = Mapping[tuple[int, int, int], int]


class KeptExamples:
    """Base class of sources that can keep their examples in memory. A subclass defines `_read` and `__len__`.

    Args:
        cache: Whether to keep them.
    """

    def __init__(self, cache: bool):
        self._kept: dict[int, dict[str, np.ndarray]] | None = {} if cache else None

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        index = int(index) % len(self)
        if self._kept is None:
            return self._read(index)
        if index not in self._kept:
            self._kept[index] = self._read(index)
        return {key: value.copy() for key, value in self._kept[index].items()}

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must define __len__")

    def _read(self, index: int) -> dict[str, np.ndarray]:
        raise NotImplementedError(f"{type(self).__name__} must define _read")


class SegmentationSource(KeptExamples):
    """Image files with mask files, decoded on access.

    `source[i]` is a dict with `image` uint8 [H, W, C], `label` int32 [H, W] and, if requested, `instances` int32 [H, W]
    and `weight` float32 [H, W]. It raises ValueError if a file is not readable, an image and its mask differ in size,
    or a value or colour of the mask has no class.

    Args:
        images: The image files.
        masks: The mask file of each image.
        classes: Class names.
        name: Name of the source.
        values: Maps each value of the masks to a class, or to 255 for an unknown class. None if the values are classes.
            Ignored with `colours` or `instances`.
        colours: Maps each RGB colour to a class, for masks in colour. None for palette and grey images.
        instances: Whether the values of the masks are instance numbers. In `label`, pixels of instances have class 1,
            and pixels of value 0 have class 0.
        weight: Function that computes the weight of every pixel from the instances, such as `border_weights`.
        size: Height and width of the examples. Images are resized with their aspect ratio, and padded at the bottom and
            right. The label of the padding is 255. None keeps the size of the files.
        channels: 3 for RGB, 1 for grey images.
        cache: Whether to keep the examples in memory.

    Raises:
        ValueError: `images` is empty, or `masks` differs in length; `values` or `colours` give a class that does not
            exist; or `weight` is given without `instances`.
    """

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path],
        classes: Sequence[str],
        name: str,
        *,
        values: Mapping[int, int] | None = None,
        colours: Colours | None = None,
        instances: bool = False,
        weight: Callable[[np.ndarray], np.ndarray] | None = None,
        size: tuple[int, int] | None = None,
        channels: int = 3,
        cache: bool = False,
    ):
        if not images or len(images) != len(masks):
            raise ValueError(f"images and masks must have one length of at least 1; got {len(images)} and {len(masks)}")
        if weight is not None and not instances:
            raise ValueError("weight must be None without instances, from which it is computed; got a function")
        checked_values(values or {}, classes)
        checked_values(colours or {}, classes, "colours")
        self.images, self.masks = list(images), list(masks)
        self.classes, self.name = tuple(classes), name
        self.values, self.colours, self.instances, self.weight = values, colours, instances, weight
        self.size, self.channels = size, channels
        super().__init__(cache)

    def __len__(self) -> int:
        return len(self.images)

    def _read(self, index: int) -> dict[str, np.ndarray]:
        path = self.masks[index]
        image = decode_image(self.images[index], channels=self.channels, orient=False)
        raw = read_mask(path, colours=self.colours, instances=self.instances)
        if raw.shape != image.shape[:2]:
            raise ValueError(
                f"{path} must have the size of its image, {image.shape[0]}x{image.shape[1]}; got"
                f" {raw.shape[0]}x{raw.shape[1]}"
            )
        example = {"image": image, "label": self._classes_of(raw, path)}
        if self.instances:
            example["instances"] = raw.astype(np.int32)
        if self.size is not None:
            example = fitted(example, self.size)
        if self.weight is not None:
            example["weight"] = np.asarray(self.weight(example["instances"]), np.float32)
        return example

    def _classes_of(self, raw: np.ndarray, path: Path) -> np.ndarray:
        if self.instances:
            return (raw > 0).astype(np.int32)
        return labels_of(raw, str(path), self.classes, None if self.colours is not None else self.values)

    def __repr__(self) -> str:
        return f"SegmentationSource({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the names and sizes of the files, and of the options."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        options = (self.classes, self.values, self.colours, self.instances, self.size, self.channels)
        digest.update(repr((options, self.weight is not None)).encode())
        for path in (*self.images, *self.masks):
            digest.update(f"{path.name}/{path.stat().st_size}/".encode())
        return digest.hexdigest()


def checked_values(table: Mapping[Any, int], classes: Sequence[str], option: str = "values") -> Mapping[Any, int]:
    """Returns `table`, which maps values of masks to classes.

    Raises:
        ValueError: An entry is neither an index of `classes` nor 255.
    """
    for value, index in table.items():
        if index != IGNORED and not 0 <= index < len(classes):
            raise ValueError(f"{option} must give classes below {len(classes)} or 255; got {index} for {value}")
    return table


def labels_of(raw: np.ndarray, where: str, classes: Sequence[str], values: Mapping[int, int] | None) -> np.ndarray:
    """Maps the values of a mask to classes, int32 [H, W]. If `values` is None, the values are the classes.

    Raises:
        ValueError: A value has no class.
    """
    if values is None:
        label, known = raw.astype(np.int32), (raw < len(classes)) | (raw == IGNORED)
    else:
        table = np.full(256, -1, np.int32)
        for value, index in values.items():
            table[value] = index
        label = table[raw]
        known = label >= 0
    if not known.all():
        row, column = np.argwhere(~known)[0]
        right = f"a class below {len(classes)} or 255" if values is None else f"in {sorted(values)}"
        raise ValueError(f"values of {where} must be {right}; got {raw[row, column]} at row {row}, column {column}")
    return label


def read_mask(path: str | os.PathLike[str], *, colours: Colours | None = None, instances: bool = False) -> np.ndarray:
    """Reads a mask.

    Args:
        path: The file.
        colours: Maps each RGB colour to a class. None for a palette or grey image.
        instances: Whether the mask may have 16 or 32 bits.

    Returns:
        The value of every pixel [H, W], int32 with `instances` and uint8 otherwise. With `colours`, the class of every
        pixel, uint8.

    Raises:
        ValueError: The file is not a readable image; it is a colour image without `colours`, or a grey image with
            `colours`; it has 16 or 32 bits without `instances`; or a colour is not in `colours`.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.load()
            mode, pixels = opened.mode, np.asarray(opened)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
    if colours is None:
        if mode.startswith("I") and not instances:
            raise ValueError(f"{path} must be an 8-bit mask; got {mode}, of 16 or 32 bits")
        if mode not in ("P", "L", "1") and not mode.startswith("I"):
            raise ValueError(f"{path} must be a palette or grey image of indices; got {mode}; pass colours to read it")
        return pixels.astype(np.int32) if instances else pixels.astype(np.uint8)
    if mode not in ("RGB", "RGBA", "P"):
        raise ValueError(f"{path} must be an RGB or palette image, because colours are given; got {mode}")
    if mode == "P":
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    codes = (pixels[..., :3].astype(np.int64) * (65536, 256, 1)).sum(-1)
    result = np.full(codes.shape, -1, np.int64)
    for (red, green, blue), index in colours.items():
        result[codes == red * 65536 + green * 256 + blue] = index
    if (result < 0).any():
        row, column = np.argwhere(result < 0)[0]
        colour = tuple(int(c) for c in pixels[row, column, :3])
        raise ValueError(f"colours must hold every colour of {path}; got {colour} at row {row}, column {column}")
    return result.astype(np.uint8)


def fitted(example: Mapping[str, np.ndarray], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Resizes an example to fit into a size, keeping its aspect ratio, and pads it at the bottom and right.

    Args:
        example: `image` uint8 [H, W, C], `label` [H, W] and optionally `instances` [H, W]. The image is resized
            bilinearly with antialiasing, and padded with 0. The others are resized by nearest neighbour; `label` is
            padded with 255, and `instances` with 0.
        size: Height and width of the result.

    Returns:
        The resized and padded example.
    """
    from PIL import Image

    height, width = example["image"].shape[:2]
    factor = min(size[0] / height, size[1] / width)
    inner = (min(size[0], max(1, round(height * factor))), min(size[1], max(1, round(width * factor))))
    result = {}
    for key, value in example.items():
        if inner != (height, width):
            if key == "image":
                picture = Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value)
                resized = np.asarray(picture.resize((inner[1], inner[0]), Image.Resampling.BILINEAR))
                value = resized.reshape(*inner, value.shape[-1])
            else:
                rows, columns = (
                    np.minimum(((np.arange(new) + 0.5) * old / new).astype(int), old - 1)
                    for new, old in zip(inner, (height, width), strict=True)
                )
                value = value[rows[:, None], columns]
        around = [(0, full - part) for full, part in zip(size, inner, strict=True)] + [(0, 0)] * (value.ndim - 2)
        result[key] = np.pad(value, around, constant_values=IGNORED if key == "label" else 0)
    return result
