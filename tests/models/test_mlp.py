"""The multilayer perceptron, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv


@pytest.mark.parametrize("activation", ["relu", "selu", "tanh", "logistic"])
def test_mlp_against_numpy(activation):
    model = fv.create_model("mlp", features=(6, 5), num_classes=3, activation=activation)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 1)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    functions = {
        "relu": lambda z: np.maximum(z, 0),
        "tanh": np.tanh,
        "logistic": lambda z: 1 / (1 + np.exp(-z)),
        "selu": lambda z: 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * (np.exp(z) - 1)),
    }
    y = np.asarray(x).reshape(4, 4)
    for layer in ("hidden1", "hidden2"):
        p = variables["params"][layer]
        y = functions[activation](y @ np.asarray(p["kernel"]) + np.asarray(p["bias"]))
    p = variables["params"]["head"]
    np.testing.assert_allclose(
        model.apply(variables, x), y @ np.asarray(p["kernel"]) + np.asarray(p["bias"]), rtol=2e-5, atol=1e-6
    )


def test_mlp_refuses_another_activation():
    with pytest.raises(ValueError, match="one of relu, selu, tanh, logistic; got 'gelu'"):
        fv.create_model("mlp", activation="gelu").init(jax.random.key(0), jnp.zeros((1, 4)))
