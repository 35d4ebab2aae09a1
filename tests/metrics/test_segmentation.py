"""Metrics of segmentation against scikit-learn, over batches and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

import flaxvision as fv
from flaxvision import metrics as fm

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, (6, 5, 7)).astype(np.int32)
LABELS[LABELS == 3] = 1  # class 3 is only predicted, and class 4 is not seen
LABELS[0, :3] = 255
FOUND = np.where(RNG.random(LABELS.shape) < 0.6, np.minimum(LABELS, 3), RNG.integers(0, 4, LABELS.shape)).astype(
    np.int32
)


def records(order=range(6), **options):
    order = list(order)
    return fm.SegmentationMetrics.of(
        jnp.asarray(FOUND[order]), jnp.asarray(LABELS[order]), 5, index=jnp.asarray(order), **options
    ).to_host()


def test_figures_equal_scikit_learn():
    known = LABELS != 255
    truth, found = LABELS[known], FOUND[known]
    got = records().compute()
    seen = [0, 1, 2, 3]
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(truth, found), abs=1e-12)
    assert got["mean_accuracy"] == pytest.approx(
        sk.recall_score(truth, found, labels=[0, 1, 2], average="macro"), abs=1e-12
    )
    iou = sk.jaccard_score(truth, found, labels=seen, average=None)
    assert got["mean_iou"] == pytest.approx(iou.mean(), abs=1e-12)
    assert got["dice"] == pytest.approx(sk.f1_score(truth, found, labels=seen, average="macro"), abs=1e-12)
    weighted = sk.jaccard_score(truth, found, average="weighted")
    assert got["frequency_weighted_iou"] == pytest.approx(weighted, abs=1e-12)
    table = records().per_class(("a", "b", "c", "d", "e"))
    assert [row["name"] for row in table] == ["a", "b", "c", "d", "e"]
    np.testing.assert_allclose([row["iou"] for row in table], [*iou, np.nan], atol=1e-12)
    np.testing.assert_array_equal([row["pixels"] for row in table], np.bincount(truth, minlength=5))
    assert np.isnan(table[3]["accuracy"])
    assert np.isnan(table[4]["dice"])


def test_each_image_by_itself_and_batches_together():
    whole = records()
    parts = records([4, 5]).merge(records([0, 2])).merge(records([3, 1]))
    assert parts.compute() == whole.compute()
    assert parts.bootstrap(resamples=20) == whole.bootstrap(resamples=20)
    one = records([2])
    assert whole.per_image("accuracy")[2] == one.compute()["accuracy"] == (FOUND[2] == LABELS[2]).mean()
    low, high = whole.bootstrap("accuracy", resamples=300)
    assert low < whole.compute()["accuracy"] < high


def test_padding_and_devices():
    """Under pmap on 8 devices with padded rows, and merged on the device, the figures are those of the real rows."""
    found, labels = (np.concatenate([x, np.zeros_like(x[:2])]) for x in (FOUND, LABELS))
    mask, index = np.array([1] * 6 + [0] * 2), np.array([*range(6), -1, -1])
    shard = lambda x: jnp.asarray(x).reshape(8, 1, *x.shape[1:])

    def count(found, labels, mask, index):
        return fm.SegmentationMetrics.of(found, labels, 5, mask, index).all_reduce("data")

    spread = jax.pmap(count, axis_name="data", out_axes=None)(*map(shard, (found, labels, mask, index)))
    assert spread.compute() == records().compute()
    halves = [
        fm.SegmentationMetrics.of(jnp.asarray(FOUND[i]), jnp.asarray(LABELS[i]), 5) for i in (slice(3), slice(3, 6))
    ]
    assert halves[0].merge(halves[1]).compute() == records().compute()


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"must have one shape \[N, H, W\]; got \(6, 5\) and \(6, 5, 7\)"):
        fm.SegmentationMetrics.of(jnp.asarray(FOUND[..., 0]), jnp.asarray(LABELS), 5)
    with pytest.raises(ValueError, match=r"figure must be one of accuracy, mean_accuracy, .*; got 'iou'"):
        records().bootstrap("iou")


def test_an_evaluation_counts_every_pixel_once():
    """Through eval batches of any size, with the padding of the last one."""
    source = fv.data.ArraySource(RNG.random((7, 4, 5, 1)).astype(np.float32), RNG.integers(0, 3, (7, 4, 5)), "abc")
    objective = fv.train.segmentation()

    def apply_fn(variables, x, *, train):
        return jnp.concatenate([x, 1 - x, 0.6 + 0 * x], axis=-1)

    totals = None
    for batch in fv.data.eval_batches(source, 3):
        _, (metrics, _) = objective(apply_fn, {}, {}, batch, None, False)
        totals = fm.merge(totals, fm.to_host(metrics))
    assert totals["segmentation"].matrix.counts.sum() == 7 * 20
    want = np.argmax(apply_fn({}, jnp.asarray(source.image), train=False), -1) == source.label
    assert totals["segmentation"].compute()["accuracy"] == pytest.approx(want.mean())
