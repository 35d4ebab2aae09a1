"""One model of every family under every transformation, in float64, against plain lax under JAX's own rules."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from tests.layers.derivatives import drawn, exported, over_devices, plain_lax, transformed

# Fields that make the model small, and the shape of the input. Deep networks of fixed widths end after two stages.
EARLY = {"stages": ("stage1", "stage2")}
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
    "googlenet": (EARLY, (2, 17, 17, 3)),
    "googlenet_bn": (EARLY, (2, 17, 17, 3)),
    "bn_inception": (EARLY, (2, 17, 17, 3)),
    "inception_v3": (EARLY, (2, 75, 75, 3)),
    "inception_v4": (EARLY, (2, 75, 75, 3)),
    "inception_resnet_v2": (EARLY, (2, 75, 75, 3)),
    "resnet50": (SMALL, (2, 17, 17, 3)),
    "resnet20_cifar": (SMALL, (2, 9, 9, 3)),
    "xception": (EARLY, (2, 17, 17, 3)),
    "se_resnet50": (SMALL | {"reduction": 4}, (2, 17, 17, 3)),
    "squeezenet1_0": ({}, (2, 33, 33, 3)),
    "mobilenet_v2": (EARLY | {"width_multiplier": 0.25}, (2, 17, 17, 3)),
    "capsnet": ({"conv_features": 4, "primary_features": 2, "capsule_dim": 4}, (2, 19, 19, 1)),
}


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


# What the layers' tests repeat with other operands.
WITHOUT = ("reverse over reverse", "vmap over params", "vmap over both")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using reduced precision")  # of an exported max-pool, which is float64 here
@pytest.mark.parametrize("name", FAMILIES)
def test_every_transformation(name):
    close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-9, atol=1e-9)
    with jax.enable_x64(True):
        function, params, x = function_of(name)
        got = jax.jit(lambda params, x: transformed(function, params, x, WITHOUT))(params, x)
        devices, program = over_devices(function, params, x), exported(function, params, x)
        with plain_lax():
            want = jax.jit(lambda params, x: transformed(function, params, x, WITHOUT))(params, x)
            loss = lambda params, x: jnp.sum(jnp.sin(function(params, x)))
            dp, dx = drawn((params, x), 1)
            value, tangent = jax.jit(lambda params, x: jax.jvp(loss, (params, x), (dp, dx)))(params, x)
            of_x = jax.jit(lambda params, x: jax.jvp(lambda x: loss(params, x), (x,), (x,)))(params, x)
            gradients = jax.jit(jax.grad(loss, (0, 1)))(params, x)
        close(got, want)
        close(devices, {"shard_map": (value, tangent, gradients), "pmap": (value, gradients)})
        close(program, {"export": (gradients, of_x)})
