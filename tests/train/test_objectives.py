"""Objectives on fixed logits, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.train import binary, classification, multilabel, regression

RNG = np.random.default_rng(0)


def measure(objective, logits, label, mask=None, train=False, aux=None):
    """The objective on fixed logits."""

    def apply_fn(variables, x, *, train, rngs=None, mutable=None):
        if not train:
            return logits
        return logits, {"aux_logits": {"head": (aux,)}} if aux is not None else {}

    batch = {"image": jnp.zeros((len(logits), 1)), "label": label} | ({} if mask is None else {"mask": mask})
    loss, (metrics, collections) = objective(apply_fn, {}, {"batch_stats": 1}, batch, jax.random.key(0), train)
    assert collections == {"batch_stats": 1}
    sums = {name: float(metric.total) for name, metric in metrics.items()}
    (weight,) = {float(metric.weight) for metric in metrics.values()}
    return float(loss), sums | {"weight": weight}


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


LOGITS = RNG.normal(size=(6, 7)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 6], np.int32)
ROWS = np.arange(6)


def test_cross_entropy():
    loss, sums = measure(classification(), LOGITS, LABELS)
    want = -log_softmax(LOGITS)[ROWS, LABELS]
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], want.sum(), rtol=1e-6)
    assert sums["accuracy"] == (LOGITS.argmax(-1) == LABELS).sum()
    top5 = np.argsort(-LOGITS, -1)[:, :5]
    assert sums["top5_accuracy"] == (top5 == LABELS[:, None]).any(-1).sum()
    assert sums["weight"] == 6


def test_padded_rows_weigh_nothing_whatever_they_hold():
    logits, labels = LOGITS.copy(), LABELS.copy()
    logits[4:] = np.nan
    mask = np.array([1, 1, 1, 1, 0, 0], np.float32)
    loss, sums = measure(classification(), logits, labels, mask)
    want = -log_softmax(LOGITS)[ROWS, LABELS][:4]
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-6)
    assert sums["weight"] == 4
    empty, sums = measure(classification(), logits, labels, np.zeros(6, np.float32))
    assert empty == 0
    assert sums["weight"] == 0


def test_label_smoothing():
    targets = np.eye(7)[LABELS] * 0.9 + 0.1 / 7
    loss, _ = measure(classification(label_smoothing=0.1), LOGITS, LABELS)
    np.testing.assert_allclose(loss, -(targets * log_softmax(LOGITS)).sum(-1).mean(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\); got 1"):
        classification(label_smoothing=1)


def test_class_weights():
    weights = np.arange(1.0, 8.0)
    loss, sums = measure(classification(class_weights=weights), LOGITS, LABELS)
    np.testing.assert_allclose(loss, (weights[LABELS] * -log_softmax(LOGITS)[ROWS, LABELS]).mean(), rtol=1e-6)
    assert sums["weight"] == 6
    with pytest.raises(ValueError, match="class_weights must have 7 values, one per class; got 2"):
        measure(classification(class_weights=(1, 2)), LOGITS, LABELS)


def test_soft_targets_of_mixup():
    targets = (0.3 * np.eye(7)[LABELS] + 0.7 * np.eye(7)[LABELS[::-1]]).astype(np.float32)
    loss, sums = measure(classification(), LOGITS, targets)
    np.testing.assert_allclose(loss, -(targets * log_softmax(LOGITS)).sum(-1).mean(), rtol=1e-6)
    assert sums["accuracy"] == (LOGITS.argmax(-1) == LABELS[::-1]).sum()
    with pytest.raises(ValueError, match=r"integers \[N\] or targets \(6, 7\); got \(6, 3\)"):
        measure(classification(), LOGITS, targets[:, :3])


def test_auxiliary_logits_count_in_training_only():
    aux = RNG.normal(size=(6, 7)).astype(np.float32)
    main, extra = (-log_softmax(z)[ROWS, LABELS].mean() for z in (LOGITS, aux))
    loss, sums = measure(classification(aux_weight=0.4), LOGITS, LABELS, train=True, aux=aux)
    np.testing.assert_allclose(loss, main + 0.4 * extra, rtol=1e-6)
    np.testing.assert_allclose(sums["loss"] / 6, main, rtol=1e-6)
    assert measure(classification(), LOGITS, LABELS, train=False)[0] == pytest.approx(main)


def test_lenet_map_against_equation_9():
    distances = np.abs(LOGITS) * 10
    want = [
        distances[i, LABELS[i]] + np.log(np.exp(-3.0) + sum(np.exp(-distances[i]))) for i in range(6)
    ]  # fmt: skip
    got = fv.losses.lenet_map(jnp.asarray(-distances), jax.nn.one_hot(LABELS, 7), rejection=3.0)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    objective = classification(loss=lambda z, t: fv.losses.lenet_map(z, t, rejection=3.0))
    np.testing.assert_allclose(measure(objective, jnp.asarray(-distances), LABELS)[0], np.mean(want), rtol=1e-5)


def test_binary():
    logits, labels = LOGITS[:, :1], np.array([0, 1, 1, 0, 1, 0])
    p = 1 / (1 + np.exp(-logits[:, 0]))
    each = -np.where(labels, np.log(p), np.log(1 - p))
    loss, sums = measure(binary(), logits, labels)
    np.testing.assert_allclose(loss, each.mean(), rtol=1e-5)
    assert sums["accuracy"] == ((p > 0.5) == labels).sum()
    loss, _ = measure(binary(positive_weight=3.0), logits, labels)
    np.testing.assert_allclose(loss, (each * np.where(labels, 3, 1)).mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="label must have one row per logit"):
        measure(binary(), LOGITS, labels)


def test_multilabel():
    labels = (RNG.random((6, 7)) > 0.5).astype(np.float32)
    labels[0] = LOGITS[0] > 0
    p = 1 / (1 + np.exp(-LOGITS))
    each = -np.where(labels, np.log(p), np.log(1 - p)).mean(-1)
    loss, sums = measure(multilabel(), LOGITS, labels)
    np.testing.assert_allclose(loss, each.mean(), rtol=1e-5)
    np.testing.assert_allclose(sums["accuracy"], ((LOGITS > 0) == labels).mean(-1).sum(), rtol=1e-6)
    assert sums["exact_match"] == ((LOGITS > 0) == labels).all(-1).sum() >= 1
    with pytest.raises(ValueError, match="label must have the shape of the logits"):
        measure(multilabel(), LOGITS, labels[:, :3])


@pytest.mark.parametrize("name", ["mse", "mae", "huber"])
def test_regression(name):
    labels = RNG.normal(size=(6, 7)).astype(np.float32)
    error = LOGITS - labels
    size = np.abs(error)
    want = {"mse": error**2, "mae": size, "huber": np.where(size < 0.5, error**2 / 2, 0.5 * (size - 0.25))}[name]
    loss, sums = measure(regression(name, huber_delta=0.5), LOGITS, labels)
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)
    np.testing.assert_allclose(sums["mae"] / 6, size.mean(), rtol=1e-5)
    np.testing.assert_allclose(sums["mse"] / 6, (error**2).mean(), rtol=1e-5)
    one, _ = measure(regression(name, huber_delta=0.5), LOGITS[:, :1], labels[:, 0])
    np.testing.assert_allclose(one, want[:, 0].mean(), rtol=1e-5)


def test_regression_refuses():
    with pytest.raises(ValueError, match="one of mse, mae, huber; got 'l2'"):
        regression("l2")
    with pytest.raises(ValueError, match="label must have the shape of the outputs"):
        measure(regression(), LOGITS, LOGITS[:, :2])
