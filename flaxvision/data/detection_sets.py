"""Detection data sets by name: `load_detection`, and TFDS data sets with boxes."""

import hashlib
import io
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flaxvision.data import annotation_files
from flaxvision.data.annotations import Objects, labels_in
from flaxvision.data.arrays import Source
from flaxvision.data.decode import decode_image
from flaxvision.data.shapes import ShapesSource
from flaxvision.data.workers import bounded_map

NAMES = ("shapes", "voc_xml", "coco", "yolo", "instances")
# Where the files of COCO are looked for: first as in the official archives, then as in folders made by hand.
_COCO_JSON = ("annotations/instances_{split}.json", "annotations/{split}.json", "{split}.json")
_COCO_BESIDE = "{split}/_annotations.coco.json"
_COCO_IMAGES = ("{split}", "images/{split}", "images", ".")
# The names of the official archives for what TFDS has in another set than its default, which is that of 2014.
_COCO_OF_TFDS = {"train2017": ("coco/2017", "train"), "val2017": ("coco/2017", "validation")}


def load_detection(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    drop_empty: bool = False,
    one_based: bool = True,
    masks: bool = False,
) -> Source:
    """Opens one split of a detection data set.

    Examples are dicts with `image` uint8 [H, W, 3], `boxes` float32 [M, 4] xyxy in pixels, `labels` int32 [M], `valid`,
    `crowd` and `difficult` bool [M], and with `masks=True` also `masks` [M, H, W], zeros and ones.

    Args:
        name: One of

            * "shapes": drawn discs, boxes and triangles, which need no files; see `ShapesSource`;
            * "voc_xml": a folder in the layout of PASCAL VOC; see `load_voc`;
            * "coco": a folder with `annotations/instances_SPLIT.json` and the images in `SPLIT`, as in the official
              archives; or a TFDS directory in which "coco" is prepared, where the splits "train2017" and "val2017" are
              "train" and "validation" of "coco/2017";
            * "yolo": a folder of YOLO text files; see `load_yolo`;
            * "instances": a folder of images and of masks whose values are the numbers of instances; see the "folder"
              of `load_segmentation`. All instances have one class;
            * the name of a prepared TFDS set with boxes, such as "voc/2007" or "coco/2017".
        split: Name of the split.
        data_dir: The folder. For a TFDS name, the directory of prepared sets; None for the default of TFDS.
        classes: Class names. For "voc_xml" and "yolo", None reads them from the files. For COCO and TFDS, they must
            include the classes of the data, whose order is the default; a model may have others in between. For
            "instances", one name; the default is "object".
        drop_empty: Whether to leave out boxes of zero width or height and list them in the attribute `dropped`,
            instead of raising an error.
        one_based: For "voc_xml"; see `load_voc`.
        masks: Whether to read the mask of each object. Only "shapes", "instances" and folders of COCO have masks; TFDS
            leaves out those of COCO.

    Returns:
        The source.

    Raises:
        ValueError: The set or split does not exist, a file is missing or damaged, a class is unknown, a box or mask is
            invalid, or `masks` is True for a set without masks.
        RuntimeError: The TFDS set is not prepared.
    """
    if name == "shapes":
        if classes is not None:
            raise ValueError(f"classes must be None for 'shapes', which has its own; got {list(classes)}")
        if data_dir is not None:
            raise ValueError(f"data_dir must be None for 'shapes', which has no files; got {os.fspath(data_dir)!r}")
        return ShapesSource(split, masks=masks)
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if name in NAMES and folder is None:
        raise ValueError(f"data_dir must be the folder of the data set for {name!r}; got None")
    if folder is not None and not folder.is_dir():
        raise ValueError(f"data_dir must be an existing folder; got {os.fspath(folder)!r}")
    if name == "instances":
        return _load_instances(folder, split, classes, masks)
    if name in ("voc_xml", "yolo") and masks:
        raise ValueError(f"masks must be False for {name!r}, whose annotations have no masks; got True")
    if name == "voc_xml":
        options: Any = {"classes": classes, "drop_empty": drop_empty, "one_based": one_based}
        return annotation_files.load_voc(folder, split, **options)  # pyright: ignore[reportArgumentType]
    if name == "yolo":
        return annotation_files.load_yolo(folder, split, classes=classes, drop_empty=drop_empty)  # pyright: ignore[reportArgumentType]
    if name == "coco" and folder is not None and not any((folder / "coco").rglob("dataset_info.json")):
        return _load_coco_folder(folder, split, classes, drop_empty, masks)
    if masks:
        raise ValueError(
            f"masks must be False for {name!r}, because TFDS has no masks; got True (to read those of COCO, data_dir "
            "must be the folder with its JSON files)"
        )
    if name == "coco":
        name, split = _COCO_OF_TFDS.get(split, (name, split))
    return load_tfds_detection(name, split, data_dir=folder, classes=classes, drop_empty=drop_empty)


def _load_instances(folder: Path | None, split: str, classes: Sequence[str] | None, masks: bool) -> Source:
    from flaxvision.data.instances import InstanceSource
    from flaxvision.data.segmentation_sets import load_segmentation

    names = ("object",) if classes is None else tuple(classes)
    if len(names) != 1:
        raise ValueError(f"classes must be one name for 'instances', whose objects have one class; got {list(names)}")
    options: Any = {"data_dir": folder, "classes": ("background", *names), "instances": True, "cache": True}
    return InstanceSource(load_segmentation("folder", split, **options), masks=masks)


def _load_coco_folder(folder: Path, split: str, classes: Sequence[str] | None, drop_empty: bool, masks: bool) -> Source:
    files = [folder / pattern.format(split=split) for pattern in (*_COCO_JSON, _COCO_BESIDE)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{folder} must have annotations of {split!r} in {files[0].relative_to(folder)}; got none")
    places = [folder / pattern.format(split=split) for pattern in _COCO_IMAGES]
    images = next(place for place in places if place.is_dir())
    options: Any = {"classes": classes, "drop_empty": drop_empty, "name": f"{folder.resolve().name}/{split}"}
    options["masks"] = masks
    return annotation_files.load_coco(file, images, **options)


class TfdsDetectionSource:
    """A prepared TFDS split of images with boxes. Images are decoded on access.

    Args:
        records: TFDS data source with encoded images.
        classes: Class names.
        name: Name of the source.
        version: Full TFDS name of the set, with its version.
        drop_empty: Whether to leave out boxes of zero width or height instead of raising an error.
        one_based: Whether the first corners of the boxes count pixels from 1.
        labels: For each class of the set, its index in `classes`. None if they are the same.

    Attributes:
        sizes: Height and width of each image, int [N, 2].
        counts: Number of objects of each image, int [N].
        dropped: Descriptions of the boxes that were left out.
    """

    def __init__(
        self,
        records: Any,
        classes: Sequence[str],
        name: str,
        *,
        version: str,
        drop_empty: bool,
        one_based: bool = False,
        labels: Sequence[int] | None = None,
    ):
        self._records, self._drop_empty = records, drop_empty
        self._labels = [*range(len(classes))] if labels is None else [*labels]
        self._offset = 1 if one_based else 0
        self.classes, self.name, self.version = tuple(classes), name, version

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        record = self._records[index]
        image = decode_image(io.BytesIO(record["image"]), orient=False, name=f"{self.name}[{index}]")
        objects = self._objects(record, index, (image.shape[0], image.shape[1]), [])
        fields: dict[str, Any] = {"boxes": objects.boxes, "labels": objects.labels, "crowd": objects.crowd}
        fields |= {"difficult": objects.difficult, "valid": np.ones(len(objects.boxes), bool)}
        return {"image": image, **fields, **({} if objects.area is None else {"area": objects.area})}

    def __repr__(self) -> str:
        return f"TfdsDetectionSource({self.name!r}, {len(self)} images of {len(self.classes)} classes)"

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, int [N, 2]. The first access reads the headers of all images."""
        return self._overview[0]

    @property
    def counts(self) -> np.ndarray:
        """Number of objects of each image, int [N]."""
        return self._overview[1]

    @property
    def dropped(self) -> tuple[str, ...]:
        """Descriptions of the boxes that were left out."""
        return self._overview[2]

    @cached_property
    def _overview(self) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        from PIL import Image

        def look(index: int) -> tuple[tuple[int, int], int, list[str]]:
            record, dropped = self._records[index], []
            with Image.open(io.BytesIO(record["image"])) as image:
                size = image.height, image.width
            return size, len(self._objects(record, index, size, dropped).boxes), dropped

        found = [*bounded_map(look, range(len(self)))]
        sizes = np.array([size for size, _, _ in found], np.int64).reshape(-1, 2)
        counts = np.array([count for _, count, _ in found], np.int64)
        return sizes, counts, tuple(text for _, _, texts in found for text in texts)

    def _objects(self, record: dict[str, Any], index: int, size: tuple[int, int], dropped: list[str]) -> Any:
        values, where = record["objects"], f"{self.name}[{index}]"
        objects = Objects(where, size, self._drop_empty, dropped, with_area="area" in values)
        height, width = size
        for k, (y1, x1, y2, x2) in enumerate(np.asarray(values["bbox"], np.float64).reshape(-1, 4)):
            label = int(values["label"][k])
            if not 0 <= label < len(self._labels):
                raise ValueError(f"the class in {where} must lie between 0 and {len(self._labels) - 1}; got {label}")
            label = self._labels[label]
            faulty = x2 <= x1 or y2 <= y1  # with the offset it could look right
            offset = 0 if faulty else self._offset
            objects.add(
                (x1 * width - offset, y1 * height - offset, x2 * width, y2 * height),
                label,
                name=self.classes[label],
                crowd=bool(values["is_crowd"][k]) if "is_crowd" in values else False,
                difficult=bool(values["is_difficult"][k]) if "is_difficult" in values else False,
                area=float(values["area"][k]) if "area" in values else 0.0,
            )
        return objects.annotation(where)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the full TFDS name, the split, the length and how boxes are read."""
        identity = f"{self.version}/{self.name}/{len(self)}/{self._drop_empty}/{self._offset}"
        if self._labels != [*range(len(self.classes))]:
            identity += f"/{self._labels}/{self.classes}"
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def load_tfds_detection(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    drop_empty: bool = False,
) -> TfdsDetectionSource:
    """Opens one split of a prepared TFDS set of images with boxes, such as "voc/2007" or "coco/2017".

    TFDS divides the coordinates of VOC, which count pixels from 1, by the size of the image. So 1 is taken off the
    first corner of these boxes, as `load_voc` does.

    Args:
        name: TFDS name with an optional config or version.
        split: TFDS split, such as "train", "validation" or "test[:100]".
        data_dir: Directory of prepared sets; None for the default of TFDS.
        classes: As in `load_detection`.
        drop_empty: As in `load_detection`.

    Returns:
        The source.

    Raises:
        ValueError: The set or split does not exist, a class is not in `classes`, or its examples are not images with
            boxes.
        RuntimeError: The set is not prepared.
    """
    from flaxvision.data.tfds import _builder, _quiet, is_known, names

    if not is_known(name, data_dir):
        import difflib

        near = difflib.get_close_matches(name, [*NAMES, *names()], n=3, cutoff=0.5) or NAMES
        raise ValueError(f"name must be a known detection set (nearest: {', '.join(near)}); got {name!r}")
    with _quiet():
        import tensorflow_datasets as tfds

        builder = _builder(name, data_dir)
        features = builder.info.features
        boxes = features["objects"].feature if "objects" in features and "image" in features else {}
        if "bbox" not in boxes or "label" not in boxes:
            raise ValueError(f"name must be a TFDS set of images with boxes; got {name!r} with {sorted(features)}")
        if not builder.is_prepared():
            raise RuntimeError(
                f"TFDS set {name!r} is not prepared in {builder.data_path}; prepare it once with TensorFlow "
                f"(tfds.builder({name!r}, file_format='array_record').download_and_prepare()), or pass its data_dir"
            )
        try:
            records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        except (KeyError, ValueError, AssertionError) as error:
            known = ", ".join(map(repr, builder.info.splits)) or "none"
            raise ValueError(f"split must name one or more of {known} for {name!r}; got {split!r} ({error})") from error
    own = boxes["label"].names
    options: Any = {"drop_empty": drop_empty, "one_based": builder.name == "voc"}
    if classes is not None:
        options["labels"] = labels_in(classes, own, f"{name}/{split}")
    version, chosen = builder.info.full_name, own if classes is None else classes
    return TfdsDetectionSource(records, chosen, f"{name}/{split}", version=version, **options)
