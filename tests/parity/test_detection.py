"""Faster R-CNN finds what torchvision's finds and has its losses: `parity/detection.py`.

The default tests need no torch: `python -m parity.detection --references` stored its results for a small network.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import flaxvision as fv
from flaxvision.weights.convert import layout_of, shapes_of, slots_of
from parity import detection, rcnn

NETWORK = detection.SMALL


@pytest.fixture(scope="module")
def stored():
    with np.load(detection.FILE) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def variables(stored):
    slots = slots_of(layout_of(rcnn.NAME, "torchvision"), shapes_of(rcnn.NAME, NETWORK.ours()))
    shapes = {slot.name: slot.shape for slot in slots}
    return NETWORK.variables(rcnn.draw(shapes, rcnn.Calibration.from_arrays(stored, shapes)))


def check(found):
    assert found["count"] == found["count_theirs"] > 24
    assert found["unmatched"] == 0
    assert found["boxes"] <= detection.TOLERANCES["boxes"]
    assert found["scores"] <= detection.TOLERANCES["scores"]


def test_the_same_detections(stored, variables):
    images, _ = detection.small_case()
    for row, ours in enumerate(detection.detect(NETWORK, variables, images)):
        theirs = {name: stored[f"{name} {row}"] for name in ("boxes", "scores", "labels")}
        assert len(set(theirs["labels"].tolist())) > 2
        assert len({tuple(box) for box in np.round(theirs["boxes"]).tolist()}) > 24
        check(detection.compare_detections(ours, theirs))


def test_the_same_losses(stored, variables):
    _, batch = detection.small_case()
    theirs = {name.removeprefix("loss "): float(value) for name, value in stored.items() if name.startswith("loss ")}
    ours, sample, _ = detection.losses(NETWORK, variables, batch, gradients=False)
    assert min(theirs.values()) > 0.01
    assert [int(np.sum(kept)) for _, kept in sample] == [512, 1024]
    assert detection.compare_losses(ours, theirs) <= detection.TOLERANCES["losses"]


def test_a_difference_is_seen():
    one = {"boxes": np.asarray([[0.0, 0, 8, 8], [4, 4, 9, 9]]), "scores": np.asarray([0.9, 0.5]), "labels": [1, 2]}
    assert detection.compare_detections(one, one) == {
        "count": 2,
        "count_theirs": 2,
        "unmatched": 0,
        "boxes": 0.0,
        "scores": 0.0,
    }
    moved = one | {"boxes": one["boxes"] + [[0], [0.5]], "scores": np.asarray([0.9, 0.5005])}
    found = detection.compare_detections(one, moved)
    assert (found["boxes"], found["unmatched"]) == (0.5, 0)
    assert found["scores"] == pytest.approx(5e-4)
    assert detection.compare_detections(one, one | {"labels": [1, 3]})["unmatched"] == 2
    assert detection.failures(
        {"boxes": 0.5, "scores": float("nan"), "unmatched": 1, "count": 2, "count_theirs": 2}
    ) == [
        "boxes 5.0e-01",
        "scores nan",
        "1 detections without a match",
    ]


def test_the_ledger_is_within_its_tolerances_and_the_table_is_its():
    lines = [json.loads(line) for line in detection.RESULTS.read_text().splitlines()]
    assert {line["case"]: bad for line in lines if (bad := detection.failures(line))} == {}
    faster = [line for line in lines if line.get("model", rcnn.NAME) == rcnn.NAME]
    assert [line["case"] for line in faster][-1] == "two small images"
    assert len(faster) == 8
    assert all(line["count"] > 24 for line in lines if line["case"] != "two small images")
    assert set(detection.TOLERANCES) <= {name for line in lines for name in line}
    assert detection.report(lines) == detection.RESULTS.with_suffix(".md").read_text()


@pytest.mark.reference
def test_small_images_live():
    model = NETWORK.theirs()
    images, batch = detection.small_case()
    tensors = rcnn.draw(rcnn.shapes_of(model), rcnn.calibrate(model, images[0][None]))
    rcnn.load(model, tensors)
    ours = detection.detect(NETWORK, NETWORK.variables(tensors), images)
    for one, other in zip(ours, rcnn.detect(model, images), strict=True):
        check(detection.compare_detections(one, other))
    result = detection.run_losses(NETWORK, images, batch, tensors)
    result |= detection.run_gradients(NETWORK, images, batch, tensors)
    assert detection.failures(result) == []
    exported = fv.weights.export(rcnn.NAME, NETWORK.variables(tensors), source="torchvision", **NETWORK.fields)
    assert {name: value.tolist() for name, value in exported.items() if value.ndim == 1} == {
        name: value.tolist() for name, value in tensors.items() if value.ndim == 1
    }
    assert all(np.array_equal(exported[name], value) for name, value in tensors.items())


@pytest.mark.reference
@pytest.mark.data
@pytest.mark.slow
def test_a_photograph_live():
    network = rcnn.Network()
    image = detection.photographs(Path(os.environ["FLAXVISION_DATA"]) / "darknet" / "images")["dog.jpg"]
    model = network.theirs()
    tensors = rcnn.draw(rcnn.shapes_of(model), rcnn.calibrate(model, image[None]))
    rcnn.load(model, tensors)
    found = detection.compare_photograph(network, model, tensors, "dog.jpg", image)
    check(found)
    assert detection.failures(found) == []


@pytest.mark.reference
def test_preprocessing_is_torchvisions():
    import torch
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    transform = fv.weights.preprocessing_for(rcnn.NAME)
    theirs = GeneralizedRCNNTransform(800, 1333, list(transform.mean), list(transform.std)).eval()
    rng = np.random.default_rng(0)
    for height, width in [(37, 50), (500, 375), (333, 91), (20, 400)]:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        wanted, _ = theirs([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])
        canvas, size = transform(pixels)
        assert size == wanted.image_sizes[0]
        np.testing.assert_allclose(canvas, wanted.tensors[0].permute(1, 2, 0).numpy(), atol=2e-6)
