"""What `flaxvision predict` does for detectors: from image files to boxes, a table, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxvision import plot, weights
from flaxvision.data.canvas import Canvases
from flaxvision.data.preprocessing import DetectionPreprocessing
from flaxvision.detection import detect
from flaxvision.models.darknet_cfg import CfgDetector
from flaxvision.registry import model_info
from flaxvision.weights.bundle import is_bundle
from flaxvision.weights.preprocessing import known_preprocessing

# From a uint8 image [H, W, 3] to pixels [h, w, 3] on a canvas, and the height and width of the part that it fills.
Transform = Callable[[np.ndarray], tuple[np.ndarray, tuple[int, int]]]


def detector_transform(name: str, stated: str, size: int | None = None) -> Transform:
    """Returns the evaluation transform of a detector.

    Args:
        name: A registry name.
        stated: A tag, a source or the path of a bundle, which may state a transform or canvases.
        size: Side of a square canvas, instead of what is stated. None for what is stated, or else the published
            input size of the model; images fill it as far as their aspect ratio allows.

    Returns:
        The transform.

    Raises:
        ValueError: There is no such model, tag, source or bundle, or `size` is below 1.
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
    """Returns the evaluation transform of a detector that a `.cfg` file describes.

    Args:
        model: The detector.
        size: Side of a square canvas; None for the `input_size` of the model.

    Returns:
        The transform; images fill the canvas as far as their aspect ratio allows (darknet's "letterbox").

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
    """Detects objects in image files. It compiles once for each size of canvas.

    Args:
        model: The detector.
        variables: Its variables.
        transform: See `detector_transform`.
        paths: The files.
        **options: Options of `flaxvision.detect`.

    Returns:
        For each file `path`, `image` uint8 [H, W, 3], and by falling score `boxes` [D, 4] xyxy in its pixels, `scores`
        and `labels` [D].

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
        results.append(
            {
                "path": path,
                "image": image,
                "boxes": boxes,
                "scores": found.scores[0][valid],
                "labels": found.labels[0][valid],
            }
        )
    return results


def table(results: Sequence[dict[str, Any]], names: Sequence[str] | None) -> str:
    """Returns a line for each detection: the file, the name, the score and the box in pixels."""
    lines = []
    for result in results:
        for box, score, label in zip(result["boxes"], result["scores"], result["labels"], strict=True):
            x1, y1, x2, y2 = (f"{value:.0f}" for value in box)
            lines.append(f"{result['path']}  {score:7.2%}  {_name(label, names)}  {x1},{y1} to {x2},{y2}")
        if not len(result["boxes"]):
            lines.append(f"{result['path']}  nothing found")
    return "\n".join(lines)


def to_json(results: Sequence[dict[str, Any]], names: Sequence[str] | None) -> str:
    """Returns the detections of all files as JSON: a list of `file`, `height`, `width` and `objects`."""
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
        content.append({"file": str(result["path"]), "height": height, "width": width, "objects": objects})
    return json.dumps(content, indent=1)


def draw(results: Sequence[dict[str, Any]], names: Sequence[str] | None, out: Path) -> list[Path]:
    """Draws the detections of each image.

    Args:
        results: See `detect_in_files`.
        names: Names of the classes; None for their numbers.
        out: The picture of one image; for several, a folder that gets a picture with the name of each.

    Returns:
        The pictures.
    """
    if len(results) == 1 and out.suffix:
        files = [out]
    else:
        out.mkdir(parents=True, exist_ok=True)
        stems = [result["path"].stem for result in results]
        files = [out / (f"{stem}.png" if stems.count(stem) == 1 else f"{stem}_{i}.png") for i, stem in enumerate(stems)]
    for result, file in zip(results, files, strict=True):
        plot.detections([result["image"]], [result], classes=names, columns=1, path=file)
    return files


def _name(label: Any, names: Sequence[str] | None) -> str:
    return str(int(label)) if names is None else names[int(label)]
