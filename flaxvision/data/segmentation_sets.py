"""Images with a class for every pixel: folders of images and masks, PASCAL VOC's layout, and the drawn shapes."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision.data.arrays import Source
from flaxvision.data.decode import decode_image
from flaxvision.data.shapes import ShapesSource

IGNORED = 255
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_IMAGES = ("images", "image", "JPEGImages")
_MASKS = ("masks", "mask", "labels", "label", "annotations", "trimaps", "SegmentationClass")

Colours = Mapping[tuple[int, int, int], int]


class SegmentationSource:
    """Image files with mask files, decoded on access.

    `source[i]` is a dict with `image` uint8 [H, W, C], `label` int32 [H, W] and, if requested, `instances` int32 [H, W]
    and `weight` float32 [H, W].

    Args:
        images: The image files.
        masks: The mask file of each image.
        classes: Class names.
        name: Name of the source.
        values: Class of each value of the masks; 255 for pixels without a known class. None for the value itself.
        colours: Class of each RGB colour, for masks in colour. None for masks of indices: palette or grey images.
        instances: Whether the values are the numbers of instances. Their pixels have class 1, and those of value 0 have
            class 0.
        weight: Function that computes the weight of every pixel from the instances, such as `border_weights`.
        size: Height and width to which images are resized, as far as their aspect ratio allows, and then padded at the
            bottom and right, with 255 in the label. None for the size of the files.
        channels: 3 for RGB, 1 for grey images.
        cache: Whether to keep the examples in memory.

    Raises:
        ValueError: There are no images, or not as many masks; `values` or `colours` give an unknown class; or there
            is a `weight` without `instances`.
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
            raise ValueError(f"masks must be as many as images, at least 1; got {len(masks)} and {len(images)}")
        if weight is not None and not instances:
            raise ValueError("weight must be None without instances, from which it is computed; got a function")
        for option, table in (("values", values), ("colours", colours)):
            for value, index in (table or {}).items():
                if index != IGNORED and not 0 <= index < len(classes):
                    raise ValueError(f"{option} must give classes below {len(classes)} or 255; got {index} for {value}")
        self.images, self.masks = list(images), list(masks)
        self.classes, self.name = tuple(classes), name
        self.values, self.colours, self.instances, self.weight = values, colours, instances, weight
        self.size, self.channels = size, channels
        self._kept: dict[int, dict[str, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        index = int(index) % len(self)
        if self._kept is None:
            return self._read(index)
        if index not in self._kept:
            self._kept[index] = self._read(index)
        return {key: value.copy() for key, value in self._kept[index].items()}

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
        if self.values is None or self.colours is not None:
            label, known = raw.astype(np.int32), (raw < len(self.classes)) | (raw == IGNORED)
        else:
            table = np.full(256, -1, np.int32)
            for value, index in self.values.items():
                table[value] = index
            label = table[raw]
            known = label >= 0
        if not known.all():
            row, column = np.argwhere(~known)[0]
            right = f"a class below {len(self.classes)} or 255" if self.values is None else f"in {sorted(self.values)}"
            raise ValueError(f"values of {path} must be {right}; got {raw[row, column]} at row {row}, column {column}")
        return label

    def __repr__(self) -> str:
        return f"SegmentationSource({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the names, sizes and options."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        options = (self.classes, self.values, self.colours, self.instances, self.size, self.channels)
        digest.update(repr((options, self.weight is not None)).encode())
        for path in (*self.images, *self.masks):
            digest.update(f"{path.name}/{path.stat().st_size}/".encode())
        return digest.hexdigest()


def read_mask(path: str | os.PathLike[str], *, colours: Colours | None = None, instances: bool = False) -> np.ndarray:
    """Reads a mask.

    Args:
        path: The file.
        colours: Class of each RGB colour. None for a mask of indices: a palette image or a grey one.
        instances: Whether the mask may have 16 bits.

    Returns:
        The index of every pixel [H, W], or with `colours` its class; uint8, or int32 for instances.

    Raises:
        ValueError: The file is not a readable image; it has colours where indices are expected, or the reverse; it has
            16 bits; or a colour is not in the table.
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
            raise ValueError(f"{path} must be a mask of 8 bits; got {mode}, of 16 or 32 bits")
        if mode not in ("P", "L", "1") and not mode.startswith("I"):
            raise ValueError(f"{path} must be a palette or grey image of indices; got {mode}; pass colours to read it")
        return pixels.astype(np.int32) if instances else pixels.astype(np.uint8)
    if mode not in ("RGB", "RGBA", "P"):
        raise ValueError(f"{path} must be an RGB image, because colours are given; got {mode}")
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
    """Resizes an example to fill a size as far as its aspect ratio allows, and pads it at the bottom and right.

    Args:
        example: `image` uint8 [H, W, C], resized bilinearly with antialiasing and padded with 0; `label` [H, W] and
            optionally `instances` [H, W], resized by nearest neighbour and padded with 255 and 0.
        size: Height and width of the result.

    Returns:
        The example of that size.
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


class ShapesMaps:
    """The drawn shapes of `ShapesSource` as a segmentation set: class 0 is the background.

    `source[i]` is a dict with `image` uint8 [96, 96, 3], padded with 0, and `label` int32 [96, 96], 255 in the padding.

    Args:
        split: "train", "val" or "test"; see `ShapesSource`.
        instances: Whether the examples have `instances` int32 [96, 96] too.
    """

    classes = ("background", *ShapesSource.classes)

    def __init__(self, split: str, *, instances: bool = False):
        self._shapes, self.instances = ShapesSource(split, masks=True), instances
        self.name = f"{self._shapes.name}/maps"

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        drawn = self._shapes[index]
        numbers = np.arange(1, len(drawn["labels"]) + 1)[:, None, None]
        height, width = drawn["image"].shape[:2]
        instances = (drawn["masks"] * numbers).sum(0, dtype=np.int32).reshape(height, width)
        label = np.concatenate([[0], drawn["labels"] + 1]).astype(np.int32)[instances]
        around = ((0, 96 - height), (0, 96 - width))
        example = {
            "image": np.pad(drawn["image"], (*around, (0, 0))),
            "label": np.pad(label, around, constant_values=IGNORED),
        }
        return example | ({"instances": np.pad(instances, around)} if self.instances else {})

    def __repr__(self) -> str:
        return f"ShapesMaps({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the shapes and the options."""
        return hashlib.blake2b(f"{self._shapes.fingerprint}/{self.instances}".encode(), digest_size=16).hexdigest()


def load_segmentation(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    **options: Any,
) -> Source:
    """Opens one split of a segmentation data set.

    Args:
        name: One of

            * "shapes": the drawn shapes, which need no files; see `ShapesMaps`;
            * "folder": a folder with a folder of images and one of masks, whose files have the same names apart from
              their endings: `images` and `masks` or `labels`. They may lie in a folder for each split. Otherwise a file
              `SPLIT.txt` with one name per line, or `index.csv` with the columns `name` and `split`, lists a split; or
              it is "all", in natural order. A part of a split is "train[:80]" or "all[24:]";
            * "voc": the layout of PASCAL VOC: `JPEGImages`, `SegmentationClass` and optionally
              `ImageSets/Segmentation/SPLIT.txt`; classes are those of VOC.
        split: Name of the split.
        data_dir: The folder.
        classes: Class names, for "folder". None reads one per line from `classes.txt`, with or without their numbers.
        **options: Options of `SegmentationSource`: `values`, `colours`, `instances`, `weight`, `size`, `channels` and
            `cache`. For "shapes", only `instances`.

    Returns:
        The source.

    Raises:
        ValueError: The set or split does not exist, a file is missing, or an image has no mask or a mask no image.
    """
    if name == "shapes":
        return ShapesMaps(split, **options)
    if name not in ("folder", "voc"):
        raise ValueError(f"name must be 'shapes', 'folder' or 'voc'; got {name!r}")
    if data_dir is None or not Path(data_dir).expanduser().is_dir():
        raise ValueError(f"data_dir must be an existing folder for {name!r}; got {data_dir}")
    folder = Path(data_dir).expanduser()
    part = re.fullmatch(r"(?P<split>.+)\[(?P<low>\d*):(?P<high>\d*)\]", split)
    whole = part["split"] if part else split
    base = folder / whole if (folder / whole).is_dir() else folder
    pairs = _pairs(_one_of(base, _IMAGES, "images"), _one_of(base, _MASKS, "masks"))
    lists = [folder / f"{whole}.txt", folder / "ImageSets" / "Segmentation" / f"{whole}.txt"]
    if base == folder:
        pairs = _chosen(pairs, whole, [file for file in lists if file.is_file()], folder)
    if part:
        low, high = (int(part[end]) if part[end] else None for end in ("low", "high"))
        pairs = dict([*pairs.items()][low:high])
    if classes is None:
        classes = VOC_CLASSES if name == "voc" else _class_names(folder)
    if not pairs:
        raise ValueError(f"split must hold images of {folder}; got none in {split!r}")
    images, masks = zip(*pairs.values(), strict=True)
    return SegmentationSource(images, masks, classes, f"{folder.resolve().name}/{split}", **options)


def _one_of(base: Path, names: Sequence[str], what: str) -> Path:
    for name in names:
        if (base / name).is_dir():
            return base / name
    raise ValueError(f"{base} must have a folder of {what}, such as {names[0]}; got none of {', '.join(names)}")


def _pairs(images: Path, masks: Path) -> dict[str, tuple[Path, Path]]:
    """Returns image and mask by name, in natural order."""

    def files(folder: Path) -> dict[str, Path]:
        found = [path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES]
        natural = lambda path: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", path.stem)]
        return {path.stem: path for path in sorted(found, key=natural)}

    pictures, labels = files(images), files(masks)
    for have, want, kind in ((pictures, labels, "a mask"), (labels, pictures, "an image")):
        if missing := [path for stem, path in have.items() if stem not in want]:
            place = masks if kind == "a mask" else images
            raise ValueError(f"{missing[0]} must have {kind} of the same name in {place}; got none")
    if not pictures:
        raise ValueError(f"{images} must hold images ({', '.join(_SUFFIXES)}); got none")
    return {stem: (path, labels[stem]) for stem, path in pictures.items()}


def _chosen(
    pairs: dict[str, tuple[Path, Path]], split: str, lists: Sequence[Path], folder: Path
) -> dict[str, tuple[Path, Path]]:
    """Returns the pairs of a split that is not a folder."""
    if split == "all":
        return pairs
    index = folder / "index.csv"
    if lists:
        names = [line.split()[0] for line in lists[0].read_text().splitlines() if line.strip()]
    elif index.is_file():
        with index.open(newline="") as file:
            rows = [*csv.DictReader(file)]
        names = [Path(row["name"]).stem for row in rows if row.get("split") == split]
        if not names:
            known = sorted({row.get("split", "") for row in rows})
            raise ValueError(f"split must be one of {', '.join(known)}, or all, for {folder}; got {split!r}")
    else:
        raise ValueError(f"split must be a folder, a list {split}.txt, or all, in {folder}; got {split!r}")
    if missing := [name for name in names if name not in pairs]:
        raise ValueError(f"{folder} must hold all images of {split!r}; got no {missing[0]}")
    return {name: pairs[name] for name in names}


def _class_names(folder: Path) -> tuple[str, ...]:
    file = folder / "classes.txt"
    if not file.is_file():
        raise ValueError(f"classes must be given, or listed in {file}; got None")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    return tuple(re.sub(r"^\d+[\s:,]+", "", line) for line in lines)
