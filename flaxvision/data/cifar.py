"""CIFAR-10 from the files of its binary version."""

from pathlib import Path

import numpy as np

from flaxvision.data.arrays import ArraySource, check_split

CIFAR10_FILES = {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FOLDER = "cifar-10-batches-bin"
_SIDE, _RECORDS = 32, 10_000
_RECORD_BYTES = 1 + 3 * _SIDE**2


def find_cifar10(folder: Path) -> Path | None:
    """Returns the folder that holds the files: `folder`, or `cifar-10-batches-bin` in it; None where neither does."""
    for place in (folder, folder / _FOLDER):
        if any((place / file).is_file() for files in CIFAR10_FILES.values() for file in files):
            return place
    return None


def load_cifar10(folder: Path, split: str) -> ArraySource:
    """Reads one split of CIFAR-10's binary version: data_batch_1.bin to data_batch_5.bin, and test_batch.bin.

    Each file holds 10,000 records of 3,073 bytes: the label, then 32x32 red, green and blue values, row by row.
    Source of the format: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, and its page.

    Args:
        folder: Where the files lie, or the folder above.
        split: "train" or "test".

    Returns:
        50,000 or 10,000 images [32, 32, 3], in the order of the files.

    Raises:
        ValueError: For another split, or when a file is missing, of another size or has a label above 9; it is named.
    """
    check_split(str(folder), split, tuple(CIFAR10_FILES))
    place = find_cifar10(folder) or folder
    files = [place / file for file in CIFAR10_FILES[split]]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{place}: {', '.join(missing)} of CIFAR-10's binary version is missing")
    image = np.empty((len(files) * _RECORDS, _SIDE, _SIDE, 3), np.uint8)
    label = np.empty(len(image), np.int32)
    for k, file in enumerate(files):
        part = slice(k * _RECORDS, (k + 1) * _RECORDS)
        image[part], label[part] = _read(file)
    return ArraySource(image, label, CIFAR10_CLASSES, f"cifar10/{split}")


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    size = file.stat().st_size
    if size != _RECORDS * _RECORD_BYTES:
        raise ValueError(f"{file}: it has {size:,} bytes; a file of CIFAR-10 has {_RECORDS * _RECORD_BYTES:,}")
    records = np.fromfile(file, np.uint8).reshape(_RECORDS, _RECORD_BYTES)
    label = records[:, 0]
    if label.max() >= len(CIFAR10_CLASSES):
        at = int(np.argmax(label >= len(CIFAR10_CLASSES)))
        raise ValueError(f"{file}: record {at} has the label {label[at]}; CIFAR-10's are 0 to 9")
    return records[:, 1:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), label.astype(np.int32)
