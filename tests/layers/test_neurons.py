"""Threshold units and radial basis outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from flaxvision import layers


def test_threshold_units():
    z = jnp.array([-2.5, -0.0, 0.0, 1e-30, 3.0, -jnp.inf, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(layers.heaviside(z), [0, 1, 1, 1, 1, 0, 1, np.nan])
    np.testing.assert_array_equal(layers.sign(z), [-1, 0, 0, 1, 1, -1, 1, np.nan])
    for unit in (layers.heaviside, layers.sign):
        np.testing.assert_array_equal(jax.grad(lambda z, unit=unit: unit(z[:-1]).sum())(z), np.zeros(8))
        assert unit(z.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(layers.heaviside(jnp.array([-1, 0, 2])), [0, 1, 1])
    np.testing.assert_array_equal(layers.sign(jnp.array([-1, 0, 2])), [-1, 0, 1])


def _distances(x, centers):
    return [[sum((a - b) ** 2 for a, b in zip(row, center, strict=True)) for center in centers] for row in x]


def test_rbf_with_fixed_codes():
    codes = layers.digit_codes()
    x = np.random.default_rng(0).standard_normal((3, 84)).astype(np.float32)
    x[1] = codes[7]
    layer = layers.RBF(10, codes)
    variables = layer.init(jax.random.key(0), x)
    assert jax.tree.leaves(variables) == []
    got = jax.jit(layer.apply)(variables, x)
    np.testing.assert_allclose(got, _distances(x.astype(np.float64), codes), rtol=1e-5)
    assert got[1, 7] == 0
    assert got[1].argmin() == 7
    with pytest.raises(ValueError, match=r"\[features, D\] = \(10, 83\); got \(10, 84\)"):
        layer.init(jax.random.key(0), x[:, :83])


def test_rbf_with_trainable_centers():
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    layer = layers.RBF(3)
    variables = layer.init(jax.random.key(0), x)
    centers = variables["params"]["centers"]
    assert centers.shape == (3, 4)
    np.testing.assert_array_equal(jnp.abs(centers), 1)
    np.testing.assert_allclose(layer.apply(variables, x), _distances(x, centers), rtol=1e-5)
    with jax.enable_x64(True):
        double = layers.RBF(3, dtype=jnp.float64)
        inputs = (jnp.asarray(x, jnp.float64), jnp.asarray(centers, jnp.float64) / 3)
        apply = jax.jit(lambda x, centers: double.apply({"params": {"centers": centers}}, x))
        check_grads(apply, inputs, order=1, modes=("fwd", "rev"))


def test_rbf_inside_a_module():
    """A numpy array is a field like any other: the module can be cloned, and tabulated by Linen."""
    layer = layers.RBF(10, layers.digit_codes())
    assert "RBF" in layer.tabulate(jax.random.key(0), jnp.zeros((1, 84)), console_kwargs={"width": 120})
    assert layer.clone().apply({}, jnp.zeros((1, 84))).tolist() == [[84.0] * 10]


def test_digit_codes():
    codes = layers.digit_codes()
    assert codes.shape == (10, 84)
    assert codes.dtype == np.float32
    assert set(np.unique(codes)) == {-1, 1}
    # No two digits are alike: at least 10 of the 84 pixels differ.
    different = (codes[:, None] != codes).sum(-1) + 84 * np.eye(10, dtype=int)
    assert different.min() >= 10
    # The one is a stroke in the middle with a foot, so its last row is ink except at the ends.
    assert codes[1].reshape(12, 7)[-1].tolist() == [1] * 6 + [-1]


def test_random_codes():
    codes = layers.random_codes(8, 3)
    assert codes.dtype == np.float32
    assert {tuple(code) for code in codes.tolist()} == {(a, b, c) for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)}
    np.testing.assert_array_equal(layers.random_codes(20), layers.random_codes(20))
    assert layers.random_codes(20).shape == (20, 84)
    assert (layers.random_codes(20) != layers.random_codes(20, seed=1)).any()
    with pytest.raises(ValueError, match=r"at most 2\*\*inputs = 8; got 9"):
        layers.random_codes(9, 3)
