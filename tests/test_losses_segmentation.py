"""Losses of segmentation, against numpy loops, and live against torch and segmentation_models_pytorch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision import losses
from parity import libraries

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(3, 4, 5, 6))).astype(np.float32)
LABELS = RNG.integers(0, 6, (3, 4, 5)).astype(np.int32)
LABELS[0, :2] = 255
LABELS[2] = np.where(LABELS[2] == 4, 1, LABELS[2])  # an image without class 4
WEIGHTS = (0.5, 1.0, 2.0, 0.1, 3.0, 1.5)


def probabilities():
    e = np.exp(LOGITS.astype(np.float64) - LOGITS.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def pixels():
    return itertools.product(*map(range, LABELS.shape))


def test_cross_entropy_and_weights_of_every_pixel():
    loss = losses.pixel_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    weights = losses.pixel_weights(jnp.asarray(LABELS), class_weights=WEIGHTS)
    p = probabilities()
    for place in pixels():
        label = LABELS[place]
        want = 0.0 if label == 255 else -np.log(p[place][label])
        assert float(loss[place]) == pytest.approx(want, rel=1e-5, abs=1e-6)
        assert float(weights[place]) == pytest.approx(0 if label == 255 else WEIGHTS[label])
    np.testing.assert_array_equal(losses.pixel_weights(jnp.asarray(LABELS)), LABELS != 255)


def test_focal_loss_of_every_pixel():
    loss = losses.focal(jnp.asarray(LOGITS), jnp.asarray(LABELS), gamma=1.5, class_weights=WEIGHTS)
    p = probabilities()
    for place in pixels():
        label = LABELS[place]
        q = p[place][label] if label != 255 else 1.0
        want = 0.0 if label == 255 else -WEIGHTS[label] * (1 - q) ** 1.5 * np.log(q)
        assert float(loss[place]) == pytest.approx(want, rel=1e-4, abs=1e-6)
    same = losses.focal(jnp.asarray(LOGITS), jnp.asarray(LABELS), gamma=0.0)
    np.testing.assert_allclose(
        same, losses.pixel_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS)), rtol=1e-4, atol=1e-6
    )


def test_focal_loss_of_one_logit_is_that_of_a_sigmoid():
    z, t = jnp.asarray([[-2.0], [0.5], [3.0], [1.0]]), jnp.asarray([0, 1, 1, 0])
    p = 1 / (1 + np.exp(-np.asarray(z)[:, 0]))
    q = np.where(np.asarray(t) == 1, p, 1 - p)
    want = -np.where(np.asarray(t) == 1, 0.25, 0.75) * (1 - q) ** 2 * np.log(q)
    np.testing.assert_allclose(losses.focal(z, t, class_weights=(0.75, 0.25)), want, rtol=1e-5)


@pytest.mark.parametrize(("squared", "background", "smooth"), [(True, True, 1.0), (False, False, 0.1)])
def test_soft_dice_of_every_image(squared, background, smooth):
    options = {"squared": squared, "background": background, "smooth": smooth}
    got = losses.soft_dice(jnp.asarray(LOGITS), jnp.asarray(LABELS), **options)
    p, known = probabilities(), LABELS != 255
    for n in range(3):
        each = []
        for k in range(0 if background else 1, 6):
            a, t = p[n, ..., k][known[n]], (LABELS[n] == k)[known[n]].astype(float)
            whole = (a**2).sum() + (t**2).sum() if squared else a.sum() + t.sum()
            each.append(1 - (2 * (a * t).sum() + smooth) / (whole + smooth))
        assert float(got[n]) == pytest.approx(np.mean(each), rel=1e-5)


def test_soft_dice_without_known_pixels():
    labels, logits = jnp.full((1, 4, 5), 255), jnp.asarray(LOGITS[:1])
    loss = lambda z: losses.soft_dice(z, labels, smooth=0.0)[0]
    value, gradient = jax.value_and_grad(loss)(logits)
    assert float(value) == 0
    assert float(jnp.abs(gradient).max()) == 0


def jaccard_loss(wrong, truth):
    """The share of the union of truth and errors that is wrong (Berman et al. 2018, equation 6)."""
    union = (truth | wrong).sum()
    return wrong.sum() / union if union else 0.0


def lovasz(errors, truth):
    """The Lovász extension by its definition, equation 8: increments of the set function along the sorted errors."""
    total, before = 0.0, 0.0
    wrong = np.zeros(len(errors), bool)
    for i in np.argsort(-errors, kind="stable"):
        wrong[i] = True
        now = jaccard_loss(wrong, truth)
        total, before = total + errors[i] * (now - before), now
    return total


def test_lovasz_softmax_of_every_image():
    got = losses.lovasz_softmax(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    p, known = probabilities(), LABELS != 255
    for n in range(3):
        each = []
        for k in range(6):
            truth = (LABELS[n] == k)[known[n]]
            if truth.any():
                each.append(lovasz(np.abs(truth - p[n, ..., k][known[n]]), truth))
        assert float(got[n]) == pytest.approx(np.mean(each), rel=1e-5)
    assert losses.lovasz_softmax(jnp.asarray(LOGITS), jnp.full(LABELS.shape, 255)).tolist() == [0, 0, 0]


ALL = {
    "cross-entropy": lambda z, t: losses.pixel_cross_entropy(z, t).sum((1, 2)),
    "focal": lambda z, t: losses.focal(z, t).sum((1, 2)),
    "dice": losses.soft_dice,
    "lovasz": losses.lovasz_softmax,
}


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    """Of float64 against finite differences; unknown pixels have none, even if their logits are not finite."""
    broken = LOGITS.copy()
    broken[0, :2] = np.nan
    with jax.enable_x64(True):
        labels = jnp.asarray(LABELS)
        loss = jax.jit(lambda z: ALL[name](z, labels).sum())
        exact = jax.jit(jax.grad(loss))(jnp.asarray(broken, jnp.float64))
        assert float(jnp.abs(exact[0, :2]).max()) == 0
        assert bool(jnp.all(jnp.isfinite(exact)))
        assert float(jnp.abs(exact[1:]).min()) > 0 or name == "lovasz"
        step, direction = 1e-6, np.random.default_rng(1).normal(size=LOGITS.shape)
        base = np.where(np.isnan(broken), 0, broken).astype(np.float64)
        along = (loss(base + step * direction) - loss(base - step * direction)) / (2 * step)
        np.testing.assert_allclose(along, (exact * direction).sum(), rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_label_without_a_class_is_not_a_number(name):
    labels = LABELS.copy()
    labels[1, 0, 0] = 6
    found, gradient = jax.jit(
        lambda z: (ALL[name](z, jnp.asarray(labels)), jax.grad(lambda z: ALL[name](z, jnp.asarray(labels))[0])(z))
    )(jnp.asarray(LOGITS))
    np.testing.assert_array_equal(np.isnan(found), [False, True, False])
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.reference
def test_against_torch_and_smp():
    import torch

    libraries._import_torchvision()
    from segmentation_models_pytorch.losses import DiceLoss, LovaszLoss

    z, t = torch.from_numpy(LOGITS.transpose(0, 3, 1, 2).copy()), torch.from_numpy(LABELS.astype(np.int64))
    criterion = torch.nn.CrossEntropyLoss(weight=torch.tensor(WEIGHTS), ignore_index=255)
    loss = losses.pixel_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    weights = losses.pixel_weights(jnp.asarray(LABELS), class_weights=WEIGHTS)
    assert float((loss * weights).sum() / weights.sum()) == pytest.approx(criterion(z, t).item(), rel=1e-5)
    # smp averages over the batch, here one image. Its Dice leaves out absent classes and counts `smooth` twice.
    for n in (1, 2):
        one, labels = z[n : n + 1], t[n : n + 1]
        lovasz = LovaszLoss("multiclass", per_image=False, ignore_index=255)(one, labels).item()
        got = losses.lovasz_softmax(jnp.asarray(LOGITS[n : n + 1]), jnp.asarray(LABELS[n : n + 1]))
        assert float(got[0]) == pytest.approx(lovasz, rel=1e-5)
    assert set(np.unique(LABELS[1])) == set(range(6))
    dice = DiceLoss("multiclass", smooth=0.5, ignore_index=255)(z[1:2], t[1:2]).item()
    got = losses.soft_dice(jnp.asarray(LOGITS[1:2]), jnp.asarray(LABELS[1:2]), squared=False, smooth=1.0)
    assert float(got[0]) == pytest.approx(dice, rel=1e-5)
