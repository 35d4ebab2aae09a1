"""Segmentation data sets by name: `load_segmentation`, folders, and the drawn shapes."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision.data.arrays import Source
from flaxvision.data.segmentation_classes import ADE20K_CLASSES, ADE20K_VALUES, VOC_CLASSES
from flaxvision.data.segmentation_source import IGNORED, KeptExamples, SegmentationSource
from flaxvision.data.segmentation_tfds import SETS, load_tfds_segmentation
from flaxvision.data.shapes import ShapesSource

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_IMAGES = ("images", "image", "JPEGImages")
_MASKS = ("masks", "mask", "labels", "label", "annotations", "trimaps", "SegmentationClass")


class ShapesMaps(KeptExamples):
    """The drawn shapes of `ShapesSource` as a segmentation data set. Class 0 is the background.

    `source[i]` is a dict with `image` uint8 [96, 96, 3], padded with 0, and `label` int32 [96, 96], 255 in the padding.

    Args:
        split: "train", "val" or "test"; see `ShapesSource`.
        instances: Whether the examples have `instances` int32 [96, 96] too.
        cache: Whether to keep the examples in memory. Drawing one takes 4 ms.
    """

    classes = ("background", *ShapesSource.classes)

    def __init__(self, split: str, *, instances: bool = False, cache: bool = False):
        self._shapes, self.instances = ShapesSource(split, masks=True), instances
        super().__init__(cache)
        self.name = f"{self._shapes.name}/maps"

    def __len__(self) -> int:
        return len(self._shapes)

    def _read(self, index: int) -> dict[str, Any]:
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
            * "folder": a folder with the subfolders `images` and `masks`, or other common names such as `labels`. An
              image and its mask have the same file name apart from the suffix. Each split may have its own folder with
              these subfolders. Otherwise, a file `SPLIT.txt` with one name per line lists a split, or `index.csv` with
              the columns `name` and `split`. The split "all" holds all images in natural order. "train[:80]" and
              "all[24:]" are parts of a split;
            * "voc": the layout and classes of PASCAL VOC: `JPEGImages`, `SegmentationClass` and optionally
              `ImageSets/Segmentation/SPLIT.txt`;
            * "ade20k": the layout of the archive ADEChallengeData2016: `images/SPLIT` and `annotations/SPLIT` for the
              splits "training" and "validation", with the 150 classes of the scene parsing benchmark;
            * "oxford_iiit_pet": a prepared TFDS set, with the classes pet, background and border;
            * "cityscapes": a prepared TFDS set, with the 19 classes of the benchmark. Its files must be downloaded by
              hand before TFDS can prepare it;
            * "scene_parse150": a prepared TFDS set. Despite its name, TFDS prepares it from the instance annotations
              of ADE20K, which have only 100 of the 150 classes. All other pixels are unknown.
        split: Name of the split.
        data_dir: The folder. For a TFDS name, the directory of prepared sets; None for the default of TFDS. Preparing
            needs TensorFlow, reading does not.
        classes: Class names, for "folder"; for "ade20k" and TFDS only together with `values`. None for the classes of
            the data set; for "folder", the lines of `classes.txt`, with or without leading numbers.
        **options: Options of `SegmentationSource`: `values`, `colours`, `instances`, `weight`, `size`, `channels` and
            `cache`. For "shapes", only `instances` and `cache`; for TFDS, `values`, `size`, `channels` and `cache`.

    Returns:
        The source.

    Raises:
        ValueError: The data set or split does not exist, a file is missing, an image has no mask, or a mask no image.
        RuntimeError: The TFDS set is not prepared.
    """
    if name == "shapes":
        return ShapesMaps(split, **options)
    known = ("shapes", "folder", "voc", "ade20k", *SETS)
    if name.split("/")[0].split(":")[0] in SETS:
        for option in ("colours", "instances", "weight"):
            if value := options.pop(option, None):
                raise ValueError(
                    f"{option} must be left out for the TFDS set {name!r}, whose masks hold classes; got {value}"
                )
        return load_tfds_segmentation(name, split, data_dir=data_dir, classes=classes, **options)
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}; got {name!r}")
    if data_dir is None or not Path(data_dir).expanduser().is_dir():
        raise ValueError(f"data_dir must be an existing folder for {name!r}; got {data_dir}")
    folder = Path(data_dir).expanduser()
    part = re.fullmatch(r"(?P<split>.+)\[(?P<low>\d*):(?P<high>\d*)\]", split)
    whole = part["split"] if part else split
    base = folder / whole if (folder / whole).is_dir() else folder
    if name == "ade20k":
        images, masks = (_one_of(folder / part, (whole,), part) for part in ("images", "annotations"))
        if classes is None and not options.get("values"):
            classes, options["values"] = ADE20K_CLASSES, ADE20K_VALUES
    else:
        images, masks = _one_of(base, _IMAGES, "images"), _one_of(base, _MASKS, "masks")
    pairs = _pairs(images, masks)
    lists = [folder / f"{whole}.txt", folder / "ImageSets" / "Segmentation" / f"{whole}.txt"]
    if base == folder and name != "ade20k":
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
