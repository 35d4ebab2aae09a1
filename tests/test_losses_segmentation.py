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


@pytest.mark.parametrize(("squared", "background", "smooth"), [(True, True, 0.0), (False, False, 0.5)])
def test_soft_dice_of_the_batch(squared, background, smooth):
    """The sums run over all images; class 4 is in two of them."""
    options = {"squared": squared, "background": background, "smooth": smooth}
    got = losses.soft_dice(jnp.asarray(LOGITS), jnp.asarray(LABELS), per_image=False, **options)
    part, whole = np.zeros(6), np.zeros(6)
    p = probabilities()
    for place in pixels():
        if LABELS[place] != 255:
            target = np.eye(6)[LABELS[place]]
            part += p[place] * target
            whole += p[place] ** 2 + target if squared else p[place] + target
    each = 1 - (2 * part + smooth) / (whole + smooth)
    assert got.shape == (3,)
    np.testing.assert_allclose(got, each[0 if background else 1 :].mean(), rtol=1e-5)
    means = losses.soft_dice(jnp.asarray(LOGITS), jnp.asarray(LABELS), **options).mean()
    assert abs(float(means) - float(got[0])) > 1e-3


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


def test_lovasz_softmax_of_the_batch():
    """Errors of all images are sorted together. Class 4 counts, although an image lacks it; the last class does not."""
    labels = np.where(LABELS == 5, 255, LABELS)
    got = losses.lovasz_softmax(jnp.asarray(LOGITS), jnp.asarray(labels), per_image=False)
    p, known = probabilities()[labels != 255], labels[labels != 255]
    want = np.mean([lovasz(np.abs((known == k) - p[:, k]), known == k) for k in range(5)])
    assert got.shape == (3,)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    unknown = jnp.full(LABELS.shape, 255)
    assert losses.lovasz_softmax(jnp.asarray(LOGITS), unknown, per_image=False).tolist() == [0, 0, 0]


def test_the_mask_loss_of_every_region():
    """Only the mask of the true class counts, and a class outside [0, K) has none."""
    rng = np.random.default_rng(3)
    logits, targets = 2 * rng.normal(size=(2, 3, 4, 5, 6)), rng.uniform(size=(2, 3, 4, 5))
    classes = np.asarray([[0, 5, 2], [3, 3, 6]])
    logits, targets = jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.float32)
    value, gradient = jax.value_and_grad(lambda z: losses.instance_mask(z, targets, classes)[:, :2].sum())(logits)
    found = losses.instance_mask(logits, targets, classes)
    assert np.isnan(found[1, 2])
    total = 0.0
    for n, r in itertools.product(range(2), range(2)):
        p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)[n, r, ..., classes[n, r]]))
        t = np.asarray(targets, np.float64)[n, r]
        want = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
        assert float(found[n, r]) == pytest.approx(want, rel=1e-5)
        total += want
        others = np.delete(np.asarray(gradient)[n, r], classes[n, r], axis=-1)
        assert not others.any()
        np.testing.assert_allclose(gradient[n, r, ..., classes[n, r]], (p - t) / 20, rtol=1e-4, atol=1e-7)
    assert float(value) == pytest.approx(total, rel=1e-5)


ALL = {
    "cross-entropy": lambda z, t: losses.pixel_cross_entropy(z, t).sum((1, 2)),
    "focal": lambda z, t: losses.focal(z, t).sum((1, 2)),
    "dice": losses.soft_dice,
    "lovasz": losses.lovasz_softmax,
}
OF_THE_BATCH = {
    "dice of the batch": lambda z, t: losses.soft_dice(z, t, per_image=False),
    "lovasz of the batch": lambda z, t: losses.lovasz_softmax(z, t, per_image=False),
}


@pytest.mark.parametrize("name", {**ALL, **OF_THE_BATCH})
def test_gradients(name):
    """Of float64 against finite differences; unknown pixels have none, even if their logits are not finite."""
    broken = LOGITS.copy()
    broken[0, :2] = np.nan
    function = {**ALL, **OF_THE_BATCH}[name]
    with jax.enable_x64(True):
        labels = jnp.asarray(LABELS)
        loss = jax.jit(lambda z: function(z, labels).sum())
        exact = jax.jit(jax.grad(loss))(jnp.asarray(broken, jnp.float64))
        assert float(jnp.abs(exact[0, :2]).max()) == 0
        assert bool(jnp.all(jnp.isfinite(exact)))
        assert float(jnp.abs(exact[1:]).min()) > 0 or "lovasz" in name
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


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_a_label_without_a_class_spoils_the_batch(name):
    labels = LABELS.copy()
    labels[1, 0, 0] = 6
    assert np.isnan(OF_THE_BATCH[name](jnp.asarray(LOGITS), jnp.asarray(labels))).all()


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
    for per_image in (False, True):
        options = {"ignore_index": 255, "per_image": per_image}
        got = losses.lovasz_softmax(jnp.asarray(LOGITS), jnp.asarray(LABELS), per_image=per_image)
        assert float(got.mean()) == pytest.approx(LovaszLoss("multiclass", **options)(z, t).item(), rel=1e-5)
    dice = DiceLoss("multiclass", smooth=0.5, ignore_index=255)(z, t).item()
    got = losses.soft_dice(jnp.asarray(LOGITS), jnp.asarray(LABELS), squared=False, smooth=1.0, per_image=False)
    assert float(got[0]) == pytest.approx(dice, rel=1e-5)
    assert set(np.unique(LABELS[1])) == set(range(6))
    dice = DiceLoss("multiclass", smooth=0.5, ignore_index=255)(z[1:2], t[1:2]).item()
    got = losses.soft_dice(jnp.asarray(LOGITS[1:2]), jnp.asarray(LABELS[1:2]), squared=False, smooth=1.0)
    assert float(got[0]) == pytest.approx(dice, rel=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5)])
def test_focal_loss_against_torchvision_and_smp(gamma, alpha):
    """With one logit per pixel the definitions agree; alpha is the weight of label 1."""
    import torch

    libraries._import_torchvision()
    from segmentation_models_pytorch.losses import FocalLoss
    from torchvision.ops import sigmoid_focal_loss

    z, t = LOGITS[..., :1], (LABELS % 2) * (LABELS != 255)
    got = losses.focal(jnp.asarray(z), jnp.asarray(t), gamma=gamma, class_weights=(1 - alpha, alpha))
    theirs = torch.from_numpy(z[..., 0].copy()), torch.from_numpy(t.astype(np.float32))
    want = sigmoid_focal_loss(*theirs, alpha=alpha, gamma=gamma)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-7)
    mean = FocalLoss("binary", alpha=alpha, gamma=gamma)(*theirs).item()
    assert float(got.mean()) == pytest.approx(mean, rel=1e-4)
