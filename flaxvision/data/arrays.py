"""The `Source` protocol, sources in memory, and sources made from other sources."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np

_PLACED = frozenset({"boxes", "masks", "keypoints"})  # what lies in the image


@runtime_checkable
class Source(Protocol):
    """Labelled images with random access.

    `source[i]` is a dict with `image` [H, W, C] and `label`, an integer scalar.

    Attributes:
        name: Name of the data set and its split.
        classes: The class names; label `k` means `classes[k]`.
        fingerprint: Hexadecimal digest that identifies the examples. A resumed run compares it.
    """

    name: str
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest that identifies the examples."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class ArraySource:
    """A source in memory.

    The arrays are neither copied nor checked; `flaxvision.data.validate` checks them.

    Args:
        image: [N, H, W, C] pixels, uint8 in 0..255 or floating point.
        label: [N] class indices, or the targets of another task, [N, ...]. Integers become int32; other types stay.
        classes: Class names. None uses "0", "1", ... up to the largest label.
        name: Name of the source.
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
        # A copy, so that a transform that works in place does not change the source.
        return {"image": self.image[index].copy(), "label": _narrow(self.label[index])}

    def __repr__(self) -> str:
        return f"ArraySource({self.name!r}, image={self.image.dtype}{list(self.image.shape)})"

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the examples at `indices` [N] as `image` [N, H, W, C] and `label` [N, ...]."""
        return {"image": self.image[indices], "label": _narrow(self.label[indices])}

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the name and of every pixel and label."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.image, self.label):
            digest.update(f"{self.name}/{part.dtype}/{part.shape}/".encode())
            digest.update(np.ascontiguousarray(part).tobytes() if part.size else b"")
        return digest.hexdigest()


class Subset:
    """A subset of the examples of another source.

    Args:
        source: The other source.
        indices: [M] positions in it.
        name: Name of the subset.
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
        """The labels [M], if the other source has an attribute `label`."""
        return np.asarray(self.source.label)[self.indices]  # type: ignore[attr-defined]

    def verify(self) -> None:
        """Calls `verify` of the other source, if it has one."""
        verify = getattr(self.source, "verify", None)
        if verify is not None:
            verify()

    def without_broken(self, *, progress: bool = True) -> tuple["Subset", list[str]]:
        """Leaves out the examples that `find_broken` of the other source finds, if it has this method.

        Returns:
            The subset of the other examples, and what is wrong with each example left out.
        """
        find = getattr(self.source, "find_broken", None)
        broken = find(progress=progress) if find is not None else {}
        lost = np.isin(self.indices, list(broken))
        if not lost.any():
            return self, []
        if lost.all():
            raise ValueError(f"{self.name!r} has no sound image: {broken[int(self.indices[0])]}")
        return Subset(self.source, self.indices[~lost], self.name), [broken[int(i)] for i in self.indices[lost]]

    @property
    def contents(self) -> dict[str, Any] | None:
        """The `contents` of the other source, if it has any."""
        return getattr(self.source, "contents", None)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the other source's fingerprint and of the positions."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        # As for `Mapped`: the name of a folder is no part of its content.
        name = self.name if self.contents is None else ""
        digest = hashlib.blake2b(f"{self.source.fingerprint}/{name}/".encode(), digest_size=16)
        digest.update(self.indices.astype("<i8").tobytes())
        return digest.hexdigest()


class Mapped:
    """A source that applies a function to the images of another source, on access.

    Args:
        source: The other source.
        function: `image [H, W, C] -> image`, an array or a PIL image; called on the host, from several threads.
        name: Describes the function; part of the name and of the fingerprint.
    """

    def __init__(self, source: Source, function: Callable[[np.ndarray], Any], name: str):
        self.source, self.function, self.name = source, function, f"{source.name}/{name}"
        self.classes, self._function_name = source.classes, name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        example = self.source[index]
        image = np.asarray(self.function(example["image"]))
        if np.shape(image)[:2] != np.shape(example["image"])[:2] and (placed := sorted(_PLACED & example.keys())):
            raise ValueError(
                f"function must keep the size {list(np.shape(example['image'])[:2])} of images with {placed[0]}, which "
                f"it would not move; got {list(np.shape(image)[:2])} from {self._function_name!r}"
            )
        return {**example, "image": image}

    @property
    def label(self) -> np.ndarray:
        """The labels [N], if the other source has an attribute `label`."""
        return np.asarray(self.source.label)  # type: ignore[attr-defined]

    def verify(self) -> None:
        """Calls `verify` of the other source, if it has one; the function is not called."""
        verify = getattr(self.source, "verify", None)
        if verify is not None:
            verify()

    def without_broken(self, *, progress: bool = True) -> tuple["Mapped", list[str]]:
        """Maps the other source without its broken examples, if it has a method `without_broken`.

        Returns:
            The new source, and what is wrong with each example left out.
        """
        remove = getattr(self.source, "without_broken", None)
        source, broken = remove(progress=progress) if remove is not None else (self.source, [])
        return Mapped(source, self.function, self._function_name) if broken else self, broken

    @property
    def contents(self) -> dict[str, Any] | None:
        """The `contents` of the other source, if it has any."""
        return getattr(self.source, "contents", None)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the other source's fingerprint and of the name."""
        # The name of a folder is no part of its content. For other sources it stays, so that old runs can be resumed.
        name = self.name if self.contents is None else self._function_name
        return hashlib.blake2b(f"{self.source.fingerprint}/{name}".encode(), digest_size=16).hexdigest()


def _narrow(label: Any) -> Any:
    """Casts integers, booleans included, to int32; other numbers stay."""
    label = np.asarray(label)
    return label.astype(np.int32)[()] if np.issubdtype(label.dtype, np.integer) or label.dtype == bool else label[()]


def subset(source: Source, indices: np.ndarray, name: str) -> Source:
    """Returns a subset of a source as a source. It is in memory if `source` is.

    Args:
        source: The source.
        indices: [M] positions of the examples, in the order wanted.
        name: Name of the subset, for example "mnist/validation".
    """
    if isinstance(source, ArraySource):
        return ArraySource(source.image[indices], source.label[indices], source.classes, name)
    return Subset(source, indices, name)


def stratified_split(
    label: np.ndarray, *, fraction: float = 0.2, seed: int = 0, keys: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples into a training part and a held-out part with the same class proportions.

    Within each class the examples are ordered by a hash of the seed and their key, and the first ones are held out.
    The split therefore does not depend on the version of a random generator. With file names as keys, adding files
    moves few of the other examples.

    Args:
        label: [N] class indices.
        fraction: Fraction of each class to hold out, rounded to whole examples. A class with two or more examples has
            at least one in each part; a single example is used for training.
        seed: Seed of the split.
        keys: [N] strings, one per example. None uses the positions.

    Returns:
        The sorted positions of the training examples, and those of the held-out examples.

    Raises:
        ValueError: `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be strictly between 0 and 1; got {fraction}")
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


def check_split(name: str, split: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless `split` is one of `allowed`; `name` is the data set."""
    if split not in allowed:
        raise ValueError(f"split must be one of {', '.join(map(repr, allowed))} for {name}; got {split!r}")
