import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision import ops
from parity import operators
from tests.ops import loops

PAIRWISE = {"iou": ops.box_iou, "giou": ops.box_giou, "diou": ops.box_diou, "ciou": ops.box_ciou}
# Identical, touching, inside, apart, a point, lines, inverted.
ODD = np.array(
    [
        *([0, 0, 4, 2], [0, 0, 4, 2], [4, 0, 8, 2], [1, 1, 2, 2], [20, 20, 30, 25], [3, 1, 3, 1], [1, 0, 1, 2]),
        *([0, 1, 4, 1], [4, 0, 0, 2], [4, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
    np.float32,
)


def overlap(kind, a, b):
    """The definition, in double precision."""
    iou = float(loops.iou(a, b))
    union = float(loops.area(a)) + float(loops.area(b))
    union = union / (1 + iou)
    wide, high = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    outer = float(wide * high) if wide >= 0 and high >= 0 else 0.0
    if kind == "giou":
        return iou - ((outer - union) / outer if outer > 0 else 0)
    center = lambda box: (float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2)
    distance, diagonal = math.dist(center(a), center(b)) ** 2, float(wide) ** 2 + float(high) ** 2
    found = iou - (distance / diagonal if diagonal > 0 else 0)
    if kind == "ciou":
        slope = lambda box: math.atan2(box[2] - box[0], box[3] - box[1])
        v = 4 / math.pi**2 * (slope(a) - slope(b)) ** 2
        found -= v * v / (1 - iou + v) if 1 - iou + v > 0 else 0
    return found


@pytest.mark.parametrize("kind", operators.KINDS)
def test_overlaps(kind):
    rng = np.random.default_rng(0)
    a, b = (np.concatenate([operators.boxes(rng, 18), ODD]) for _ in range(2))
    found = np.asarray(jax.jit(PAIRWISE[kind])(a, b))
    if kind == "iou":
        expected = np.array([[loops.iou(x, y) for y in b] for x in a])
        np.testing.assert_array_equal(found, expected)  # compiled code rounds as NumPy does
        assert np.array_equal(ops.box_area(a), [loops.area(x) for x in a])
    else:
        expected = np.array([[overlap(kind, x, y) for y in b] for x in a])
        np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(ops.paired_iou(a, b, kind), np.diagonal(found), atol=1e-6)
    batched = jax.vmap(PAIRWISE[kind])(np.stack([a, b]), np.stack([b, a]))
    np.testing.assert_allclose(batched, np.stack([found, PAIRWISE[kind](b, a)]), atol=1e-6)
    np.testing.assert_array_equal(PAIRWISE[kind](np.stack([a, b]), np.stack([b, a])), batched)


@pytest.mark.parametrize("kind", operators.KINDS)
def test_gradients_are_finite(kind):
    a, b = (x.reshape(-1, 4) for x in np.broadcast_arrays(ODD[:, None], ODD[None]))
    loss = lambda a, b: jnp.sum(1 - ops.paired_iou(a, b, kind))
    for gradient in jax.jit(jax.grad(loss, (0, 1)))(a, b):
        assert np.isfinite(gradient).all()
    for tangent in jax.jit(lambda a, b: jax.jvp(jax.grad(loss), (a, b), (b, a)))(a, b):
        assert np.isfinite(tangent).all()


@pytest.mark.parametrize("kind", operators.KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        corner = rng.uniform(0, 5, (20, 2))
        a = np.concatenate([corner, corner + rng.uniform(1, 6, (20, 2))], axis=1)
        b, step = a[::-1] + 0.3, 1e-6
        f = lambda x: np.asarray(ops.paired_iou(x, b, kind))
        found = np.asarray(jax.grad(lambda x: jnp.sum(ops.paired_iou(x, b, kind)))(jnp.asarray(a)))
        if kind == "ciou":  # alpha has no gradient: take the part that has one
            width, height = (lambda x: x[:, 2] - x[:, 0]), (lambda x: x[:, 3] - x[:, 1])
            slope = lambda x: np.arctan(width(x) / height(x))
            v = lambda x: 4 / np.pi**2 * (slope(x) - slope(b)) ** 2
            alpha = v(a) / (1 - np.asarray(ops.paired_iou(a, b)) + v(a))
            f = lambda x: np.asarray(ops.paired_iou(x, b, "diou")) - alpha * v(x)
        for i in range(4):
            move = step * np.eye(4)[i][None]
            np.testing.assert_allclose(found[:, i], (f(a + move) - f(a - move)) / (2 * step), atol=1e-7)


def test_coding_is_inverted():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 100, (2, 50, 2))
    boxes, anchors = np.concatenate([corner, corner + rng.uniform(1, 80, (2, 50, 2))], axis=-1).astype(np.float32)
    for weights in ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)):
        deltas = ops.encode_boxes(boxes, anchors, weights)
        np.testing.assert_allclose(ops.decode_boxes(deltas, anchors, weights), boxes, atol=1e-4)
    (delta,) = ops.encode_boxes([[10, 10, 30, 50]], [[0, 0, 10, 20]], (1, 2, 3, 4))
    np.testing.assert_allclose(delta, [1.5, 2.0, 3 * math.log(2), 4 * math.log(2)], rtol=1e-6)
    (box,) = ops.decode_boxes([[0.0, 0.0, 99.0, -99.0]], [[0.0, 0.0, 16.0, 10.0]])
    np.testing.assert_allclose(box, [-492, 5, 508, 5], rtol=1e-6)
    per_class = ops.decode_boxes(np.zeros((50, 3, 4), np.float32), anchors[:, None])
    np.testing.assert_allclose(per_class, np.broadcast_to(anchors[:, None], (50, 3, 4)), rtol=1e-6, atol=1e-5)


def test_coding_of_boxes_without_an_area_is_finite():
    a, b = (x.reshape(-1, 4) for x in np.broadcast_arrays(ODD[:, None], ODD[None]))
    assert np.isfinite(ops.encode_boxes(a, b)).all()
    assert np.isfinite(ops.decode_boxes(a, b)).all()
    for function in (ops.encode_boxes, ops.decode_boxes):
        gradients = jax.grad(lambda a, b, function=function: jnp.sum(function(a, b)), (0, 1))(a, b)
        assert all(np.isfinite(g).all() for g in gradients)


def test_conversions_and_clipping():
    boxes = np.array([[[-5, -6, 50, 60], [1, 2, 3, 4]], [[10, 90, 99, 20], [0, 0, 7, 7]]], np.float32)
    assert np.array_equal(ops.to_centers(boxes)[0, 1], [2, 3, 2, 2])
    assert np.array_equal(ops.from_centers(ops.to_centers(boxes)), boxes)
    assert ops.clip_boxes(boxes, (30, 40))[0, 0].tolist() == [0, 0, 40, 30]
    each = ops.clip_boxes(boxes, np.array([[30, 40], [5, 6]]))
    assert each.tolist() == [[[0, 0, 40, 30], [1, 2, 3, 4]], [[6, 5, 6, 5], [0, 0, 6, 5]]]
    assert ops.box_area(np.array([0, 0, 3, 2])) == 6


def test_errors():
    with pytest.raises(ValueError, match=r"boxes must be \[..., 4\]; got \(3, 5\)"):
        ops.box_area(np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"kind must be one of iou, giou, diou, ciou; got 'eiou'"):
        ops.paired_iou(ODD, ODD, "eiou")
    with pytest.raises(ValueError, match=r"size must be \[2\] or have one row .* \(12, 4\); got \(3, 2\)"):
        ops.clip_boxes(ODD, np.zeros((3, 2)))
