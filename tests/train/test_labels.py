"""Labels that are no classes of the model are never trained on silently."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxvision as fv
from flaxvision.train import binary, capsule, classification, create_state, jit_step, multilabel, train_step
from flaxvision.train.objectives import explain_loss

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 7)).astype(np.float32)
GOOD = np.array([0, 6, 3, 2], np.int32)
SOFT = np.eye(7, dtype=np.float32)[GOOD]


def measure(objective, logits, label, mask=None):
    """The values of the metrics, and the gradient of each row's logits."""
    batch = {"image": jnp.zeros((len(logits), 1, 1, 1)), "label": label} | ({} if mask is None else {"mask": mask})

    def loss(logits):
        def apply_fn(variables, x, *, train, rngs=None, mutable=None, label=None):
            return (logits, {}) if mutable is not None else logits

        value, (metrics, _) = objective(apply_fn, {}, {}, batch, jax.random.key(0), True)
        return value, metrics

    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(logits))
    return fv.metrics.compute(metrics), gradient, metrics


def replaced(values, value):
    values = np.array(values)
    values[1] = value
    return values


CASES = {
    "class too large": (classification(), LOGITS, GOOD, 7),
    "255": (classification(label_smoothing=0.1), LOGITS, GOOD, 255),
    "negative class": (classification(class_weights=range(7)), LOGITS, GOOD, -1),
    "uint8": (classification(), LOGITS, GOOD.astype(np.uint8), 200),
    "nan in soft targets": (classification(), LOGITS, SOFT, np.nan),
    "binary": (binary(), LOGITS[:, :1], GOOD > 2, 2),
    "multilabel": (multilabel(), LOGITS, SOFT, -1),
    "capsule": (capsule(), np.abs(LOGITS) / 4, GOOD, 7),
    "capsule, soft": (capsule(), np.abs(LOGITS) / 4, SOFT, np.nan),
}


@pytest.mark.parametrize("name", CASES)
def test_a_label_outside_the_classes(name):
    objective, logits, labels, wrong = CASES[name]
    labels = labels.astype(np.int32) if labels.dtype == bool else labels
    right, _, good = measure(objective, logits, labels)
    assert np.all(np.isfinite(list(right.values())))
    assert explain_loss(good) == explain_loss(right) == explain_loss({}) == ""
    values, gradient, metrics = measure(objective, logits, replaced(labels, wrong))
    assert np.isnan(values["loss"])
    assert np.isnan(values["accuracy"])
    assert "because a label lies outside the classes" in explain_loss(metrics)
    assert explain_loss(values) == explain_loss(metrics)
    assert np.all(np.isfinite(gradient))
    assert not np.asarray(gradient[1]).any()
    # A padded row may hold anything.
    mask = np.array([1, 0, 1, 1], np.float32)
    padded, gradient, _ = measure(objective, logits, replaced(labels, wrong), mask)
    other, same, _ = measure(objective, logits, labels, mask)
    assert padded == other
    np.testing.assert_array_equal(gradient, same)


def test_a_loss_that_is_not_finite_for_another_reason():
    values, _, metrics = measure(classification(), replaced(LOGITS, np.nan), GOOD)
    assert np.isnan(values["loss"])
    assert explain_loss(metrics) == ""


def test_more_classes_than_a_byte_holds():
    logits = RNG.normal(size=(4, 300)).astype(np.float32)
    values, _, _ = measure(classification(), logits, np.array([0, 1, 2, 255], np.uint8))
    assert np.isfinite(values["loss"])


@pytest.mark.parametrize("mix", [fv.data.augment.mixup, fv.data.augment.cutmix])
def test_mixing_keeps_the_fault(mix):
    batch = {"image": np.zeros((4, 5, 5, 1), np.float32), "label": replaced(GOOD, 7)}
    mixed = mix(jax.random.key(0), batch, num_classes=7)
    assert np.isnan(mixed["label"][1]).all()
    assert np.isnan(measure(classification(), LOGITS, mixed["label"])[0]["loss"])
    batch["mask"] = np.array([1, 0, 1, 1], np.float32)
    mixed = mix(jax.random.key(0), batch, num_classes=7)
    assert np.isfinite(measure(classification(), LOGITS, mixed["label"], batch["mask"])[0]["loss"])


def state_of():
    model = fv.create_model("mlp", features=(4,), num_classes=7)
    return create_state(model, optax.sgd(0.1), jax.random.key(0), jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32))


def batches():
    image = RNG.normal(size=(8, 2, 2, 1)).astype(np.float32)
    while True:
        yield {"image": image, "label": np.array([0, 1, 2, 3, 4, 5, 6, 7], np.int32)}


def test_the_range_test_names_the_labels():
    step = jit_step(partial(train_step, objective=classification()))
    with pytest.raises(ValueError, match="the loss must be finite; got nan at step 1, because a label lies outside"):
        fv.train.learning_rate_range(lambda rate: state_of(), step, batches(), jax.random.key(0))


def test_a_run_names_the_labels():
    class Data:
        def from_step(self, step):
            return batches()

    step = jit_step(partial(train_step, objective=classification()))
    message = r"the loss is not finite at step 1, because a label lies outside the classes of the model .*; there is no"
    with pytest.raises(FloatingPointError, match=message):
        fv.train.fit(state_of(), step, Data(), num_steps=4, rng=jax.random.key(0), log_every=2)
