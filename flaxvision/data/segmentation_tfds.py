"""Segmentation data sets of TFDS, read from array records without TensorFlow."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxvision.data.decode import decode_image
from flaxvision.data.segmentation_classes import (
    ADE20K_INSTANCE_CLASSES,
    CITYSCAPES_CLASSES,
    CITYSCAPES_VALUES,
    PET_CLASSES,
)
from flaxvision.data.segmentation_source import IGNORED, KeptExamples, checked_values, fitted, labels_of


class _Set(NamedTuple):
    image: str
    mask: str
    mode: str  # mode of the mask files; the first channel holds the values
    classes: tuple[str, ...]
    values: Mapping[int, int]
    source: str  # how to obtain the files


SETS = {
    "oxford_iiit_pet": _Set(
        "image", "segmentation_mask", "grey", PET_CLASSES, {1: 0, 2: 1, 3: 2}, "TFDS downloads its files"
    ),
    "cityscapes": _Set(
        *("image_left", "segmentation_label", "grey", CITYSCAPES_CLASSES, CITYSCAPES_VALUES),
        "download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com, which needs a "
        "registration, into the manual_dir of TFDS",
    ),
    "scene_parse150": _Set(
        *("image", "annotation", "RGB", ADE20K_INSTANCE_CLASSES),
        {0: IGNORED} | {k + 1: k for k in range(100)},
        "TFDS downloads its files",
    ),
}


class TfdsSegmentationSource(KeptExamples):
    """A prepared TFDS split of images with masks, decoded on access; see `load_segmentation`.

    Args:
        records: TFDS data source with encoded images.
        features: Names of the image feature and of the mask feature.
        mode: "grey" for palette and grey masks, "RGB" for masks whose red channel holds the values.
        classes: Class names.
        values: Maps each value of the masks to a class, or to 255 for an unknown class.
        name: Name of the source.
        version: Full TFDS name of the set, with its version.
        size: As in `SegmentationSource`.
        channels: As in `SegmentationSource`.
        cache: As in `SegmentationSource`.
    """

    def __init__(
        self,
        records: Any,
        features: tuple[str, str],
        mode: str,
        classes: Sequence[str],
        values: Mapping[int, int],
        name: str,
        *,
        version: str,
        size: tuple[int, int] | None = None,
        channels: int = 3,
        cache: bool = False,
    ):
        self._records, self._features, self._mode = records, features, mode
        self.classes, self.values = tuple(classes), checked_values(values, classes)
        self.name, self.version, self.size, self.channels = name, version, size, channels
        super().__init__(cache)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"TfdsSegmentationSource({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the full TFDS name, the split, the length and the options."""
        identity = (self.version, self.name, len(self), self.classes, dict(self.values), self.size, self.channels)
        return hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()

    def _read(self, index: int) -> dict[str, np.ndarray]:
        record, where = self._records[index], f"{self.name}[{index}]"
        encoded, mask = (io.BytesIO(record[feature]) for feature in self._features)
        image = decode_image(encoded, channels=self.channels, orient=False, name=where)
        raw = self._indices(mask, f"the mask of {where}")
        if raw.shape != image.shape[:2]:
            raise ValueError(
                f"the mask of {where} must have the size of its image, {image.shape[0]}x{image.shape[1]}; got"
                f" {raw.shape[0]}x{raw.shape[1]}"
            )
        example = {"image": image, "label": labels_of(raw, f"the mask of {where}", self.classes, self.values)}
        return example if self.size is None else fitted(example, self.size)

    def _indices(self, file: io.BytesIO, where: str) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(file) as opened:
                mode, pixels = opened.mode, np.asarray(opened)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{where} is not a readable image: {error}") from error
        if mode not in (("RGB",) if self._mode == "RGB" else ("L", "P")):
            raise ValueError(f"{where} must be an 8-bit {self._mode} image; got {mode}")
        return pixels[..., 0] if self._mode == "RGB" else pixels


def load_tfds_segmentation(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    values: Mapping[int, int] | None = None,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    cache: bool = False,
) -> TfdsSegmentationSource:
    """Opens one split of a prepared TFDS set of images with masks.

    Args:
        name: "oxford_iiit_pet", "cityscapes" or "scene_parse150", optionally with a config or version.
        split: TFDS split, such as "train", "validation" or "test[:100]".
        data_dir: Directory of prepared sets; None for the default of TFDS.
        classes: Class names; None for the classes of the data set. Must be given together with `values`.
        values: Maps each value of the masks to a class; None for the mapping of the data set.
        size: As in `SegmentationSource`.
        channels: As in `SegmentationSource`.
        cache: As in `SegmentationSource`.

    Returns:
        The source.

    Raises:
        ValueError: The set or split does not exist, its examples are not images with masks, or `classes` and `values`
            are not given together or do not fit.
        RuntimeError: The set is not prepared.
    """
    from flaxvision.data.tfds import _builder, _quiet

    base = SETS[name.split("/")[0].split(":")[0]]
    if (classes is None) != (values is None):
        raise ValueError(f"classes and values must be given together for {name!r}; got one of them")
    with _quiet():
        import tensorflow_datasets as tfds

        builder = _builder(name, data_dir)
        features = builder.info.features
        if base.image not in features or base.mask not in features:
            raise ValueError(
                f"name must be a TFDS set with {base.image} and {base.mask}; got {name!r} with {sorted(features)}"
            )
        if not builder.is_prepared():
            raise RuntimeError(
                f"TFDS set {name!r} is not prepared in {builder.data_path}; prepare it once with TensorFlow "
                f"(tfds.builder({name!r}, file_format='array_record').download_and_prepare(); {base.source}), or pass "
                "its data_dir"
            )
        decoders: Any = {feature: tfds.decode.SkipDecoding() for feature in (base.image, base.mask)}
        try:
            records = builder.as_data_source(split=split, decoders=decoders)
        except (KeyError, ValueError, AssertionError) as error:
            known = ", ".join(map(repr, builder.info.splits)) or "none"
            raise ValueError(f"split must name one or more of {known} for {name!r}; got {split!r} ({error})") from error
    return TfdsSegmentationSource(
        records,
        (base.image, base.mask),
        base.mode,
        base.classes if classes is None else classes,
        base.values if values is None else values,
        f"{name}/{split}",
        version=builder.info.full_name,
        size=size,
        channels=channels,
        cache=cache,
    )
