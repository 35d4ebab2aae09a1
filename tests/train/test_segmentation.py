"""The objective of segmentation: pixels, weights, crops, padding, auxiliary heads, and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxvision as fv
from flaxvision import metrics as fm

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 6, 8, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, (4, 6, 8)).astype(np.int32)
LABELS[1, 2:] = 255
IMAGES = np.zeros((4, 6, 8, 1), np.float32)


def measured(objective, batch, logits=LOGITS, train=False, aux=None):
    def apply_fn(variables, x, *, train, rngs=None, mutable=None):
        return (logits, {"aux_logits": {"aux": (aux,)}} if aux is not None else {}) if train else logits

    batch = {"image": IMAGES, "label": LABELS} | batch
    loss, (metrics, collections) = objective(apply_fn, {}, {"batch_stats": 1}, batch, jax.random.key(0), train)
    assert collections == {"batch_stats": 1}
    return float(loss), metrics


def entropy(labels=LABELS, logits=LOGITS):
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, np.where(labels == 255, 0, labels)[..., None], -1)[..., 0]


def test_the_mean_over_known_pixels():
    loss, metrics = measured(fv.train.segmentation(), {})
    known = LABELS != 255
    assert loss == pytest.approx(entropy()[known].mean(), rel=1e-5)
    assert metrics["loss"].compute() == pytest.approx(loss, rel=1e-6)
    assert float(metrics["loss"].weight) == known.sum()
    right = (LOGITS.argmax(-1) == LABELS)[known].mean()
    assert metrics["accuracy"].compute() == pytest.approx(right)
    figures = fm.compute(metrics)
    assert figures["segmentation_accuracy"] == pytest.approx(right)
    assert "segmentation" not in measured(fv.train.segmentation(), {}, train=True)[1]


def test_weights_of_classes_and_pixels():
    weight, factors = RNG.random(LABELS.shape).astype(np.float32), np.array([0.2, 1.0, 3.0])
    loss, _ = measured(fv.train.segmentation(class_weights=factors.tolist()), {"weight": weight})
    each = np.where(LABELS == 255, 0, factors[np.where(LABELS == 255, 0, LABELS)] * weight)
    assert loss == pytest.approx((each * entropy()).sum() / each.sum(), rel=1e-5)


def test_padded_rows_weigh_nothing_whatever_they_hold():
    mask = np.array([1, 1, 0, 0], np.float32)
    logits, labels = LOGITS.copy(), LABELS.copy()
    logits[2:], labels[2:] = np.nan, 77
    loss, metrics = measured(fv.train.segmentation(), {"mask": mask, "label": labels}, logits)
    assert loss == pytest.approx(entropy()[:2][LABELS[:2] != 255].mean(), rel=1e-5)
    assert len(metrics["segmentation"].to_host()) == 2
    assert measured(fv.train.segmentation(), {"mask": np.zeros(4, np.float32), "label": labels}, logits)[0] == 0


def test_logits_of_the_central_pixels():
    weight = RNG.random(LABELS.shape).astype(np.float32)
    small = LOGITS[:, 1:5, 2:6]
    loss, metrics = measured(fv.train.segmentation(), {"weight": weight}, small)
    known = LABELS[:, 1:5, 2:6] != 255
    each = (entropy()[:, 1:5, 2:6] * weight[:, 1:5, 2:6])[known].sum() / weight[:, 1:5, 2:6][known].sum()
    assert loss == pytest.approx(each, rel=1e-5)
    assert metrics["segmentation"].to_host().matrix.counts.sum() == known.sum()


def test_auxiliary_logits_are_resized():
    aux = RNG.normal(size=(4, 3, 4, 3)).astype(np.float32)
    loss, _ = measured(fv.train.segmentation(aux_weight=0.5), {}, train=True, aux=jnp.asarray(aux))
    large = np.asarray(fv.layers.resize_bilinear(jnp.asarray(aux), (6, 8)))
    known = LABELS != 255
    want = entropy()[known].mean() + 0.5 * entropy(logits=large)[known].mean()
    assert loss == pytest.approx(want, rel=1e-5)


def test_another_loss_is_averaged_over_images():
    mask = np.array([1, 0, 1, 1], np.float32)
    loss, metrics = measured(fv.train.segmentation(loss=fv.losses.soft_dice), {"mask": mask})
    each = fv.losses.soft_dice(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    assert loss == pytest.approx(float(each[mask > 0].mean()), rel=1e-6)
    assert float(metrics["loss"].weight) == 3


def test_a_label_without_a_class_is_not_a_number():
    labels = np.where(LABELS == 255, 0, LABELS)
    labels[0, 0, 0] = 9
    loss, metrics = measured(fv.train.segmentation(), {"label": labels})
    assert np.isnan(loss)
    assert np.isnan(metrics["accuracy"].compute())


@pytest.mark.parametrize(
    ("batch", "logits", "message"),
    [
        ({"label": LABELS[:, 0, 0]}, LOGITS, r"batch must hold label \[N, H, W\]; got \(4,\)"),
        ({"label": LABELS[:, :5]}, LOGITS, r"not larger than the labels \(5, 8\); got \(4, 6, 8, 3\)"),
        ({"weight": LABELS[:, :5]}, LOGITS, r"weight must have the shape of label, \(4, 6, 8\); got \(4, 5, 8\)"),
    ],
)
def test_wrong_shapes(batch, logits, message):
    with pytest.raises(ValueError, match=message):
        measured(fv.train.segmentation(), batch, logits)


def test_wrong_options():
    weighted = {"weight": np.ones(LABELS.shape, np.float32)}
    with pytest.raises(ValueError, match="batch must not hold weight with a loss"):
        measured(fv.train.segmentation(loss=fv.losses.soft_dice), weighted)
    with pytest.raises(ValueError, match="class_weights must have 3 values, one per class; got 2"):
        measured(fv.train.segmentation(class_weights=(1.0, 2.0)), {})
    with pytest.raises(ValueError, match="class_weights must be None with a loss; got both"):
        fv.train.segmentation(loss=fv.losses.soft_dice, class_weights=(1.0,))
    with pytest.raises(ValueError, match="ignore must be 255 with a loss, which does not see it; got 0"):
        fv.train.segmentation(loss=fv.losses.soft_dice, ignore=0)


@pytest.mark.slow
def test_devices_give_the_same_step_and_metrics():
    """One step under jit on 1 and 8 devices and under pmap; ignored pixels are spread unevenly."""
    model = fv.create_model("unet_same", features=(4, 4), decoder_features=(4,), num_classes=3)
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (8, 12, 12)).astype(np.int32)
    label[:5, 3:] = 255
    batch = {"image": rng.normal(size=(8, 12, 12, 1)).astype(np.float32), "label": label}
    batch["mask"] = np.array([1] * 7 + [0], np.float32)
    sample = jax.ShapeDtypeStruct((1, 12, 12, 1), jnp.float32)
    state = fv.train.create_state(model, optax.sgd(0.1), jax.random.key(0), sample)
    state = jax.device_get(state)
    objective = fv.train.segmentation()
    step = functools.partial(fv.train.train_step, objective=objective)
    found = {}
    for name, compiled in (
        ("one", fv.train.jit_step(step, fv.train.make_mesh(jax.devices()[:1]))),
        ("eight", fv.train.jit_step(step, fv.train.make_mesh())),
        ("pmap", fv.train.pmap_step(step)),
    ):
        fresh = jax.tree.map(jnp.array, state)
        after, metrics = compiled(fresh, batch, jax.random.key(1))
        found[name] = jax.device_get((after.params, fm.compute(metrics)))
    for name in ("eight", "pmap"):
        for a, b in zip(jax.tree.leaves(found["one"]), jax.tree.leaves(found[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
