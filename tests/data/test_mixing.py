"""Mixup and cutmix of batches."""

from functools import partial

import jax
import numpy as np
import pytest

from flaxvision.data import augment
from tests.conftest import AS_USERS


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def images(n=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_mixing_leaves_padded_rows_out(mix):
    """Row i has the constant value i + 1 and the class i, so each result shows its origin."""
    values = np.arange(1, 9, dtype=np.float32)
    batch = {
        "image": np.broadcast_to(values[:, None, None, None], (8, 10, 6, 1)),
        "label": np.arange(8, dtype=np.int32),
        "mask": np.asarray([1, 1, 0, 1, 1, 1, 0, 0], np.float32),
    }
    run = jax.jit(partial(mix, num_classes=8, alpha=1.0), compiler_options=AS_USERS)
    partners = np.zeros((8, 8))
    for seed in range(40):
        out = {k: np.asarray(v) for k, v in run(jax.random.key(seed), batch).items()}
        label = out["label"]
        assert label.dtype == np.float32
        np.testing.assert_allclose(label.sum(1), 1, atol=1e-6)
        np.testing.assert_array_equal(label[batch["mask"] == 0], np.eye(8)[batch["mask"] == 0])
        np.testing.assert_array_equal(out["image"][batch["mask"] == 0], batch["image"][batch["mask"] == 0])
        np.testing.assert_array_equal(label[batch["mask"] == 1][:, batch["mask"] == 0], 0)
        # The exact mean of an image is what its target says that it holds.
        np.testing.assert_allclose(out["image"].mean((1, 2, 3)), label @ values, rtol=1e-5)
        np.testing.assert_allclose(label[batch["mask"] == 1].sum(0), batch["mask"], atol=1e-5)  # a permutation
        if mix is augment.mixup:
            assert (out["image"] == out["image"][:, :1, :1]).all()
        else:
            assert np.isin(out["image"], values).all()
        partners += label > 0
    real = batch["mask"] == 1
    assert (partners[np.ix_(real, real)] > 0).all()


@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_mixing_weights_follow_beta(mix):
    image = np.broadcast_to(np.asarray([0.0, 1.0], np.float32)[:, None, None, None], (2, 20, 20, 1))
    batch = {"image": image, "label": np.eye(2, dtype=np.float32)}
    run = jax.jit(jax.vmap(lambda k: mix(k, batch, alpha=1.0)["label"][0, 1]))
    given = np.asarray(run(keys(4000)))
    mixed = given[given > 0]
    if mix is augment.mixup:  # half of the permutations of two rows swap them, Beta(1, 1) is uniform
        assert abs(len(mixed) / 4000 - 0.5) < 0.04
        np.testing.assert_allclose(np.quantile(mixed, (0.25, 0.5, 0.75)), (0.25, 0.5, 0.75), atol=0.04)
        assert mixed.max() > 0.98
    else:
        side = np.sqrt(np.random.default_rng(0).uniform(size=40000)) * 20 // 2  # half of the box
        middle = np.random.default_rng(1).integers(0, 20, (2, 40000))
        low, high = np.maximum(middle - side, 0), np.minimum(middle + side, 20)
        area = np.prod(high - low, axis=0) / 400
        np.testing.assert_allclose(
            np.quantile(mixed, (0.25, 0.5, 0.75)), np.quantile(area[area > 0], (0.25, 0.5, 0.75)), atol=0.04
        )


def test_mixing_off_and_bad_arguments():
    batch = {"image": np.ones((4, 6, 6, 1), np.float32) * np.arange(4, dtype=np.float32)[:, None, None, None]}
    batch["label"] = np.arange(4)
    for mix in (augment.mixup, augment.cutmix):
        for off in ({"alpha": 0.0}, {"probability": 0.0}):
            out = jax.jit(partial(mix, num_classes=4, **off))(jax.random.key(1), batch)
            np.testing.assert_array_equal(out["image"], batch["image"])
            np.testing.assert_array_equal(out["label"], np.eye(4))
        with pytest.raises(ValueError, match="num_classes must be given for integer labels"):
            mix(jax.random.key(0), batch)
        with pytest.raises(ValueError, match="num_classes must be 4, the number of label columns; got 3"):
            mix(jax.random.key(0), batch | {"label": np.eye(4, dtype=np.float32)}, num_classes=3)
        with pytest.raises(ValueError, match="alpha must be at least 0; got -1"):
            mix(jax.random.key(0), batch, num_classes=4, alpha=-1)
        with pytest.raises(ValueError, match="uint8"):
            mix(jax.random.key(0), batch | {"image": images(4)}, num_classes=4)
        with pytest.raises(ValueError, match=r"float32\[4\]"):
            mix(jax.random.key(0), batch | {"label": np.ones(4, np.float32)}, num_classes=4)
