"""Heads of YOLO: decoding and losses against darknet's loops, whose deltas are the negative gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxvision as fv
from flaxvision.models import CfgDetector
from flaxvision.models.darknet_cfg import Convolution, Head
from flaxvision.models.yolo_heads import BOX_LOSSES, Truth
from tests.models.darknet_loops import sigmoid
from tests.models.yolo_loops import (
    ANCHORS,
    BOXES,
    GRID,
    HEIGHT,
    LABELS,
    REGION,
    VALID,
    WIDTH,
    YOLO,
    best_of,
    compare,
    normalized,
    predicted,
    quick,
    raw_of,
    region_loop,
    truth_of,
    yolo_loop,
)


@pytest.mark.parametrize(
    ("changes", "ignored"),
    [
        ({}, ()),
        ({"mask": (0, 2), "ignore_threshold": 0.25}, ()),
        ({"mask": (0, 1, 2, 3), "iou_threshold": 0.3, "scale_xy": 1.2, "box_weight": 0.5}, ()),
        ({"object_weight": 2.0, "class_weight": 0.3, "ignore_threshold": 0.4}, (1, 4)),
    ],
)
def test_yolo_losses_against_darknets_deltas(changes, ignored):
    head = dataclasses.replace(YOLO, **changes)
    delta = compare(head, len(head.mask), yolo_loop, ignored=ignored)
    assert (delta[..., 5:] != 0).any()
    if head.ignore_threshold < 0.5:
        assert (delta[..., 4] == 0).any()


@pytest.mark.parametrize(
    ("changes", "seen", "ignored"),
    [
        ({}, 100, ()),
        ({"ignore_threshold": 0.2}, 99, ()),
        ({"rescore": False, "match_anchors": False, "coord_scale": 2.0}, 100, ()),
        ({"softmax": False, "object_scale": 3.0, "noobject_scale": 0.5, "class_scale": 2.0}, 0, (3,)),
        ({"prior_scale": 0.1, "prior_images": 7}, 6, ()),
    ],
)
def test_region_losses_against_darknets_deltas(changes, seen, ignored):
    head = dataclasses.replace(REGION, **changes)

    def loop(head, raw, boxes, labels, ignored):
        return region_loop(head, raw, boxes, labels, seen, ignored)

    compare(head, len(head.anchors), loop, seen, ignored)


def test_two_truths_in_one_anchor():
    """The first and the third truth: the box of the last, the classes of both."""
    head = dataclasses.replace(YOLO, mask=(0, 1, 2, 3))
    raw = jnp.zeros((1, *GRID, 4 * 8))
    gradient = quick(jax.grad(lambda r: head.losses(r, truth_of())["class"].sum()))(raw).reshape(*GRID, 4, 8)
    np.testing.assert_allclose(gradient[1, 2, 1, 5:], [-0.5, 0.5, -0.5])


def test_a_perfect_prediction_has_no_loss():
    head = dataclasses.replace(YOLO, mask=(0, 1, 2, 3))
    truth = dataclasses.replace(truth_of(), valid=jnp.asarray([[False, True] + [False] * 6]))
    raw = np.full((*GRID, 4, 8), -30.0, np.float32)
    x, y, w, h = normalized(BOXES[1])
    i, j = int(x * GRID[1]), int(y * GRID[0])
    n = best_of([(a / WIDTH, b / HEIGHT) for a, b in ANCHORS], (x, y, w, h))[0]
    center = np.array([x * GRID[1] - i, y * GRID[0] - j])
    raw[j, i, n, :2] = np.log(center / (1 - center))
    raw[j, i, n, 2:4] = np.log([w * WIDTH / ANCHORS[n][0], h * HEIGHT / ANCHORS[n][1]])
    raw[j, i, n, 4], raw[j, i, n, 5 + LABELS[1]] = 30, 30
    losses = quick(head.losses)(raw.reshape(1, *GRID, -1), truth)
    for name, value in losses.items():
        assert abs(float(value[0])) < 1e-5, name
    boxes, scores = quick(head.decode)(raw.reshape(1, *GRID, -1))
    np.testing.assert_allclose(boxes[0, j, i, n], BOXES[1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(scores[0, j, i, n], np.eye(3)[LABELS[1]], atol=1e-5)
    assert float(scores.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", BOX_LOSSES[1:])
def test_iou_losses_reach_the_truth(kind):
    """Descent on the loss of boxes alone. The deltas of darknet's fork are no gradients, so none is compared."""
    head = dataclasses.replace(YOLO, mask=(0, 1, 2, 3), box_loss=kind, box_weight=0.5)
    truth = dataclasses.replace(truth_of(), valid=jnp.asarray([[True] * 2 + [False] * 6]))
    raw = jnp.asarray(raw_of(head, 4))
    tx = optax.adam(0.05)

    @quick
    def step(raw, state):
        loss, gradient = jax.value_and_grad(lambda r: head.losses(r, truth)["box"].sum())(raw)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(raw, updates), state, loss

    state, first = tx.init(raw), None
    for _ in range(200):
        raw, state, loss = step(raw, state)
        first = loss if first is None else first
    assert 0.2 < float(first) < 2
    assert float(loss) < 0.06


@pytest.mark.parametrize("head", [YOLO, REGION], ids=["yolo", "region"])
def test_without_objects(head):
    """No truth and no room for one give losses of background alone, and no NaN in any gradient."""
    anchors = len(getattr(head, "mask", head.anchors))
    raw = jnp.asarray(raw_of(head, anchors)) * 100
    empty = Truth(jnp.zeros((1, 0, 4)), jnp.zeros((1, 0), int), *[jnp.zeros((1, 0), bool)] * 2, jnp.array([500]))
    padded = dataclasses.replace(truth_of(500), valid=jnp.zeros((1, 8), bool))
    for truth in (empty, padded):
        total = lambda r, t=truth: sum(map(jnp.sum, head.losses(r, t).values()))
        losses, gradient = quick(jax.value_and_grad(total))(raw)
        assert np.isfinite(losses)
        assert np.isfinite(gradient).all()
        found = np.asarray(gradient).reshape(*GRID, anchors, -1)
        assert not found[..., :4].any()
        assert not found[..., 5:].any()


def model_of(*heads):
    layers = []
    for head in heads:
        depth = len(getattr(head, "mask", head.anchors)) * (5 + head.num_classes)
        layers += [Convolution("convolutional", depth, 16, (16, 16), 0, 1, 1, False, "linear"), Head("yolo", head)]
    return CfgDetector(layers=tuple(layers[:2]), input_size=(64, 96), channels=3)


def test_candidates_against_a_loop():
    model = model_of(dataclasses.replace(YOLO, scale_xy=1.05))
    head = model.heads["layer1_yolo"]
    raw, sizes = raw_of(head, 2, rows=2), np.array([[64, 96], [41, 55]])
    candidates = quick(model.candidates)
    found = jax.tree.map(np.asarray, candidates({"layer1_yolo": raw}, sizes))
    assert (found.boxes.shape, found.scores.shape, found.valid.shape) == ((2, 48, 4), (2, 48, 3), (2, 48))
    for row in range(2):
        x, h, w = raw[row].reshape(*GRID, 2, 8), *sizes[row]
        for place, (j, i, n) in enumerate(np.ndindex(*GRID, 2)):
            cx, cy, bw, bh = predicted(x[j, i, n], j, i, ANCHORS[head.mask[n]], 1.05) * np.array([96, 64, 96, 64])
            box = np.array([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2]).clip(0, [w, h, w, h])
            np.testing.assert_allclose(found.boxes[row, place], box, rtol=1e-5, atol=1e-3)
            scores = sigmoid(x[j, i, n, 4]) * sigmoid(x[j, i, n, 5:])
            np.testing.assert_allclose(found.scores[row, place], scores, rtol=1e-5)
            assert bool(found.valid[row, place]) == bool(box[2] > box[0] and box[3] > box[1])
    assert not found.valid[1].all()
    whole = candidates({"layer1_yolo": raw}, None)
    np.testing.assert_array_equal(whole.boxes[0], found.boxes[0])


def test_region_scores_are_a_softmax():
    raw = raw_of(REGION, 3)
    boxes, scores = jax.tree.map(np.asarray, quick(REGION.decode)(raw))
    x = raw.reshape(*GRID, 3, 9)
    np.testing.assert_allclose(scores.sum(-1)[0], sigmoid(x[..., 4]), rtol=1e-5)
    np.testing.assert_allclose(boxes[0, 2, 3, 1, 2] - boxes[0, 2, 3, 1, 0], np.exp(x[2, 3, 1, 2]) * 40, rtol=1e-4)


def test_losses_of_a_model():
    """Crowds and difficult objects are no positives; rows are independent; `seen` starts the warm-up."""
    model = model_of(REGION)
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 64, 96, 3)), jnp.float32)
    kernel = np.random.default_rng(1).normal(size=(16, 16, 3, 27)).astype(np.float32) / 16
    variables = {"params": {"layer0_conv": {"kernel": kernel, "bias": kernel[0, 0, 0]}}}
    batch = {
        "image": images,
        "boxes": jnp.asarray([BOXES] * 2, jnp.float32),
        "labels": jnp.asarray([LABELS] * 2),
        "valid": jnp.asarray([VALID] * 2, bool),
        "crowd": jnp.zeros((2, 8), bool),
        "difficult": jnp.zeros((2, 8), bool),
        "seen": jnp.full(2, 100),
    }
    compiled = quick(functools.partial(model.apply, variables, method="losses"))

    def losses(**changes):
        return jax.tree.map(np.asarray, compiled({**batch, **changes}))

    plain = losses()
    assert set(plain) == {"box", "object", "class", "prior"}
    assert {value.shape for value in plain.values()} == {(2,)}
    assert not plain["prior"].any()
    assert losses(seen=jnp.full(2, 99))["prior"].all()
    np.testing.assert_array_equal(losses(seen=jnp.array([99, 100]))["prior"] > 0, [True, False])
    for name, value in compiled({key: value[:1] for key, value in batch.items()}).items():
        np.testing.assert_allclose(plain[name][:1], value, rtol=1e-6)
    nothing = losses(crowd=jnp.ones((2, 8), bool))
    assert not nothing["box"].any()
    np.testing.assert_allclose(losses(difficult=jnp.ones((2, 8), bool))["object"], nothing["object"])
    few = {key: value for key, value in batch.items() if key not in ("crowd", "difficult", "seen")}
    for name, value in compiled(few).items():
        np.testing.assert_allclose(plain[name], value, rtol=1e-6)
    none = losses(valid=jnp.zeros((2, 8), bool))
    assert (nothing["object"] < none["object"]).all()  # predictions within their area are ignored


def test_detect_finds_what_a_head_says():
    model = model_of(YOLO)
    bias = np.full((2, 8), -8.0, np.float32)
    bias[0] = [0, 0, 0, 0, 8, 8, -8, -8]  # everywhere, with the first class
    variables = {"params": {"layer0_conv": {"kernel": np.zeros((16, 16, 3, 16), np.float32), "bias": bias.ravel()}}}
    detect = quick(functools.partial(fv.detect, model, iou_threshold=0.9))
    found = jax.tree.map(np.asarray, detect(variables, jnp.zeros((1, 64, 96, 3)), jnp.array([[64, 96]])))
    assert int(found.valid.sum()) == 24
    assert not found.labels[found.valid].any()


def test_wrong_heads_and_canvases():
    with pytest.raises(ValueError, match=r"mask must hold indices of the 4 anchors; got \(4,\)"):
        dataclasses.replace(YOLO, mask=(4,))
    with pytest.raises(ValueError, match="box_loss must be one of mse, iou, giou, diou, ciou; got 'l1'"):
        dataclasses.replace(YOLO, box_loss="l1")
    with pytest.raises(ValueError, match="num_classes must be at least 1 for a detector; got 0"):
        dataclasses.replace(REGION, num_classes=0)
    with pytest.raises(ValueError, match=r"anchors must have at least one \(width, height\); got \(\)"):
        dataclasses.replace(REGION, anchors=())
    with pytest.raises(ValueError, match=r"height and a width that are multiples of 16; got \(60, 96\)"):
        model_of(YOLO).init(jax.random.key(0), jnp.zeros((1, 60, 96, 3)))
    with pytest.raises(ValueError, match=r"images must have the shape \[N, H, W, C\]"):
        model_of(YOLO).init(jax.random.key(0), jnp.zeros((64, 96, 3)))
    with pytest.raises(ValueError, match=r"sizes must have the shape \(1, 2\)"):
        model_of(YOLO).init(jax.random.key(0), jnp.zeros((1, 64, 96, 3)), jnp.zeros((2, 2)))
