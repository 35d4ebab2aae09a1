"""Reports of `detect.py`: training samples, detections next to the ground truth, and metrics of each class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flaxvision as fv
from flaxvision.data.canvas import image_sizes

PICTURES = 8  # images per picture
_SHOWN = 0.3  # minimum score of a detection that is drawn
_TRUTH = ("boxes", "labels", "crowd", "difficult")


class Pictures:
    """A callback that draws `FOLDER/STEP.png` at every evaluation.

    Args:
        draw: Function `(state, path=...)` that draws the picture.
        folder: The folder.
    """

    def __init__(self, draw: Callable[..., None], folder: Path):
        self.draw, self.folder = draw, folder

    def on_evaluation(self, step: int, state: Any, values: dict[str, float]) -> None:
        """Draws the picture."""
        self.draw(state, path=self.folder / f"{step:07}.png")


def draw(find: Callable[..., Any], source: fv.data.CanvasSource, classes: tuple[str, ...], path: Path) -> None:
    """Draws detections next to the ground truth for the first images with the same canvas.

    Args:
        find: Function `batch -> Detections`.
        source: The images.
        classes: Names of the classes.
        path: File to write.
    """
    examples = [source[int(i)] for i in np.flatnonzero(source.canvas == source.canvas[0])[:PICTURES]]
    found = jax.device_get(find({key: np.stack([each[key] for each in examples]) for key in ("image", "size")}))
    if jax.process_index() != 0:
        return
    images, drawn, truth = [], [], []
    for i, example in enumerate(examples):
        height, width = example["size"]
        images.append(example["image"][:height, :width])
        kept = found.valid[i] & (found.scores[i] >= _SHOWN)
        drawn.append({key: getattr(found, key)[i][kept] for key in ("boxes", "labels", "scores")})
        truth.append(_objects(example, height, width))
        if found.masks is not None:
            pasted = fv.ops.iter_masks(found.masks[i][kept], found.boxes[i][kept], (height, width))
            drawn[-1]["masks"] = [*pasted]
    path.parent.mkdir(parents=True, exist_ok=True)
    fv.plot.detections(images, drawn, truth, classes, path=path)


def draw_samples(batches: Any, transform: Callable[..., dict[str, Any]], rng: jax.Array, path: Path) -> None:
    """Draws augmented training images with their boxes.

    Args:
        batches: The training batches.
        transform: Function `(rng, batch) -> batch` that gives images in [0, 1].
        rng: PRNG key of the transform.
        path: File to write.
    """
    if jax.process_index() != 0:
        return
    with batches.from_step(0) as iterator:
        first = {key: value[:PICTURES] for key, value in next(iterator).items()}
    made = jax.device_get(jax.jit(transform)(rng, first))
    images = [image[:h, :w] for image, (h, w) in zip(made["image"], made["size"], strict=True)]
    examples = ({key: value[i] for key, value in made.items()} for i in range(len(images)))
    truth = [_objects(example, *example["size"]) for example in examples]
    fv.plot.detections(images, truth, None, batches.source.classes, columns=4, path=path)


def _objects(example: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Returns the objects of an example on a canvas, with masks of the size of the image."""
    objects = {key: example[key][example["valid"] > 0] for key in _TRUTH}
    if "masks" in example:
        objects["masks"] = example["masks"][example["valid"] > 0][:, :height, :width] > 0
    return objects


def report(
    found: fv.metrics.DetectionRecords, name: str, classes: tuple[str, ...], figures: dict[str, float], folder: Path
) -> dict[str, float]:
    """Prints the metrics of each class and a bootstrap interval, and draws curves and false positives.

    Args:
        found: The detections of all images.
        name: Name of the data set.
        classes: Names of the classes.
        figures: The metrics of the evaluation.
        folder: Folder for `precision_recall.png`, `false_positives.png` and `results.json`.

    Returns:
        Additional metrics.
    """
    low, high = found.bootstrap("ap50", resamples=300)
    more = {"ap50_low": low, "ap50_high": high, "voc_map": found.voc(eleven_points=False)}
    print(f"{name}: {len(found)} images")
    print(f"{'class':16} {'objects':>8} {'AP':>7} {'AP50':>7} {'VOC AP':>7}")
    table = found.per_class(classes)
    for row in table:
        print(f"{row['name'][:16]:16} {row['objects']:8} {row['ap']:7.3f} {row['ap50']:7.3f} {row['voc']:7.3f}")
    print(
        f"AP {figures['coco_ap']:.3f}, AP50 {figures['coco_ap50']:.3f} (95 % bootstrap interval {low:.3f} to "
        f"{high:.3f}), VOC mAP {more['voc_map']:.3f}"
    )
    curves = found.curves()
    if any(curve is not None for curve in curves):
        fv.plot.precision_recall(curves, classes, path=folder / "precision_recall.png")
        fv.plot.false_positives(found.false_positives(), classes, path=folder / "false_positives.png")
    (folder / "results.json").write_text(json.dumps({**figures, **more, "classes": table}, indent=1) + "\n")
    return more


def report_masks(found: fv.metrics.DetectionRecords, classes: tuple[str, ...], folder: Path) -> dict[str, float]:
    """Prints the metrics of the masks of each class and a bootstrap interval.

    Args:
        found: The masks of all images.
        classes: Names of the classes.
        folder: Folder with the `results.json` of `report`, to which the metrics are added.

    Returns:
        The metrics; their names start with `masks_`.
    """
    values, (low, high) = found.compute(), found.bootstrap("ap50", resamples=300)
    more = {f"masks_{name}": value for name, value in values.items()} | {"masks_ap50_low": low, "masks_ap50_high": high}
    print(f"{'masks of class':16} {'objects':>8} {'AP':>7} {'AP50':>7}")
    table = found.per_class(classes)
    for row in table:
        print(f"{row['name'][:16]:16} {row['objects']:8} {row['ap']:7.3f} {row['ap50']:7.3f}")
    print(f"AP {values['ap']:.3f}, AP50 {values['ap50']:.3f} (95 % bootstrap interval {low:.3f} to {high:.3f})")
    results = json.loads((folder / "results.json").read_text()) | more | {"mask_classes": table}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return more


def anchors_of(placed: fv.data.CanvasSource, count: int, seed: int) -> tuple[tuple[int, int], ...]:
    """Computes anchors from the boxes of up to 1,000 images on their canvases (Redmon 2017, section 2).

    Args:
        placed: The training images.
        count: Number of anchors.
        seed: Seed of k-means.

    Returns:
        Width and height of each anchor in pixels, smallest area first.
    """
    source: Any = placed.source
    sizes, sides = image_sizes(source), []
    for index in np.unique(np.linspace(0, len(placed) - 1, 1000).astype(int)):
        example = source.objects(int(index)) if hasattr(source, "objects") else source[int(index)]
        size = placed.canvases.placement((int(sizes[index][0]), int(sizes[index][1])), int(placed.canvas[index]))
        boxes = np.asarray(example["boxes"], np.float64)
        sides.append((boxes[:, 2:] - boxes[:, :2]) * (np.array(size) / sizes[index])[None, ::-1])
    found = fv.ops.kmeans_anchors(np.concatenate(sides), count, seed)
    return tuple((max(1, round(w)), max(1, round(h))) for w, h in found.tolist())
