"""Images with boxes: `DetectionSource`, and the checks that all readers of annotations share.

`flaxvision.data.annotation_files` reads PASCAL VOC, COCO and YOLO annotations into a `DetectionSource`.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision.data import rle
from flaxvision.data.folder import FolderSource

# A box may exceed its image by this many pixels, for example by rounding. It is then clipped.
OVERHANG = 1.0


@dataclasses.dataclass(frozen=True)
class Annotation:
    """The annotation of one image.

    Attributes:
        path: Path of the image, relative to the root of the source.
        file: File with the annotation, for error messages.
        size: Height and width of the image in pixels.
        boxes: float32 [M, 4], xyxy in pixels.
        labels: int32 [M], class indices.
        crowd: bool [M], whether a box marks a group of objects that are not annotated individually.
        difficult: bool [M], whether an object is marked as difficult to recognise.
        area: float32 [M], area of each object in square pixels; None for the area of the box.
        masks: The compressed RLE of each object; see `flaxvision.data.rle`. None if masks were not read.
    """

    path: str
    file: str
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    area: np.ndarray | None = None
    masks: tuple[bytes, ...] | None = None


class DetectionSource:
    """Image files with boxes. Images are decoded on access; annotations are kept in memory.

    `source[i]` is a dict with `image` uint8 [H, W, 3], `boxes` float32 [M, 4] xyxy in pixels, `labels` int32 [M],
    `valid`, `crowd` and `difficult` bool [M] and, if the annotations have them, `area` float32 [M] and `masks` uint8
    [M, H, W]. Images without objects are kept, with M = 0. The EXIF orientation is not applied, because annotations
    refer to the stored pixels.

    Args:
        root: Folder that the paths of the images are relative to.
        annotations: One annotation per image.
        classes: Class names; label `k` means `classes[k]`.
        name: Name of the source.
        dropped: Descriptions of the boxes that were left out.
        category_ids: The id of each class in its data set. None if the ids are the labels.

    Attributes:
        sizes: Height and width of each image, int [N, 2].
        counts: Number of objects of each image, int [N].
        dropped: Descriptions of the boxes that were left out.
        category_ids: The id of each class in its data set.
    """

    def __init__(
        self,
        root: Path,
        annotations: Sequence[Annotation],
        classes: Sequence[str],
        name: str,
        *,
        dropped: Sequence[str] = (),
        category_ids: Sequence[int] | None = None,
    ):
        self.annotations, self.classes, self.name = tuple(annotations), tuple(classes), name
        self.dropped = tuple(dropped)
        self.category_ids = tuple(range(len(self.classes)) if category_ids is None else category_ids)
        self.sizes = np.array([a.size for a in self.annotations], np.int64).reshape(-1, 2)
        self.counts = np.array([len(a.boxes) for a in self.annotations], np.int64)
        paths = [a.path for a in self.annotations]
        labels = np.zeros(len(paths), np.int32)  # these images have no class labels
        self._files = FolderSource(root, paths, labels, self.classes, name, image_size=None, orient=False)

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        annotation = self.annotations[index]
        image = self._files[index]["image"]
        if image.shape[:2] != annotation.size:
            stored, stated = ("x".join(map(str, size)) for size in (image.shape[:2], annotation.size))
            raise ValueError(
                f"{self._files.root / annotation.path} is {stored} pixels high and wide, but {annotation.file} states "
                f"{stated}: correct the annotation or replace the image"
            )
        return {"image": image, **self.objects(index)}

    def objects(self, index: int) -> dict[str, np.ndarray]:
        """Returns the example without `image`, and without decoding the image."""
        a = self.annotations[index]
        arrays = {"boxes": a.boxes, "labels": a.labels, "crowd": a.crowd, "difficult": a.difficult}
        arrays["valid"] = np.ones(len(a.boxes), bool)
        if a.area is not None:
            arrays["area"] = a.area
        copies = {key: value.copy() for key, value in arrays.items()}
        return copies if a.masks is None else {**copies, "masks": rle.decode(a.masks, a.size)}

    def __repr__(self) -> str:
        return f"DetectionSource({self.name!r}, {len(self)} images, {int(self.counts.sum())} boxes)"

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the names and sizes of the files and of all annotations."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(f"{self._files.fingerprint}/{self.classes}".encode(), digest_size=16)
        for a in self.annotations:
            digest.update(f"/{a.size}".encode())
            for array in (a.boxes, a.labels, a.crowd, a.difficult, a.area):
                digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
            if a.masks is not None:
                digest.update(b"/".join((b"masks", *a.masks)))
        return digest.hexdigest()

    def find_broken(self, *, progress: bool = True) -> dict[int, str]:
        """Decodes every image once; see `FolderSource.find_broken`."""
        return self._files.find_broken(progress=progress)

    def verify(self, *, progress: bool = True) -> None:
        """Decodes every image once and raises ValueError if some are damaged; see `FolderSource.verify`."""
        self._files.verify(progress=progress)

    def without_broken(self, *, progress: bool = True) -> tuple["DetectionSource", list[str]]:
        """Decodes every image once and leaves out those that are missing or damaged.

        Returns:
            A source of the other images, and a description of the fault of each image that was left out.

        Raises:
            ValueError: No image is left.
        """
        if not (broken := self.find_broken(progress=progress)):
            return self, []
        kept = [a for index, a in enumerate(self.annotations) if index not in broken]
        if not kept:
            raise ValueError(f"{self.name!r} has no sound image: {next(iter(broken.values()))}")
        options: Any = {"dropped": self.dropped, "category_ids": self.category_ids}
        return DetectionSource(self._files.root, kept, self.classes, self.name, **options), [*broken.values()]


class Objects:
    """Collects and checks the objects of one image.

    Args:
        file: File with the annotation, for error messages.
        size: Height and width of the image in pixels.
        drop_empty: Whether to leave out boxes of zero width or height instead of raising an error.
        dropped: List to which a description of each box that is left out is appended.
        with_area: Whether the annotations state the areas of the objects.
        with_masks: Whether the annotations have masks.
    """

    def __init__(
        self,
        file: str,
        size: tuple[int, int],
        drop_empty: bool,
        dropped: list[str],
        *,
        with_area: bool = False,
        with_masks: bool = False,
    ):
        if not (size[0] >= 1 and size[1] >= 1):
            raise ValueError(f"the image size in {file} must be at least 1x1; got {size[0]}x{size[1]}")
        self.file, self.size, self._drop_empty, self._dropped = file, size, drop_empty, dropped
        self._with_area, self._with_masks = with_area, with_masks
        self._rows: list[tuple[np.ndarray, int, bool, bool, float, bytes]] = []
        self._seen = 0

    def add(
        self,
        box: Sequence[float],
        label: int,
        *,
        name: str,
        crowd: bool = False,
        difficult: bool = False,
        area: float = 0.0,
        mask: bytes = b"",
        empty: bool = False,
    ) -> None:
        """Checks and adds an object.

        Args:
            box: xyxy in pixels.
            label: Its class index.
            name: Name of its class, for error messages.
            crowd: See `Annotation`.
            difficult: See `Annotation`.
            area: See `Annotation`.
            mask: Its compressed RLE, with `with_masks`.
            empty: Whether the annotation states a width or height of zero. Rounding can hide this in `box`.

        Raises:
            ValueError: The box is not finite, is inverted, does not lie in its image, or has zero width or height
                without `drop_empty`, or the mask has no pixel without it.
        """
        self._seen += 1
        x1, y1, x2, y2 = (float(v) for v in box)
        height, width = self.size
        where = f"box {self._seen} ({name}) in {self.file}"
        if not np.isfinite([x1, y1, x2, y2]).all():
            raise ValueError(f"{where} must be finite; got {[x1, y1, x2, y2]}")
        if x2 < x1 or y2 < y1:
            raise ValueError(f"{where} must have its first corner at the top left; got {[x1, y1, x2, y2]}")
        if empty or x1 == x2 or y1 == y2:
            if not self._drop_empty:
                raise ValueError(
                    f"{where} must have an area above 0 (drop_empty=True leaves such boxes out); got {[x1, y1, x2, y2]}"
                )
            self._dropped.append(f"{where} has no area: {[x1, y1, x2, y2]}")
            return
        if self._with_masks and not rle.runs_of(mask)[1::2].any():
            if not self._drop_empty:
                raise ValueError(
                    f"{where} must have a mask with a pixel (drop_empty=True leaves such objects out); got none"
                )
            self._dropped.append(f"{where} has a mask without a pixel")
            return
        if min(x1, y1) < -OVERHANG or x2 > width + OVERHANG or y2 > height + OVERHANG:
            raise ValueError(f"{where} must lie in its image of {height}x{width} pixels; got {[x1, y1, x2, y2]}")
        clipped = np.array([max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)], np.float32)
        if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
            raise ValueError(f"{where} must lie in its image of {height}x{width} pixels; got {[x1, y1, x2, y2]}")
        self._rows.append((clipped, label, crowd, difficult, area, mask))

    def annotation(self, path: str) -> Annotation:
        """Returns the annotation of the image at `path`."""
        boxes, labels, crowd, difficult, area, masks = zip(*self._rows, strict=True) if self._rows else ([],) * 6
        return Annotation(
            path,
            self.file,
            self.size,
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(labels, np.int32),
            np.array(crowd, bool),
            np.array(difficult, bool),
            np.array(area, np.float32) if self._with_area else None,
            tuple(masks) if self._with_masks else None,
        )


def labels_in(classes: Sequence[str], own: Sequence[str], where: object) -> list[int]:
    """Returns the label of each class of a data set in a list of classes that includes them.

    Args:
        classes: The list.
        own: The classes of the data set.
        where: The data set, for the error message.

    Raises:
        ValueError: A class of the data set is not in the list.
    """
    if missing := [name for name in own if name not in classes]:
        raise ValueError(f"classes must include those of {where}; got none named {', '.join(missing)}")
    if list(classes) == list(own):
        return [*range(len(own))]
    return [list(classes).index(name) for name in own]


def pad_objects(example: dict[str, Any], count: int, name: str = "the example") -> dict[str, Any]:
    """Pads the objects of an example to a fixed number.

    Args:
        example: `boxes` [M, 4], `labels`, `valid` and optionally `crowd`, `difficult`, `area` [M], `masks` [M, h, w].
        count: Number of objects after padding.
        name: Name of the example, for the error message.

    Returns:
        A new example. Its rows from M on are zeros, so `valid` is False there.

    Raises:
        ValueError: The example has more than `count` objects.
    """
    have = len(example["boxes"])
    if have > count:
        raise ValueError(f"max_objects must be at least {have}, the number of objects in {name}; got {count}")
    padded = dict(example)
    for key in ("boxes", "labels", "valid", "crowd", "difficult", "area", "masks"):
        if key in example:
            value = np.asarray(example[key])
            padded[key] = np.concatenate([value, np.zeros((count - have, *value.shape[1:]), value.dtype)])
    return padded
