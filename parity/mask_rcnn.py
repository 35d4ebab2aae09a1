"""Compares Mask R-CNN with torchvision's, with the same weights: detections, masks, losses and gradients.

    python -m parity.mask_rcnn --images FOLDER       # all comparisons, on the photographs of a folder
    python -m parity.mask_rcnn --images FOLDER --only dog.jpg scream.jpg
    python -m parity.mask_rcnn --references          # only writes tests/parity/mask_rcnn.npz

It adds its results to those of `parity.detection`, which describes the comparisons. Besides, it compares

* the logits of the mask head for torchvision's detections, for all classes;
* the pixels of the objects: each library pastes its own masks at its own boxes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import flaxvision as fv
from parity import comparison, detection, rcnn

FILE = detection.FILE.with_name("mask_rcnn.npz")
NETWORK = rcnn.Network(mask_features=(256, 256, 256, 256))
SMALL = rcnn.Network(
    classes=7, stage_sizes=(1, 1, 1, 1), fpn_features=16, head_features=32, mask_features=(16, 16, 16, 16)
)
STORED = 6  # detections of each image whose masks are stored for the default tests
NEAR = 1e-4  # distance from the threshold 0.5 within which a pixel may belong to the object in one library only


def with_masks(batch: dict[str, Any]) -> dict[str, Any]:
    """Adds `masks [N, M, H, W]` to a batch: the ellipses within the boxes."""
    low, high = batch["boxes"][..., :2], batch["boxes"][..., 2:]
    center, half = (low + high) / 2, np.maximum(high - low, 1e-3) / 2
    height, width = batch["image"].shape[1:3]
    x = (np.arange(width) + 0.5 - center[..., :1]) / half[..., :1]
    y = (np.arange(height) + 0.5 - center[..., 1:]) / half[..., 1:]
    return batch | {"masks": (x[..., None, :] ** 2 + y[..., None] ** 2 < 1) & batch["valid"][..., None, None]}


def theirs(model: Any, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Returns torchvision's detections of each image, with `mask_logits [D, h, w, K]`."""
    logits: list[np.ndarray] = []
    hook = model.roi_heads.mask_predictor.register_forward_hook(
        lambda module, inputs, output: logits.append(output.permute(0, 2, 3, 1).numpy())
    )
    found = rcnn.detect(model, images)
    hook.remove()
    ends = np.cumsum([len(one["scores"]) for one in found])
    return [one | {"mask_logits": x} for one, x in zip(found, np.split(logits[0], ends[:-1]), strict=True)]


def ours(
    network: rcnn.Network, variables: Any, images: Sequence[np.ndarray], others: Sequence[dict[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """Returns our detections of each image, with `masks [D, h, w]`, and `mask_logits` for the boxes of `others`."""
    canvas, sizes = detection.on_canvas(images)
    most = max(len(one["boxes"]) for one in others)
    boxes = np.stack([np.pad(one["boxes"], [(0, most - len(one["boxes"])), (0, 0)]) for one in others])
    found, logits = _detector(network)(variables, canvas, sizes, boxes)
    results = []
    for row, other in enumerate(others):
        valid = np.asarray(found.valid[row])
        one = {name: np.asarray(getattr(found, name)[row])[valid] for name in ("boxes", "scores", "labels", "masks")}
        results.append(one | {"mask_logits": np.asarray(logits[row, : len(other["boxes"])])})
    return results


@functools.cache
def _detector(network: rcnn.Network) -> Any:
    model = network.ours()

    def run(variables, images, sizes, boxes):
        found = fv.detect(model, variables, images, sizes)
        outputs = model.apply(variables, images, sizes)
        head = lambda module, method: isinstance(module, fv.models.MaskHead) and method == "__call__"
        _, seen = model.apply(
            variables, outputs, boxes, found.labels[:, : boxes.shape[1]], method="masks", capture_intermediates=head
        )
        return found, seen["intermediates"]["mask_head"]["__call__"][0]

    return jax.jit(run)


def compare_masks(one: dict[str, np.ndarray], other: dict[str, np.ndarray], size: Sequence[int]) -> dict[str, Any]:
    """Compares the masks of one image of this height and width.

    Returns:
        `mask_logits`, the relative error of the logits, and `mask_pixels`; parity/detection.md describes both.
    """
    paste = jax.jit(functools.partial(fv.ops.paste_masks, size=tuple(size)))
    pixels = 0
    for i, j in detection.matches(one, other):
        wanted = other["masks"][j]
        differ = (np.asarray(paste(one["masks"][i], one["boxes"][i])) > 0.5) != (wanted > 0.5)
        pixels += int(np.sum(differ & (np.abs(wanted - 0.5) > NEAR)))
    return {"mask_logits": comparison.error(one["mask_logits"], other["mask_logits"]), "mask_pixels": pixels}


def compare_images(
    network: rcnn.Network, variables: Any, images: Sequence[np.ndarray], others: Sequence[dict[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """Compares our detections and masks of images with torchvision's."""
    found = ours(network, variables, images, others)
    return [
        detection.compare_detections(one, other) | compare_masks(one, other, image.shape[:2])
        for one, other, image in zip(found, others, images, strict=True)
    ]


def small_case() -> tuple[list[np.ndarray], dict[str, Any]]:
    """Returns the images and the batch of `detection.small_case`, with masks."""
    images, batch = detection.small_case()
    return images, with_masks(batch)


def make_references() -> None:
    """Writes torchvision's results for the small network, and the calibration of its weights."""
    model = SMALL.theirs()
    images, batch = small_case()
    calibration = rcnn.calibrate(model, images[0][None])
    tensors = rcnn.draw(rcnn.shapes_of(model), calibration)
    rcnn.load(model, tensors)
    arrays: dict[str, Any] = calibration.arrays() | {"version": np.array(rcnn.version())}
    for row, found in enumerate(theirs(model, images)):
        arrays |= {f"{name} {row}": found[name] for name in ("boxes", "scores", "labels")}
        masks, label = found["masks"][:STORED], found["labels"][:STORED] + 1
        own = np.take_along_axis(found["mask_logits"][:STORED], label[:, None, None, None], axis=3)[..., 0]
        arrays |= {f"mask_logits {row}": own, f"object {row}": np.packbits(masks > 0.5)}
        arrays |= {f"near {row}": np.packbits(np.abs(masks - 0.5) <= NEAR)}
    _, sample, _ = detection.losses(SMALL, SMALL.variables(tensors), batch, gradients=False)
    losses, _ = rcnn.losses(model, images, detection.real(batch), sample, gradients=False)
    arrays |= {f"loss {name}": np.array(value) for name, value in losses.items()}
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


def compare(folder: Path, only: Sequence[str]) -> Iterable[dict[str, Any]]:
    """Yields the results of all comparisons."""
    model, images = NETWORK.theirs(), detection.photographs(folder)
    calibration = rcnn.calibrate(model, next(iter(images.values()))[None])
    tensors = rcnn.draw(rcnn.shapes_of(model), calibration)
    rcnn.load(model, tensors)
    variables = NETWORK.variables(tensors)
    for name in only or images:
        size = images[name].shape[:2]
        found = compare_images(NETWORK, variables, [images[name]], theirs(model, [images[name]]))[0]
        canvas, sizes = detection.on_canvas([images[name]])
        batch = {"image": canvas, "size": sizes, **detection.targets(name, [size], NETWORK.classes)}
        losses = detection.run_losses(NETWORK, [images[name]], with_masks(batch), tensors)
        yield {"case": name, "size": size, **found, **losses}
    small, batch = small_case()
    batch["labels"] = batch["labels"] * 13  # some of the 90 classes
    result = detection.run_losses(NETWORK, small, batch, tensors)
    result |= detection.run_gradients(NETWORK, small, batch, tensors)
    yield {"case": "two small images", "size": detection.CANVAS, **result}


def main(images: Path | None = None, only: tuple[str, ...] = (), references: bool = False) -> None:
    """Runs the comparisons and writes the results.

    Args:
        images: Folder of photographs.
        only: Names of photographs; empty for all.
        references: Write the reference file of the default tests instead.
    """
    if references:
        return make_references()
    if images is None:
        raise SystemExit("--images must name a folder of photographs")
    detection.record(NETWORK.name, compare(images, only))


if __name__ == "__main__":
    tyro.cli(main)
