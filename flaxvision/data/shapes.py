"""Procedurally drawn shapes with exact boxes and masks: a detection data set that needs no files.

The random numbers are the raw output of a counter-based generator, which NumPy keeps stable across versions. The images
are computed from them by additions, multiplications, divisions, square roots and rounding only. The pixels therefore do
not depend on the version of NumPy or on the platform.
"""

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from flaxvision.data.arrays import check_split

CLASSES = ("disc", "box", "triangle")
MAX_OBJECTS = 6
_SPLITS = {"train": 2000, "val": 200, "test": 500}
_SIDES = (72, 97)  # shortest side, and longest side plus one
_VISIBLE = 0.55  # minimum fraction of an object that stays visible
_EMPTY = 0.05  # fraction of the images without objects
_CONTRAST = 0.2  # minimum difference between the mean colours of an object and of what it covers, in some channel
_VERSION = 1


class _Draw:
    """The random number generator of one image."""

    def __init__(self, split: int, index: int):
        self._bits = np.random.Philox(np.random.SeedSequence([_VERSION, split, index]))

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Returns float64 numbers, uniform in [low, high)."""
        raw = self._bits.random_raw(int(np.prod(shape, dtype=int)))
        return low + (high - low) * ((np.asarray(raw) >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def number(self, low: float, high: float) -> float:
        """Returns one number, uniform in [low, high)."""
        return float(self.uniform(low, high, (1,))[0])

    def integer(self, low: int, high: int) -> int:
        """Returns an integer, uniform in [low, high)."""
        return low + int(self.number(0, high - low))

    def direction(self) -> tuple[float, float]:
        """Returns a unit vector, uniform over the circle."""
        while True:
            x, y = self.uniform(-1, 1, (2,)).tolist()
            square = x * x + y * y
            if 0.01 < square <= 1:
                return x / square**0.5, y / square**0.5


class ShapesSource:
    """Discs, boxes and triangles that overlap on textured, noisy backgrounds.

    An image is 72 to 96 pixels high and wide and has 0 to 6 objects: filled shapes of any rotation, colour and
    texture. Lines across the background are distractors. `source[i]` is a dict with `image` uint8 [H, W, 3], `boxes`
    float32 [M, 4] xyxy in pixels, `labels` int32 [M], `valid`, `crowd` and `difficult` bool [M] and, if requested,
    `masks` bool [M, H, W]. A mask marks exactly the visible pixels of an object, and its box is the tightest around
    them.

    Args:
        split: "train" (2,000 images), "val" (200) or "test" (500).
        masks: Whether the examples have `masks`.
        length: Number of images; None for the number above. It does not change the images.

    Attributes:
        sizes: Height and width of each image, int [N, 2].
        counts: Upper bound of the number of objects of each image, int [N].

    Raises:
        ValueError: `split` is not one of the three, or `length` is below 1.
    """

    classes: tuple[str, ...] = CLASSES

    def __init__(self, split: str, *, masks: bool = False, length: int | None = None):
        check_split("shapes", split, tuple(_SPLITS))
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1 or None; got {length}")
        self.name, self.masks = f"shapes/{split}", masks
        self._length = _SPLITS[split] if length is None else length
        self._part = tuple(_SPLITS).index(split)

    def __len__(self) -> int:
        return self._length

    @cached_property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, int [N, 2]."""
        return np.array([_size(_Draw(self._part, index)) for index in range(len(self))])

    @property
    def counts(self) -> np.ndarray:
        """Upper bound of the number of objects of each image, int [N]."""
        return np.full(len(self), MAX_OBJECTS)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        draw = _Draw(self._part, int(index) % len(self))
        height, width = _size(draw)
        image = _background(draw, height, width)
        owner = np.zeros((height, width), np.int64)  # 0 for the background, k for the k-th object
        labels: list[int] = []
        whole: list[int] = []
        wanted = draw.integer(1, MAX_OBJECTS + 1)
        for _ in range(0 if draw.number(0, 1) < _EMPTY else wanted):
            label, mask = _shape(draw, height, width)
            texture = _texture(draw, height, width)
            # Skip an object that would hide too much of another one.
            left = [np.count_nonzero((owner == k + 1) & ~mask) for k in range(len(labels))]
            if mask.any() and all(n >= _VISIBLE * full for n, full in zip(left, whole, strict=True)):
                labels.append(label)
                whole.append(int(np.count_nonzero(mask)))
                owner[mask] = len(labels)
                mean = texture[mask].mean(0)
                if np.abs(mean - image[mask].mean(0)).max() < _CONTRAST:
                    texture = texture + np.where(mean < 0.5, 0.4, -0.4)
                image = np.where(mask[..., None], texture, image)
        noise = draw.uniform(-1, 1, (height, width, 3)) + draw.uniform(-1, 1, (height, width, 3))
        image = image + draw.number(0.01, 0.05) * noise
        masks = owner[None] == np.arange(1, len(labels) + 1)[:, None, None]
        flags = np.zeros(len(labels), bool)
        return {
            "image": np.floor(255 * image.clip(0, 1) + 0.5).astype(np.uint8),
            "boxes": np.array([_enclosing(mask) for mask in masks], np.float32).reshape(-1, 4),
            "labels": np.array(labels, np.int32),
            "valid": ~flags,
            "crowd": flags,
            "difficult": flags.copy(),
            **({"masks": masks} if self.masks else {}),
        }

    def __repr__(self) -> str:
        return f"ShapesSource({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the name, the length, `masks` and the first ten images."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(f"{self.name}/{len(self)}/{self.masks}".encode(), digest_size=16)
        for index in range(min(10, len(self))):
            digest.update(self[index]["image"].tobytes())
        return digest.hexdigest()


def _size(draw: _Draw) -> tuple[int, int]:
    return draw.integer(*_SIDES), draw.integer(*_SIDES)


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the centres of the pixels, y [H, 1] and x [1, W]."""
    return np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5


def _texture(draw: _Draw, height: int, width: int, contrast: float = 0.12) -> np.ndarray:
    """Returns a plain colour, or a colour with stripes or checks, [H, W, 3]."""
    colour, other = draw.uniform(0, 1, (3,)), draw.uniform(-contrast, contrast, (3,))
    kind, (cos, sin), period = draw.integer(0, 3), draw.direction(), draw.number(3, 11)
    y, x = _grid(height, width)
    along, across = (cos * x + sin * y) / period, (cos * y - sin * x) / period
    if kind == 0:
        level = np.zeros((height, width))
    elif kind == 1:
        level = np.abs(2 * (along - np.floor(along)) - 1)
    else:
        level = (np.floor(along) + np.floor(across)) % 2
    return colour + level[..., None] * other


def _background(draw: _Draw, height: int, width: int) -> np.ndarray:
    """Returns a texture with a gradient and up to four lines, [H, W, 3]."""
    image = _texture(draw, height, width)
    y, x = _grid(height, width)
    slope = draw.uniform(-0.3, 0.3, (2,))
    image = image + (slope[0] * (y / height - 0.5) + slope[1] * (x / width - 0.5))[..., None]
    for _ in range(draw.integer(0, 5)):
        (cos, sin), place, colour = draw.direction(), draw.uniform(0, 1, (2,)), draw.uniform(0, 1, (3,))
        distance = np.abs(cos * (x - place[0] * width) + sin * (y - place[1] * height))
        image = np.where((distance < draw.number(0.5, 1.5))[..., None], colour, image)
    return image


def _shape(draw: _Draw, height: int, width: int) -> tuple[int, np.ndarray]:
    """Draws a class and a shape of it within the image; returns the class and the mask [H, W]."""
    label, radius = draw.integer(0, len(CLASSES)), draw.number(0.15, 0.28) * min(height, width)
    place, (cos, sin) = draw.uniform(0, 1, (2,)), draw.direction()
    y, x = _grid(height, width)
    y = y - (radius + place[0] * (height - 2 * radius))
    x = x - (radius + place[1] * (width - 2 * radius))
    along, across = cos * x + sin * y, cos * y - sin * x
    kinds: tuple[Callable[[], np.ndarray], ...] = (
        lambda: along * along + across * across < radius * radius,
        lambda: _rectangle(draw, along, across, radius),
        # An equilateral triangle with its corners on the circle: its sides are half a radius from the centre.
        lambda: np.maximum(-along, np.maximum(_turned(along, across, 1), _turned(along, across, -1))) < radius / 2,
    )
    return label, kinds[label]()


def _rectangle(draw: _Draw, along: np.ndarray, across: np.ndarray, radius: float) -> np.ndarray:
    share = draw.number(0.45, 0.9)  # half of one side, relative to the radius; the corners lie on the circle
    return (np.abs(along) < share * radius) & (np.abs(across) < (1 - share * share) ** 0.5 * radius)


def _turned(along: np.ndarray, across: np.ndarray, side: int) -> np.ndarray:
    return 0.5 * along + side * (0.75**0.5) * across


def _enclosing(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Returns the tightest xyxy box around the pixels of a mask [H, W]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
