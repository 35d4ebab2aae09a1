"""The perceptron and its learning rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv


def test_the_perceptron_rule_against_a_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)).astype(np.float32), (rng.random((20, 2)) > 0.5).astype(np.float32)
    params = fv.create_model("perceptron", num_classes=2).init(jax.random.key(0), x)["params"]
    new, wrong = fv.models.perceptron_update(params, jnp.asarray(x), jnp.asarray(y), 0.5)
    w, b, mistakes = np.zeros((3, 2), np.float32), np.zeros(2, np.float32), 0
    for xi, yi in zip(x, y, strict=True):
        for k in range(2):
            guess = 1.0 if xi @ w[:, k] + b[k] >= 0 else 0.0
            mistakes += int(guess != yi[k])
            w[:, k] += 0.5 * (yi[k] - guess) * xi
            b[k] += 0.5 * (yi[k] - guess)
    np.testing.assert_allclose(new["units"]["kernel"], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["units"]["bias"], b, rtol=1e-5)
    assert int(wrong) == mistakes > 0


def test_the_perceptron_separates_setosa():
    from sklearn.datasets import load_iris

    iris = load_iris()
    x = jnp.asarray(iris.data[:, 2:], jnp.float32)
    y = jnp.asarray(iris.target == 0, jnp.float32)[:, None]
    model = fv.create_model("perceptron")
    params = model.init(jax.random.key(0), x)["params"]
    for _ in range(20):
        params, wrong = fv.models.perceptron_update(params, x, y)
    assert int(wrong) == 0
    np.testing.assert_array_equal(model.apply({"params": params}, x, threshold=True), y)


def test_the_perceptron_rule_checks_shapes():
    params = {"units": {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}}
    with pytest.raises(ValueError, match=r"x must be \[N, 2\] and y \[N, 1\]"):
        fv.models.perceptron_update(params, jnp.zeros((4, 3)), jnp.zeros((4, 1)))
