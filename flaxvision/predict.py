"""Detectors in `flaxvision predict`: detects objects in image files and writes a table, JSON or pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxvision import plot, weights
from flaxvision.data import rle
from flaxvision.data.canvas import Canvases
from flaxvision.data.preprocessing import DetectionPreprocessing
from flaxvision.detection import detect
from flaxvision.models.darknet_cfg import CfgDetector
from flaxvision.ops import iter_masks
from flaxvision.registry import model_info
from flaxvision.weights.bundle import is_bundle
from flaxvision.weights.preprocessing import known_preprocessing

# Maps a uint8 image [H, W, 3] to a padded array [h, w, 3], and the height and width of the region that it fills there.
Transform = Callable[[np.ndarray], tuple[np.ndarray, tuple[int, int]]]


def detector_transform(name: str, stated: str, size: int | None = None) -> Transform:
    """Returns the evaluation transform of a detector.

    Args:
        name: A registry name.
        stated: The weights: a tag, a source or the path of a bundle. They may define a transform.
        size: Side of the square to which images are padded, after they are resized to fill it as far as their aspect
            ratio allows. None for the transform of the weights. If they define none, images fill the published input
            size of the model in the same way.

    Returns:
        The transform.

    Raises:
        ValueError: The model, tag, source or bundle does not exist, or `size` is below 1.
    """
    info = model_info(name)
    values: dict[str, Any] = {"mean": info.mean, "std": info.std, "padding": 0.5}
    if is_bundle(stated) and (card := weights.read_card(stated)["metadata"].get("canvases")):
        values |= {key: card[key] for key in values}
        canvases = Canvases(**{key: value for key, value in card.items() if key not in values})
        canvases = canvases if size is None else Canvases(((size, size),))
        return partial(_on_canvas, canvases=canvases, **values)
    known = known_preprocessing(name, stated) if stated in (*weights.tags(name), *weights.sources(name)) else None
    if isinstance(known, DetectionPreprocessing) and size is None:
        return known
    side = (info.input_size[0], info.input_size[1]) if size is None else (size, size)
    return partial(_on_canvas, canvases=Canvases((side,)), **values)


def cfg_transform(model: CfgDetector, size: int | None = None) -> Transform:
    """Returns the evaluation transform of a detector from a `.cfg` file.

    Args:
        model: The detector.
        size: Side of the square to which images are padded; None for the `input_size` of the model.

    Returns:
        The transform. It resizes an image to fill the padded array as far as its aspect ratio allows (darknet's
        "letterbox").

    Raises:
        ValueError: `size` is below 1.
    """
    side = model.input_size if size is None else (size, size)
    return partial(_on_canvas, canvases=Canvases((side,)), mean=(0.0,) * 3, std=(1.0,) * 3, padding=0.5)


def _on_canvas(
    image: np.ndarray, *, canvases: Canvases, mean: Sequence[float], std: Sequence[float], padding: float
) -> tuple[np.ndarray, tuple[int, int]]:
    placed = canvases.place({"image": image}, canvases.choose((image.shape[0], image.shape[1])))
    height, width = (int(side) for side in placed["size"])
    pixels = placed["image"].astype(np.float32) / np.float32(255)
    pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    pixels[height:] = padding
    pixels[:, width:] = padding
    return pixels, (height, width)


def detect_in_files(
    model: Any, variables: Any, transform: Transform, paths: Sequence[Path], **options: Any
) -> list[dict[str, Any]]:
    """Detects objects in image files. It compiles once for each padded size.

    Args:
        model: The detector.
        variables: Variables of the model.
        transform: Result of `detector_transform` or `cfg_transform`.
        paths: The image files.
        **options: Options of `flaxvision.detect`.

    Returns:
        A dict for each file: `path`; `image`, uint8 [H, W, 3]; and by decreasing score `boxes` [D, 4], xyxy in pixels
        of that image, `scores` [D] and `labels` [D]; and for a detector with masks `masks`, a compressed RLE of each
        mask in that image; see `flaxvision.data.rle`.

    Raises:
        ValueError: A file is not a readable image.
    """
    from flaxvision.data.decode import decode_image

    find = jax.jit(lambda v, pixels, sizes: detect(model, v, pixels, sizes, **options))
    results = []
    for path in paths:
        image = decode_image(path)
        pixels, size = transform(image)
        found = jax.device_get(find(variables, pixels[None], np.array([size], np.int32)))
        valid = found.valid[0]
        scale = np.array([image.shape[1] / size[1], image.shape[0] / size[0]] * 2, np.float32)
        boxes = found.boxes[0][valid] * scale[None]
        result = {"path": path, "image": image, "boxes": boxes}
        result |= {"scores": found.scores[0][valid], "labels": found.labels[0][valid]}
        if found.masks is not None:
            pasted = iter_masks(found.masks[0][valid], boxes, image.shape[:2])
            result["masks"] = [rle.encode(mask[None])[0] for mask in pasted]
        results.append(result)
    return results


def table(results: Sequence[dict[str, Any]], names: Sequence[str] | None) -> str:
    """Returns one line per detection, with the file, the class, the score and the box in pixels."""
    lines = []
    for result in results:
        for box, score, label in zip(result["boxes"], result["scores"], result["labels"], strict=True):
            x1, y1, x2, y2 = (f"{value:.0f}" for value in box)
            lines.append(f"{result['path']}  {score:7.2%}  {_name(label, names)}  {x1},{y1} to {x2},{y2}")
        if not len(result["boxes"]):
            lines.append(f"{result['path']}  nothing found")
    return "\n".join(lines)


def to_json(results: Sequence[dict[str, Any]], names: Sequence[str] | None) -> str:
    """Returns the detections as JSON: a list with `file`, `height`, `width` and `objects` of each image.

    Masks are in COCO's format: a `segmentation` with `size` and the `counts` of a compressed RLE.
    """
    content = []
    for result in results:
        objects = [
            {
                "name": _name(label, names),
                "label": int(label),
                "score": round(float(score), 5),
                "box": [round(float(value), 2) for value in box],
            }
            for box, score, label in zip(result["boxes"], result["scores"], result["labels"], strict=True)
        ]
        height, width = result["image"].shape[:2]
        for each, mask in zip(objects, result.get("masks", ()), strict="masks" in result):
            each["segmentation"] = {"size": [height, width], "counts": mask.decode()}
        content.append({"file": str(result["path"]), "height": height, "width": width, "objects": objects})
    return json.dumps(content, indent=1)


def draw(results: Sequence[dict[str, Any]], names: Sequence[str] | None, out: Path) -> list[Path]:
    """Draws the detections of each image.

    Args:
        results: Result of `detect_in_files`.
        names: Names of the classes; None for their numbers.
        out: File to write if there is one image and the path has a suffix. Otherwise a folder, which gets one picture
            per image, with the name of the image.

    Returns:
        Paths of the pictures.
    """
    files = picture_files([result["path"] for result in results], out)
    for result, file in zip(results, files, strict=True):
        if "masks" in result:
            result = {**result, "masks": rle.decode(result["masks"], result["image"].shape[:2]).astype(bool)}
        plot.detections([result["image"]], [result], classes=names, columns=1, path=file)
    return files


def picture_files(paths: Sequence[Path], out: Path) -> list[Path]:
    """Returns the file of the picture of each image.

    Args:
        paths: The image files.
        out: File to write if there is one image and the path has a suffix. Otherwise a folder, which is created.

    Returns:
        `out`, or a file in it with the name of each image; numbers tell images of the same name apart.
    """
    if len(paths) == 1 and out.suffix:
        return [out]
    out.mkdir(parents=True, exist_ok=True)
    stems = [path.stem for path in paths]
    return [out / (f"{stem}.png" if stems.count(stem) == 1 else f"{stem}_{i}.png") for i, stem in enumerate(stems)]


def _name(label: Any, names: Sequence[str] | None) -> str:
    return str(int(label)) if names is None else names[int(label)]
