"""Reads CIFAR-10 from the files of its binary version."""

from pathlib import Path

import numpy as np

from flaxvision.data.arrays import ArraySource, check_split

CIFAR10_FILES = {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FOLDER = "cifar-10-batches-bin"
_SIDE, _RECORDS = 32, 10_000
_RECORD_BYTES = 1 + 3 * _SIDE**2


def find_cifar10(folder: Path) -> Path | None:
    """Returns `folder` or its subfolder `cifar-10-batches-bin`, whichever has files of CIFAR-10, or None."""
    for place in (folder, folder / _FOLDER):
        if any((place / file).is_file() for files in CIFAR10_FILES.values() for file in files):
            return place
    return None


def load_cifar10(folder: Path, split: str) -> ArraySource:
    """Reads one split of the binary version of CIFAR-10 (data_batch_1.bin to data_batch_5.bin and test_batch.bin).

    Each file has 10,000 records of 3,073 bytes: the label, then 32x32 red, green and blue values in row-major order.
    See A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, and the web page of the data set.

    Args:
        folder: The folder of the files, or its parent.
        split: "train" or "test".

    Returns:
        A source of 50,000 or 10,000 images [32, 32, 3], in the order of the files.

    Raises:
        ValueError: There is no such split, or a file is missing, has the wrong size or has a label above 9.
    """
    check_split(str(folder), split, tuple(CIFAR10_FILES))
    place = find_cifar10(folder) or folder
    files = [place / file for file in CIFAR10_FILES[split]]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{place} lacks files of the binary version of CIFAR-10: {', '.join(missing)}")
    image = np.empty((len(files) * _RECORDS, _SIDE, _SIDE, 3), np.uint8)
    label = np.empty(len(image), np.int32)
    for k, file in enumerate(files):
        part = slice(k * _RECORDS, (k + 1) * _RECORDS)
        image[part], label[part] = _read(file)
    return ArraySource(image, label, CIFAR10_CLASSES, f"cifar10/{split}")


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    size = file.stat().st_size
    if size != _RECORDS * _RECORD_BYTES:
        raise ValueError(f"{file} must have {_RECORDS * _RECORD_BYTES:,} bytes, like all CIFAR-10 files; got {size:,}")
    records = np.fromfile(file, np.uint8).reshape(_RECORDS, _RECORD_BYTES)
    label = records[:, 0]
    if label.max() >= len(CIFAR10_CLASSES):
        at = int(np.argmax(label >= len(CIFAR10_CLASSES)))
        raise ValueError(f"labels in {file} must be between 0 and 9; got {label[at]} in record {at}")
    return records[:, 1:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), label.astype(np.int32)
