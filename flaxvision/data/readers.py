"""Readers of whole data sets into memory: scikit-learn's digits, `.npz` files and the original files of MNIST."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision.data.arrays import ArraySource, check_split, stratified_split

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# Published accuracies depend on the split of the digits, so it does not depend on the seed of a run.
_DIGITS_SEED = 0


def load_digits(split: str) -> ArraySource:
    """Reads scikit-learn's 1,797 handwritten digits (8x8, grayscale): 1,438 for training, 359 held out.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    scikit-learn ships its test part. The values 0..16 are scaled to 0..255.

    Args:
        split: "train" or "test".

    Raises:
        ValueError: There is no such split.
    """
    check_split("digits", split, ("train", "test"))
    from sklearn.datasets import load_digits as sklearn_digits

    digits: Any = sklearn_digits()
    train, test = stratified_split(digits.target, seed=_DIGITS_SEED)
    chosen = train if split == "train" else test
    image = np.round(digits.images[chosen, :, :, None] * 255 / 16).astype(np.uint8)
    return ArraySource(image, digits.target[chosen].astype(np.int32), [str(k) for k in range(10)], f"digits/{split}")


def load_npz(path: Path, split: str) -> ArraySource:
    """Reads one split of an `.npz` file with `train_image`, `train_label`, `test_image` and `test_label`.

    Images are [N, H, W, C], or [N, H, W] if grayscale. An optional array `classes` of strings names the classes;
    without it the largest training label determines their number.

    Args:
        path: The file.
        split: "train" or "test".

    Raises:
        ValueError: The file cannot be read, an array is missing or holds Python objects, or there is no such split.
    """
    check_split(str(path), split, ("train", "test"))
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            wanted = (f"{split}_image", f"{split}_label")
            missing = [key for key in wanted if key not in archive.files]
            if missing:
                raise ValueError(
                    f"{path} has no array {missing[0]!r}, only {sorted(archive.files)}; the file must have "
                    "train_image, train_label, test_image and test_label"
                )
            image, label = archive[wanted[0]], archive[wanted[1]]
            train_label = archive["train_label"] if "train_label" in archive.files else label
            names = [str(text) for text in archive["classes"]] if "classes" in archive.files else None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not a readable .npz file of numeric arrays: {error}") from error
    except Exception as error:
        # For a damaged archive NumPy raises errors of zipfile, zlib and struct, and EOFError.
        raise ValueError(f"{path} is not a readable .npz file: {type(error).__name__}: {error}") from error
    if image.ndim == 3:
        image = image[..., None]
    if names is None and train_label.size and np.issubdtype(train_label.dtype, np.integer):
        if train_label.max() >= len(train_label):
            raise ValueError(
                f"train_label in {path} must be class indices below the number of labels, {len(train_label)}, unless "
                f"the file has an array `classes`; got {train_label.max()}"
            )
        # For both splits the training labels determine the classes: a larger test label is an error.
        names = [str(k) for k in range(int(train_label.max()) + 1)]
    return ArraySource(image, label, names, f"{path.name}/{split}")


def has_idx_files(folder: Path) -> bool:
    """Returns whether a folder has the four original files of MNIST or Fashion-MNIST, gzipped or not."""
    return all(_idx_file(folder, stem).is_file() for stems in IDX_FILES.values() for stem in stems)


def load_idx(folder: Path, split: str) -> ArraySource:
    """Reads one split of a folder with the four original files of MNIST, Fashion-MNIST or KMNIST.

    Args:
        folder: The folder.
        split: "train" or "test".

    Raises:
        ValueError: There is no such split, or a file is missing or damaged.
    """
    check_split(str(folder), split, ("train", "test"))
    image, label = (read_idx(_idx_file(folder, stem)) for stem in IDX_FILES[split])
    if image.ndim != 3 or label.ndim != 1 or len(image) != len(label):
        raise ValueError(
            f"the {split} files in {folder} must hold images [N, H, W] and labels [N]; "
            f"got {list(image.shape)} and {list(label.shape)}"
        )
    # From both parts, because one of them may lack a class.
    labels = np.concatenate([read_idx(_idx_file(folder, stems[1])) for stems in IDX_FILES.values()])
    classes = [str(k) for k in range(int(labels.max(initial=0)) + 1)]
    return ArraySource(image[..., None], label.astype(np.int32), classes, f"{folder.resolve().name}/{split}")


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or not.

    The format is described in Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".

    Args:
        path: The file.

    Returns:
        The uint8 array.

    Raises:
        ValueError: The file is missing or damaged, its length contradicts its header, or it does not hold bytes.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except Exception as error:
        # For a damaged file gzip raises OSError, EOFError or zlib.error.
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes: it starts with {raw[:4].hex()!r} and has {len(raw)} bytes; "
            "get it again"
        )
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if body.size != np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"{path} is damaged: its header declares the shape {list(shape)}, but it has {body.size} bytes of data; "
            "get it again"
        )
    return body.reshape(shape)


def _idx_file(folder: Path, stem: str) -> Path:
    path = folder / stem
    return path if path.is_file() else folder / f"{stem}.gz"
