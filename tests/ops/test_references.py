"""The results of torchvision that `python -m parity.operators` stored, which this run does not need."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision import ops
from parity import operators


@pytest.fixture(scope="module")
def stored():
    with np.load(operators.FILE) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("threshold", operators.THRESHOLDS)
def test_nms(stored, threshold):
    cases = [operators.nms_case(seed) for seed in range(8)]
    boxes, scores, valid, labels = (
        np.stack([case[k] for case in cases] * 2) for k in ("boxes", "scores", "valid", "labels")
    )
    labels[:8] = 0
    run = lambda b, s, v, k: ops.nms(b, s, v, iou_threshold=threshold, max_outputs=operators.BOXES, labels=k)
    indices, kept = jax.jit(jax.vmap(run))(boxes, scores, valid, labels)
    for i in range(16):
        assert indices[i][kept[i]].tolist() == stored[f"nms/{i % 8}/{threshold}/{i >= 8}"].tolist()
    assert kept.sum() < valid.sum()


@pytest.mark.parametrize(
    ("name", "ours", "number"),
    [("roi_align", ops.roi_align, i) for i in range(len(operators.ROI_ALIGN))]
    + [("roi_pool", ops.roi_max_pool, i) for i in range(len(operators.ROI_POOL))],
)
def test_regions(stored, name, ours, number):
    options = (operators.ROI_ALIGN if name == "roi_align" else operators.ROI_POOL)[number]
    case = operators.roi_case(number, options["spatial_scale"])
    value = jax.jit(lambda f, r: ours(f, r, **options))(case["features"], case["rois"])
    np.testing.assert_allclose(value, stored[f"{name}/{number}/value"], atol=1e-5, err_msg=json.dumps(options))
    weights = operators.cotangent(value.shape)
    loss = lambda f: jnp.sum(ours(f, case["rois"], **options) * weights)
    gradient = jax.jit(jax.grad(loss))(case["features"])
    np.testing.assert_allclose(gradient, stored[f"{name}/{number}/gradient"], atol=1e-5)


@pytest.mark.parametrize("kind", operators.KINDS)
def test_overlaps(stored, kind):
    ours = {"iou": ops.box_iou, "giou": ops.box_giou, "diou": ops.box_diou, "ciou": ops.box_ciou}[kind]
    found, expected = np.asarray(ours(stored["boxes/a"], stored["boxes/b"])), stored[f"boxes/{kind}"]
    known = ~np.isnan(expected)
    assert known.mean() > 0.5
    np.testing.assert_allclose(found[known], expected[known], atol=1e-6)
    assert np.isfinite(found).all()


def test_the_file_is_small():
    assert operators.FILE.stat().st_size < 100_000
