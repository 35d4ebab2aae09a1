"""Accumulators against sklearn and numpy: merging, weights of their own, exactness, devices, JSON."""

import dataclasses
import json
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from sklearn import metrics as sk

import flaxvision as fv
from flaxvision import metrics as fm
from flaxvision.train import create_state, eval_step, jit_step, make_mesh, pmap_step, train_step

RNG = np.random.default_rng(0)


def test_correct_and_top_k():
    logits = np.array([[1, 1, 0], [0, 2, 2], [np.nan, 1, 0]], np.float32)
    labels = np.array([1, 2, 0])
    # Ties go to the lower index; a NaN row is wrong.
    np.testing.assert_array_equal(fm.correct(logits, labels), [0, 0, 0])
    np.testing.assert_array_equal(fm.correct(logits, np.array([0, 1, 1])), [1, 1, 0])
    np.testing.assert_array_equal(fm.top_k_correct(logits, labels, 2), [1, 1, 0])
    for label in (3, 255, -1, -3):  # not in [0, K): wrong
        np.testing.assert_array_equal(fm.top_k_correct(logits, np.full(3, label), 3), [0, 0, 0])


def test_mean():
    values, weights = RNG.random(50).astype(np.float32), RNG.random(50).astype(np.float32)
    values[:5], weights[:5] = np.nan, 0  # padding
    mean = fm.Mean.init().update(values[:20], weights[:20]).update(values[20:], weights[20:])
    assert mean.compute() == pytest.approx(np.average(values[5:], weights=weights[5:]), rel=1e-6)
    assert fm.Mean.of(jnp.arange(4.0)).compute() == 1.5
    assert np.isnan(fm.Mean.init().compute())
    assert np.isnan(fm.Mean.of(values, weights * 0).compute())
    with pytest.raises(dataclasses.FrozenInstanceError):
        mean.total = 0


def test_confusion_matrix_equals_sklearn():
    guesses, labels = RNG.integers(0, 4, (2, 60))
    mask = RNG.integers(0, 2, 60)
    update = jax.jit(fm.ConfusionMatrix.update)
    matrix = fm.ConfusionMatrix.init(5)  # class 4 never occurs
    for rows in (slice(0, 25), slice(25, 60)):
        matrix = matrix.merge(update(fm.ConfusionMatrix.init(5), guesses[rows], labels[rows], mask[rows]))
    real = mask > 0
    want = sk.confusion_matrix(labels[real], guesses[real], labels=range(5))
    np.testing.assert_array_equal(matrix.counts, want)
    assert matrix.accuracy == sk.accuracy_score(labels[real], guesses[real])
    jaccard = sk.jaccard_score(labels[real], guesses[real], labels=range(4), average=None)
    np.testing.assert_allclose(matrix.iou, [*jaccard, np.nan])
    assert matrix.mean_iou == pytest.approx(jaccard.mean())
    assert matrix.mean_accuracy == pytest.approx(sk.balanced_accuracy_score(labels[real], guesses[real]))
    frequency = np.bincount(labels[real], minlength=4)
    assert matrix.frequency_weighted_iou == pytest.approx((jaccard * frequency).sum() / frequency.sum())
    assert fm.compute({"test": matrix}) == {"test_accuracy": matrix.accuracy, "test_mean_iou": matrix.mean_iou}


def test_confusion_matrix_of_pixels_ignores_255():
    labels = RNG.integers(0, 3, (4, 5, 6))
    labels[RNG.random(labels.shape) < 0.3] = 255
    guesses = RNG.integers(0, 3, labels.shape)
    mask = np.array([1, 1, 0, 1], np.float32)  # one image of padding
    matrix = fm.ConfusionMatrix.init(3).update(jnp.asarray(guesses), jnp.asarray(labels), mask)
    known = (labels != 255) & (mask > 0)[:, None, None]
    np.testing.assert_array_equal(matrix.counts, sk.confusion_matrix(labels[known], guesses[known]))
    empty = fm.ConfusionMatrix.init(3).update(jnp.asarray(guesses), jnp.full(labels.shape, 255))
    assert not np.asarray(empty.counts).any()
    assert all(np.isnan([empty.accuracy, empty.mean_iou, empty.mean_accuracy, empty.frequency_weighted_iou]))
    with pytest.raises(ValueError, match=r"predictions must have the labels' shape \(4, 5, 6\); got \(4, 5\)"):
        matrix.update(guesses[..., 0], labels)
    with pytest.raises(ValueError, match=r"mask must have the leading dimensions .*; got \(5,\)"):
        matrix.update(guesses, labels, np.ones(5))
    with pytest.raises(ValueError, match="num_classes must be at least 1; got 0"):
        fm.ConfusionMatrix.init(0)


def test_nothing_is_lost_beyond_24_bits():
    """Float32 counts stop at 2^24: one more example would not be seen."""
    many = 2**24
    matrix = fm.ConfusionMatrix(jnp.full((1, 1), many, jnp.int32)).update(jnp.zeros(3, int), jnp.zeros(3, int))
    assert int(matrix.counts[0, 0]) == many + 3
    total = None
    for _ in range(3):
        batch = {"matrix": fm.ConfusionMatrix(jnp.full((1, 1), 2**30, jnp.int32)), "mean": fm.Mean.of(jnp.ones(1))}
        total = fm.merge(total, fm.to_host(batch))
    assert total["matrix"].counts[0, 0] == 3 * 2**30
    total = fm.to_host({"mean": fm.Mean(jnp.float32(many), jnp.float32(many))})
    for _ in range(5):
        total = fm.merge(total, fm.to_host({"mean": fm.Mean.of(jnp.zeros(1))}))
    assert total["mean"].weight == many + 5
    assert total["mean"].compute() == many / (many + 5)


def test_dicts_of_metrics():
    a, b = ({"loss": fm.Mean.of(jnp.asarray(x))} for x in ([1.0, 2.0], [6.0]))
    assert fm.compute(fm.merge(fm.merge(None, a), b)) == {"loss": 3.0}
    with pytest.raises(ValueError, match=r"same names to be merged; got \['loss'\] and \['error'\]"):
        fm.merge(a, {"error": b["loss"]})
    clash = {"x": fm.ConfusionMatrix.init(2), "x_accuracy": fm.Mean.of(jnp.ones(1))}
    with pytest.raises(ValueError, match=r"different names; got \['x_accuracy'\] twice"):
        fm.compute(clash)
    with pytest.raises(NotImplementedError, match=r"Accumulator must define compute\(\)"):
        fm.Accumulator().compute()


def test_json_keeps_every_bit():
    metrics = {
        "loss": fm.Mean.of(jnp.asarray(RNG.random(7), jnp.float32), jnp.asarray(RNG.random(7), jnp.float32)),
        "confusion": fm.ConfusionMatrix.init(3).update(jnp.arange(3), jnp.arange(3)),
    }
    stored = json.loads(json.dumps(fm.to_json(metrics)))
    back = fm.from_json(stored, metrics)
    chex.assert_trees_all_equal(back, jax.device_get(metrics))
    chex.assert_trees_all_equal_dtypes(back, jax.device_get(metrics))
    assert fm.to_json(None) == {}
    with pytest.raises(ValueError, match=r"stored metrics must be \['confusion', 'loss'\]; got \['loss'\]"):
        fm.from_json({"loss": stored["loss"]}, metrics)
    with pytest.raises(ValueError, match=r"'confusion' must have a field 'counts' of shape \(2, 2\); got \(3, 3\)"):
        fm.from_json(stored, metrics | {"confusion": fm.ConfusionMatrix.init(2)})
    old = {"loss": 2.5, "accuracy": 3.0, "weight": 4.0}
    back = fm.from_json(old, {"loss": fm.Mean.init(), "accuracy": fm.Mean.init()})
    assert fm.compute(back) == {"loss": 0.625, "accuracy": 0.75}


class Segmenter(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Conv(3, (1, 1), name="head")(x)


@struct.dataclass
class BestScores(fm.Accumulator):
    """A toy detection metric: the median of all scores above 0, which needs lists of different lengths on the host."""

    scores: Any  # [N, M]
    valid: Any  # [N, M]

    def merge(self, other):
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self, other)

    def all_reduce(self, axis_name):
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), self)

    def to_host(self):
        scores, valid = np.asarray(self.scores), np.asarray(self.valid)
        return ScoreList([s[v].tolist() for s, v in zip(scores, valid, strict=True)])


@dataclasses.dataclass
class ScoreList:
    images: list[list[float]]

    def merge(self, other):
        return ScoreList(self.images + other.images)

    def compute(self):
        scores = [s for image in self.images for s in image]
        return {"median": float(np.median(scores)), "count": len(scores)}


def segmentation(apply_fn, params, collections, batch, rng, train):
    """An objective in which each metric has its own weight: images, pixels, and detections."""
    logits = apply_fn({"params": params, **collections}, batch["image"], train=train)
    mask, known = batch["mask"], (batch["label"] != 255) & (batch["mask"] > 0)[:, None, None]
    pixels = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, batch["label"], 0))
    each = jnp.sum(jnp.where(known, pixels, 0), (1, 2)) / jnp.maximum(jnp.sum(known, (1, 2)), 1)
    metrics = {
        "loss": fm.Mean.of(each, mask),
        "pixel_loss": fm.Mean.of(pixels, known),
        "seg": fm.ConfusionMatrix.init(3).update(logits.argmax(-1), batch["label"], mask),
    }
    if not train:
        scores = logits[:, 0, :, 0]
        metrics["scores"] = BestScores(scores, (scores > 0) & (mask > 0)[:, None])
    return metrics["loss"].total / jnp.maximum(metrics["loss"].weight, 1), (metrics, collections)


IMAGES = RNG.normal(size=(21, 4, 5, 2)).astype(np.float32)
LABELS = np.where(RNG.random((21, 4, 5)) < 0.3, 255, RNG.integers(0, 3, (21, 4, 5))).astype(np.int32)


def batches(size):
    for start in range(0, len(IMAGES), size):
        rows = np.arange(start, start + size)
        real = rows < len(IMAGES)
        rows = np.where(real, rows, 0)
        yield {"image": IMAGES[rows], "label": LABELS[rows], "mask": real.astype(np.float32)}


def start():
    return create_state(Segmenter(), optax.sgd(0.1), jax.random.key(0), jnp.zeros((1, 4, 5, 2)))


@pytest.mark.parametrize(("devices", "size", "pmap"), [(1, 5, False), (2, 8, False), (8, 16, False), (8, 8, True)])
def test_an_evaluation_of_any_metric_is_exact_for_any_batch_size_and_device_count(devices, size, pmap):
    state, many = start(), jax.devices()[:devices]
    body = partial(eval_step, objective=segmentation)
    step = pmap_step(body, many) if pmap else jit_step(body, make_mesh(many))
    got = fv.train.evaluate(state, step, batches(size))
    logits = np.asarray(Segmenter().apply(state.variables, IMAGES))
    known = LABELS != 255
    guess = logits.argmax(-1)
    pixels = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(LABELS % 255)))
    jaccard = sk.jaccard_score(LABELS[known], guess[known], average=None)
    scores = logits[:, 0, :, 0]
    assert got.pop("scores_count") == (scores > 0).sum()
    assert got.pop("scores_median") == pytest.approx(np.median(scores[scores > 0]), rel=1e-5)
    assert got.pop("seg_accuracy") == (guess == LABELS)[known].mean()
    assert got.pop("seg_mean_iou") == pytest.approx(jaccard.mean(), rel=1e-12)
    assert got.pop("pixel_loss") == pytest.approx(pixels[known].mean(), rel=1e-5)
    each = np.where(known, pixels, 0).sum((1, 2)) / known.sum((1, 2))
    assert got.pop("loss") == pytest.approx(each.mean(), rel=1e-5)
    assert got == {}


@pytest.mark.parametrize("compiled", [jit_step, pmap_step])
def test_training_merges_metrics_of_parts_and_devices(compiled):
    batch = next(batches(16))
    step = partial(train_step, objective=segmentation)
    _, whole = jit_step(step, make_mesh(jax.devices()[:1]))(start(), batch, jax.random.key(1))
    _, parts = compiled(partial(step, accumulate=2))(start(), batch, jax.random.key(1))
    chex.assert_trees_all_close(jax.device_get(parts), jax.device_get(whole), rtol=1e-5)
    assert int(parts["seg"].counts.sum()) == float(parts["pixel_loss"].weight) == (batch["label"] != 255).sum()
    assert float(parts["loss"].weight) == 16


def test_the_loop_logs_and_saves_any_metric(tmp_path):
    class Data:
        def from_step(self, step):
            while True:
                yield next(batches(16))

    step = jit_step(partial(train_step, objective=segmentation))
    writer = fv.train.JsonlWriter(tmp_path / "metrics.jsonl")
    options = {"rng": jax.random.key(1), "log_every": 4, "checkpoint_every": 3, "writers": [writer]}
    with fv.checkpoint.Checkpoints(tmp_path / "run", manifest={}) as checkpoints:
        fv.train.fit(start(), step, Data(), num_steps=3, checkpoints=checkpoints, **options | {"log_every": 100})
        fv.train.fit(start(), step, Data(), num_steps=8, checkpoints=checkpoints, **options)
    resumed = fv.train.read_records(tmp_path / "metrics.jsonl")
    whole = fv.train.JsonlWriter(tmp_path / "whole.jsonl")
    fv.train.fit(start(), step, Data(), num_steps=8, rng=jax.random.key(1), log_every=4, writers=[whole])
    want = fv.train.read_records(tmp_path / "whole.jsonl")
    names = {"step", "split", "loss", "pixel_loss", "seg_accuracy", "seg_mean_iou"}
    for records in (resumed, want):
        for record in records:
            assert record.pop("images_per_second") > 0
            assert set(record) == names
    assert resumed[-1] == want[-1]
