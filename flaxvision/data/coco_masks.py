"""Reads the object masks of COCO: polygons and run-length encodings (RLE). pycocotools draws the polygons."""

from typing import Any

import numpy as np

from flaxvision.data.annotations import OVERHANG
from flaxvision.data.rle import runs_of


def encode_mask(segmentation: Any, size: tuple[int, int], where: str) -> bytes:
    """Converts the `segmentation` of an annotation to a compressed RLE.

    Args:
        segmentation: A list of polygons, each a flat list x1, y1, x2, y2, ...; or a dict with `size` and `counts`, a
            list of run lengths or a compressed RLE.
        size: Height and width of the image in pixels.
        where: The annotation, for error messages.

    Returns:
        The `counts` of the compressed RLE; see `flaxvision.data.rle`.

    Raises:
        ValueError: There is no segmentation, or it is damaged, is of another size, or lies outside of its image.
    """
    import pycocotools.mask

    coder: Any = pycocotools.mask  # its type hints leave out lists of floats
    if not segmentation:
        raise ValueError(f"{where} must have a segmentation, because masks are read; got {segmentation}")
    if isinstance(segmentation, dict):
        _check_runs(segmentation, size, where)
        counts = segmentation["counts"]
        if isinstance(counts, list):
            return coder.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
        return counts.encode()
    polygons = [_checked(polygon, size, where) for polygon in segmentation]
    return coder.merge(coder.frPyObjects(polygons, *size))["counts"]


def _checked(polygon: Any, size: tuple[int, int], where: str) -> list[float]:
    """Returns a polygon of finite corners in the image. pycocotools reads lists of four numbers as boxes."""
    try:
        corners = np.asarray(polygon, np.float64)
    except (TypeError, ValueError):
        corners = np.zeros(0)
    if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2 or not np.isfinite(corners).all():
        raise ValueError(f"{where} must have polygons of at least three finite corners x, y; got {_short(polygon)}")
    over = corners.reshape(-1, 2) - [size[::-1]]
    if corners.min() < -OVERHANG or over.max() > OVERHANG:
        raise ValueError(
            f"{where} must have a polygon in its image of {size[0]}x{size[1]} pixels; got {_short(polygon)}"
        )
    return corners.tolist()


def _check_runs(segmentation: dict[str, Any], size: tuple[int, int], where: str) -> None:
    """Raises ValueError unless the runs of an RLE fill the image. pycocotools would read beyond their end."""
    if segmentation.get("size") != list(size):
        raise ValueError(
            f"{where} must have an RLE of its image's size {list(size)}; got the size {segmentation.get('size')}"
        )
    counts: Any = segmentation.get("counts")
    try:
        runs = np.asarray(counts, np.int64) if isinstance(counts, list) else runs_of(counts.encode())
    except (AttributeError, TypeError, ValueError, OverflowError):
        runs = np.array([-1])
    if runs.ndim != 1 or runs.min(initial=0) < 0 or runs.sum() != size[0] * size[1]:
        raise ValueError(
            f"{where} must have an RLE whose counts add up to {size[0] * size[1]} pixels; got {_short(counts)}"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
