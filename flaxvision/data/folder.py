"""Folders of class folders as sources."""

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision import processes
from flaxvision.data.arrays import check_split, stratified_split
from flaxvision.data.decode import check_channels, check_image_size, decode_image
from flaxvision.data.workers import bounded_map

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# Seconds before an error of the file system is met again; what is missing or damaged is not tried again.
_PAUSES = (0.5, 2.0)
_CHUNK = 1024  # files whose sizes one thread asks for at a time
_MAX_CLASSES = 2000  # that are listed in a fingerprint
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
        return {"image": self._decode(index, self.image_size), "label": self.label[index]}

    def __repr__(self) -> str:
        return f"FolderSource({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the decoding options and of the relative path, size and label of every file.

        It depends neither on the name of the folder nor on where the folder is. Files are not opened: a file whose
        content changes but not its size, such as a repaired one, keeps its part of the fingerprint.
        """
        return self._identity[0]

    @property
    def contents(self) -> dict[str, Any]:
        """The parts of the fingerprint, as JSON values: the options, and count and digest of the files of a class.

        With more than 2,000 classes, the classes are left out.
        """
        return self._identity[1]

    @cached_property
    def _identity(self) -> tuple[str, dict[str, Any]]:
        options = {"image_size": self.image_size, "channels": self.channels, "orient": self.orient}
        whole = hashlib.blake2b(repr(options).encode(), digest_size=16)
        parts = {label: hashlib.blake2b(digest_size=8) for label in np.unique(self.label).tolist()}
        for path, size, label in zip(self.paths, self._sizes(), self.label.tolist(), strict=True):
            text = f"/{path}/{size}".encode(errors="surrogateescape")
            whole.update(b"%s/%d" % (text, label))
            parts[label].update(text)
        counts = Counter(self.label.tolist())
        names = dict(enumerate(self.classes)) if len(self.classes) <= _MAX_CLASSES else {}
        classes = {names[k]: f"{counts[k]} {part.hexdigest()}" for k, part in parts.items() if k in names}
        return whole.hexdigest(), {**options, "classes": classes}

    def _sizes(self) -> Iterator[int]:
        root = os.fspath(self.root)

        def sizes(start: int) -> list[int]:
            return [os.stat(f"{root}/{path}").st_size for path in self.paths[start : start + _CHUNK]]

        for chunk in bounded_map(sizes, range(0, len(self), _CHUNK)):
            yield from chunk

    def _decode(self, index: int, image_size: int | None) -> np.ndarray:
        options: Any = {"channels": self.channels, "image_size": image_size, "orient": self.orient}
        for pause in _PAUSES:
            try:
                return decode_image(self.root / self.paths[index], **options)
            except OSError:
                time.sleep(pause)
        return decode_image(self.root / self.paths[index], **options)

    def find_broken(self, *, progress: bool = True) -> dict[int, str]:
        """Decodes every file once. With several processes, all of them call it and process 0 decodes.

        Args:
            progress: Whether to show a progress bar.

        Returns:
            Of each file that is missing or damaged, its index and what is wrong with it.

        Raises:
            OSError: The file system fails, which says nothing about a file.
        """
        from tqdm import tqdm

        title = f"checking {self.name}"

        def fault(index: int) -> str | None:
            try:
                self._decode(index, None)
            except ValueError as error:
                return str(error)
            return None

        def find() -> list[tuple[int, str]]:
            faults = bounded_map(fault, range(len(self)))
            bar = tqdm(faults, title, len(self), disable=not progress, unit="file", leave=False)
            broken = []
            with processes.Progress(title, alone=True) as work:
                for index, text in enumerate(bar):
                    work.advance()
                    if text is not None:
                        broken.append((index, text))
            return broken

        # Process 0 may take an hour or more; it ends the run itself if it makes no progress.
        return dict(processes.on_first(title, find, math.inf))

    def verify(self, *, progress: bool = True) -> None:
        """Decodes every file once. With several processes, all of them call it and process 0 decodes.

        Args:
            progress: Whether to show a progress bar.

        Raises:
            ValueError: Some files cannot be decoded; the message names the first five.
            OSError: The file system fails, which says nothing about a file.
        """
        if damaged := list(self.find_broken(progress=progress).values()):
            more = f" (and {len(damaged) - 5} more)" if len(damaged) > 5 else ""
            raise ValueError(f"{len(damaged)} of {len(self)} images cannot be decoded: {'; '.join(damaged[:5])}{more}")

    def without_broken(self, *, progress: bool = True) -> tuple["FolderSource", list[str]]:
        """Decodes every file once and leaves out those that are missing or damaged.

        With several processes, all of them call it and process 0 decodes.

        Args:
            progress: Whether to show a progress bar.

        Returns:
            The source of the other files, with the same classes and labels, and what is wrong with each file left out.

        Raises:
            ValueError: No file is left.
            OSError: The file system fails, which says nothing about a file.
        """
        if not (broken := self.find_broken(progress=progress)):
            return self, []
        kept = [index for index in range(len(self)) if index not in broken]
        if not kept:
            raise ValueError(f"{self.name!r} has no sound image: {next(iter(broken.values()))}")
        options: Any = {"image_size": self.image_size, "channels": self.channels, "orient": self.orient}
        paths = [self.paths[index] for index in kept]
        return FolderSource(self.root, paths, self.label[kept], self.classes, self.name, **options), [*broken.values()]


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
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    if not names:
        raise ValueError(f"{root} has no class folders; it must have one folder of images per class")
    return names


def _list_images(root: Path, classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    paths, counts = [], []
    for name in classes:
        found = sorted(_images_in(root / name, name)) if (root / name).is_dir() else None
        if found == []:
            raise ValueError(f"{root / name} has no images; a class folder must have at least one")
        paths += found or []
        counts.append(len(found or []))
    return paths, np.repeat(np.arange(len(classes), dtype=np.int32), counts)


def _images_in(folder: Path, name: str) -> list[str]:
    """Returns the paths of the images below a folder, from its parent on; asks the file system for folders only."""
    found, folders = [], [(os.fspath(folder), name)]
    while folders:
        path, relative = folders.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name[name.rfind(".") :].lower() in SUFFIXES and not name.startswith(".") and entry.is_file():
                    found.append(f"{relative}/{name}")
                elif entry.is_dir(follow_symlinks=False):
                    folders.append((entry.path, f"{relative}/{name}"))
    return found
