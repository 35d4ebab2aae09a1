"""Mask R-CNN finds torchvision's masks and has its losses: `parity/mask_rcnn.py`.

The default tests need no torch: `python -m parity.mask_rcnn --references` stored its results for a small network.
"""

import json

import numpy as np
import pytest

import flaxvision as fv
from flaxvision.weights.convert import layout_of, shapes_of, slots_of
from parity import comparison, detection, mask_rcnn, rcnn

NETWORK = mask_rcnn.SMALL


@pytest.fixture(scope="module")
def stored():
    with np.load(mask_rcnn.FILE) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def variables(stored):
    slots = slots_of(layout_of(NETWORK.name, "torchvision"), shapes_of(NETWORK.name, NETWORK.ours()))
    shapes = {slot.name: slot.shape for slot in slots}
    return NETWORK.variables(rcnn.draw(shapes, rcnn.Calibration.from_arrays(stored, shapes)))


@pytest.mark.slow
def test_the_same_detections_and_masks(stored, variables):
    images, _ = mask_rcnn.small_case()
    others = [{name: stored[f"{name} {row}"] for name in ("boxes", "scores", "labels")} for row in (0, 1)]
    for row, (ours, theirs) in enumerate(zip(mask_rcnn.ours(NETWORK, variables, images, others), others, strict=True)):
        found, size = detection.compare_detections(ours, theirs), images[row].shape[:2]
        assert found["count"] > 24
        assert detection.failures(found) == []
        own = (theirs["labels"] + 1)[: mask_rcnn.STORED, None, None, None]
        logits = np.take_along_axis(ours["mask_logits"][: mask_rcnn.STORED], own, axis=3)[..., 0]
        assert comparison.error(logits, stored[f"mask_logits {row}"]) <= detection.TOLERANCES["mask_logits"]
        shape = (mask_rcnn.STORED, *size)
        inside, near = (
            np.unpackbits(stored[f"{name} {row}"], count=np.prod(shape)).reshape(shape).astype(bool)
            for name in ("object", "near")
        )
        assert 0.01 < inside.mean() < 0.9
        assert near.mean() < 0.001
        pairs = [(i, j) for i, j in detection.matches(ours, theirs) if j < mask_rcnn.STORED]
        assert len(pairs) == mask_rcnn.STORED
        pasted = np.asarray(fv.ops.paste_masks(ours["masks"], ours["boxes"], size)) > 0.5
        assert sum(int(((pasted[i] != inside[j]) & ~near[j]).sum()) for i, j in pairs) == 0


@pytest.mark.slow
def test_the_same_losses(stored, variables):
    _, batch = mask_rcnn.small_case()
    theirs = {name.removeprefix("loss "): float(value) for name, value in stored.items() if name.startswith("loss ")}
    assert set(theirs) == {"mask", "classes", "box", "objectness", "rpn_box"}
    ours, _, _ = detection.losses(NETWORK, variables, batch, gradients=False)
    assert min(theirs.values()) > 0.01
    assert detection.compare_losses(ours, theirs) <= detection.TOLERANCES["losses"]


def test_the_ledger_has_the_masks():
    lines = [json.loads(line) for line in detection.RESULTS.read_text().splitlines()]
    lines = [line for line in lines if line.get("model") == mask_rcnn.NETWORK.name]
    assert {line["case"]: bad for line in lines if (bad := detection.failures(line))} == {}
    assert [line["case"] for line in lines] == ["dog.jpg", "scream.jpg", "two small images"]
    assert all({"mask_logits", "mask_pixels"} <= set(line) for line in lines[:-1])


@pytest.mark.reference
def test_small_images_live():
    model = NETWORK.theirs()
    images, batch = mask_rcnn.small_case()
    tensors = rcnn.draw(rcnn.shapes_of(model), rcnn.calibrate(model, images[0][None]))
    rcnn.load(model, tensors)
    variables = NETWORK.variables(tensors)
    for found in mask_rcnn.compare_images(NETWORK, variables, images, mask_rcnn.theirs(model, images)):
        assert found["count"] > 24
        assert detection.failures(found) == []
    result = detection.run_losses(NETWORK, images, batch, tensors)
    result |= detection.run_gradients(NETWORK, images, batch, tensors)
    assert set(result["values"]) == {"mask", "classes", "box", "objectness", "rpn_box"}
    assert detection.failures(result) == []
    exported = fv.weights.export(NETWORK.name, variables, source="torchvision", **NETWORK.fields)
    assert set(exported) == set(tensors)
    assert all(np.array_equal(exported[name], value) for name, value in tensors.items())
