"""TFDS image classification sets, read from array records without TensorFlow.

Preparing a set needs TensorFlow (the extra `tfds`), except for MNIST, Fashion-MNIST and KMNIST.
"""

import contextlib
import functools
import hashlib
import http.client
import importlib.util
import io
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision.data.arrays import ArraySource, Source
from flaxvision.data.decode import check_channels, check_image_size, decode_image
from flaxvision.data.readers import IDX_FILES, read_idx

# Splits up to this decoded size are kept in memory.
_MEMORY_BYTES = 512 * 2**20
_CHUNK = 512
_IDX_SETS = ("mnist", "fashion_mnist", "kmnist")


class TfdsSource:
    """A prepared TFDS split, decoded on access.

    Args:
        records: TFDS data source with encoded images.
        keys: Names of the image feature and of the label feature.
        classes: Class names.
        name: Name of the source.
        version: Full TFDS name of the set, with its version.
        channels: 3 for RGB, 1 for grayscale.
        image_size: Height and width in pixels, or None to keep the stored size; see
            `flaxvision.data.decode.decode_image`.
        orient: Whether to apply the EXIF orientation.
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
        """Hexadecimal digest of the full TFDS name, the split, the length and the decoding options."""
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
        """Decodes the split, which must have images of one size, into an `ArraySource`."""

        def read(start: int) -> list[dict[str, Any]]:
            indices = range(start, min(start + _CHUNK, len(self)))
            return [
                self._decode(*pair) for pair in zip(self._records.__getitems__(list(indices)), indices, strict=True)
            ]

        image, label = np.empty((len(self), *self[0]["image"].shape), np.uint8), np.empty(len(self), np.int32)
        # Each task decodes many images, because decoding a small one takes less time than waking a thread.
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16), thread_name_prefix="flaxvision-decode") as pool:
            starts = range(0, len(self), _CHUNK)
            for start, examples in zip(starts, pool.map(read, starts), strict=True):
                np.stack([example["image"] for example in examples], out=image[start : start + len(examples)])
                label[start : start + len(examples)] = [example["label"] for example in examples]
        return ArraySource(image, label, self.classes, self.name)


def names() -> list[str]:
    """Returns the sorted names of all sets that TFDS can build."""
    import tensorflow_datasets as tfds

    return sorted(tfds.list_builders(with_community_datasets=False))


def is_known(name: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Returns whether TFDS can build a set of this name or `data_dir` has it prepared."""
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
    channels: int | None = None,
    as_stored: bool = False,
) -> Source:
    """Opens one split of a TFDS image classification set and prepares the set if needed.

    Args:
        name: TFDS name, optionally with a config or version: "mnist", "mnist:3.0.1", "cifar10_corrupted/fog_3".
        split: TFDS split, such as "train", "test" or "train[:90%]". "test" means "validation" if the set has no test
            part.
        data_dir: Directory of prepared sets. None uses the default of TFDS.
        manual_dir: Folder with the original files under their original names, to be used instead of a download.
        image_size: As in `flaxvision.data.load`.
        channels: As in `flaxvision.data.load`.
        as_stored: As in `flaxvision.data.load`.

    Returns:
        An `ArraySource` if all images have one size and the decoded split takes at most 512 MiB, else a `TfdsSource`.

    Raises:
        ValueError: The set has no such split, or is not a set of images with one label each.
        RuntimeError: The set is not prepared and cannot be prepared; the message says what to do.
    """
    check_channels(channels)
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
            raise ValueError(f"split must name one or more of {known} for {name!r}; got {split!r} ({error})") from error
    stored = tuple(builder.info.features[keys[0]].shape)
    channels = int(channels or stored[-1] or 3)
    if None not in stored:
        image_size = None if stored[:2] == (image_size, image_size) else image_size
    elif not as_stored:
        image_size = image_size or 224
    source = TfdsSource(
        records,
        keys,
        classes,
        f"{name}/{split}",
        version=builder.info.full_name,
        channels=channels,
        image_size=image_size,
        orient=not as_stored,
    )
    if None in stored:
        return source
    height, width = (image_size, image_size) if image_size else stored[:2]
    return source.in_memory() if 0 < len(source) * height * width * channels <= _MEMORY_BYTES else source


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir and Path(data_dir).expanduser(), file_format="array_record")
    except ImportError as error:
        raise RuntimeError(f"TFDS set {name!r} needs a package that is not installed: {error}") from error
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"TFDS set {name!r} cannot be opened as array records: {error}; if it was prepared in another file format, "
            "prepare it again in another data_dir"
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
    raise ValueError(f"name must be a TFDS set with one image and one label; got {name!r} with {sorted(features)}")


def _prepare(builder: Any, manual_dir: str | os.PathLike[str] | None) -> None:
    """Prepares the set, from the files in `manual_dir` if it has them."""
    import tensorflow_datasets as tfds

    root = _root(builder)
    manual = None if manual_dir is None else Path(manual_dir).expanduser().resolve()
    if manual is not None and not manual.is_dir():
        raise ValueError(f"manual_dir must be an existing folder; got {os.fspath(manual)!r}")
    failed = f"TFDS set {builder.name!r} is not in {root} and cannot be prepared"
    if builder.name in _IDX_SETS:
        if manual is not None:
            files = [f"{stem}.gz" for stems in IDX_FILES.values() for stem in stems]
            missing = [file for file in files if not (manual / file).is_file()]
            if missing:
                raise ValueError(f"manual_dir must have {', '.join(files)}; got {manual}, which lacks {missing[0]}")
        builder = _idx_builder(type(builder))(data_dir=root, file_format="array_record")
    elif importlib.util.find_spec("tensorflow") is None:
        raise RuntimeError(
            f"{failed} without TensorFlow (only preparing needs it); install 'flaxvision[tfds]', or pass a data_dir "
            "that has the set prepared as array records"
        )
    _check_network(builder, manual, failed)
    config = tfds.download.DownloadConfig(
        manual_dir=manual,
        # TFDS reuses extracted files by name, and the files of MNIST and Fashion-MNIST have the same names.
        extract_dir=root / "downloads" / "extracted" / builder.name,
        try_download_gcs=False,
    )
    try:
        builder.download_and_prepare(download_dir=root / "downloads", download_config=config)
    except Exception as error:
        if manual is not None and type(error).__name__ == "NonMatchingChecksumError":
            failed += f", because a file in manual_dir ({manual}) is not the original file"
        raise RuntimeError(f"{failed}: {type(error).__name__}: {error}") from error


def _check_network(builder: Any, manual: Path | None, failed: str) -> None:
    """Raises RuntimeError at once if there is no network; TFDS itself would retry for minutes."""
    infos = builder.url_infos or {}
    needed = [url for url, info in infos.items() if manual is None or not (manual / (info.filename or ".")).is_file()]
    if not needed:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(needed[0], method="HEAD"), timeout=20).close()
    except urllib.error.HTTPError as error:
        error.close()  # the host answers; TFDS reports whatever is wrong with the file
    except (OSError, http.client.HTTPException) as error:
        files = ", ".join(sorted(info.filename or url for url, info in infos.items())[:8])
        raise RuntimeError(
            f"{failed}: {needed[0]} cannot be reached; pass a manual_dir that has the original files ({files}), or a "
            "data_dir that has the set prepared as array records"
        ) from error


def _root(builder: Any) -> Path:
    """Returns the directory of all sets, above the directories of the set's name, configuration and version."""
    return Path(builder.data_path).parents[builder.info.full_name.count("/")]


@functools.cache
def _idx_builder(base: Any) -> Any:
    """Returns a subclass of TFDS's builder of MNIST, Fashion-MNIST or KMNIST that needs no TensorFlow."""
    from PIL import Image

    class Builder(base, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        name = base.name
        # TFDS finds the checksums of the files by the module of the builder.
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
    """Silences the warnings of TFDS that a set is not prepared and that OpenCV would decode faster."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
