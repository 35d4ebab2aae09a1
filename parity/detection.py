"""Faster R-CNN beside torchvision's, with the same weights: detections, losses and gradients.

    python -m parity.detection --images FOLDER       # all comparisons; about ten minutes on two cores

Needs `pip install -e ".[reference]"` and a folder of photographs; run it from the root of the checkout. It writes
parity/detection.jsonl and parity/detection.md.

* `detections`: photographs at their own sizes, resized by torchvision's rule, through the whole of both networks.
* `losses`: the four losses in float32, with the same sampled anchors and proposals.
* `gradients`: the gradients of their sum in float64, for all parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import flaxvision as fv
from parity import comparison, drawing, rcnn

RESULTS = Path(__file__).with_name("detection.jsonl")
# Largest errors: pixels, probabilities, relative errors.
TOLERANCES = {"boxes": 0.01, "scores": 1e-5, "losses": 1e-5, "gradient": 1e-6, "gradient_worst": 1e-6}
SMALL = rcnn.Network(classes=7, stage_sizes=(1, 1, 1, 1), fpn_features=16, head_features=32)
CANVAS = (128, 160)


def on_canvas(images: Sequence[np.ndarray], multiple: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Puts images `[h, w, 3]` on the canvas that torchvision makes for them.

    Returns:
        The canvases `[N, H, W, 3]` and the sizes of the images `[N, 2]`.
    """
    sizes = np.asarray([image.shape[:2] for image in images], np.int32)
    height, width = -(-sizes.max(0) // multiple) * multiple
    canvas = np.zeros((len(images), height, width, 3), images[0].dtype)
    for row, image in zip(canvas, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return canvas, sizes


def detect(network: rcnn.Network, variables: Any, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Returns our `boxes`, `scores` and `labels` of each image."""
    model = network.ours()
    canvas, sizes = on_canvas(images)
    found = jax.jit(lambda v, x, s: fv.detect(model, v, x, s))(variables, canvas, sizes)
    return [
        {name: np.asarray(getattr(found, name)[row])[np.asarray(found.valid[row])] for name in _FOUND}
        for row in range(len(images))
    ]


_FOUND = ("boxes", "scores", "labels")


def compare_detections(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compares the detections of one image in order of score.

    Detections whose scores are equal to 1e-5 may come in either order, so each of ours is compared with the nearest of
    theirs that has its label and, nearly, its score.

    Returns:
        `count`, `count_theirs`, `unmatched` (detections without a partner), and the largest differences `boxes` in
        pixels and `scores`.
    """
    left, boxes, scores, unmatched = set(range(len(theirs["scores"]))), [0.0], [0.0], 0
    for box, score, label in zip(*(ours[name] for name in _FOUND), strict=True):
        near = [i for i in left if theirs["labels"][i] == label and abs(theirs["scores"][i] - score) < 1e-3]
        if not near:
            unmatched += 1
            continue
        distance = [float(np.abs(theirs["boxes"][i] - box).max()) for i in near]
        best = int(np.argmin(distance))
        left.remove(near[best])
        boxes.append(distance[best])
        scores.append(abs(float(theirs["scores"][near[best]]) - float(score)))
    return {
        "count": len(ours["scores"]),
        "count_theirs": len(theirs["scores"]),
        "unmatched": unmatched + len(left),
        "boxes": max(boxes),
        "scores": max(scores),
    }


def targets(name: str, sizes: Sequence[tuple[int, int]], classes: int, count: int = 5) -> dict[str, np.ndarray]:
    """Draws true boxes within images of these sizes, the last one padding.

    Returns:
        `boxes [N, count, 4]`, `labels [N, count]` and `valid [N, count]`.
    """
    drawn = (drawing.draw_images(name, (len(sizes), count, 2, 2)) / np.sqrt(3) + 1) / 2
    drawn = np.sort(drawn, axis=2)
    drawn[:, :, 1] = np.maximum(drawn[:, :, 1], drawn[:, :, 0] + 0.1)
    scale = np.asarray(sizes, np.float32)[:, None, None, ::-1]
    boxes = np.minimum(drawn * scale, scale).reshape(len(sizes), count, 4).astype(np.float32)
    valid = np.ones((len(sizes), count), bool)
    valid[:, -1] = False
    labels = drawing.draw_labels(name, len(sizes) * count, classes - 1).reshape(len(sizes), count)
    return {"boxes": np.where(valid[..., None], boxes, 0), "labels": labels, "valid": valid}


def losses(
    network: rcnn.Network, variables: Any, batch: dict[str, Any], *, gradients: bool = True, **fields: Any
) -> tuple[dict[str, float], Any, Any]:
    """Computes our losses of a batch, the sample that they are based on, and the gradients of their sum."""
    model = network.ours(**fields)

    def loss(params):
        found, sown = model.apply(
            {**variables, "params": params}, batch, jax.random.key(0), method="losses", mutable=["intermediates"]
        )
        named = {name: value.mean() for name, value in found.items()}
        return sum(named.values()), (named, sown["intermediates"])

    compiled = jax.jit(jax.grad(loss, has_aux=True) if gradients else lambda p: (None, loss(p)[1]))
    gradient, (named, sown) = compiled(variables["params"])
    sample = jax.tree.map(np.asarray, (sown["rpn_sample"][0], sown["box_sample"][0]))
    return {name: float(value) for name, value in named.items()}, sample, gradient


def compare_losses(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Returns the largest relative error of a loss."""
    assert set(ours) == set(theirs)
    return max(abs(ours[name] / theirs[name] - 1) for name in ours)


def small_case(images: int = 2) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Draws images that all need the canvas `CANVAS`, and a batch of them with true boxes."""
    sizes = [(CANVAS[0] - 3 - i, CANVAS[1] - 7 * i) for i in range(images)]
    drawn = [drawing.draw_images(f"image {i}", (1, *size, 3))[0] for i, size in enumerate(sizes)]
    canvas, extents = on_canvas(drawn)
    return drawn, {"image": canvas, "size": extents, **targets("small", sizes, SMALL.classes)}


def real(batch: dict[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the true boxes and labels of each image of a batch, without padding."""
    rows = list(zip(batch["boxes"], batch["labels"], batch["valid"], strict=True))
    return [b[v] for b, _, v in rows], [c[v] for _, c, v in rows]


def run_losses(network: rcnn.Network, images: list[np.ndarray], batch: dict[str, Any], tensors: Any) -> dict[str, Any]:
    """Compares the losses in float32, and the gradients in float64.

    Returns:
        `losses`, `gradient` and `gradient_worst` (the largest error of one tensor), and the losses.
    """
    variables = network.variables(tensors)
    ours, sample, _ = losses(network, variables, batch, gradients=False)
    model = network.theirs()
    rcnn.load(model, tensors)
    theirs, _ = rcnn.losses(model, images, *real(batch), sample)
    result: dict[str, Any] = {"losses": compare_losses(ours, theirs), "values": theirs}
    model = network.theirs(double=True)
    rcnn.load(model, tensors)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
        double = batch | {name: np.asarray(batch[name], np.float64) for name in ("image", "boxes")}
        ours, sample, gradient = losses(network, wide, double, param_dtype=jnp.float64)
        theirs, found = rcnn.losses(model, images, *real(batch), sample)
        zeros = {name: np.zeros(value.shape) for name, value in tensors.items()}
        wanted = flatten_dict(network.variables(zeros | found)["params"], sep="/")
        gradient = flatten_dict(gradient, sep="/")
        result["losses_double"] = compare_losses(ours, theirs)
        result["gradient"] = comparison.error(gradient, wanted)
        result["gradient_worst"] = comparison._worst(gradient, wanted)
    return result


def photographs(folder: Path) -> dict[str, np.ndarray]:
    """Reads the photographs of a folder, normalized and resized by torchvision, by file name."""
    import torch
    from PIL import Image
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    fv_transform = fv.weights.tag_of(rcnn.NAME, "torchvision/COCO_V1").preprocessing
    transform = GeneralizedRCNNTransform(800, 1333, list(fv_transform.mean), list(fv_transform.std)).eval()
    images = {}
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32) / 255
        batch, _ = transform([torch.from_numpy(pixels).permute(2, 0, 1)])
        height, width = batch.image_sizes[0]
        images[path.name] = batch.tensors[0, :, :height, :width].permute(1, 2, 0).numpy()
    return images
