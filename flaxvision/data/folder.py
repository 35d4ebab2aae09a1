"""Folders of class folders as sources."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision.data.arrays import check_split, stratified_split
from flaxvision.data.decode import check_channels, check_image_size, decode_image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_VAL = ("val", "valid", "validation")
_SUBFOLDERS = {"train": ("train", "training"), "test": ("test", *_VAL), "val": (*_VAL, "test")}


class FolderSource:
    """Image files, decoded on access.

    Args:
        root: The folder.
        paths: [N] paths relative to `root`.
        label: [N] class indices.
        classes: Class names.
        name: Name of the source.
        image_size: Height and width of every image in pixels, or None to keep the size of each file; see
            `flaxvision.data.decode.decode_image`.
        channels: 3 for RGB, 1 for grayscale.
        orient: Whether to apply the EXIF orientation.

    Raises:
        ValueError: `channels` or `image_size` is out of range.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        label: np.ndarray,
        classes: Sequence[str],
        name: str,
        *,
        image_size: int | None = 224,
        channels: int = 3,
        orient: bool = True,
    ):
        check_channels(channels)
        check_image_size(image_size)
        self.root, self.paths, self.label = Path(root), tuple(paths), np.asarray(label, np.int32)
        self.classes, self.name = tuple(classes), name
        self.image_size, self.channels, self.orient = image_size, channels, orient

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        path = self.root / self.paths[index]
        image = decode_image(path, channels=self.channels, image_size=self.image_size, orient=self.orient)
        return {"image": image, "label": self.label[index]}

    def __repr__(self) -> str:
        return f"FolderSource({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the name, the decoding options, and the path, size and label of every file."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        identity = f"{self.name}/{self.image_size}/{self.channels}" + ("" if self.orient else "/as stored")
        digest = hashlib.blake2b(identity.encode(), digest_size=16)
        for path, label in zip(self.paths, self.label, strict=True):
            digest.update(f"/{path}/{(self.root / path).stat().st_size}/{label}".encode())
        return digest.hexdigest()

    def verify(self, *, progress: bool = True) -> None:
        """Decodes every file once.

        Args:
            progress: Whether to show a progress bar.

        Raises:
            ValueError: Some files cannot be decoded; the message names the first five.
        """
        from tqdm import tqdm

        def damage(path: str) -> str | None:
            try:
                decode_image(self.root / path, channels=self.channels)
            except ValueError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16), thread_name_prefix="flaxvision-verify") as pool:
            results = pool.map(damage, self.paths)
            bar = tqdm(results, f"checking {self.name}", len(self), disable=not progress, unit="file", leave=False)
            damaged = [message for message in bar if message is not None]
        if damaged:
            more = f" (and {len(damaged) - 5} more)" if len(damaged) > 5 else ""
            raise ValueError(f"{len(damaged)} of {len(self)} images cannot be decoded: {'; '.join(damaged[:5])}{more}")


def load_folder(
    folder: Path,
    split: str,
    *,
    seed: int = 0,
    image_size: int | None = 224,
    channels: int = 3,
    orient: bool = True,
) -> FolderSource:
    """Opens one split of a folder of class folders.

    The subfolder `train` (or `training`) is the training part, and `test` or `val` (or `valid`, `validation`) is the
    held-out part. If there is only one of `test` and `val`, it serves as both. Without a held-out part, or if the class
    folders are in `folder` itself, 20 % of each class is held out. The classes are the sorted names of the class
    folders of the training part. Files without an image suffix are ignored.

    Args:
        folder: The folder.
        split: "train", "test" or "val". A folder without parts also has "all", which is every image.
        seed: Seed of the split, if the folder has no held-out part.
        image_size: As in `FolderSource`.
        channels: As in `FolderSource`.
        orient: As in `FolderSource`.

    Raises:
        ValueError: There is no such split, there are no class folders, a class folder has no image, or the held-out
            part has a class that the training part lacks.
    """
    parts = {part: _first_folder(folder, names) for part, names in _SUBFOLDERS.items()}
    check_split(str(folder), split, (*_SUBFOLDERS,) if any(parts.values()) else (*_SUBFOLDERS, "all"))
    name = f"{folder.resolve().name}/{split}"
    options: Any = {"image_size": image_size, "channels": channels, "orient": orient}
    if split == "all":
        classes = _class_names(folder)
        return FolderSource(folder, *_list_images(folder, classes), classes, name, **options)
    if parts["train"] is None and parts["test"] is not None:
        raise ValueError(f"{folder} has a subfolder {parts['test'].name!r} but no subfolder 'train'; it must have both")
    train_root = parts["train"] or folder
    classes = _class_names(train_root)
    root = parts[split] if parts["test"] is not None else train_root
    assert root is not None
    if unknown := sorted(set(_class_names(root)) - set(classes)):
        raise ValueError(f"{root / unknown[0]} is a class that the training part {train_root} lacks; add it there")
    paths, label = _list_images(root, classes)
    if parts["test"] is None:
        train, held_out = stratified_split(label, seed=seed, keys=paths)
        chosen = train if split == "train" else held_out
        paths, label = [paths[i] for i in chosen], label[chosen]
    return FolderSource(root, paths, label, classes, name, **options)


def _first_folder(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _class_names(root: Path) -> list[str]:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{root} has no class folders; it must have one folder of images per class")
    return names


def _list_images(root: Path, classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    paths, label = [], []
    for k, name in enumerate(classes):
        if not (root / name).is_dir():
            continue
        found = sorted(
            path.relative_to(root).as_posix()
            for path in (root / name).rglob("*")
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
        if not found:
            raise ValueError(f"{root / name} has no images; a class folder must have at least one")
        paths += found
        label += [k] * len(found)
    return paths, np.array(label, np.int32)
