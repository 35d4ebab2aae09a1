"""Every picture of the library: each function draws one matplotlib Figure and saves it if given a path.

No function touches pyplot, its global state or the backend, so that they work without a display, inside a notebook
and from threads. Matplotlib is imported when the first picture is drawn. A file appears whole or not at all.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxvision import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]
TRAIN_COLOUR, VALIDATION_COLOUR, OTHER_COLOUR = "#1f77b4", "#d95f02", "#2a9d5c"


def image_grid(
    images: Any,
    labels: Sequence[Any] | np.ndarray | None = None,
    classes: Sequence[str] | None = None,
    columns: int = 8,
    path: PathLike | None = None,
) -> "Figure":
    """Draws images side by side, each with its label above.

    Args:
        images: [N, H, W], [N, H, W, 1] or [N, H, W, 3]; uint8 in [0, 255], or floats in [0, 1] (clipped).
        labels: N class indices, or N texts.
        classes: Names of the classes, to show instead of indices.
        columns: Images in a row.
        path: File to write; None only returns the figure.

    Returns:
        The figure.

    Raises:
        ValueError: if `images` is empty or of another shape, `labels` has another length, or `columns` is below 1.
    """
    images = _images("images", images)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels has {len(labels)} entries for {len(images)} images.")
    titles = None if labels is None else [_class_name(label, classes) for label in labels]
    return _grid(images, titles, columns, path, {"vmin": 0, "vmax": 1})


def feature_maps(
    maps: Any, titles: Sequence[str] | None = None, path: PathLike | None = None, columns: int = 4
) -> "Figure":
    """Draws the outputs of filters in grey, each stretched over its own range.

    Args:
        maps: Feature maps [H, W], of any sizes; an array [N, H, W] will do.
        titles: One text each.
        path: File to write; None only returns the figure.
        columns: Maps in a row.

    Returns:
        The figure.

    Raises:
        ValueError: if a map is not [H, W] or there is none, `titles` has another length, or `columns` is below 1.
    """
    arrays = [np.asarray(each, dtype=np.float32) for each in maps]
    if not arrays or any(each.ndim != 2 for each in arrays):
        raise ValueError(f"maps has shapes {[each.shape for each in arrays]}; expected one or more arrays [H, W].")
    if titles is not None and len(titles) != len(arrays):
        raise ValueError(f"titles has {len(titles)} entries for {len(arrays)} maps.")
    return _grid(arrays, titles, columns, path, {})


def curves(
    records: Sequence[Mapping[str, Any]], path: PathLike | None = None, steps_per_epoch: float | None = None
) -> "Figure":
    """Draws loss and, where recorded, accuracy over the steps of a run, one line per split.

    Args:
        records: Lines of ``metrics.jsonl``: dicts with ``step``, ``split`` ("train", "validation", "test", ...) and
            ``loss``, ``accuracy`` (from 0 to 1) or both. Other records and keys are passed over.
        path: File to write; None only returns the figure.
        steps_per_epoch: Adds a second axis that counts epochs.

    Returns:
        The figure.

    Raises:
        ValueError: if no record has a step and a loss, or `steps_per_epoch` is not positive.
    """
    if steps_per_epoch is not None and steps_per_epoch <= 0:
        raise ValueError(f"steps_per_epoch is {steps_per_epoch}; expected a positive number.")
    lines = {
        metric: {
            split: sorted((r["step"], r[metric]) for r in records if _belongs(r, split, metric))
            for split in dict.fromkeys(r["split"] for r in records if _belongs(r, None, metric))
        }
        for metric in ("loss", "accuracy")
    }
    if not lines["loss"]:
        raise ValueError("records holds nothing with `step`, `split` and `loss`; expected the lines of metrics.jsonl.")
    panels = [metric for metric in lines if lines[metric]]
    figure = _figure(5.6 * len(panels), 4.0)
    for axes, metric in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        percent = 100 if metric == "accuracy" else 1
        for i, (split, points) in enumerate(lines[metric].items()):
            steps, values = np.asarray(points, dtype=np.float64).T
            marker = "o" if (len(points) <= 40 and split != "train") or len(points) == 1 else None
            style = {"color": _split_colour(split, i), "marker": marker, "markersize": 4, "linewidth": 1.5}
            axes.plot(steps, percent * values, label=split, **style)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_ylabel("loss" if metric == "loss" else "accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        if steps_per_epoch is not None:
            per = steps_per_epoch
            top = axes.secondary_xaxis(
                "top", functions=(lambda step, per=per: step / per, lambda epoch, per=per: epoch * per)
            )
            top.set_xlabel("epoch")
    return _save(figure, path)


def lr_range(
    learning_rates: Sequence[float] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    chosen: float,
    path: PathLike | None = None,
    diverged: float | None = None,
) -> "Figure":
    """Draws a learning-rate range test: the loss over the raised rate, smoothed, and the rate that was chosen.

    Args:
        learning_rates: Rates in the order of the test, positive and rising.
        losses: Loss at each; NaN or infinite where it diverged.
        chosen: The rate to train with.
        path: File to write; None only returns the figure.
        diverged: Rate at which the loss diverged; None for three times `chosen`, the rule of the test.

    Returns:
        The figure.

    Raises:
        ValueError: if the two sequences differ in length, are empty, or a rate is not positive.
    """
    rates, values = np.asarray(learning_rates, np.float64), np.asarray(losses, np.float64)
    if rates.shape != values.shape or rates.ndim != 1 or not rates.size:
        raise ValueError(
            f"learning_rates has shape {rates.shape} and losses {values.shape}; expected two equal lengths."
        )
    if not (rates > 0).all():
        raise ValueError(f"learning_rates holds {rates.min()}; expected positive rates, they stand on a log axis.")
    finite = np.isfinite(values)
    smooth = _smooth(values[finite])
    diverged = 3 * chosen if diverged is None else diverged

    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    axes.plot(rates[finite], values[finite], color=TRAIN_COLOUR, alpha=0.3, linewidth=1, label="loss of each batch")
    axes.plot(rates[finite], smooth, color=TRAIN_COLOUR, linewidth=2, label="smoothed")
    axes.axvline(diverged, color=VALIDATION_COLOUR, linestyle="--", label=f"diverges at {diverged:.2g}")
    axes.axvline(chosen, color=OTHER_COLOUR, linestyle="-", label=f"chosen: {chosen:.2g}")
    axes.set_xscale("log")
    before = smooth[rates[finite] <= diverged]
    if before.size:  # what comes after the divergence would flatten everything before it
        low, high = before.min(), before.max()
        room = 0.15 * (high - low) or 1.0
        axes.set_ylim(low - room, high + 3 * room)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    return _save(figure, path)


def decision_boundary(
    predict: Callable[[np.ndarray], Any],
    features: Any,
    labels: Any,
    feature_names: Sequence[str] = ("feature 0", "feature 1"),
    class_names: Sequence[str] | None = None,
    path: PathLike | None = None,
) -> "Figure":
    """Draws the regions in which a classifier of two features predicts each class, and the samples.

    Args:
        predict: Maps float32 [M, 2] to M class indices.
        features: Samples [N, 2].
        labels: Their N classes, from 0.
        feature_names: Axis labels, with units.
        class_names: Names of the classes; None for "class 0" and so on.
        path: File to write; None only returns the figure.

    Returns:
        The figure.

    Raises:
        ValueError: if the shapes are others, or a class has no name.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels).astype(int)
    if features.ndim != 2 or features.shape[1] != 2:
        raise ValueError(f"features has shape {features.shape}; expected [N, 2].")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}; expected ({len(features)},), one for each sample.")
    low, high = features.min(0), features.max(0)
    room = np.where(high > low, 0.08 * (high - low), 0.5)
    x, y = (np.linspace(a, b, 400, dtype=np.float32) for a, b in zip(low - room, high + room, strict=True))
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    regions = np.asarray(predict(grid.reshape(-1, 2)))
    if regions.shape != (grid.shape[0] * grid.shape[1],):
        raise ValueError(
            f"predict gave shape {regions.shape} for {grid[..., 0].size} samples; expected one class each."
        )
    regions = regions.reshape(grid.shape[:2]).astype(int)
    count = int(max(labels.max(), regions.max())) + 1
    names = [f"class {k}" for k in range(count)] if class_names is None else list(class_names)
    if len(names) < count:
        raise ValueError(f"class_names has {len(names)} entries for {count} classes.")

    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colours = colormaps["tab10" if count <= 10 else "tab20"].colors[:count]
    figure = _figure(6.0, 4.6)
    axes = figure.subplots()
    fill = {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": count - 0.5, "alpha": 0.25, "shading": "nearest"}
    axes.pcolormesh(x, y, regions, rasterized=True, **fill)
    if regions.min() < regions.max():
        for k in np.unique(regions)[1:]:
            axes.contour(x, y, (regions >= k).astype(float), levels=[0.5], colors="0.25", linewidths=1.2)
    for k, marker in zip(range(count), "os^Dv<>ph*" * (count // 10 + 1), strict=False):
        chosen = features[labels == k]
        style = {"color": colours[k], "marker": marker, "s": 28, "edgecolors": "white", "linewidths": 0.6}
        axes.scatter(chosen[:, 0], chosen[:, 1], label=names[k], **style)
    axes.set_xlabel(feature_names[0])
    axes.set_ylabel(feature_names[1])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=min(count, 4), frameon=False)
    return _save(figure, path)


def confusion_matrix(counts: Any, classes: Sequence[str] | None = None, path: PathLike | None = None) -> "Figure":
    """Draws how often each class was taken for each: counts as text, shares of the true class as colour.

    Args:
        counts: [K, K], rows are true classes and columns predicted ones.
        classes: Names of the K classes; None for indices.
        path: File to write; None only returns the figure.

    Returns:
        The figure.

    Raises:
        ValueError: if `counts` is not square or `classes` has another length.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"counts has shape {counts.shape}; expected [K, K].")
    size = len(counts)
    names = [str(k) for k in range(size)] if classes is None else list(classes)
    if len(names) != size:
        raise ValueError(f"classes has {len(names)} names for {size} classes.")
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(0.5 * size, 2.6), 12.0)
    figure = _figure(side + 2.2, side + 1.2)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if size <= 30:  # beyond, numbers do not fit and names every few classes are enough
        for i, j in np.argwhere(counts):
            colour = "white" if shares[i, j] > 55 else "black"
            text = {"ha": "center", "va": "center", "fontsize": 9 if size <= 12 else 6, "color": colour}
            axes.text(j, i, f"{counts[i, j]:.4g}" if counts[i, j] % 1 else f"{counts[i, j]:.0f}", **text)
    every = range(0, size, math.ceil(size / 40))
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 2 else {}
    axes.set_xticks(every, [names[k] for k in every], **slanted)
    axes.set_yticks(every, [names[k] for k in every])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(picture, ax=axes, label="share of the true class (%)", fraction=0.046)
    return _save(figure, path)


def _grid(images, titles, columns, path, limits):
    """Images [H, W] or [H, W, 3] in rows of `columns`."""
    if columns < 1:
        raise ValueError(f"columns is {columns}; expected at least 1.")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height, width = np.max([image.shape[:2] for image in images], axis=0)
    cell = max(min(7.5 / columns, 3.2), 1.1)
    figure = _figure(cell * columns, (cell * height / width + (0.25 if titles is not None else 0)) * rows)
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    letters = max(int(cell * 12), 6)  # that fit above a cell at 9 points
    for i, axes in enumerate(panels):
        axes.set_axis_off()
        if i >= len(images):
            continue
        nearest = max(images[i].shape[:2]) < 100
        axes.imshow(images[i], cmap="gray", interpolation="nearest" if nearest else "antialiased", **limits)
        if titles is not None:
            text = str(titles[i])
            axes.set_title(text if len(text) <= letters else text[: letters - 1] + "…", fontsize=9, pad=3)
    return _save(figure, path)


def _figure(width, height):
    """An empty figure of so many inches whose parts make room for each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    """Saves the figure to `path`, unless it is None; a reader never sees half a picture."""
    if path is not None:
        path = Path(path)
        with atomic.replacing(path) as partial:
            figure.savefig(partial, format=path.suffix[1:] or "png")
    return figure


def _images(name, images):
    """[N, H, W] or [N, H, W, 3] floats in [0, 1]."""
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if not len(images) or (images.ndim != 3 and (images.ndim != 4 or images.shape[-1] != 3)):
        raise ValueError(f"{name} has shape {images.shape}; expected one or more [H, W], [H, W, 1] or [H, W, 3].")
    if images.dtype == np.uint8:
        return images / np.float32(255)
    return np.clip(images.astype(np.float32), 0, 1)


def _class_name(label, classes):
    """The name of a class index, or the label itself."""
    if classes is None or isinstance(label, str):
        return str(label)
    if not 0 <= int(label) < len(classes):
        raise ValueError(f"labels holds {label}, but classes has {len(classes)} names.")
    return classes[int(label)]


def _belongs(record, split, metric):
    """Whether a record is a finite point of this line."""
    value = record.get(metric)
    known = "step" in record and "split" in record and split in (None, record["split"])
    return known and isinstance(value, int | float) and math.isfinite(value)


def _split_colour(split, index):
    """Fixed colours for the usual splits."""
    named = {"train": TRAIN_COLOUR, "validation": VALIDATION_COLOUR, "test": OTHER_COLOUR}
    return named.get(split, f"C{index + 3}")


def _smooth(values, decay=0.8):
    """Exponential moving average, corrected for its start."""
    smooth, average = [], 0.0
    for i, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        smooth.append(average / (1 - decay ** (i + 1)))
    return np.asarray(smooth)
