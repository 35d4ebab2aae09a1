"""Boxes and masks of the objects in instance maps."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np

from flaxvision.data.arrays import Source
from flaxvision.data.workers import bounded_map


class InstanceSource:
    """A detection source whose objects are the instances of a segmentation source.

    `source[i]` is a dict with `image` uint8 [H, W, C], `boxes` float32 [M, 4] xyxy in pixels, `labels` int32 [M],
    `valid`, `crowd` and `difficult` bool [M] and, if requested, `masks` uint8 [M, H, W]. A box is the smallest
    one that contains all pixels of its instance. Labels do not count the background: class k has the label k - 1. An
    instance whose pixels have several classes, or class 0, raises ValueError.

    Args:
        source: A source whose examples have `label` and `instances` [H, W]. In both, 0 is the background.
        masks: Whether the examples have `masks`.

    Attributes:
        sizes: Height and width of each image, int [N, 2].
        counts: Number of objects of each image, int [N].
    """

    def __init__(self, source: Source, *, masks: bool = False):
        self.source, self.masks = source, masks
        self.name, self.classes = source.name, tuple(source.classes[1:])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        example = self.source[int(index)]
        return {"image": example["image"], **self._objects(example, int(index))}

    def __repr__(self) -> str:
        return f"InstanceSource({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, int [N, 2]. The first access reads all examples."""
        return self._overview[0]

    @property
    def counts(self) -> np.ndarray:
        """Number of objects of each image, int [N]. The first access reads all examples."""
        return self._overview[1]

    @cached_property
    def _overview(self) -> tuple[np.ndarray, np.ndarray]:
        def look(index: int) -> tuple[tuple[int, ...], int]:
            numbers = self.source[index]["instances"]
            return numbers.shape, int(np.count_nonzero(np.unique(numbers)))

        sizes, counts = zip(*bounded_map(look, range(len(self))), strict=True)
        return np.array(sizes, np.int64), np.array(counts, np.int64)

    def _objects(self, example: dict[str, Any], index: int) -> dict[str, np.ndarray]:
        numbers, label = example["instances"], example["label"]
        found = np.unique(numbers[numbers > 0])
        # Compute the bounds of all instances in one pass over their pixels.
        place = np.searchsorted(found, numbers[numbers > 0])
        rows, columns = np.nonzero(numbers)
        boxes = np.empty((len(found), 4), np.float32)
        for k, (start, values) in enumerate(((np.inf, columns), (np.inf, rows), (-np.inf, columns), (-np.inf, rows))):
            bound = np.full(len(found), start)
            (np.minimum if k < 2 else np.maximum).at(bound, place, values)
            boxes[:, k] = bound + (k >= 2)
        first = np.unique(place, return_index=True)[1]
        classes = label[rows[first], columns[first]]
        wrong = (label[rows, columns] != classes[place]) | ~((classes > 0) & (classes < len(self.source.classes)))[
            place
        ]
        if wrong.any():
            number = found[place[np.argmax(wrong)]]
            raise ValueError(
                f"instance {number} of {self.name}[{index}] must have one class above 0; got"
                f" {np.unique(label[numbers == number]).tolist()}"
            )
        flags = np.zeros(len(found), bool)
        objects = {"boxes": boxes, "labels": (classes - 1).astype(np.int32)}
        objects |= {"valid": ~flags, "crowd": flags, "difficult": flags.copy()}
        return objects | ({"masks": (numbers[None] == found[:, None, None]).astype(np.uint8)} if self.masks else {})

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the fingerprint of the source and of `masks`."""
        identity = f"{self.source.fingerprint}/instances/{self.masks}"
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
