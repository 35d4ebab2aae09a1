import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision import ops
from parity import operators
from tests.ops import loops

SEEDS = range(24)


def stacked(cases):
    return {key: np.stack([case[key] for case in cases]) for key in cases[0]}


@pytest.mark.parametrize(("threshold", "classwise"), [pytest.param(0.3, False, marks=pytest.mark.slow), (0.6, True)])
def test_nms_is_a_greedy_loop(threshold, classwise):
    cases = [operators.nms_case(seed) for seed in SEEDS]
    batch = stacked(cases)
    run = jax.vmap(partial(ops.nms, iou_threshold=threshold, max_outputs=operators.BOXES + 3))
    labels = {"labels": batch["labels"]} if classwise else {}
    indices, kept = jax.jit(run)(batch["boxes"], batch["scores"], batch["valid"], **labels)
    for i, case in enumerate(cases):
        expected = loops.nms(
            case["boxes"], case["scores"], case["valid"], threshold, case["labels"] if classwise else None
        )
        assert indices[i][kept[i]].tolist() == expected
        assert kept[i].tolist() == [True] * len(expected) + [False] * (operators.BOXES + 3 - len(expected))
        assert not indices[i][~kept[i]].any()


def test_nms_over_several_blocks_ends_when_there_are_enough():
    rng = np.random.default_rng(0)
    boxes = operators.boxes(rng, 300, extent=25)
    scores = (rng.integers(0, 90, 300) / 90).astype(np.float32)
    expected = loops.nms(boxes, scores, np.ones(300), 0.5)
    assert 50 < len(expected) < 290
    for count in (50, 300):
        run = jax.jit(partial(ops.nms, iou_threshold=0.5, max_outputs=count))
        indices, kept = run(boxes, scores)
        assert indices[kept].tolist() == expected[:count]


@pytest.mark.parametrize("block", [1, 7, 256])
def test_the_size_of_a_block_does_not_matter(block, monkeypatch):
    """GPUs and TPUs decide more boxes at a time than the CPU of this test."""
    rng = np.random.default_rng(1)
    boxes = operators.boxes(rng, 300, extent=25)
    scores = (rng.integers(0, 90, 300) / 90).astype(np.float32)
    labels, valid = rng.integers(0, 3, 300), rng.random(300) < 0.9
    expected = loops.nms(boxes, scores, valid, 0.5, labels)
    monkeypatch.setattr(sys.modules["flaxvision.ops.nms"], "_CPU_BLOCK", block)
    run = jax.jit(partial(ops.nms, iou_threshold=0.5, max_outputs=300))
    indices, kept = run(boxes, scores, valid, labels=labels)
    assert indices[kept].tolist() == expected


def test_a_chain_of_overlapping_boxes():
    """Each box is suppressed by the one before it, if that one is kept: every second box survives."""
    x = np.arange(100, dtype=np.float32) * 4
    boxes = np.stack([x, 0 * x, x + 10, 0 * x + 10], axis=1)
    indices, kept = jax.jit(partial(ops.nms, iou_threshold=0.4, max_outputs=100))(boxes, -x)
    assert indices[kept].tolist() == list(range(0, 100, 2))


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.6, 0.7, 0.9])
def test_a_threshold_is_compared_exactly(threshold):
    """As in double precision: an IoU of float32(0.6), which is above 0.6, exceeds 0.6."""
    width = np.float32(threshold)
    boxes = np.array([[0, 0, 1, 1], [0, 0, width, 1]], np.float32)
    _, kept = ops.nms(boxes, np.array([2.0, 1.0]), iou_threshold=threshold, max_outputs=2)
    assert kept.tolist() == [True, float(width) <= threshold]


def test_scores_that_are_not_numbers_are_never_kept():
    boxes = np.array([[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]], np.float32)
    scores = np.array([np.nan, -np.inf, 1], np.float32)
    indices, kept = ops.nms(boxes, scores, iou_threshold=0.5, max_outputs=3)
    assert indices[kept].tolist() == [2, 1]
    indices, kept = ops.top_k(scores, None, 3)
    assert indices[kept].tolist() == [2, 1]
    indices, _, kept = ops.soft_nms(boxes, scores, max_outputs=3)
    assert indices[kept].tolist() == [2]


def test_without_boxes():
    nothing, none = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    assert not ops.nms(nothing, none, iou_threshold=0.5, max_outputs=2)[1].any()
    assert not ops.soft_nms(nothing, none, max_outputs=2)[2].any()
    assert not ops.nms(np.ones((3, 4)), np.ones(3), np.zeros(3, bool), iou_threshold=0.5, max_outputs=2)[1].any()


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_is_a_loop(method):
    options = {"method": method, "iou_threshold": 0.3, "sigma": 0.5, "score_threshold": 0.05}
    cases = [operators.nms_case(seed) for seed in SEEDS]
    batch = stacked(cases)
    batch["scores"] = np.stack([np.random.default_rng(i).uniform(0, 1, operators.BOXES) for i in SEEDS])
    batch["scores"] = batch["scores"].astype(np.float32)
    run = jax.jit(jax.vmap(lambda b, s, v, k: ops.soft_nms(b, s, v, max_outputs=30, labels=k, **options)))
    indices, scores, kept = run(batch["boxes"], batch["scores"], batch["valid"], batch["labels"])
    lowered = 0
    for i, case in enumerate(cases):
        given = batch["scores"][i]
        expected = loops.soft_nms(case["boxes"], given, case["valid"], count=30, labels=case["labels"], **options)
        assert indices[i][kept[i]].tolist() == [index for index, _ in expected]
        np.testing.assert_allclose(scores[i][kept[i]], [score for _, score in expected], rtol=2e-6)
        lowered += sum(score < 0.999 * given[index] for index, score in expected)
    assert lowered > 15


def test_top_k():
    scores = jnp.asarray([3.0, 5.0, 5.0, 1.0, 9.0, 5.0])
    valid = jnp.asarray([True, True, True, True, False, True])
    indices, kept = ops.top_k(scores, valid, 3)
    assert (indices.tolist(), kept.tolist()) == ([1, 2, 5], [True] * 3)
    indices, kept = ops.top_k(scores, valid, 8)
    assert (indices.tolist(), kept.tolist()) == ([1, 2, 5, 0, 3, 0, 0, 0], [True] * 5 + [False] * 3)


def test_errors():
    boxes, scores = np.zeros((3, 4)), np.zeros(3)
    for function in (partial(ops.nms, iou_threshold=0.5), ops.soft_nms):
        with pytest.raises(ValueError, match=r"boxes must be \[A, 4\]; got \(3, 5\)"):
            function(np.zeros((3, 5)), scores, max_outputs=1)
        with pytest.raises(ValueError, match=r"valid must be \(3,\), one entry for each box; got \(2,\)"):
            function(boxes, scores, np.zeros(2), max_outputs=1)
        with pytest.raises(ValueError, match="max_outputs must be at least 1; got 0"):
            function(boxes, scores, max_outputs=0)
    with pytest.raises(ValueError, match="method must be 'linear' or 'gaussian'; got 'hard'"):
        ops.soft_nms(boxes, scores, max_outputs=1, method="hard")
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        ops.top_k(scores, None, 0)
