"""One model of every family under every transformation, in float64, against plain lax that JAX differentiates itself."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from tests.layers.derivatives import drawn, exported, over_devices, plain_lax, transformed

# The model's fields, made small where the family has a choice, and the input's shape.
SMALL = {"stage_sizes": (1, 1), "features": (4, 8)}
FAMILIES = {
    "perceptron": ({}, (2, 4)),
    "mlp": ({"features": (5,)}, (2, 4, 4, 1)),
    "lenet5": ({}, (2, 32, 32, 1)),
    "lenet5_modern": ({}, (2, 32, 32, 1)),
    "lenet_dli": ({}, (2, 10, 10, 1)),
    "fashion_cnn": ({}, (2, 8, 8, 1)),
    "alexnet": ({"features": (4, 8, 4, 4, 4), "hidden_features": 8}, (2, 67, 67, 3)),
    "zfnet": ({"features": (4, 8, 4, 4, 4), "hidden_features": 8}, (2, 63, 63, 3)),
    "vgg11_bn": ({"stage_sizes": (1, 1), "features": (4, 8), "hidden_features": 8}, (2, 14, 14, 3)),
    "googlenet": ({}, (2, 33, 33, 3)),
    "googlenet_bn": ({}, (2, 33, 33, 3)),
    "bn_inception": ({}, (2, 33, 33, 3)),
    "inception_v3": ({}, (2, 75, 75, 3)),
    "inception_v4": ({}, (2, 75, 75, 3)),
    "inception_resnet_v2": ({}, (2, 75, 75, 3)),
    "resnet50": (SMALL, (2, 17, 17, 3)),
    "resnet20_cifar": (SMALL, (2, 9, 9, 3)),
    "xception": ({}, (2, 33, 33, 3)),
    "se_resnet50": (SMALL | {"reduction": 4}, (2, 17, 17, 3)),
    "squeezenet1_0": ({}, (2, 33, 33, 3)),
    "mobilenet_v2": ({"width_multiplier": 0.25}, (2, 33, 33, 3)),
    "capsnet": ({"conv_features": 4, "primary_features": 2, "capsule_dim": 4}, (2, 19, 19, 1)),
}
FIXED = ("googlenet", "googlenet_bn", "bn_inception", "inception_v3", "inception_v4", "inception_resnet_v2", "xception")


@functools.cache
def function_of(name):
    """The model as `f(params, x)`, its parameters and an input."""
    fields, shape = FAMILIES[name]
    model = fv.create_model(name, num_classes=3, **fields)
    x = drawn(jax.ShapeDtypeStruct(shape, jnp.float32), 0)
    variables = dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x))
    rng = np.random.default_rng(1)

    def leaf(path, like):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, like.shape))
        fan_in = math.prod(like.shape[:-1]) if path[-1].key == "kernel" else 1
        return jnp.asarray(rng.standard_normal(like.shape) * (2 / fan_in) ** 0.5)

    variables = jax.tree_util.tree_map_with_path(leaf, variables)
    params = variables.pop("params")
    return (lambda params, x: model.apply({"params": params, **variables}, x)), params, x


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_transformation(name):
    with jax.enable_x64(True):
        function, params, x = function_of(name)
        got = jax.jit(lambda params, x: transformed(function, params, x))(params, x)
        with plain_lax():
            want = jax.jit(lambda params, x: transformed(function, params, x))(params, x)
        for key in want:
            chex.assert_trees_all_close(got[key], want[key], rtol=1e-9, atol=1e-9, custom_message=key)
