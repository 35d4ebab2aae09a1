"""Procedurally drawn patterns: a data set without files, to try a program on."""

import hashlib
from typing import Any

import numpy as np

from flaxvision.data.arrays import ArraySource, check_split

_KINDS = ("stripes across", "stripes down", "checks", "dots", "rings")
# Two colours each, in [0, 1]. A mirrored image keeps its class.
_COLOURS = {"warm": ((0.95, 0.75, 0.3), (0.6, 0.15, 0.1)), "cool": ((0.45, 0.8, 0.95), (0.1, 0.2, 0.55))}
_SIZES = {"train": 1000, "test": 250}


class PatternSource:
    """Five patterns in warm and cool colours. Images differ in size, period, phase and contrast, and have noise.

    Image `i` has class `i mod 10`. It is drawn when it is read and depends on its index only.

    Args:
        split: "train" (1,000 images) or "test" (250).
        image_size: Height and width in pixels; None draws them from 72 to 128 for each image.

    Raises:
        ValueError: `split` is neither of the two.
    """

    classes = tuple(f"{colour} {kind}" for kind in _KINDS for colour in _COLOURS)

    def __init__(self, split: str, image_size: int | None = None):
        check_split("patterns", split, tuple(_SIZES))
        self.name, self.image_size = f"patterns/{split}", image_size
        self.label = np.arange(_SIZES[split], dtype=np.int32) % len(self.classes)
        self._part = tuple(_SIZES).index(split)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        label = self.label[index]
        rng = np.random.default_rng([self._part, int(index) % len(self)])
        kind, colour = divmod(int(label), len(_COLOURS))
        height, width = rng.integers(72, 129, 2) if self.image_size is None else (self.image_size,) * 2
        period = rng.uniform(0.12, 0.25) * min(height, width)
        y, x = np.arange(height)[:, None] / period + rng.uniform(), np.arange(width)[None] / period + rng.uniform()
        across, down = np.sin(2 * np.pi * y), np.sin(2 * np.pi * x)
        level = {
            "stripes across": across + 0 * down,
            "stripes down": down + 0 * across,
            "checks": np.sign(across * down),
            "dots": 2 * (across + down > 0.9) - 1.0,
            "rings": np.sin(2 * np.pi * np.hypot(y - height / period / 2, x - width / period / 2)),
        }[_KINDS[kind]]
        share = 0.5 + 0.5 * rng.uniform(0.5, 1.0) * level[..., None]
        light, dark = (np.array(c) for c in tuple(_COLOURS.values())[colour])
        image = share * light + (1 - share) * dark + rng.uniform(-0.1, 0.1) + rng.normal(0, 0.06, (height, width, 1))
        return {"image": np.round(255 * image.clip(0, 1)).astype(np.uint8), "label": label}

    def __repr__(self) -> str:
        return f"PatternSource({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def fingerprint(self) -> str:
        """Digest of the name, the size and the first ten images."""
        digest = hashlib.blake2b(f"{self.name}/{self.image_size}".encode(), digest_size=16)
        for index in range(len(self.classes)):
            digest.update(self[index]["image"].tobytes())
        return digest.hexdigest()

    def in_memory(self) -> ArraySource:
        """Draws all images into an `ArraySource`; requires `image_size`."""
        return ArraySource(np.stack([self[i]["image"] for i in range(len(self))]), self.label, self.classes, self.name)
