from functools import partial

import jax
import numpy as np
import pytest

from flaxvision import ops
from tests.ops import loops


@pytest.mark.parametrize(("low", "high", "allow"), [(0.3, 0.7, True), (0.5, 0.5, False), (0.4, 0.5, True)])
def test_match_is_a_loop(low, high, allow):
    rng = np.random.default_rng(0)
    overlaps = np.stack([np.round(rng.random((5, 30)) ** 2, i % 3 + 1) for i in range(60)]).astype(np.float32)
    overlaps[:, 2] *= rng.random((60, 1)) < 0.5  # an object that overlaps nothing
    valid = rng.random((60, 5)) < 0.7
    valid[0] = False
    run = partial(ops.match, low=low, high=high, allow_low_quality=allow)
    matched, label = jax.jit(jax.vmap(run))(overlaps, valid)
    assert (matched.dtype, label.dtype) == (np.int32, np.int8)
    for i in range(60):
        expected = loops.match(overlaps[i], valid[i], low, high, allow)
        assert (matched[i].tolist(), label[i].tolist()) == expected


def test_without_objects_all_boxes_are_negative():
    for overlaps in (np.ones((2, 3)), np.ones((0, 3))):
        matched, label = ops.match(overlaps, np.zeros(len(overlaps)), low=0, high=0.5, allow_low_quality=True)
        assert (matched.tolist(), label.tolist()) == ([0, 0, 0], [0, 0, 0])


@pytest.mark.parametrize(("size", "fraction"), [(16, 0.5), (20, 0.25), (64, 0.33), (5, 0.0), (5, 1.0)])
def test_sample(size, fraction):
    rng = np.random.default_rng(0)
    labels = np.stack([rng.choice([1, 0, -1], 40, p=rng.dirichlet([0.3, 1, 1])) for _ in range(40)]).astype(np.int8)
    labels[0], labels[1], labels[2] = 1, 0, -1
    keys = jax.random.split(jax.random.key(0), 40)
    run = partial(ops.sample, size=size, positive_fraction=fraction)
    indices, kept = jax.jit(jax.vmap(run))(keys, labels)
    for label, index, real in zip(labels, np.asarray(indices), np.asarray(kept), strict=True):
        positives = min((label == 1).sum(), int(size * fraction))
        negatives = min((label == 0).sum(), size - positives)
        assert label[index[real]].tolist() == [1] * positives + [0] * negatives
        assert len(set(index[real])) == positives + negatives == real.sum()
        assert not index[~real].any()


def test_samples_are_uniform():
    label = np.array([1] * 6 + [0] * 10 + [-1] * 2, np.int8)
    run = jax.vmap(partial(ops.sample, label=label, size=6, positive_fraction=0.5))
    indices, kept = run(jax.random.split(jax.random.key(1), 4000))
    assert kept.all()
    counts = np.bincount(np.asarray(indices).reshape(-1), minlength=18) / 4000
    np.testing.assert_allclose(counts, [3 / 6] * 6 + [3 / 10] * 10 + [0, 0], atol=0.04)


def test_a_sample_by_ids_depends_neither_on_the_order_nor_on_other_boxes():
    rng = np.random.default_rng(0)
    label, ids = rng.choice([1, 0, -1], 60).astype(np.int8), rng.permutation(1000)[:60]
    run = jax.jit(partial(ops.sample, size=16, positive_fraction=0.25))

    def drawn(label, ids, seed=0):
        indices, kept = run(jax.random.key(seed), label, ids=ids)
        return ids[np.asarray(indices)[np.asarray(kept)]].tolist()

    first = drawn(label, ids)
    order = rng.permutation(60)
    assert drawn(label[order], ids[order]) == first
    assert drawn(label, ids, seed=1) != first
    other = label.copy()
    other[ids == first[-1]] = -1  # the last negative
    assert drawn(other, ids)[:-1] == first[:-1]
    with pytest.raises(ValueError, match=r"ids must have the shape of label, \(60,\); got \(59,\)"):
        ops.sample(jax.random.key(0), label, size=4, positive_fraction=0.5, ids=ids[1:])


def test_level_anchors():
    anchors = ops.level_anchors(2, 3, (8, 16), (32, 64), (0.5, 1.0))
    assert anchors.shape == (2 * 3 * 4, 4)
    # 32 / sqrt(0.5) = 45.25 wide and 22.63 high: half of them, rounded.
    assert anchors[0].tolist() == [-23, -11, 23, 11]
    assert anchors[:4, 2].tolist() == [23, 45, 16, 32]  # by aspect ratio, then by size
    assert anchors[4].tolist() == [-23 + 16, -11, 23 + 16, 11]  # the next column
    assert anchors[12].tolist() == [-23, -11 + 8, 23, 11 + 8]  # the next row
    np.testing.assert_array_equal(
        ops.level_anchors(2, 3, np.int64(8), (32,), (1.0,)), ops.level_anchors(2, 3, (8, 8), (32,), (1.0,))
    )
    assert ops.level_anchors(1, 1, 1, [5], [1.0]).tolist() == [[-2, -2, 2, 2]]  # 2.5: halves to even numbers


def test_kmeans_anchors():
    rng = np.random.default_rng(0)
    centers = np.array([[10, 12], [40, 20], [30, 90]])
    boxes = np.concatenate([center * rng.uniform(0.9, 1.1, (50, 2)) for center in centers])
    found = ops.kmeans_anchors(boxes, 3, 0)
    np.testing.assert_allclose(found, [boxes[i : i + 50].mean(0) for i in (0, 50, 100)])
    assert np.array_equal(ops.kmeans_anchors(boxes, 3, 0), found)
    assert np.array_equal(ops.kmeans_anchors(boxes[:2], 2), boxes[:2][np.argsort(boxes[:2].prod(1))])


def test_errors():
    with pytest.raises(ValueError, match=r"iou must be \[M, A\] and valid \[M\]; got \(2, 3\) and \(3,\)"):
        ops.match(np.zeros((2, 3)), np.zeros(3), low=0.3, high=0.5)
    with pytest.raises(ValueError, match=r"low must be in \[0, high = 0.5\]; got 0.7"):
        ops.match(np.zeros((2, 3)), np.zeros(2), low=0.7, high=0.5)
    key, label = jax.random.key(0), np.zeros(4)
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        ops.sample(key, label, size=0, positive_fraction=0.5)
    with pytest.raises(ValueError, match=r"positive_fraction must be in \[0, 1\]; got 2"):
        ops.sample(key, label, size=1, positive_fraction=2)
    with pytest.raises(ValueError, match=r"label must be \[A\]; got \(1, 4\)"):
        ops.sample(key, label[None], size=1, positive_fraction=1)
    with pytest.raises(ValueError, match=r"sizes must be one or more positive numbers; got \(\)"):
        ops.level_anchors(1, 1, 1, (), (1.0,))
    with pytest.raises(ValueError, match=r"widths_heights must be positive numbers \[M, 2\]; got an array \(2, 2\)"):
        ops.kmeans_anchors([[1, 0], [1, 1]], 1)
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\], the number of boxes; got 3"):
        ops.kmeans_anchors([[1, 1], [1, 1]], 3)
