"""Plots for segmentation: images overlaid with the colours of their classes, next to the ground truth."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxvision.plot.general import PathLike, _figure, _images, _save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IGNORED = 255


def overlays(
    images: Sequence[Any] | np.ndarray,
    labels: Sequence[Any] | np.ndarray,
    truth: Sequence[Any] | np.ndarray | None = None,
    classes: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    background: int | None = None,
    opacity: float = 0.55,
    columns: int = 2,
    path: PathLike | None = None,
) -> "Figure":
    """Draws images overlaid with the colours of their labels, and optionally the ground truth next to each.

    With the ground truth, a third picture shows wrongly labelled pixels in black. Pixels whose true class is unknown
    are not coloured.

    Args:
        images: N images [H, W, 3] or [H, W] of any sizes, uint8 or floats in [0, 1].
        labels: For each image the class of every pixel, [H, W] integers; 255 is not coloured.
        truth: Ground truth like `labels`; None draws the labels only.
        classes: Names of the classes; None for their numbers.
        titles: A title for each image; None for none.
        background: Class that is not coloured and not in the legend; None to colour all classes.
        opacity: Opacity of the colours, from 0 to 1.
        columns: Number of images per row; the pictures of one image count as one.
        path: File to write; None only returns the figure.

    Returns:
        The figure.

    Raises:
        ValueError: There are no images, the lengths or the sizes of an image and its labels differ, a label has no
            name, or `columns` is below 1.
    """
    pictures = [_images("images", np.asarray(image)[None])[0] for image in images]
    if not pictures:
        raise ValueError("images must hold at least one image; got none")
    for name, values in (("labels", labels), ("truth", truth), ("titles", titles)):
        if values is not None and len(values) != len(pictures):
            raise ValueError(f"{name} must have one entry for each of the {len(pictures)} images; got {len(values)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    found = [np.asarray(map_) for map_ in labels]
    truths = None if truth is None else [np.asarray(map_) for map_ in truth]
    if truths is not None and all(a.shape == b.shape for a, b in zip(found, truths, strict=True)):
        found = [np.where(b == IGNORED, IGNORED, a) for a, b in zip(found, truths, strict=True)]
    present: set[int] = set()
    for name, maps in (("labels", found), ("truth", truths or [])):
        for picture, map_ in zip(pictures, maps, strict=False):
            if map_.shape != picture.shape[:2]:
                raise ValueError(f"{name} must have the size of the image, {picture.shape[:2]}; got {map_.shape}")
            present |= set(np.unique(map_).tolist())
    present -= {IGNORED, background}
    if wrong := [k for k in present if k < 0 or (classes is not None and k >= len(classes))]:
        known = "at least 0" if classes is None else f"indices of the {len(classes)} classes"
        raise ValueError(f"labels must be {known}; got {min(wrong)}")

    columns = min(columns, len(pictures))
    rows, each = math.ceil(len(pictures) / columns), 1 if truths is None else 3
    shape = np.max([picture.shape[:2] for picture in pictures], axis=0)
    cell = min(max(10.0 / (columns * each), 2.0), 8.0)
    names = {k: str(k) if classes is None else classes[k] for k in sorted(present)}
    per_row = max(1, int(cell * columns * each / 1.4))
    legend = 0.22 * math.ceil(len(names) / per_row) + 0.1
    figure = _figure(cell * columns * each, (cell * shape[0] / shape[1] + 0.25) * rows + legend)
    panels = figure.subplots(rows, columns * each, squeeze=False)
    for axes in np.ravel(panels):
        axes.set_axis_off()
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        group = panels[row][column * each : (column + 1) * each]
        title = "" if titles is None else titles[i]
        _draw(group[0], picture, found[i], background, opacity, title or (None if truths is None else "found"))
        if truths is not None:
            _draw(group[1], picture, truths[i], background, opacity, "truth")
            errors = (found[i] != truths[i]) & (truths[i] != IGNORED)
            grey = np.broadcast_to(_grey(picture)[..., None], (*picture.shape[:2], 3)) * 0.4 + 0.6
            group[2].imshow(np.where(errors[..., None], 0.0, grey), interpolation="nearest")
            group[2].set_title(f"wrong: {errors.sum() / max(1, (truths[i] != IGNORED).sum()):.1%}", fontsize=8, pad=2)
    if names:
        from matplotlib.patches import Patch

        handles = [Patch(color=colour_of(k), label=name) for k, name in names.items()]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(per_row, len(names)), frameon=False, fontsize=8
        )
    return _save(figure, path)


def coloured(image: np.ndarray, labels: np.ndarray, background: int | None = None, opacity: float = 0.55) -> np.ndarray:
    """Blends the brightness of an image with the colours of its labels.

    Args:
        image: [H, W, 3] or [H, W] floats in [0, 1].
        labels: Class of every pixel, [H, W] integers; 255 is not coloured.
        background: Class that is not coloured; None to colour all classes.
        opacity: Opacity of the colours, from 0 to 1.

    Returns:
        [H, W, 3] floats in [0, 1].
    """
    rgb = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
    out = np.array(rgb, np.float32)
    for k in np.unique(labels).tolist():
        if k not in (IGNORED, background):
            place = labels == k
            grey = _grey(out[place][None])[0][:, None]  # a colour below would change that of the class
            out[place] = (1 - opacity) * grey + opacity * np.asarray(colour_of(k), np.float32)
    return out


def colour_of(label: int) -> tuple[float, float, float]:
    """Returns the colour of a class in PASCAL VOC's colour map, except that class 0 is grey instead of black."""
    if label == 0:
        return (0.55, 0.55, 0.55)
    rgb = [0, 0, 0]
    # The colour map of the VOC development kit spreads the bits of the label over the high bits of the channels.
    value = label
    for shift in range(7, -1, -1):
        for channel in range(3):
            rgb[channel] |= (value >> channel & 1) << shift
        value >>= 3
    return (rgb[0] / 255, rgb[1] / 255, rgb[2] / 255)


def _grey(picture):
    return picture if picture.ndim == 2 else picture.mean(axis=-1)


def _draw(axes, picture, labels, background, opacity, title):
    interpolation = "nearest" if picture.shape[0] < 200 else "antialiased"
    axes.imshow(coloured(picture, labels, background, opacity), interpolation=interpolation)
    if title:
        axes.set_title(title, fontsize=8, pad=2)
