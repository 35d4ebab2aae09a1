"""`load` opens every data set that the library reads, by name or path."""

import difflib
import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision.data import cifar, readers
from flaxvision.data.arrays import ArraySource, Mapped, Source
from flaxvision.data.decode import adapt_image, check_channels, check_image_size

# The data sets of this project's experiments come first in suggestions.
_FAVOURITES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "kmnist", "emnist", "svhn_cropped")
# Adapted images are kept in memory up to this size.
_MEMORY_BYTES = 512 * 2**20


def load(
    name: str | os.PathLike[str],
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    image_size: int | None = None,
    channels: int | None = None,
    as_stored: bool = False,
) -> Source:
    """Opens one split of a labelled image data set.

    Args:
        name: One of

            * "digits": scikit-learn's 1,797 handwritten digits, which need no file;
            * "patterns": 1,250 procedurally drawn images in ten classes, which need no file;
            * the name of a TFDS image classification set, such as "mnist", "fashion_mnist" or "cifar10";
            * the path of an `.npz` file with `train_image`, `train_label`, `test_image` and `test_label`;
            * the path of a folder with the four original files of MNIST or Fashion-MNIST, or with the six files of the
              binary version of CIFAR-10;
            * the path of a folder of class folders, with subfolders `train` and `test` or `val`, or without them; then
              20 % of each class is held out.
        split: "train" or "test". A folder may also have "val" and "all". A TFDS name accepts the split syntax of TFDS,
            such as "train[:90%]".
        data_dir: Directory of prepared TFDS sets. None uses the default of TFDS. Only for TFDS names.
        manual_dir: Folder with the original files of a TFDS set, which is then prepared without a network. If it has
            the files of the binary version, "cifar10" is read from them without TFDS. Only for TFDS names.
        seed: Seed of the split of a folder without a held-out part. The other sets have a fixed split.
        image_size: Height and width of the images in pixels: the shorter side is resized (bilinear with antialiasing)
            and the center square is cropped. None means 224 for photographs of different sizes, 64 for "patterns", and
            the stored size for every set with images of one size.
        channels: 3 for RGB or 1 for grayscale. None means 3 for a folder of photographs and the stored channels for
            every other set.
        as_stored: Keep photographs at their own size and do not apply the EXIF orientation; for transforms that crop
            them, as in the protocols of ImageNet. Excludes `image_size`.

    Returns:
        The source; an `ArraySource` if its images have one size and take at most 512 MiB.

    Raises:
        ValueError: There is no data set of this name (the message lists the nearest names), no such split, an option
            is out of range or does not apply to this data set, or a file is missing or damaged.
        RuntimeError: A TFDS set is not prepared and cannot be prepared; the message says what to do.

    Example:
        >>> digits = load("digits", "train")
        >>> len(digits), digits[0]["image"].shape, digits.classes[:3]
        (1438, (8, 8, 1), ('0', '1', '2'))
    """
    check_channels(channels)
    check_image_size(image_size)
    if as_stored and image_size is not None:
        raise ValueError(f"image_size must be None with as_stored=True; got {image_size}")
    for option, value in {"name": name, "data_dir": data_dir, "manual_dir": manual_dir}.items():
        if value is not None and re.match(r"[A-Za-z][\w+.-]+:/", os.fspath(value)):  # a Path has lost the second slash
            raise ValueError(f"{option} must be on a mounted file system, and not a URL; got {os.fspath(value)!r}")
    text, path = os.fspath(name), Path(name).expanduser()
    if text == "cifar10" and manual_dir is not None and (files := cifar.find_cifar10(Path(manual_dir).expanduser())):
        return _adapted(cifar.load_cifar10(files, split), image_size, channels)
    kind = _kind_of(name, data_dir)
    if kind == "tfds":
        from flaxvision.data.tfds import load_tfds

        places: dict[str, Any] = {"data_dir": data_dir, "manual_dir": manual_dir}
        return load_tfds(text, split, image_size=image_size, channels=channels, as_stored=as_stored, **places)
    for option, value in {"data_dir": data_dir, "manual_dir": manual_dir}.items():
        if value is not None:
            raise ValueError(f"{option} must be None for {text!r}, which is not a TFDS set; got {os.fspath(value)!r}")
    if kind == "folder":
        from flaxvision.data.folder import load_folder

        size = None if as_stored else image_size or 224
        return load_folder(path, split, seed=seed, image_size=size, channels=channels or 3, orient=not as_stored)
    if kind == "patterns":
        from flaxvision.data.patterns import PatternSource

        patterns = PatternSource(split) if as_stored else PatternSource(split, image_size or 64).in_memory()
        return _adapted(patterns, None, channels)
    if kind == "digits":
        return _adapted(readers.load_digits(split), image_size, channels)
    read = {"npz": readers.load_npz, "idx": readers.load_idx, "cifar10": cifar.load_cifar10}[kind]
    return _adapted(read(path, split), image_size, channels)


def _kind_of(name: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None) -> str:
    """Returns what a name stands for: digits, patterns, tfds, npz, idx, cifar10 (its files) or folder."""
    text, path = os.fspath(name), Path(name).expanduser()
    if text in ("digits", "patterns"):
        return text
    if path.suffix == ".npz" and path.is_file():
        return "npz"
    looks_like_path = isinstance(name, os.PathLike) or text.startswith((".", "~")) or path.is_absolute()
    looks_like_path = looks_like_path or path.suffix == ".npz" or (os.sep in text and path.exists())
    if not looks_like_path:
        from flaxvision.data import tfds

        if tfds.is_known(text, data_dir):
            return "tfds"
        if not path.exists():
            raise ValueError(_unknown(text, tfds.names()))
    if not path.exists():
        raise ValueError(f"name must be an existing file or folder; got {text!r}")
    if not path.is_dir():
        raise ValueError(f"name must be a folder or an .npz file; got the file {text!r}")
    if readers.has_idx_files(path):
        return "idx"
    return "cifar10" if cifar.find_cifar10(path) else "folder"


def _adapted(source: Source, image_size: int | None, channels: int | None) -> Source:
    """Brings the images of a source to a size and a number of channels; None keeps the stored ones."""
    if not len(source):
        return source
    shape = source.image.shape[1:] if isinstance(source, ArraySource) else source[0]["image"].shape
    if {image_size, channels} == {None}:
        return source
    if len(shape) == 3 and all(image_size in (None, side) for side in shape[:2]) and channels in (None, shape[-1]):
        return source
    if len(shape) != 3 or (channels is not None and shape[-1] not in (1, 3)):
        raise ValueError(
            f"channels and image_size must be None for {source.name!r}, which has images {list(shape)}; "
            f"got channels={channels} and image_size={image_size}"
        )
    function = functools.partial(adapt_image, image_size=image_size, channels=channels)
    if isinstance(source, ArraySource):
        height, width = (image_size, image_size) if image_size else shape[:2]
        size = len(source) * height * width * (channels or shape[-1]) * source.image.itemsize
        if size <= _MEMORY_BYTES:
            images = np.stack([function(image) for image in source.image])
            return ArraySource(images, source.label, source.classes, source.name)
    return Mapped(source, function, f"size {image_size}, channels {channels}")


def _unknown(name: str, known: list[str]) -> str:
    candidates = [*_FAVOURITES, *(other for other in known if other not in _FAVOURITES)]
    near = difflib.get_close_matches(name.lower(), candidates, n=3, cutoff=0.5) or list(_FAVOURITES[:4])
    return f"name must be a known data set (nearest: {', '.join(near)}) or an existing path; got {name!r}"
