"""`flaxvision predict` for segmenters: labels the pixels of image files, and writes a table, JSON or overlays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax

from flaxvision import plot
from flaxvision.layers.resize import resize_bilinear
from flaxvision.segmentation import segment


def segment_files(
    model: Any, variables: Any, transform: Callable[[Any], np.ndarray], paths: Sequence[Path], **options: Any
) -> list[dict[str, Any]]:
    """Labels the pixels of image files. Compiles once for each image size.

    Args:
        model: The segmenter.
        variables: Its variables.
        transform: Maps a uint8 image `[H, W, 3]` to a normalized one of any size, `[h, w, C]`.
        paths: The image files.
        **options: Options of `flaxvision.segment`.

    Returns:
        A dict for each file: `path`; `image`, uint8 `[H, W, 3]`; and `labels`, the class of every pixel, int32
        `[H, W]`. Probabilities are resized bilinearly to `[H, W]` before the class is chosen.

    Raises:
        ValueError: A file is not a readable image.
    """
    from flaxvision.data.decode import decode_image

    def labels_of(size: tuple[int, int]) -> Callable[..., Any]:
        def labels(variables: Any, pixels: jax.Array) -> jax.Array:
            found = segment(model, variables, pixels, probabilities=True, **options)
            return lax.argmax(resize_bilinear(found, size), 3, np.int32)

        return jax.jit(labels)

    compiled: dict[tuple[int, int], Callable[..., Any]] = {}
    results = []
    for path in paths:
        image = decode_image(path)
        size = (image.shape[0], image.shape[1])
        find = compiled.setdefault(size, labels_of(size))
        results.append({"path": path, "image": image, "labels": np.asarray(find(variables, transform(image)[None]))[0]})
    return results


def table(results: Sequence[dict[str, Any]], names: Sequence[str] | None) -> str:
    """Returns one line per image and class, with the share of the pixels in that class. The largest share is first."""
    lines = []
    for result in results:
        for label, pixels in _counts(result["labels"]):
            share = pixels / result["labels"].size
            lines.append(f"{result['path']}  {share:7.2%}  {_name(label, names)}")
    return "\n".join(lines)


def to_json(results: Sequence[dict[str, Any]], names: Sequence[str] | None) -> str:
    """Returns the labels as JSON: a list with `file`, `height`, `width` and the pixels of each class."""
    content = []
    for result in results:
        height, width = result["labels"].shape
        classes = [
            {"name": _name(label, names), "label": label, "pixels": pixels}
            for label, pixels in _counts(result["labels"])
        ]
        content.append({"file": str(result["path"]), "height": height, "width": width, "classes": classes})
    return json.dumps(content, indent=1)


def draw(results: Sequence[dict[str, Any]], names: Sequence[str] | None, out: Path) -> list[Path]:
    """Draws every image overlaid with the colours of its classes.

    Args:
        results: Result of `segment_files`.
        names: Names of the classes; None for their numbers. Class 0 is not coloured if its name is `background`.
        out: File to write, if there is one image and the path has a suffix. Otherwise a folder. One picture per image
            is written to the folder, named after the image.

    Returns:
        Paths of the pictures.
    """
    from flaxvision.predict import picture_files

    background = 0 if names is not None and names[0] == "background" else None
    files = picture_files([result["path"] for result in results], out)
    for result, file in zip(results, files, strict=True):
        plot.overlays([result["image"]], [result["labels"]], classes=names, background=background, columns=1, path=file)
    return files


def _counts(labels: np.ndarray) -> list[tuple[int, int]]:
    values, counts = np.unique(labels, return_counts=True)
    return sorted(zip(values.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])


def _name(label: int, names: Sequence[str] | None) -> str:
    return str(label) if names is None else names[label]
