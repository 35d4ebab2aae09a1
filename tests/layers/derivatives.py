"""Every derivative and transformation of a function, for comparison with the same function in plain lax."""

import contextlib
import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flaxvision.layers.lowering import convolution, gather, pooling, reductions, rows
from tests.models.smallest import QUICK

DEVICES = 2


@contextlib.contextmanager
def plain_lax(exact_max=True):
    """Replaces every form by its definition in plain lax, which JAX differentiates by its own rules.

    Args:
        exact_max: Compute max-pools by comparisons of slices. In float64, lax differentiates its own with reduced
            precision.
    """

    def call(form, *operands):
        return (
            slices_max(form, *operands) if exact_max and isinstance(form, pooling.MaxWindows) else form.plain(*operands)
        )

    modules = (convolution, gather, pooling, reductions, rows)
    kept = [module.call for module in modules]
    jax.clear_caches()
    try:
        for module in modules:
            module.call = call
        yield
    finally:
        for module, original in zip(modules, kept, strict=True):
            module.call = original
        jax.clear_caches()


def slices_max(form, x):
    """Computes `pooling.MaxWindows` by comparisons of slices. Random numbers have no ties."""
    x = jnp.pad(x, ((0, 0), *form.padding, (0, 0)), constant_values=-jnp.inf)
    sizes = zip(x.shape[1:-1], form.window, form.strides, strict=True)
    spans = [[slice(p, p + (n - k) // s * s + 1, s) for p in range(k)] for n, k, s in sizes]
    return functools.reduce(jnp.maximum, [x[(slice(None), *place)] for place in itertools.product(*spans)])


def drawn(like, seed, dtype=jnp.float64):
    """Standard normal numbers, shaped as the leaves of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype), like)


def transformed(function, params, x, without=()):
    """Applies every transformation to `function(params, x) -> y`, each of which is independent per row of `x`.

    Args:
        function: The function.
        params: Its parameters, a tree that may be empty.
        x: Its input.
        without: Names of transformations to leave out.

    Returns:
        A dict of results by the name of the transformation.
    """
    dp, dx = drawn((params, x), 1)
    g = drawn(jax.eval_shape(function, params, x), 2)

    def loss(params, x):
        return jnp.sum(jnp.sin(function(params, x)) * g)

    def line(t):
        moved = jax.tree.map(lambda a, b: a + t[0] * b, (params, x), (dp, dx))
        return function(moved[0], moved[1] + t[1] * dx[::-1])

    def dot(a, b):
        return sum(jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    def direction(params, x):
        return jax.jvp(loss, (params, x), (dp, dx))[1]

    grad = jax.grad(loss, (0, 1))
    origin = jnp.zeros(2)
    two, many = jnp.stack([x, dx]), jax.tree.map(lambda a, b: jnp.stack([a, b]), params, dp)
    results = {
        "value": lambda: function(params, x),
        "jvp": lambda: jax.jvp(function, (params, x), (dp, dx))[1],
        "linearize": lambda: jax.linearize(function, params, x)[1](dp, dx),
        "vjp": lambda: jax.vjp(function, params, x)[1](g),
        "jacfwd": lambda: jax.jacfwd(line)(origin),
        "jacrev": lambda: jax.jacrev(lambda t: line(t)[:1].reshape(-1)[:3])(origin),
        "forward over reverse": lambda: jax.jvp(grad, (params, x), (dp, dx))[1],
        "reverse over forward": lambda: jax.grad(direction, (0, 1))(params, x),
        "reverse over reverse": lambda: jax.grad(lambda p, x: dot(grad(p, x), (dp, dx)), (0, 1))(params, x),
        "vmap over x": lambda: jax.vmap(grad, (None, 0))(params, two),
        "vmap over both": lambda: jax.vmap(direction)(many, two),
        "scan": lambda: lax.scan(lambda carry, x: (carry, grad(params, x)), 0, two)[1],
        "checkpoint": lambda: jax.grad(jax.checkpoint(loss), (0, 1))(params, x),
    }
    if params:
        results["vmap over params"] = lambda: jax.vmap(grad, (0, None))(many, x)
    return {name: result() for name, result in results.items() if name not in without}


def over_devices(function, params, x):
    """The value, the gradients and a tangent over two devices, by `shard_map` with its check and by `pmap`."""
    dp, dx = drawn((params, x), 1)

    def local(params, x, dp, dx):
        def loss(params, x):
            return lax.psum(jnp.sum(jnp.sin(function(params, x))), "data")

        value, tangent = jax.jvp(loss, (params, x), (dp, dx))
        return value, tangent, jax.grad(loss, (0, 1))(params, x)

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    split = {"in_specs": (P(), P("data"), P(), P("data")), "out_specs": (P(), P(), (P(), P("data")))}
    local = jax.shard_map(local, mesh=mesh, check_vma=True, **split)
    sharded = jax.jit(local, compiler_options=QUICK)(params, x, dp, dx)

    def mapped(params, x):
        def loss(params, x):
            return jnp.sum(jnp.sin(function(params, x)))

        gradients = jax.grad(loss, (0, 1))(params, x)
        return lax.psum(loss(params, x), "data"), (lax.psum(gradients[0], "data"), gradients[1])

    rows = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), x)
    value, (of_params, of_x) = jax.pmap(mapped, "data", in_axes=(None, 0), devices=jax.devices()[:DEVICES])(
        params, rows
    )
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    return {"shard_map": sharded, "pmap": (first(value), (first(of_params), of_x.reshape(x.shape)))}


def exported(function, params, x):
    """The gradients and a tangent after an export for three platforms with a symbolic batch, on a CPU."""

    def run(params, x):
        loss = lambda params, x: jnp.sum(jnp.sin(function(params, x)))
        return jax.grad(loss, (0, 1))(params, x), jax.jvp(partial(loss, params), (x,), (x,))

    (n,) = export.symbolic_shape("n")
    like = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
    program = export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(params, like)
    assert program.platforms == ("cpu", "cuda", "tpu")
    return {"export": jax.jit(program.call, compiler_options=QUICK)(params, x)}
