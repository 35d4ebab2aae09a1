"""What a source is, and the sources that live in memory: digits, `.npz` files and the original MNIST files."""

import gzip
import hashlib
import struct
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# Digits is one set for everybody: its held-out part does not move with the seed of a run.
_DIGITS_SEED = 0


@runtime_checkable
class Source(Protocol):
    """Labelled images with random access.

    Attributes:
        name: What the set is called, with its split.
        classes: One name per class; the label `k` means `classes[k]`.
        fingerprint: Hexadecimal digest of the source's identity. A run that resumes compares it.
    """

    name: str
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the source's identity."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class ArraySource:
    """A source held in memory.

    Args:
        image: [N, H, W, C] pixels, uint8 0..255 or floating point.
        label: [N] class indices.
        classes: Names of the classes; None names them by their index, up to the greatest label.
        name: What to call the source.

    The arrays are taken as they are, not copied and not checked; `flaxvision.data.validate` checks them.
    """

    def __init__(self, image: np.ndarray, label: np.ndarray, classes: Sequence[str] | None = None, name: str = "array"):
        self.image = np.asarray(image)
        self.label = np.asarray(label)
        self.name = name
        if classes is None:
            countable = self.label.size and np.issubdtype(self.label.dtype, np.integer)
            classes = [str(k) for k in range(int(self.label.max()) + 1)] if countable else ()
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        # A copy: a transform that works in place must not change the set.
        return {"image": self.image[index].copy(), "label": np.int32(self.label[index])}

    def __repr__(self) -> str:
        return f"ArraySource({self.name!r}, image={self.image.dtype}{list(self.image.shape)})"

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the examples at `indices` [B] stacked: `image` [B, H, W, C] and `label` [B] int32."""
        return {"image": self.image[indices], "label": self.label[indices].astype(np.int32)}

    @property
    def fingerprint(self) -> str:
        """Digest of the name and of every pixel and label."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.image, self.label):
            digest.update(f"{self.name}/{part.dtype}/{part.shape}/".encode())
            digest.update(np.ascontiguousarray(part).tobytes() if part.size else b"")
        return digest.hexdigest()


class Subset:
    """Some examples of another source.

    Args:
        source: The whole.
        indices: [M] positions in it.
        name: What to call the part.
    """

    def __init__(self, source: Source, indices: np.ndarray, name: str):
        self.source, self.indices, self.name = source, np.asarray(indices), name
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    @property
    def label(self) -> np.ndarray:
        """The part's labels [M]; where the whole has them."""
        return np.asarray(self.source.label)[self.indices]  # type: ignore[attr-defined]

    def verify(self) -> None:
        """Verifies the whole, where it can be verified."""
        verify = getattr(self.source, "verify", None)
        if verify is not None:
            verify()

    @property
    def fingerprint(self) -> str:
        """Digest of the whole's fingerprint and of the positions."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(f"{self.source.fingerprint}/{self.name}/".encode(), digest_size=16)
        digest.update(self.indices.astype("<i8").tobytes())
        return digest.hexdigest()


class Mapped:
    """Another source whose images go through a function when they are asked for.

    Args:
        source: What to read.
        function: `image [H, W, C] -> image`, on the host; decoding threads call it.
        name: What it does; part of the fingerprint.
    """

    def __init__(self, source: Source, function: Callable[[np.ndarray], np.ndarray], name: str):
        self.source, self.function, self.name = source, function, f"{source.name}/{name}"
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        example = self.source[index]
        return {**example, "image": self.function(example["image"])}

    @property
    def fingerprint(self) -> str:
        """Digest of the source's fingerprint and of the name."""
        return hashlib.blake2b(f"{self.source.fingerprint}/{self.name}".encode(), digest_size=16).hexdigest()


def subset(source: Source, indices: np.ndarray, name: str) -> Source:
    """Returns the examples of `source` at `indices` [M] as a source of its own, in memory when `source` is.

    Args:
        source: What to take them from.
        indices: Positions, in the order wanted.
        name: What to call the part, for example "mnist/validation".
    """
    if isinstance(source, ArraySource):
        return ArraySource(source.image[indices], source.label[indices], source.classes, name)
    return Subset(source, indices, name)


def stratified_split(
    label: np.ndarray, *, fraction: float = 0.2, seed: int = 0, keys: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits a set into a training and a held-out part with the same share of every class.

    Within a class the examples are ordered by a hash of the seed and their key, and the first ones are held out. So the
    split does not depend on the version of a random generator, and with file names as keys it hardly moves when files
    are added.

    Args:
        label: [N] class indices.
        fraction: Share of each class that is held out, rounded to whole examples. A class of two or more keeps at
            least one example on either side; a class of one stays in training.
        seed: Another seed, another split.
        keys: One string per example; None takes the positions.

    Returns:
        Two sorted integer arrays: the positions of the training and of the held-out examples.

    Raises:
        ValueError: When `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: received {fraction}; it must lie between 0 and 1")
    label = np.asarray(label)
    keys = keys if keys is not None else [str(i) for i in range(len(label))]
    ranks = [hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest() for key in keys]
    held_out = []
    for k in np.unique(label):
        members = sorted(np.flatnonzero(label == k).tolist(), key=lambda i: (ranks[i], i))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out += members[:count]
    test = np.array(sorted(held_out), dtype=np.int64)
    return np.setdiff1d(np.arange(len(label)), test), test


def load_digits(split: str) -> ArraySource:
    """Reads scikit-learn's 1,797 handwritten digits (8×8, grey): 1,438 for training, 359 held out.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
    (its test part, which scikit-learn packs). The grey values 0..16 become 0..255.

    Args:
        split: "train" or "test".

    Raises:
        ValueError: For another split.
    """
    check_split("digits", split, ("train", "test"))
    from sklearn.datasets import load_digits as sklearn_digits

    digits: Any = sklearn_digits()
    train, test = stratified_split(digits.target, seed=_DIGITS_SEED)
    chosen = train if split == "train" else test
    image = np.round(digits.images[chosen, :, :, None] * 255 / 16).astype(np.uint8)
    return ArraySource(image, digits.target[chosen].astype(np.int32), [str(k) for k in range(10)], f"digits/{split}")


def load_npz(path: Path, split: str) -> ArraySource:
    """Reads one split of an `.npz` file that holds `train_image`, `train_label`, `test_image` and `test_label`.

    Images are [N, H, W, C]; [N, H, W] is read as grey. An array `classes` of strings, where there is one, names the
    classes; without it there are as many as the training labels say.

    Raises:
        ValueError: When the file is no readable `.npz`, an array is missing or holds Python objects, or the split is
            neither "train" nor "test".
    """
    check_split(str(path), split, ("train", "test"))
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            wanted = (f"{split}_image", f"{split}_label")
            missing = [key for key in wanted if key not in archive.files]
            if missing:
                raise ValueError(
                    f"{path}: the array {missing[0]!r} is missing (received {sorted(archive.files)}); the file must "
                    "hold train_image, train_label, test_image and test_label"
                )
            image, label = archive[wanted[0]], archive[wanted[1]]
            train_label = archive["train_label"] if "train_label" in archive.files else label
            names = [str(text) for text in archive["classes"]] if "classes" in archive.files else None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: not a readable .npz file of plain arrays ({error})") from error
    except Exception as error:
        # numpy lets zipfile, zlib, struct and end-of-file errors of a damaged archive through as they come.
        raise ValueError(f"{path}: not a readable .npz file ({type(error).__name__}: {error})") from error
    if image.ndim == 3:
        image = image[..., None]
    if names is None and train_label.size and np.issubdtype(train_label.dtype, np.integer):
        if train_label.max() >= len(train_label):
            raise ValueError(
                f"{path}: train_label goes up to {train_label.max()} for {len(train_label)} images; class indices must "
                "count from 0 (an array `classes` names classes that have no image)"
            )
        # The training labels count the classes for both splits: a test label beyond them is a fault.
        names = [str(k) for k in range(int(train_label.max()) + 1)]
    return ArraySource(image, label, names, f"{path.name}/{split}")


def has_idx_files(folder: Path) -> bool:
    """Says whether a folder holds the four original files of MNIST or Fashion-MNIST, gzipped or not."""
    return all(_idx_file(folder, stem).is_file() for stems in IDX_FILES.values() for stem in stems)


def load_idx(folder: Path, split: str) -> ArraySource:
    """Reads one split of a folder that holds the four original files of MNIST, Fashion-MNIST or KMNIST.

    Raises:
        ValueError: When the split is neither "train" nor "test", or a file is missing or damaged.
    """
    check_split(str(folder), split, ("train", "test"))
    image, label = (read_idx(_idx_file(folder, stem)) for stem in IDX_FILES[split])
    if image.ndim != 3 or label.ndim != 1 or len(image) != len(label):
        raise ValueError(
            f"{folder}: the {split} files hold images {list(image.shape)} and labels {list(label.shape)}; they must be "
            "[N, H, W] and [N]"
        )
    # Both parts, so that a class that one of them lacks does not change the number of classes.
    labels = np.concatenate([read_idx(_idx_file(folder, stems[1])) for stems in IDX_FILES.values()])
    classes = [str(k) for k in range(int(labels.max(initial=0)) + 1)]
    return ArraySource(image[..., None], label.astype(np.int32), classes, f"{folder.resolve().name}/{split}")


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or not, into an array.

    Source of the format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".

    Raises:
        ValueError: When the file is missing, damaged, shorter or longer than its header says, or not of bytes.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except Exception as error:
        # gzip raises OSError, EOFError and zlib.error, by the kind of damage.
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (it begins with {raw[:4].hex()})")
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if body.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path}: the header announces {list(shape)} bytes, the file holds {body.size}")
    return body.reshape(shape)


def check_split(where: str, split: str, allowed: Sequence[str]) -> None:
    """Raises ValueError when `split` is not one of `allowed`."""
    if split not in allowed:
        raise ValueError(f"split: received {split!r} for {where}; it must be one of {', '.join(map(repr, allowed))}")


def _idx_file(folder: Path, stem: str) -> Path:
    plain = folder / stem
    return plain if plain.is_file() else folder / f"{stem}.gz"
