from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from parity import operators
from tests.ops import loops

N, A, K = 6, 60, 5


def candidates(seed, per_class, extent=60.0):
    """Many overlaps, equal scores, padding, and an image without anything."""
    rng = np.random.default_rng(seed)
    shape = (N, A, K, 4) if per_class else (N, A, 4)
    boxes = operators.boxes(rng, int(np.prod(shape[:-1])), extent=extent).reshape(shape)
    scores = (rng.integers(0, 30, (N, A, K)) / 30).astype(np.float32)
    scores[1], valid = 0.01, rng.random((N, A)) < 0.9
    valid[2] = False
    return fv.Candidates(boxes, scores, valid)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("count", [4, 300])
def test_it_is_the_post_processing_of_torchvision(per_class, count):
    given = candidates(0, per_class)
    # 0.1 is a score that occurs, and must not be selected: scores are above the threshold.
    run = jax.jit(partial(fv.select_detections, score_threshold=0.1, iou_threshold=0.6, max_detections=count))
    found = run(given)
    assert (found.boxes.shape, found.labels.dtype, found.valid.dtype) == ((N, count, 4), np.int32, np.bool_)
    for i, (boxes, scores, valid) in enumerate(zip(*given, strict=True)):
        boxes = boxes if per_class else np.broadcast_to(boxes[:, None], (A, K, 4))
        expected = loops.select(boxes, scores, valid, 0.1, 0.6, count)
        real = len(expected[1])
        assert real == (0 if i in (1, 2) else count if count == 4 else real)
        assert found.valid[i].tolist() == [True] * real + [False] * (count - real)
        for mine, theirs in zip((found.boxes, found.scores, found.labels), expected, strict=True):
            np.testing.assert_array_equal(mine[i][:real], theirs)
            assert not mine[i][real:].any()


@pytest.mark.parametrize("per_class", [False, True])
def test_class_agnostic(per_class):
    given = candidates(1, per_class)
    found = fv.select_detections(given, class_agnostic=True, iou_threshold=0.5, max_detections=A)
    for i, (boxes, scores, valid) in enumerate(zip(*given, strict=True)):
        if per_class:
            flat, values, exists = boxes.reshape(-1, 1, 4), scores.reshape(-1, 1), np.repeat(valid, K)
            names = np.tile(np.arange(K), A)
        else:
            flat, values, exists, names = boxes[:, None], scores.max(1, keepdims=True), valid, scores.argmax(1)
        order = {(*b, float(s)): n for b, s, n in zip(flat[::-1, 0], values[::-1, 0], names[::-1], strict=True)}
        expected, s, _ = loops.select(flat, values, exists, 0.05, 0.5, A)
        np.testing.assert_array_equal(found.boxes[i][found.valid[i]], expected)
        np.testing.assert_array_equal(found.scores[i][found.valid[i]], s)
        labels = [order[(*b, float(v))] for b, v in zip(expected, s, strict=True)]
        different = np.asarray(found.labels[i][found.valid[i]]) != labels
        assert different.mean() < 0.2 if labels else True  # identical candidates may stand for each other


def test_soft_nms_lowers_the_scores_of_each_class():
    given = candidates(2, per_class=False)
    found = fv.select_detections(given, soft_sigma=0.5, score_threshold=0.2, max_detections=60)
    for i, (boxes, scores, valid) in enumerate(zip(*given, strict=True)):
        large = valid & (np.min(boxes[:, 2:] - boxes[:, :2], axis=1) >= 0.01)
        options = {"method": "gaussian", "iou_threshold": 0, "sigma": 0.5, "labels": None, "count": 999}
        expected = []
        for k in range(K):
            each = loops.soft_nms(boxes, scores[:, k], large & (scores[:, k] > 0.2), score_threshold=0.2, **options)
            expected += [score for _, score in each]
        expected = sorted(expected, reverse=True)[:60]
        np.testing.assert_allclose(found.scores[i][found.valid[i]], expected, rtol=1e-5)


@pytest.mark.parametrize(("count", "classes"), [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("options", [{}, {"class_agnostic": True}, {"soft_sigma": 0.5}], ids=str)
def test_without_candidates_the_result_is_empty(count, classes, per_class, options):
    shape = (2, count, classes, 4) if per_class else (2, count, 4)
    given = fv.Candidates(jnp.zeros(shape), jnp.zeros((2, count, classes)), jnp.ones((2, count), bool))
    found = jax.jit(partial(fv.select_detections, max_detections=5, **options))(given)
    assert [(x.shape, x.dtype) for x in (found.boxes, found.scores, found.labels, found.valid)] == [
        ((2, 5, 4), np.float32),
        ((2, 5), np.float32),
        ((2, 5), np.int32),
        ((2, 5), np.bool_),
    ]
    assert not any(x.any() for x in jax.tree.leaves(found))


def test_detect_applies_the_model():
    class Model:
        def apply(self, variables, images, sizes):
            return {"boxes": variables["boxes"] + images.sum(), "sizes": sizes}

        def candidates(self, outputs, sizes):
            assert outputs["sizes"] is sizes
            boxes = fv.ops.clip_boxes(outputs["boxes"], sizes)
            return fv.Candidates(boxes, jnp.full((1, 3, 2), 0.5), jnp.ones((1, 3), bool))

    variables = {"boxes": jnp.asarray([[[0.0, 0, 9, 9], [0, 0, 9, 9], [50, 50, 60, 60]]])}
    run = jax.jit(partial(fv.detect, Model(), max_detections=3))
    found = run(variables, jnp.zeros((1, 4, 4, 3)), jnp.asarray([[5, 6]]))
    # The third box is empty within the image.
    assert found.valid.tolist() == [[True, True, False]]
    assert found.labels.tolist() == [[0, 1, 0]]
    assert found.boxes[0, 0].tolist() == [0, 0, 6, 5]
    assert found.masks is None


def test_detect_asks_for_the_masks_of_what_it_selects():
    class Model:
        def apply(self, variables, *given, method="__call__"):
            return getattr(self, method)(*given)

        def __call__(self, images, sizes):
            return {"level": images}

        def candidates(self, outputs, sizes):
            boxes = jnp.asarray([[[0.0, 0, 9, 9], [20, 20, 29, 29], [1, 0, 9, 9]]])
            return fv.Candidates(boxes, jnp.asarray([[[0.1, 0.7], [0.9, 0], [0, 0.6]]]), jnp.ones((1, 3), bool))

        def masks(self, outputs, boxes, labels):
            assert outputs["level"].shape == (1, 40, 40, 3)
            return jnp.ones((1, 4, 2, 2)) * (10 * labels + boxes[..., 0] + 1)[..., None, None]

    found = fv.detect(Model(), {}, jnp.zeros((1, 40, 40, 3)), score_threshold=0.2, max_detections=4)
    assert found.valid.tolist() == [[True, True, False, False]]
    assert found.masks[0, :, 0, 1].tolist() == [21, 11, 0, 0]


def test_errors():
    given = candidates(0, per_class=False)
    with pytest.raises(ValueError, match=r"boxes must be \[N, A, 4\] or \[N, A, K, 4\] with scores .*; got \(6, 60\)"):
        fv.select_detections(given._replace(boxes=given.boxes[..., 0]))
    with pytest.raises(ValueError, match=r"scores must be \[N, A, K\] and valid \[N, A\]; got"):
        fv.select_detections(given._replace(scores=given.scores[..., 0]))
    with pytest.raises(ValueError, match="max_detections must be at least 1; got 0"):
        fv.select_detections(given, max_detections=0)
    with pytest.raises(ValueError, match="soft_sigma must be positive; got 0"):
        fv.select_detections(given, soft_sigma=0)


@pytest.mark.parametrize("per_class", [False, True])
def test_scores_and_boxes_have_gradients(per_class):
    """Such as those with respect to the pixels: each goes to the candidate that was selected."""
    boxes, scores, valid = (jnp.asarray(x) for x in candidates(0, per_class))

    def total(boxes, scores):
        found = fv.select_detections(fv.Candidates(boxes, scores, valid), max_detections=7)
        return found.scores.sum() + found.boxes.sum(), found

    (to_boxes, to_scores), found = jax.grad(total, argnums=(0, 1), has_aux=True)(boxes, scores)
    assert sorted(np.unique(to_scores)) == [0, 1]
    for i in range(N):
        chosen = np.asarray(scores[i])[np.asarray(to_scores[i]) > 0]
        np.testing.assert_array_equal(np.sort(chosen), np.sort(found.scores[i][found.valid[i]]))
    assert float(to_boxes.sum()) == 4 * float(found.valid.sum())
