"""`load`: one name for every set that the library can read."""

import difflib
import os
from pathlib import Path

from flaxvision.data import arrays, cifar
from flaxvision.data.arrays import Source

# Named first among the suggestions: they are what the experiments of this project use.
_FAVOURITES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "kmnist", "emnist", "svhn_cropped")


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
    """Opens one split of a labelled image set.

    Args:
        name: One of

            * "digits", scikit-learn's 1,797 handwritten digits, which need no file;
            * "patterns", 1,250 drawn stripes, checks, dots and rings in ten classes, which need no file either;
            * the name of a TFDS image classification set such as "mnist", "fashion_mnist" or "cifar10";
            * the path of an `.npz` file with `train_image`, `train_label`, `test_image` and `test_label`;
            * the path of a folder with the four original files of MNIST or Fashion-MNIST, or with the six of CIFAR-10's
              binary version;
            * the path of a folder of class folders, with subfolders `train` and `test` or `val`, or without them:
              then 20 % of each class are held out.
        split: "train" or "test"; a folder may also have "val" and "all", and a TFDS name takes TFDS's words
            ("train[:90%]").
        data_dir: Where TFDS keeps its sets. None is TFDS's own default.
        manual_dir: Folder with the original files of a TFDS set, from which it is prepared without a network. With the
            files of its binary version, "cifar10" is read from them and TFDS has no part in it.
        seed: Seed of the split of a folder that has no split of its own.
        image_size: Height and width to which photographs of different sizes are brought, in pixels: the shorter side is
            resized (bilinear, antialiased) and the middle cut out. Default 224. Sets whose images all have one size
            keep it; "patterns" have 64 by default.
        channels: 3 (the default) or 1 for a folder of photographs.
        as_stored: Leave images of different sizes at their own size, without applying an EXIF orientation: for a
            transform that crops them, as the protocols of ImageNet do.

    Raises:
        ValueError: For an unknown name, naming the nearest ones; for an unknown split; for a file or folder that is
            missing, empty or damaged.
        RuntimeError: When a TFDS set is not there and cannot be made; the message says what to do.
    """
    text = os.fspath(name)
    if text == "digits":
        return arrays.load_digits(split)
    if text == "patterns":
        from flaxvision.data.patterns import PatternSource

        return PatternSource(split) if as_stored else PatternSource(split, image_size or 64).in_memory()
    if text == "cifar10" and manual_dir is not None and (files := cifar.find_cifar10(Path(manual_dir).expanduser())):
        return cifar.load_cifar10(files, split)
    path = Path(text).expanduser()
    if path.suffix == ".npz":
        if not path.is_file():
            raise ValueError(f"name: received {text!r}; there is no such file")
        return arrays.load_npz(path, split)
    looks_like_path = isinstance(name, os.PathLike) or text.startswith((".", "~")) or path.is_absolute()
    if not (looks_like_path or (os.sep in text and path.exists())):
        from flaxvision.data import tfds

        if tfds.is_known(text, data_dir):
            return tfds.load_tfds(
                text, split, data_dir=data_dir, manual_dir=manual_dir, image_size=image_size, as_stored=as_stored
            )
        if not path.exists():
            raise ValueError(_unknown(text, tfds.names()))
    if not path.exists():
        raise ValueError(f"name: received {text!r}; there is no such file or folder")
    if not path.is_dir():
        raise ValueError(f"name: received {text!r}; a file must be an .npz, a folder may hold class folders")
    if arrays.has_idx_files(path):
        return arrays.load_idx(path, split)
    if cifar.find_cifar10(path):
        return cifar.load_cifar10(path, split)
    from flaxvision.data.folder import load_folder

    size = None if as_stored else image_size or 224
    return load_folder(path, split, seed=seed, image_size=size, channels=channels or 3, orient=not as_stored)


def _unknown(name: str, known: list[str]) -> str:
    candidates = [*_FAVOURITES, *(other for other in known if other not in _FAVOURITES)]
    near = difflib.get_close_matches(name.lower(), candidates, n=3, cutoff=0.5) or list(_FAVOURITES[:4])
    return (
        f"name: received {name!r}, which is neither a known set nor a path that exists; "
        f"the nearest names are {', '.join(near)}"
    )
