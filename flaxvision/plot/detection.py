"""Plots for detectors: boxes next to the ground truth, precision-recall curves, kinds of false positives."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxvision.plot.general import PathLike, _figure, _images, _save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KIND_COLOURS = {
    "correct": "#2a9d5c",
    "localization": "#1f77b4",
    "duplicate": "#9467bd",
    "confusion": "#d95f02",
    "background": "#7f7f7f",
}

_OPACITY = 0.5  # of masks
_NAMED = 20  # with more objects than this, masks have no text


def detections(
    images: Sequence[Any] | np.ndarray,
    found: Sequence[Mapping[str, Any]],
    truth: Sequence[Mapping[str, Any]] | None = None,
    classes: Sequence[str] | None = None,
    columns: int = 2,
    path: PathLike | None = None,
) -> "Figure":
    """Draws images with detected boxes, class names and scores, and optionally the ground truth next to each.

    Args:
        images: N images [H, W, 3] of any sizes, uint8 or floats in [0, 1].
        found: For each image `boxes` [D, 4] xyxy in pixels, `labels` and `scores` [D], and optionally `masks` bool
            [D, H, W]. With masks, each object has its own colour, and images with more than 20 objects have no text.
            Without masks, a box has the colour of its class.
        truth: Ground truth: for each image `boxes` [M, 4], `labels` [M] and optionally `crowd` and `difficult` [M],
            which are drawn with dashed lines, and `masks` [M, H, W]. None draws the detections only.
        classes: Names of the classes; None for their numbers.
        columns: Number of images per row; detections and ground truth of an image count as one.
        path: File to write; None only returns the figure.

    Returns:
        The figure.

    Raises:
        ValueError: There are no images, the lengths differ, a label has no name, or `columns` is below 1.
    """
    pictures = [_images("images", np.asarray(image)[None])[0] for image in images]
    if not pictures:
        raise ValueError("images must hold at least one image; got none")
    for name, values in (("found", found), ("truth", truth)):
        if values is not None and len(values) != len(pictures):
            raise ValueError(f"{name} must have one entry for each of the {len(pictures)} images; got {len(values)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    each = 1 if truth is None else 2
    shape = np.max([picture.shape[:2] for picture in pictures], axis=0)
    cell = min(max(10.0 / (columns * each), 2.2), 8.0)
    figure = _figure(cell * columns * each, (cell * shape[0] / shape[1] + 0.25) * rows)
    panels = figure.subplots(rows, columns * each, squeeze=False)
    for axes in np.ravel(panels):
        axes.set_axis_off()
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        pair = panels[row][column * each : (column + 1) * each]
        _boxes(pair[0], picture, found[i], classes, "found" if truth is not None else None)
        if truth is not None:
            _boxes(pair[1], picture, truth[i], classes, "truth")
    return _save(figure, path)


def precision_recall(
    curves: Sequence[tuple[np.ndarray, np.ndarray] | None],
    classes: Sequence[str] | None = None,
    path: PathLike | None = None,
) -> "Figure":
    """Draws the precision-recall curve of each class, with the area under it in the legend.

    Args:
        curves: For each class recall and precision, as from `DetectionRecords.curves`. None for a class without
            objects, which is left out.
        classes: Names of the classes; None for their numbers.
        path: File to write; None only returns the figure.

    Returns:
        The figure.

    Raises:
        ValueError: There is no curve, or `classes` does not have one name per class.
    """
    from flaxvision.metrics.average_precision import voc_average_precision

    if classes is not None and len(classes) != len(curves):
        raise ValueError(f"classes must have {len(curves)} names; got {len(classes)}")
    known = [(k, *curve) for k, curve in enumerate(curves) if curve is not None]
    if not known:
        raise ValueError(f"curves must have a class with objects; got {len(curves)} without objects")
    figure = _figure(6.2, 4.6)
    axes = figure.subplots()
    for k, recall, precision in known:
        area = voc_average_precision(recall, precision)
        # Extend the curve to a recall of 0, and drop it to a precision of 0 after the last detection.
        x = np.concatenate([[0.0], recall, recall[-1:]])
        y = np.concatenate([precision[:1], precision, [0.0] if len(precision) else []])
        label = f"{k if classes is None else classes[k]} ({area:.3f})"
        axes.plot(x, y if len(y) == len(x) else np.zeros_like(x), linewidth=1.6, label=label, color=_colour(k))
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.grid(alpha=0.3)
    if len(known) <= 24:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=min(len(known), 4), frameon=False)
    return _save(figure, path)


def false_positives(
    counts: Mapping[str, np.ndarray], classes: Sequence[str] | None = None, path: PathLike | None = None
) -> "Figure":
    """Draws how many of the best detections of each class are of each kind, as stacked bars (Hoiem et al. 2012).

    Args:
        counts: Number of detections of each class, [K], by kind, as from `DetectionRecords.false_positives`.
        classes: Names of the K classes; None for their numbers.
        path: File to write; None only returns the figure.

    Returns:
        The figure.

    Raises:
        ValueError: `counts` is empty, or `classes` does not have one name per class.
    """
    if not counts:
        raise ValueError("counts must have at least one kind; got none")
    size = len(next(iter(counts.values())))
    names = [str(k) for k in range(size)] if classes is None else list(classes)
    if len(names) != size:
        raise ValueError(f"classes must have {size} names; got {len(names)}")
    totals = np.maximum(np.sum([*counts.values()], axis=0), 1)
    figure = _figure(7.0, min(max(0.32 * size, 1.0), 24.0) + 1.4)
    axes = figure.subplots()
    left = np.zeros(size)
    for kind, values in counts.items():
        share = 100 * np.asarray(values) / totals
        axes.barh(np.arange(size), share, left=left, color=_KIND_COLOURS.get(kind), label=kind, height=0.7)
        left += share
    axes.set_yticks(range(size), [f"{name} ({n})" for name, n in zip(names, totals.astype(int), strict=True)])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the detections with the highest scores, one per object (%)")
    figure.legend(loc="outside lower center", ncols=len(counts), frameon=False)
    return _save(figure, path)


def _boxes(axes, picture, example, classes, title):
    """Draws boxes with class names, and with scores if there are any."""
    from matplotlib.patches import Rectangle

    height, width = picture.shape[:2]
    masks, scores = example.get("masks"), example.get("scores")
    boxes, labels = np.asarray(example["boxes"]).reshape(-1, 4), np.asarray(example["labels"])
    # The best detection is drawn last, on top.
    order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
    if masks is not None:
        picture = np.repeat(picture[..., None], 3, -1) if picture.ndim == 2 else np.array(picture[..., :3])
        for i in order:
            inside = np.asarray(masks[i], bool)
            picture[inside] = (1 - _OPACITY) * picture[inside] + _OPACITY * np.asarray(_colour(int(i)))
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest" if height < 200 else "antialiased")
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    if title is not None:
        axes.set_title(title, fontsize=8, pad=2)
    dashed = np.zeros(len(boxes), bool)
    for key in ("crowd", "difficult"):
        dashed |= np.asarray(example.get(key, np.zeros(len(boxes), bool)), bool)
    for i in order:
        x1, y1, x2, y2 = boxes[i] - 0.5  # pixel i covers the interval from i - 0.5 to i + 0.5 in matplotlib
        label = int(labels[i])
        if classes is not None and not 0 <= label < len(classes):
            raise ValueError(f"labels must be indices of the {len(classes)} classes; got {label}")
        colour = _colour(label if masks is None else int(i))
        thickness = 1.4 if masks is None else 0.7
        style = {"fill": False, "edgecolor": colour, "linewidth": thickness, "linestyle": "--" if dashed[i] else "-"}
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **style))
        if masks is not None and len(boxes) > _NAMED:
            continue
        text = str(label) if classes is None else classes[label]
        text = text if scores is None else f"{text} {float(scores[i]):.2f}"
        back = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        place = {"va": "bottom", "ha": "left"} if y1 > 0.06 * height else {"va": "top", "ha": "left"}
        axes.text(max(x1, 0), max(y1, 0), text, color=_ink(colour), fontsize=6, bbox=back, clip_on=True, **place)


def _colour(label):
    """Returns the colour of a class."""
    from matplotlib import colormaps

    return tuple(colormaps["tab20"].colors[(2 * label) % 20 if label % 20 < 10 else (2 * label + 1) % 20])


def _ink(colour):
    """Returns black or white, whichever is easier to read on a colour."""
    return "black" if 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 0.55 else "white"
