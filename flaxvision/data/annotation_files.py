"""Readers of detection annotations: PASCAL VOC XML, COCO JSON and YOLO text files.

All readers check every box. They raise an error that names the file for a box that is not finite, is inverted or lies
outside of its image, for an unknown class, and for a missing file. A box that exceeds its image by at most one pixel is
clipped. A box of zero width or height is an error too, unless `drop_empty` is set. Then it is left out, and the source
lists it in `dropped`.
"""

import difflib
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxvision.data.annotations import Annotation, DetectionSource, Objects, labels_in
from flaxvision.data.coco_masks import encode_mask
from flaxvision.data.folder import SUFFIXES
from flaxvision.data.workers import bounded_map

YOLO_IMAGES, YOLO_LABELS = "images", "labels"
_NAME_FILES = ("classes.txt", "obj.names", "classes.names", "data.names")


def load_voc(
    folder: Path, split: str, *, classes: Sequence[str] | None = None, drop_empty: bool = False, one_based: bool = True
) -> DetectionSource:
    """Reads a folder in the layout of PASCAL VOC: `Annotations`, `JPEGImages` and `ImageSets/Main`.

    Args:
        folder: The folder.
        split: Name of a file in `ImageSets/Main`, such as "train", "val", "trainval" or "test"; or "all" for every
            annotation.
        classes: Class names. None uses the sorted names from all annotations of the folder, so that every split has the
            same classes.
        drop_empty: Whether to leave out boxes of zero width or height instead of raising an error.
        one_based: Whether coordinates follow VOC: pixels are numbered from 1, and the last pixel belongs to the box. If
            False, coordinates are used as they are.

    Returns:
        The source. `difficult` is the flag of VOC; `crowd` is False.

    Raises:
        ValueError: The split does not exist, a file is missing or damaged, a class is unknown, or a box is invalid.
    """
    folder = Path(folder)
    if not (folder / "Annotations").is_dir():
        raise ValueError(f"{folder} is not a folder of PASCAL VOC: it has no folder Annotations")
    stems = _voc_stems(folder, split)
    if classes is None:
        every = sorted((folder / "Annotations").glob("*.xml"))
        classes = sorted({name for names in bounded_map(_voc_names, every) for name in names})
    dropped: list[str] = []
    found = [_voc_annotation(folder, stem, tuple(classes), drop_empty, one_based, dropped) for stem in stems]
    return DetectionSource(folder, found, classes, f"{folder.resolve().name}/{split}", dropped=dropped)


def _voc_stems(folder: Path, split: str) -> list[str]:
    if split == "all":
        return sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))
    file = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        known = sorted(path.stem for path in file.parent.glob("*.txt"))
        raise ValueError(f"split must be one of {', '.join([*known, 'all'])} for {folder}; got {split!r}")
    stems = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    if repeated := [stem for stem, count in Counter(stems).items() if count > 1]:
        raise ValueError(f"{file} is damaged: it names {repeated[0]!r} more than once")
    return stems


def _voc_tree(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{path} is not a readable annotation: {error}") from error


def _voc_names(path: Path) -> set[str]:
    return {(element.findtext("name") or "").strip() for element in _voc_tree(path).iter("object")} - {""}


def _voc_annotation(
    folder: Path, stem: str, classes: tuple[str, ...], drop_empty: bool, one_based: bool, dropped: list[str]
) -> Annotation:
    path = folder / "Annotations" / f"{stem}.xml"
    root = _voc_tree(path)
    # Some tools rename the annotation file only, and `filename` stays right. Others rename both files and not
    # `filename`.
    names = [f"JPEGImages/{name}" for name in ((root.findtext("filename") or "").strip(), f"{stem}.jpg") if name]
    image = next((name for name in names if (folder / name).is_file()), None)
    if image is None:
        raise ValueError(f"{path} has no image: {folder / names[0]} is missing")
    size = _numbers(path, root.find("size"), ("height", "width"))
    objects = Objects(str(path), (int(size[0]), int(size[1])), drop_empty, dropped)
    for element in root.iter("object"):
        name = (element.findtext("name") or "").strip()
        x1, y1, x2, y2 = _numbers(path, element.find("bndbox"), ("xmin", "ymin", "xmax", "ymax"))
        offset = 1 if one_based else 0
        faulty = x2 <= x1 or y2 <= y1  # the offset could hide this
        box = (x1, y1, x2, y2) if faulty else (x1 - offset, y1 - offset, x2, y2)
        difficult = (element.findtext("difficult") or "0").strip() not in ("", "0")
        objects.add(box, _class_index(name, classes, path), name=name, difficult=difficult)
    return objects.annotation(image)


def _numbers(path: Path, element: ElementTree.Element | None, tags: Sequence[str]) -> list[float]:
    values = [None if element is None else element.findtext(tag) for tag in tags]
    try:
        return [float(value) for value in values]  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise ValueError(f"{path} must have numbers for {', '.join(tags)}; got {values}") from None


def _class_index(name: str, classes: Sequence[str], path: Path) -> int:
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5) or list(classes[:5])
        raise ValueError(f"every class in {path} must be a known one (such as {', '.join(near)}); got {name!r}")
    return tuple(classes).index(name)


def load_coco(
    annotations: Path,
    images: Path,
    *,
    classes: Sequence[str] | None = None,
    drop_empty: bool = False,
    masks: bool = False,
    name: str | None = None,
) -> DetectionSource:
    """Reads a JSON file of object instances in the format of COCO.

    Args:
        annotations: The JSON file, such as `annotations/instances_val2017.json`.
        images: Folder with the images.
        classes: Class names that include those of the categories, such as the classes of a model. None takes the
            categories by increasing id.
        drop_empty: Whether to leave out boxes of zero width or height, and masks without a pixel, instead of raising an
            error.
        masks: Whether to read each `segmentation`: polygons, or run lengths, compressed or not. The examples then have
            `masks` uint8 [M, H, W].
        name: Name of the source; None uses that of the file.

    Returns:
        The source. Labels number the classes; `category_ids` holds their ids, -1 for a class without a category.
        `crowd` is `iscrowd`, and `difficult` is False. `area` is that of the file, or else the area of the box. In
        COCO's files it is the area of the segmentation.

    Raises:
        ValueError: The file is missing or damaged, an annotation refers to an unknown image or category, a category is
            not in `classes`, an image is missing, a box is invalid, or with `masks`, a segmentation is missing or
            invalid.
    """
    path = Path(annotations)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} must have images, annotations and categories; got {found or 'nothing'}")
    for part, keys in (("images", ("id", "file_name", "height", "width")), ("categories", ("id", "name"))):
        for entry in content[part]:
            if any(entry.get(key) is None for key in keys):
                raise ValueError(f"each of the {part} in {path} must have {', '.join(keys)}; got {entry}")
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    classes = names if classes is None else classes
    labels = dict(zip((category["id"] for category in categories), labels_in(classes, names, path), strict=True))
    if len(labels) != len(categories):
        raise ValueError(f"{path} is damaged: two categories have the same id")
    dropped: list[str] = []
    order = sorted(content["images"], key=lambda image: image["id"])
    objects = {
        image["id"]: Objects(
            f"{path} (image {image['id']}, {image['file_name']})",
            (int(image["height"]), int(image["width"])),
            drop_empty,
            dropped,
            with_area=True,
            with_masks=masks,
        )
        for image in order
    }
    if len(objects) != len(order):
        raise ValueError(f"{path} is damaged: two images have the same id")
    for annotation in content["annotations"]:
        where = f"annotation {annotation.get('id')} in {path}"
        if annotation.get("image_id") not in objects:
            raise ValueError(
                f"{where} must refer to an image in the file; got the image id {annotation.get('image_id')}"
            )
        if annotation.get("category_id") not in labels:
            raise ValueError(
                f"{where} must refer to a category in the file; got the category id {annotation.get('category_id')}"
            )
        try:
            x, y, width, height = (float(value) for value in annotation["bbox"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{where} must have a bbox of four numbers x, y, width, height; got {annotation.get('bbox')}"
            ) from None
        label = labels[annotation["category_id"]]
        own = objects[annotation["image_id"]]
        own.add(
            (x, y, x + width, y + height),
            label,
            name=classes[label],
            crowd=bool(annotation.get("iscrowd", 0)),
            area=float(annotation.get("area", width * height)),
            mask=encode_mask(annotation.get("segmentation"), own.size, where) if masks else b"",
        )
    for image in order:
        if not (Path(images) / image["file_name"]).is_file():
            raise ValueError(f"{path} has no image {image['id']}: {Path(images) / image['file_name']} is missing")
    found = [objects[image["id"]].annotation(image["file_name"]) for image in order]
    category_ids = [-1] * len(classes)
    for category, label in labels.items():
        category_ids[label] = category
    options: Any = {"dropped": dropped, "category_ids": category_ids}
    return DetectionSource(Path(images), found, classes, name or path.stem, **options)


def load_yolo(
    folder: Path, split: str, *, classes: Sequence[str] | None = None, drop_empty: bool = False
) -> DetectionSource:
    """Reads a folder of YOLO text files: `images/SPLIT/x.jpg` with `labels/SPLIT/x.txt`, or a list `SPLIT.txt`.

    A line of a label file is `class x y width height`. x and y are the centre, and all four numbers are fractions of
    the width or height of the image. An image without a label file has no objects. A list has the path of one image per
    line, relative to `folder`. The path of the label file is that of the image, with the last folder `images` replaced
    by `labels`. Without such a folder, the label file is next to the image.

    Args:
        folder: The folder.
        split: Name of the subfolders or of the list.
        classes: Class names. None reads `classes.txt`, `obj.names`, `classes.names`, `data.names` or the `names` of
            `data.yaml`.
        drop_empty: Whether to leave out boxes of zero width or height instead of raising an error.

    Returns:
        The source; `crowd` and `difficult` are False.

    Raises:
        ValueError: The split does not exist, there are no class names, a file is missing or damaged, a class is out of
            range, or a box is invalid.
    """
    folder = Path(folder)
    paths = _yolo_images(folder, split)
    names = tuple(_yolo_classes(folder) if classes is None else classes)
    sizes = bounded_map(lambda path: _image_size(folder / path), paths)
    dropped: list[str] = []
    found = []
    for path, size in zip(paths, sizes, strict=True):
        label_file = _yolo_label_file(folder, path)
        objects = Objects(str(label_file), size, drop_empty, dropped)
        lines = label_file.read_text().splitlines() if label_file.is_file() else []
        for number, line in enumerate(lines, 1):
            if line.strip():
                _yolo_line(objects, line, f"line {number} of {label_file}", names)
        found.append(objects.annotation(path))
    return DetectionSource(folder, found, names, f"{folder.resolve().name}/{split}", dropped=dropped)


def _yolo_images(folder: Path, split: str) -> list[str]:
    inside, listed = folder / YOLO_IMAGES / split, folder / f"{split}.txt"
    if inside.is_dir():
        files = (path for path in sorted(inside.rglob("*")) if path.suffix.lower() in SUFFIXES)
        found = [path.relative_to(folder).as_posix() for path in files]
    elif listed.is_file():
        found = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
        for path in found:
            if not (folder / path).is_file():
                raise ValueError(f"{listed} has no image: {folder / path} is missing")
    else:
        known = sorted(path.name for path in (folder / YOLO_IMAGES).glob("*") if path.is_dir())
        raise ValueError(
            f"split must be a folder {YOLO_IMAGES}/SPLIT or a list SPLIT.txt in {folder} (it has "
            f"{', '.join(known) or 'none'}); got {split!r}"
        )
    return found


def _yolo_label_file(folder: Path, path: str) -> Path:
    parts = list(Path(path).with_suffix(".txt").parts)
    if YOLO_IMAGES in parts:
        last = len(parts) - 1 - parts[::-1].index(YOLO_IMAGES)
        parts[last] = YOLO_LABELS
    return folder.joinpath(*parts)


def _yolo_classes(folder: Path) -> list[str]:
    for name in _NAME_FILES:
        if (folder / name).is_file():
            return [line.strip() for line in (folder / name).read_text().splitlines() if line.strip()]
    file = folder / "data.yaml"
    if file.is_file() and (names := _names_of_yaml(file.read_text())):
        return names
    raise ValueError(f"{folder} must have class names in {', '.join(_NAME_FILES)} or data.yaml; got none")


def _names_of_yaml(text: str) -> list[str]:
    """Reads the entry `names` of a data.yaml: a list in brackets, a list with dashes, or a map from numbers."""
    lines = [line.split(" #")[0].rstrip() for line in text.splitlines()]
    start = next((i for i, line in enumerate(lines) if line.startswith("names:")), None)
    if start is None:
        return []
    value = lines[start].partition(":")[2].strip()
    if value:
        items = value.strip("[]{}").split(",")
    else:
        block = []
        for line in lines[start + 1 :]:
            if line and not line.startswith((" ", "-")):
                break
            if line.strip():
                block.append(line.strip().removeprefix("-"))
        items = block
    return [item.rpartition(":")[2].strip().strip("'\"") for item in items if item.strip()]


def _yolo_line(objects: Objects, line: str, where: str, classes: Sequence[str]) -> None:
    words = line.split()
    try:
        label, (x, y, width, height) = int(words[0]), (float(word) for word in words[1:])
    except ValueError:
        raise ValueError(f"{where} must be a class index, x, y, width and height; got {line.strip()!r}") from None
    if not 0 <= label < len(classes):
        raise ValueError(f"the class in {where} must lie between 0 and {len(classes) - 1}; got {label}")
    rows, columns = objects.size
    box = [(x - width / 2) * columns, (y - height / 2) * rows, (x + width / 2) * columns, (y + height / 2) * rows]
    objects.add(box, label, name=classes[label], empty=width == 0 or height == 0)


def _image_size(path: Path) -> tuple[int, int]:
    """Reads the height and width of an image file without decoding its pixels."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
