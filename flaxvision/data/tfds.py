"""TFDS image classification sets, read through array records without TensorFlow.

Preparing a set takes TensorFlow in general (the extra `tfds`). MNIST, Fashion-MNIST and KMNIST are prepared without it.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision.data.arrays import IDX_FILES, ArraySource, Source, read_idx
from flaxvision.data.decode import check_image_size, decode_image

# Sets up to this size, decoded, are held in memory.
_MEMORY_BYTES = 512 * 2**20
_CHUNK = 512
_IDX_SETS = ("mnist", "fashion_mnist", "kmnist")


class TfdsSource:
    """A prepared TFDS split, decoded example by example; TFDS's features `image` and `label` are what it gives.

    Args:
        records: TFDS data source whose image feature is not decoded.
        keys: Names of the image and of the label feature.
        classes: Names of the classes.
        name: What to call the source.
        version: TFDS's full name of the set, version included.
        channels: 3 or 1.
        image_size: Height and width in pixels, None for the images' own; see `flaxvision.data.decode.decode_image`.
        orient: Whether the EXIF orientation is applied.
    """

    def __init__(
        self,
        records: Any,
        keys: tuple[str, str],
        classes: Sequence[str],
        name: str,
        *,
        version: str,
        channels: int,
        image_size: int | None,
        orient: bool = True,
    ):
        self._records, self._keys = records, keys
        self.classes, self.name, self.version = tuple(classes), name, version
        self.channels, self.image_size, self.orient = channels, image_size, orient

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return self._decode(self._records[index], index)

    def __repr__(self) -> str:
        return f"TfdsSource({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def fingerprint(self) -> str:
        """Digest of the set's full name with its version, the split, the length and the decoding."""
        identity = f"{self.version}/{self.name}/{len(self)}/{self.channels}/{self.image_size}"
        identity += "" if self.orient else "/as stored"
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def _decode(self, record: dict[str, Any], index: int) -> dict[str, Any]:
        encoded = io.BytesIO(record[self._keys[0]])
        where = f"{self.name}[{index}]"
        image = decode_image(
            encoded, channels=self.channels, image_size=self.image_size, orient=self.orient, name=where
        )
        return {"image": image, "label": np.int32(record[self._keys[1]])}

    def in_memory(self) -> ArraySource:
        """Decodes the whole split, whose images must have one size, into an `ArraySource`."""

        def read(start: int) -> list[dict[str, Any]]:
            indices = range(start, min(start + _CHUNK, len(self)))
            return [
                self._decode(*pair) for pair in zip(self._records.__getitems__(list(indices)), indices, strict=True)
            ]

        image, label = np.empty((len(self), *self[0]["image"].shape), np.uint8), np.empty(len(self), np.int32)
        # A thread takes many pictures at a time: one small picture is decoded faster than a thread is woken.
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16), thread_name_prefix="flaxvision-decode") as pool:
            starts = range(0, len(self), _CHUNK)
            for start, examples in zip(starts, pool.map(read, starts), strict=True):
                np.stack([example["image"] for example in examples], out=image[start : start + len(examples)])
                label[start : start + len(examples)] = [example["label"] for example in examples]
        return ArraySource(image, label, self.classes, self.name)


def names() -> list[str]:
    """Returns the names of all sets that TFDS can build."""
    import tensorflow_datasets as tfds

    return sorted(tfds.list_builders(with_community_datasets=False))


def is_known(name: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Says whether TFDS can build a set of this name, or `data_dir` holds it prepared."""
    base = name.split("/")[0].split(":")[0]
    if not base.isidentifier():
        return False
    return base in names() or (data_dir is not None and any(Path(data_dir, base).rglob("dataset_info.json")))


def load_tfds(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    as_stored: bool = False,
) -> Source:
    """Opens one split of a TFDS image classification set, preparing the set if it is not there.

    Args:
        name: TFDS's name, with a config or version if need be: "mnist", "mnist:3.0.1", "cifar10_corrupted/fog_3".
        split: TFDS's split: "train", "test", "train[:90%]". "test" stands for "validation" where there is no test part.
        data_dir: Where TFDS keeps its sets; None is TFDS's default.
        manual_dir: Folder with the original files, under their original names. Then no network is used for them.
        image_size: Size to which images of differing sizes are brought, in pixels; None is 224. Sets whose images
            have one size keep theirs.
        as_stored: Leave images of differing sizes as they are stored, at their own size and orientation.

    Returns:
        An `ArraySource` when the decoded split takes at most 512 MiB, otherwise a `TfdsSource`.

    Raises:
        ValueError: When the set has no such split, or is not one of images with one label.
        RuntimeError: When the set is not there and cannot be prepared; the message says what to do.
    """
    check_image_size(image_size)
    with _quiet():
        builder = _builder(name, data_dir)
        _classification(builder, name)
        if not builder.is_prepared():
            _prepare(builder, manual_dir)
            builder = _builder(name, data_dir)
        keys, classes = _classification(builder, name)
        import tensorflow_datasets as tfds

        try:
            whole = split.split("[")[0]
            if whole == "test" and "test" not in builder.info.splits and "validation" in builder.info.splits:
                split = split.replace("test", "validation", 1)
            records: Any = builder.as_data_source(split=split, decoders={keys[0]: tfds.decode.SkipDecoding()})
        except (KeyError, ValueError, AssertionError) as error:
            known = ", ".join(map(repr, builder.info.splits)) or "none"
            raise ValueError(f"split: received {split!r} for {name!r}; it must be made of {known} ({error})") from error
    shape = builder.info.features[keys[0]].shape
    fixed = None not in shape
    source = TfdsSource(
        records,
        keys,
        classes,
        f"{name}/{split}",
        version=builder.info.full_name,
        channels=shape[-1] or 3,
        image_size=None if fixed or as_stored else image_size or 224,
        orient=not as_stored,
    )
    small = fixed and 0 < len(source) * int(np.prod(shape)) <= _MEMORY_BYTES
    return source.in_memory() if small else source


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir and Path(data_dir).expanduser(), file_format="array_record")
    except ImportError as error:
        raise RuntimeError(f"name: TFDS cannot open {name!r} without a package that is missing: {error}") from error
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"name: TFDS cannot open {name!r} as array records: {error}. A set that was prepared in another file "
            "format must be prepared anew in another data_dir"
        ) from error


def _classification(builder: Any, name: str) -> tuple[tuple[str, str], list[str]]:
    """Returns the names of the image and label features, and the names of the classes."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    candidates = [builder.info.supervised_keys, ("image", "label")]
    for keys in candidates:
        if keys is not None and len(keys) == 2 and all(isinstance(key, str) and key in features for key in keys):
            image, label = (features[key] for key in keys)
            if isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel):
                return (keys[0], keys[1]), list(label.names)
    raise ValueError(
        f"name: received {name!r}, which has the features {sorted(features)}; it must have one image and one label"
    )


def _prepare(builder: Any, manual_dir: str | os.PathLike[str] | None) -> None:
    """Builds the set, from the files in `manual_dir` where it has them."""
    import tensorflow_datasets as tfds

    root = _root(builder)
    manual = None if manual_dir is None else Path(manual_dir).expanduser().resolve()
    if manual is not None and not manual.is_dir():
        raise ValueError(f"manual_dir: received {os.fspath(manual)!r}; there is no such folder")
    place = f"the TFDS set {builder.name!r} is not in {root} and could not be prepared"
    if builder.name in _IDX_SETS:
        if manual is not None:
            files = [f"{stem}.gz" for stems in IDX_FILES.values() for stem in stems]
            missing = [file for file in files if not (manual / file).is_file()]
            if missing:
                raise ValueError(f"manual_dir: {manual} lacks {', '.join(missing)}; it must hold {', '.join(files)}")
        builder = _idx_builder(type(builder))(data_dir=root, file_format="array_record")
    elif importlib.util.find_spec("tensorflow") is None:
        raise RuntimeError(
            f"{place}: preparing it takes TensorFlow once, reading does not. Install it with "
            "pip install 'flaxvision[tfds]', or name a data_dir that holds the set prepared as array records"
        )
    _check_network(builder, manual, place)
    config = tfds.download.DownloadConfig(
        manual_dir=manual,
        # TFDS finds extracted files again by their names, which MNIST and Fashion-MNIST share.
        extract_dir=root / "downloads" / "extracted" / builder.name,
        try_download_gcs=False,
    )
    try:
        builder.download_and_prepare(download_dir=root / "downloads", download_config=config)
    except Exception as error:
        if manual is not None and type(error).__name__ == "NonMatchingChecksumError":
            place += f" because a file in manual_dir ({manual}) is not the original one"
        raise RuntimeError(f"{place}: {type(error).__name__}: {error}") from error


def _check_network(builder: Any, manual: Path | None, place: str) -> None:
    """Fails at once where TFDS would try for minutes to reach a host that cannot be reached."""
    import requests

    infos = builder.url_infos or {}
    needed = [url for url, info in infos.items() if manual is None or not (manual / (info.filename or ".")).is_file()]
    if not needed:
        return
    try:
        requests.head(needed[0], timeout=20)
    except (requests.ConnectionError, requests.Timeout) as error:
        files = ", ".join(sorted(info.filename or url for url, info in infos.items())[:8])
        raise RuntimeError(
            f"{place}: {needed[0]} cannot be reached. Without a network, name a manual_dir that holds the original "
            f"files ({files}), or a data_dir that holds the set prepared as array records"
        ) from error


def _root(builder: Any) -> Path:
    """Returns the folder of all sets, above those of this set's name, configuration and version."""
    return Path(builder.data_path).parents[builder.info.full_name.count("/")]


@functools.cache
def _idx_builder(base: Any) -> Any:
    """Returns TFDS's builder of MNIST or a sister, which then reads and encodes without TensorFlow."""
    from PIL import Image

    class Builder(base, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        name = base.name
        # TFDS finds the checksums and writes the origin of a set by its builder's module.
        __module__ = base.__module__

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            urls = {split: [f"{self.URL}{stem}.gz" for stem in stems] for split, stems in IDX_FILES.items()}
            files = dl_manager.download(urls)
            return {split: self._generate_examples(*files[split]) for split in IDX_FILES}

        def _generate_examples(self, image_path: Any, label_path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
            image, label = read_idx(Path(image_path)), read_idx(Path(label_path))
            for index in range(len(image)):
                png = io.BytesIO()
                Image.fromarray(image[index]).save(png, "png")
                yield index, {"image": png.getvalue(), "label": int(label[index])}

    return Builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from warning that a set is not prepared yet and that OpenCV would decode faster."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
