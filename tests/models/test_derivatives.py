"""One model of every family under every transformation, in float64, against plain lax under JAX's own rules."""

import chex
import jax
import jax.numpy as jnp
import pytest

import flaxvision as fv
from tests.layers.derivatives import drawn, exported, over_devices, plain_lax, transformed
from tests.models.smallest import QUICK, SMALLEST, filled, sample_of


def name_of_each_family():
    return list({type(fv.create_model(name)): name for name in SMALLEST}.values())


def function_of(name):
    """The model as `f(params, x)`, its parameters and an input. Backbones end after their second stage."""
    size, fields, _ = SMALLEST[name]
    backbone = getattr(fv.create_model(name, **fields), "backbone", None)
    early = {"stages": tuple(backbone.strides)[:2]} if backbone else {}
    model = fv.create_model(name, num_classes=3, **fields, **early)
    like = sample_of(size, fv.model_info(name).channels)
    variables = dict(filled(jax.eval_shape(model.init, jax.random.key(0), like)))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
    params = variables.pop("params")
    return (lambda params, x: model.apply({"params": params, **variables}, x)), params, drawn(like, 0)


# What the layers' tests do, and what others imply for a whole network: `linearize`, `jacfwd` and `jacrev` are `jvp` and
# `vjp` with `vmap`.
WITHOUT = (
    *("reverse over reverse", "reverse over forward", "vmap over params", "vmap over both"),
    *("linearize", "jacfwd", "jacrev", "scan"),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using reduced precision")  # of an exported max-pool, which is float64 here
@pytest.mark.parametrize("name", name_of_each_family())
def test_every_transformation(name):
    close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-9, atol=1e-9)
    with jax.enable_x64(True):
        function, params, x = function_of(name)
        run = lambda params, x: transformed(function, params, x, WITHOUT)
        got = jax.jit(run, compiler_options=QUICK)(params, x)
        devices, program = over_devices(function, params, x), exported(function, params, x)
        with plain_lax():
            want = jax.jit(lambda params, x: run(params, x), compiler_options=QUICK)(params, x)
            loss = lambda params, x: jnp.sum(jnp.sin(function(params, x)))
            dp, dx = drawn((params, x), 1)

            def plain(params, x):
                forward = jax.jvp(loss, (params, x), (dp, dx))
                return forward, jax.jvp(lambda x: loss(params, x), (x,), (x,)), jax.grad(loss, (0, 1))(params, x)

            (value, tangent), of_x, gradients = jax.jit(plain, compiler_options=QUICK)(params, x)
        close(got, want)
        close(devices, {"shard_map": (value, tangent, gradients), "pmap": (value, gradients)})
        close(program, {"export": (gradients, of_x)})
