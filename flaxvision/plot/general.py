"""Pictures of runs, of classifiers and of feature maps; see `flaxvision.plot`."""

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
        classes: Names of the classes, shown instead of indices.
        columns: Number of images in a row.
        path: File to write; None only returns the figure.

    Returns:
        The figure.

    Raises:
        ValueError: `images` is empty or has another shape, `labels` has another length, or `columns` is below 1.
    """
    images = _images("images", images)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels must have one entry for each of the {len(images)} images; got {len(labels)}")
    titles = None if labels is None else [_class_name(label, classes) for label in labels]
    return _grid(images, titles, columns, path, {"vmin": 0, "vmax": 1})


def feature_maps(
    maps: Any, titles: Sequence[str] | None = None, path: PathLike | None = None, columns: int = 4
) -> "Figure":
    """Draws feature maps in grey, each from black, its lowest value, to white, its highest.

    Args:
        maps: Feature maps [H, W] of any sizes, or an array [N, H, W].
        titles: One text for each map.
        path: File to write; None only returns the figure.
        columns: Number of maps in a row.

    Returns:
        The figure.

    Raises:
        ValueError: A map is not [H, W], there are none, `titles` has another length, or `columns` is below 1.
    """
    arrays = [np.asarray(each, dtype=np.float32) for each in maps]
    if not arrays or any(each.ndim != 2 for each in arrays):
        raise ValueError(f"maps must be one or more arrays [H, W]; got shapes {[each.shape for each in arrays]}")
    if titles is not None and len(titles) != len(arrays):
        raise ValueError(f"titles must have one entry for each of the {len(arrays)} maps; got {len(titles)}")
    return _grid(arrays, titles, columns, path, {})


def curves(
    records: Sequence[Mapping[str, Any]],
    path: PathLike | None = None,
    steps_per_epoch: float | None = None,
    metrics: Sequence[str] | None = None,
) -> "Figure":
    """Draws the metrics of a run over its steps, one panel for each metric and one line for each split.

    Args:
        records: Lines of ``metrics.jsonl``: dicts with ``step``, ``split`` ("train", "validation", "test", ...) and
            metrics by name. Values of metrics with names that end in "accuracy" are drawn in percent.
        path: File to write; None only returns the figure.
        steps_per_epoch: Adds a second axis that counts epochs.
        metrics: Names of the metrics to draw; None for all in the records.

    Returns:
        The figure.

    Raises:
        ValueError: No record has a step, a split and one of the metrics, or `steps_per_epoch` is not positive.
    """
    from flaxvision.train.writers import metric_names

    if steps_per_epoch is not None and steps_per_epoch <= 0:
        raise ValueError(f"steps_per_epoch must be positive; got {steps_per_epoch}")
    found = {name: None for r in records if "step" in r and "split" in r for name in metric_names(r)}
    names = list(metrics) if metrics is not None else sorted(found, key=lambda name: name != "loss")
    panels = [name for name in names if any(_belongs(r, None, name) for r in records)]
    if not panels:
        raise ValueError(
            f"records must hold `step`, `split` and {'one of ' + ', '.join(names) if names else 'a metric'}; got "
            f"no such record among {len(records)}"
        )
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = _figure(5.6 * columns, 4.0 * rows)
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, metric in zip(grid, panels, strict=False):
        percent = metric.endswith("accuracy")
        for i, split in enumerate(dict.fromkeys(r["split"] for r in records if _belongs(r, None, metric))):
            points = sorted((r["step"], r[metric]) for r in records if _belongs(r, split, metric))
            steps, values = np.asarray(points, dtype=np.float64).T
            marker = "o" if (len(points) <= 40 and split != "train") or len(points) == 1 else None
            style = {"color": _split_colour(split, i), "marker": marker, "markersize": 4, "linewidth": 1.5}
            axes.plot(steps, 100 * values if percent else values, label=split, **style)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_ylabel(f"{metric} (%)" if percent else metric)
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
    """Draws a learning-rate range test: the loss over the learning rate, and the learning rate that was chosen.

    Args:
        learning_rates: Learning rates in the order of the test, positive and increasing.
        losses: Loss at each of them; NaN or infinite where it diverged.
        chosen: The learning rate to train with.
        path: File to write; None only returns the figure.
        diverged: Learning rate at which the loss diverged; None for three times `chosen`.

    Returns:
        The figure.

    Raises:
        ValueError: The two sequences are empty or differ in length, or a learning rate is not positive.
    """
    rates, values = np.asarray(learning_rates, np.float64), np.asarray(losses, np.float64)
    if rates.shape != values.shape or rates.ndim != 1 or not rates.size:
        raise ValueError(
            f"learning_rates and losses must have the same length, at least 1; got shapes {rates.shape} and "
            f"{values.shape}"
        )
    if not (rates > 0).all():
        raise ValueError(f"learning_rates must be positive; got {rates.min()}")
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
    if before.size:  # the axis ends soon above these values, which the diverged ones would flatten
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
        labels: N class indices.
        feature_names: Labels of the axes, with units.
        class_names: Names of the classes; None for "class 0", "class 1" and so on.
        path: File to write; None only returns the figure.

    Returns:
        The figure.

    Raises:
        ValueError: A shape is not as described, or a class has no name.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels).astype(int)
    if features.ndim != 2 or features.shape[1] != 2:
        raise ValueError(f"features must be [N, 2]; got shape {features.shape}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have shape ({len(features)},), one for each sample; got {labels.shape}")
    low, high = features.min(0), features.max(0)
    room = np.where(high > low, 0.08 * (high - low), 0.5)
    x, y = (np.linspace(a, b, 400, dtype=np.float32) for a, b in zip(low - room, high + room, strict=True))
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    regions = np.asarray(predict(grid.reshape(-1, 2)))
    if regions.shape != (grid.shape[0] * grid.shape[1],):
        raise ValueError(
            f"predict must return one class for each of the {grid[..., 0].size} samples; got shape {regions.shape}"
        )
    regions = regions.reshape(grid.shape[:2]).astype(int)
    count = int(max(labels.max(), regions.max())) + 1
    names = [f"class {k}" for k in range(count)] if class_names is None else list(class_names)
    if len(names) < count:
        raise ValueError(f"class_names must have at least {count} entries; got {len(names)}")

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
    """Draws a confusion matrix: counts as text, shares of the true class as colour.

    Args:
        counts: [K, K]; rows are true classes, columns are predictions. See `flaxvision.metrics.ConfusionMatrix`.
        classes: Names of the K classes; None for indices.
        path: File to write; None only returns the figure.

    Returns:
        The figure.

    Raises:
        ValueError: `counts` is not square, or `classes` has another length.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"counts must be [K, K]; got shape {counts.shape}")
    size = len(counts)
    names = [str(k) for k in range(size)] if classes is None else list(classes)
    if len(names) != size:
        raise ValueError(f"classes must have {size} names; got {len(names)}")
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(0.5 * size, 2.6), 12.0)
    figure = _figure(side + 2.2, side + 1.2)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if size <= 30:  # numbers do not fit into smaller cells
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
    """Draws images [H, W] or [H, W, 3] in rows of `columns`."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1; got {columns}")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height, width = np.max([image.shape[:2] for image in images], axis=0)
    cell = max(min(7.5 / columns, 3.2), 1.1)
    figure = _figure(cell * columns, (cell * height / width + (0.25 if titles is not None else 0)) * rows)
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    letters = max(int(cell * 12), 6)  # the number that fits above a cell at 9 points
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
    """Returns an empty figure of this size in inches, with constrained layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    """Writes the figure if there is a path, and returns it."""
    if path is not None:
        path = Path(path)
        with atomic.replacing(path) as partial:
            figure.savefig(partial, format=path.suffix[1:] or "png")
    return figure


def _images(name, images):
    """Returns images as [N, H, W] or [N, H, W, 3] floats in [0, 1]."""
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if not len(images) or (images.ndim != 3 and (images.ndim != 4 or images.shape[-1] != 3)):
        raise ValueError(f"{name} must be one or more [H, W], [H, W, 1] or [H, W, 3]; got shape {images.shape}")
    if images.dtype == np.uint8:
        return images / np.float32(255)
    return np.clip(images.astype(np.float32), 0, 1)


def _class_name(label, classes):
    """Returns the name of a class index, or the label itself."""
    if classes is None or isinstance(label, str):
        return str(label)
    if not 0 <= int(label) < len(classes):
        raise ValueError(f"labels must be indices of the {len(classes)} classes; got {label}")
    return classes[int(label)]


def _belongs(record, split, metric):
    """Returns whether a record is a finite point of this line."""
    value = record.get(metric)
    known = "step" in record and "split" in record and split in (None, record["split"])
    return known and isinstance(value, int | float) and math.isfinite(value)


def _split_colour(split, index):
    """Returns the colour of a split; the usual splits have fixed ones."""
    named = {"train": TRAIN_COLOUR, "validation": VALIDATION_COLOUR, "test": OTHER_COLOUR}
    return named.get(split, f"C{index + 3}")


def _smooth(values, decay=0.8):
    """Returns the exponential moving average, corrected for its start."""
    smooth, average = [], 0.0
    for i, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        smooth.append(average / (1 - decay ** (i + 1)))
    return np.asarray(smooth)
