"""Elastic deformation and the weights of borders, against SciPy and brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from flaxvision.data import augment, border_weights

RNG = np.random.default_rng(0)


def example(height=24, width=31):
    return {
        "image": jnp.asarray(RNG.random((height, width, 2)), jnp.float32),
        "label": jnp.asarray(RNG.integers(0, 4, (height, width)), jnp.int32),
        "instances": jnp.asarray(RNG.integers(0, 9, (height, width)), jnp.int32),
        "weight": jnp.asarray(RNG.random((height, width)), jnp.float32),
        "mask": jnp.ones(()),
    }


def test_everything_moves_by_the_same_field():
    one, key = example(), jax.random.key(3)
    run = jax.jit(lambda e: (augment.random_elastic(key, e, sigma=4.0), augment.displacements(key, 24, 31, sigma=4.0)))
    got, field = run(one)
    places = np.mgrid[:24, :31] + np.moveaxis(np.asarray(field), -1, 0)
    for channel in range(2):
        want = ndimage.map_coordinates(np.asarray(one["image"][..., channel]), places, order=1, mode="mirror")
        np.testing.assert_allclose(got["image"][..., channel], want, atol=1e-5)
    want = ndimage.map_coordinates(np.asarray(one["weight"]), places, order=1, mode="mirror")
    np.testing.assert_allclose(got["weight"], want, atol=1e-5)
    for name in ("label", "instances"):
        near = ndimage.map_coordinates(np.asarray(one[name]), places, order=0, mode="mirror")
        tie = np.any(np.abs(places - np.floor(places) - 0.5) < 1e-4, axis=0)
        np.testing.assert_array_equal(np.asarray(got[name])[~tie], near[~tie])
        assert got[name].dtype == jnp.int32
    assert float(got["mask"]) == 1


def test_the_field_is_smooth_and_passes_through_its_grid():
    key = jax.random.key(0)
    field = np.asarray(augment.displacements(key, 41, 61, sigma=10.0))
    coarse = np.asarray(10.0 * jax.random.normal(key, (3, 3, 2)))
    np.testing.assert_allclose(field[::20, ::30], coarse, atol=1e-3)
    assert np.abs(np.diff(field, axis=0)).max() < 3
    many = jax.vmap(lambda k: augment.displacements(k, 3, 3))(jax.random.split(jax.random.key(1), 500))
    assert float(many.std()) == pytest.approx(10, rel=0.05)


def test_no_deformation_and_what_is_refused():
    one = example()
    same = augment.random_elastic(jax.random.key(0), one, probability=0.0)
    np.testing.assert_allclose(same["image"], one["image"], atol=1e-6)
    np.testing.assert_array_equal(same["label"], one["label"])
    with pytest.raises(ValueError, match="example must not hold boxes for random_elastic"):
        augment.random_elastic(jax.random.key(0), {**one, "boxes": jnp.zeros((1, 4))})
    with pytest.raises(ValueError, match="grid must be at least 2; got 1"):
        augment.random_elastic(jax.random.key(0), one, grid=1)


def test_other_ops_move_the_maps_too():
    """Flips and rotations move `instances` and `weight` with the label; nothing is known beyond the image."""
    one = example(20, 20)
    ops = (functools.partial(augment.random_flip, probability=1.0), augment.random_rotation)
    turned = jax.jit(augment.compose(*ops))(jax.random.key(0), {**one, "instances": one["label"]})
    beyond = np.asarray(turned["label"]) == 255
    assert 0 < beyond.sum() < 200
    np.testing.assert_array_equal(np.asarray(turned["instances"])[beyond], 0)
    np.testing.assert_array_equal(np.asarray(turned["weight"])[beyond], 0)
    np.testing.assert_array_equal(np.asarray(turned["instances"])[~beyond], np.asarray(turned["label"])[~beyond])
    with pytest.raises(ValueError, match=r"weight must be a map of the image's size \[20, 20\]"):
        augment.random_flip(jax.random.key(0), {**one, "weight": jnp.zeros((20, 5))})


def brute_force(instances, w0, sigma):
    places = {k: np.argwhere(instances == k) for k in np.unique(instances) if k}
    out = np.zeros(instances.shape)
    for y, x in np.ndindex(instances.shape):
        if instances[y, x] == 0 and len(places) > 1:
            near = sorted(np.sqrt(((place - (y, x)) ** 2).sum(1).min()) for place in places.values())
            out[y, x] = w0 * np.exp(-((near[0] + near[1]) ** 2) / (2 * sigma**2))
    return out


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_border_weights_equal_brute_force(count):
    instances = np.zeros((18, 23), np.int32)
    for k in range(1, count + 1):
        y, x = RNG.integers(0, 14), RNG.integers(0, 19)
        instances[y : y + 4, x : x + 4] = k
    got = border_weights(instances, w0=7.0, sigma=3.0, balance=False)
    np.testing.assert_allclose(got, 1 + brute_force(instances, 7.0, 3.0), rtol=1e-6)
    balanced = border_weights(instances, w0=0.0)
    if count:
        inside = instances > 0
        assert balanced[inside].sum() == pytest.approx(balanced[~inside].sum(), rel=1e-5)
        assert balanced.mean() == pytest.approx(1, rel=1e-5)
    assert got.dtype == np.float32


def test_wrong_arguments_of_border_weights():
    with pytest.raises(ValueError, match=r"instances must be integers \[H, W\]; got float64 \[2, 2\]"):
        border_weights(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="sigma must be positive; got 0"):
        border_weights(np.zeros((2, 2), int), sigma=0)
