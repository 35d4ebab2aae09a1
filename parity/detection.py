"""Compares Faster R-CNN with torchvision's, with the same weights: detections, losses and gradients.

    python -m parity.detection --images FOLDER       # all comparisons, on the photographs of a folder; ten minutes
    python -m parity.detection --references          # only writes tests/parity/detection.npz

Install with `pip install -e ".[reference]"`, and run it from the root of the checkout. It writes parity/detection.jsonl
and parity/detection.md. `rcnn.py` describes how the weights are drawn. `mask_rcnn.py` adds Mask R-CNN.

* Photographs, resized by torchvision: the detections after NMS, and the four losses in float32 for random ground-truth
  boxes, with the same sampled anchors and proposals.
* Two small images: the losses, and the gradients of their sum in float64, for all parameters.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.traverse_util import flatten_dict

import flaxvision as fv
from benchmarks import machine
from parity import comparison, drawing, rcnn

RESULTS = Path(__file__).with_name("detection.jsonl")
FILE = Path(__file__).resolve().parents[1] / "tests" / "parity" / "detection.npz"
# Maximum errors: in pixels of boxes, in probability, relative, in pixels of masks, and relative.
TOLERANCES = {
    "boxes": 0.01,
    "scores": 1e-5,
    "mask_logits": 1e-5,
    "mask_pixels": 0,
    "losses": 1e-5,
    "gradient": 1e-6,
    "gradient_worst": 1e-6,
}
SMALL = rcnn.Network(classes=7, stage_sizes=(1, 1, 1, 1), fpn_features=16, head_features=32)
CANVAS = (128, 160)


def on_canvas(images: Sequence[np.ndarray], multiple: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Pads images `[h, w, 3]` to one size, as torchvision does.

    Returns:
        The padded images `[N, H, W, 3]` and the sizes of the images `[N, 2]`.
    """
    sizes = np.asarray([image.shape[:2] for image in images], np.int32)
    height, width = -(-sizes.max(0) // multiple) * multiple
    canvas = np.zeros((len(images), height, width, 3), images[0].dtype)
    for row, image in zip(canvas, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return canvas, sizes


def detect(network: rcnn.Network, variables: Any, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Returns our `boxes`, `scores` and `labels` of each image."""
    found = _detector(network)(variables, *on_canvas(images))
    return [
        {name: np.asarray(getattr(found, name)[row])[np.asarray(found.valid[row])] for name in _FOUND}
        for row in range(len(images))
    ]


_FOUND = ("boxes", "scores", "labels")


@functools.cache
def _detector(network: rcnn.Network) -> Any:
    return jax.jit(functools.partial(fv.detect, network.ours()))


@functools.cache
def _losses(network: rcnn.Network, gradients: bool, param_dtype: Any) -> Any:
    model = network.ours(param_dtype=param_dtype)

    def loss(params, variables, batch):
        found, sown = model.apply(
            {**variables, "params": params}, batch, jax.random.key(0), method="losses", mutable=["intermediates"]
        )
        named = {name: value.mean() for name, value in found.items()}
        return sum(named.values()), (named, sown["intermediates"])

    return jax.jit(jax.grad(loss, has_aux=True) if gradients else lambda *given: (None, loss(*given)[1]))


def compare_detections(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compares the detections of one image.

    Detections with nearly equal scores may come in either order. So each of ours is compared with the nearest of theirs
    that has the same label and a score within 1e-3.

    Returns:
        `count`, `count_theirs`, `unmatched` (number of detections of both without a match), and the largest differences
        `boxes` in pixels and `scores`.
    """
    pairs = matches(ours, theirs)
    return {
        "count": len(ours["scores"]),
        "count_theirs": len(theirs["scores"]),
        "unmatched": len(ours["scores"]) + len(theirs["scores"]) - 2 * len(pairs),
        "boxes": max([0.0, *(float(np.abs(theirs["boxes"][j] - ours["boxes"][i]).max()) for i, j in pairs)]),
        "scores": max([0.0, *(abs(float(theirs["scores"][j]) - float(ours["scores"][i])) for i, j in pairs)]),
    }


def matches(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """Returns the indices of the detections that `compare_detections` compares."""
    left, pairs = set(range(len(theirs["scores"]))), []
    for number, (box, score, label) in enumerate(zip(*(ours[name] for name in _FOUND), strict=True)):
        near = [i for i in left if theirs["labels"][i] == label and abs(theirs["scores"][i] - score) < 1e-3]
        if near:
            best = near[int(np.argmin([float(np.abs(theirs["boxes"][i] - box).max()) for i in near]))]
            left.remove(best)
            pairs.append((number, best))
    return pairs


def targets(name: str, sizes: Sequence[tuple[int, int]], classes: int, count: int = 5) -> dict[str, np.ndarray]:
    """Draws ground-truth boxes within images of these sizes. The last box is padding.

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
    labels = drawing.draw_labels(name, (len(sizes), count), classes - 1)
    return {"boxes": np.where(valid[..., None], boxes, 0), "labels": labels, "valid": valid}


def losses(
    network: rcnn.Network,
    variables: Any,
    batch: dict[str, Any],
    *,
    gradients: bool = True,
    param_dtype: Any = jnp.float32,
) -> tuple[dict[str, float], Any, Any]:
    """Computes our losses of a batch, the sample that they use, and the gradients of their sum, or None."""
    run = _losses(network, gradients, param_dtype)
    gradient, (named, sown) = run(variables["params"], {"batch_stats": variables["batch_stats"]}, batch)
    sample = jax.tree.map(np.asarray, (sown["rpn_sample"][0], sown["box_sample"][0]))
    return {name: float(value) for name, value in named.items()}, sample, gradient


def compare_losses(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Returns the largest relative error of a loss."""
    assert set(ours) == set(theirs)
    return max(abs(ours[name] / theirs[name] - 1) for name in ours)


def small_case(images: int = 2) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Draws images that are padded to the size `CANVAS`, and a batch of them with ground-truth boxes."""
    sizes = [(CANVAS[0] - 3 - i, CANVAS[1] - 7 * i) for i in range(images)]
    drawn = [drawing.draw_images(f"image {i}", (1, *size, 3))[0] for i, size in enumerate(sizes)]
    canvas, extents = on_canvas(drawn)
    return drawn, {"image": canvas, "size": extents, **targets("small", sizes, SMALL.classes)}


def real(batch: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Returns the ground truth of each image of a batch, without padding."""
    found = []
    for row, valid in enumerate(batch["valid"]):
        truth = {name: batch[name][row][valid] for name in ("boxes", "labels", "masks") if name in batch}
        if "masks" in truth:
            height, width = batch["size"][row]
            truth["masks"] = truth["masks"][:, :height, :width]
        found.append(truth)
    return found


def run_losses(network: rcnn.Network, images: list[np.ndarray], batch: dict[str, Any], tensors: Any) -> dict[str, Any]:
    """Compares the losses in float32 for the same sample. Returns the largest error and torchvision's losses."""
    ours, sample, _ = losses(network, network.variables(tensors), batch, gradients=False)
    model = network.theirs()
    rcnn.load(model, tensors)
    theirs, _ = rcnn.losses(model, images, real(batch), sample, gradients=False)
    return {"losses": compare_losses(ours, theirs), "values": theirs}


def run_gradients(
    network: rcnn.Network, images: list[np.ndarray], batch: dict[str, Any], tensors: Any
) -> dict[str, float]:
    """Compares the losses and their gradients in float64.

    Returns:
        The errors `losses_double`, `gradient`, and `gradient_worst`, the largest error of a single tensor.
    """
    model = network.theirs(double=True)
    rcnn.load(model, tensors)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), network.variables(tensors))
        double = batch | {name: np.asarray(batch[name], np.float64) for name in ("image", "boxes")}
        ours, sample, gradient = losses(network, wide, double, param_dtype=jnp.float64)
        theirs, found = rcnn.losses(model, images, real(batch), sample)
        zeros = {name: np.zeros(value.shape) for name, value in tensors.items()}
        wanted = flatten_dict(network.variables(zeros | found)["params"], sep="/")
        gradient = flatten_dict(gradient, sep="/")
        return {
            "losses_double": compare_losses(ours, theirs),
            "gradient": comparison.error(gradient, wanted),
            "gradient_worst": comparison.worst(gradient, wanted),
        }


def photographs(folder: Path) -> dict[str, np.ndarray]:
    """Reads the photographs of a folder, normalized and resized by torchvision, by file name."""
    import torch
    from PIL import Image
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    info = fv.model_info(rcnn.NAME)
    transform = GeneralizedRCNNTransform(800, 1333, list(info.mean), list(info.std)).eval()
    images = {}
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32) / 255
        batch, _ = transform([torch.from_numpy(pixels).permute(2, 0, 1)])
        height, width = batch.image_sizes[0]
        images[path.name] = batch.tensors[0, :, :height, :width].permute(1, 2, 0).numpy()
    return images


def make_references() -> None:
    """Writes torchvision's results for the small network, and the calibration of its weights."""
    model = SMALL.theirs()
    images, batch = small_case()
    calibration = rcnn.calibrate(model, images[0][None])
    tensors = rcnn.draw(rcnn.shapes_of(model), calibration)
    rcnn.load(model, tensors)
    arrays: dict[str, Any] = calibration.arrays() | {"version": np.array(rcnn.version())}
    for row, found in enumerate(rcnn.detect(model, images)):
        arrays |= {f"{name} {row}": value for name, value in found.items()}
    _, sample, _ = losses(SMALL, SMALL.variables(tensors), batch, gradients=False)
    theirs, _ = rcnn.losses(model, images, real(batch), sample, gradients=False)
    arrays |= {f"loss {name}": np.array(value) for name, value in theirs.items()}
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


def compare_photograph(
    network: rcnn.Network, model: Any, tensors: rcnn.Tensors, name: str, image: np.ndarray
) -> dict[str, Any]:
    """Compares the detections and losses of one photograph."""
    found = compare_detections(detect(network, network.variables(tensors), [image])[0], rcnn.detect(model, [image])[0])
    canvas, sizes = on_canvas([image])
    batch = {"image": canvas, "size": sizes, **targets(name, [image.shape[:2]], network.classes)}
    return {"case": name, "size": image.shape[:2], **found, **run_losses(network, [image], batch, tensors)}


def compare(folder: Path) -> Iterable[dict[str, Any]]:
    """Yields the results of all comparisons."""
    network = rcnn.Network()
    model, images = network.theirs(), photographs(folder)
    calibration = rcnn.calibrate(model, next(iter(images.values()))[None])
    tensors = rcnn.draw(rcnn.shapes_of(model), calibration)
    rcnn.load(model, tensors)
    for name, image in images.items():
        yield compare_photograph(network, model, tensors, name, image)
    small, batch = small_case()
    batch["labels"] = batch["labels"] * 13  # some of the 90 classes
    result = run_losses(network, small, batch, tensors) | run_gradients(network, small, batch, tensors)
    yield {"case": "two small images", "size": CANVAS, **result}


def failures(line: dict[str, Any]) -> list[str]:
    """Returns a description of every error that exceeds its tolerance."""
    bad = [f"{name} {line[name]:.1e}" for name, most in TOLERANCES.items() if name in line and not line[name] <= most]
    if line.get("unmatched") or line.get("count", 0) != line.get("count_theirs", 0):
        bad.append(f"{line['unmatched']} detections without a match")
    return bad


def report(lines: Iterable[dict[str, Any]]) -> str:
    """Returns the text of parity/detection.md."""
    lines, titles = list(lines), ("model", "case", "size", "detections", *TOLERANCES)
    rows, versions = [titles, ["---"] * len(titles)], {}
    for line in lines:
        model = line.get("model", rcnn.NAME)
        values = [f"{line[name]:.1e}" if name in line else "" for name in TOLERANCES]
        rows.append([f"`{model}`", line["case"], "x".join(map(str, line["size"])), str(line.get("count", "")), *values])
        versions[model] = f"`{model}`: {line['version']}, jax {line['jax']}, flaxvision {line['commit']}."
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    most = ", ".join(f"{name} {value:g}" for name, value in TOLERANCES.items())
    bad = [f"{line['case']}: {', '.join(found)}" for line in lines if (found := failures(line))]
    return f"""# Parity of Faster R-CNN and Mask R-CNN

This table compares `faster_rcnn_resnet50_fpn` and `mask_rcnn_resnet50_fpn` in torchvision and in flaxvision, with the
same random weights, drawn by `parity/rcnn.py`. It is written by

    python -m parity.detection --images FOLDER
    python -m parity.mask_rcnn --images FOLDER --only dog.jpg scream.jpg

FOLDER holds the photographs that come with darknet. The columns are:

* `boxes` and `scores`: the largest differences of matched detections, in pixels of the resized image and in
  probability. Every detection of one library matches a detection of the other with the same label.
* `mask_logits`: the relative error of the logits of the mask head, for torchvision's detections and all classes.
* `mask_pixels`: the number of pixels that belong to the object in only one of the libraries, over all matched
  detections, where torchvision's probability is not within 1e-4 of the threshold 0.5. Each library pastes its own masks
  at its own boxes.
* `losses`: the largest relative error of the losses in float32, with the same sampled anchors and proposals.
* `gradient`: the relative error of the gradient of their sum in float64; `gradient_worst`: the largest such error of a
  single tensor.

{table}

Tolerances: {most}. {"Not within them: " + "; ".join(bad) if bad else "All comparisons are within them."}

{chr(10).join(f"* {version}" for version in versions.values())}
"""


def record(model: str, lines: Iterable[dict[str, Any]]) -> None:
    """Replaces the results of a model in parity/detection.jsonl, and writes parity/detection.md."""
    where = {"version": rcnn.version(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    where |= machine.describe(jax.devices()[0])
    found = []
    for line in lines:
        found.append({"model": model, **line, **where})
        print(json.dumps(found[-1]), failures(line) or "", flush=True)
    stored = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    found += [line for line in stored if line.get("model", rcnn.NAME) != model]
    found.sort(key=lambda line: line.get("model", rcnn.NAME))
    RESULTS.write_text("".join(f"{json.dumps(line)}\n" for line in found))
    RESULTS.with_suffix(".md").write_text(report(found))


def main(images: Path | None = None, references: bool = False) -> None:
    """Runs the comparisons and writes the results.

    Args:
        images: Folder of photographs.
        references: Write the reference file of the default tests instead.
    """
    if references:
        return make_references()
    if images is None:
        raise SystemExit("--images must name a folder of photographs")
    record(rcnn.NAME, compare(images))


if __name__ == "__main__":
    tyro.cli(main)
