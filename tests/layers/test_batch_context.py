"""What BatchNorm learns of a batch, through every transformation of JAX and Flax."""

import threading
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from flaxvision.layers import BatchContext, BatchNorm, batch_context
from flaxvision.layers.batch_context import current_batch
from flaxvision.layers.lowering import channel_sum
from flaxvision.layers.normalization import _standardize

X = np.random.default_rng(0).normal(size=(8, 3, 2, 4)).astype(np.float32) + np.arange(8, dtype=np.float32).reshape(
    -1, 1, 1, 1
)
MASK = np.array([1, 1, 0, 1, 1, 0, 0, 1], np.float32)
OTHER = 1 - MASK
NORM = BatchNorm(use_running_average=False, momentum=0.5)
VARIABLES = NORM.init(jax.random.key(0), X)


def normalized(mask):
    real = X[mask > 0]
    return (X - real.mean((0, 1, 2))) / np.sqrt(real.var((0, 1, 2)) + 1e-5)


def apply(x, norm=NORM):
    return norm.apply(VARIABLES, x, mutable=["batch_stats"])[0]


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_context():
    assert current_batch() == BatchContext(None, None, 1)
    with batch_context(axis_name="data"):
        with batch_context(shards=4) as inner:
            assert inner == current_batch() == BatchContext(None, "data", 4)
        found = []
        thread = threading.Thread(target=lambda: found.append(current_batch()))
        thread.start()
        thread.join()
        assert found == [BatchContext()]
        assert current_batch().shards == 1
    with pytest.raises(TypeError, match="masks"), batch_context(masks=None):
        pass
    assert current_batch() == BatchContext()


@jax.jit
def jitted(x):
    return apply(x)


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(BatchNorm)(use_running_average=False, momentum=0.5, name="norm")(x)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(BatchNorm)(use_running_average=False, momentum=0.5, name="norm")(x)


def nested(module, x):
    variables = {collection: {"norm": leaves} for collection, leaves in VARIABLES.items()}
    return module.apply(variables, x, mutable=["batch_stats"])[0]


WAYS = {
    "op by op": apply,
    "jit": jitted,
    "checkpoint": jax.checkpoint(apply),
    "remat": partial(nested, Remat()),
    "nn.jit": partial(nested, Jitted()),
    "scan": lambda x: jax.lax.scan(lambda carry, _: (carry, apply(x)), 0, None, length=2)[1][1],
    "map": lambda x: jax.lax.map(apply, x[None])[0],
    "vmap": lambda x: jax.vmap(apply)(jnp.stack([x, 2 * x]))[0],
    "grad": lambda x: jax.grad(lambda x: (apply(x) * x).sum(), has_aux=False)(x) * 0 + apply(x),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_mask_reaches_the_layer(way):
    """A second mask too: no transformation may remember the first one, nor its tracer."""

    @jax.jit
    def run(x, mask):
        with batch_context(mask=mask):
            first = WAYS[way](x)
            gradient = jax.grad(lambda x: jnp.sin(WAYS[way](x)).sum())(x)
        return first, gradient

    for mask in (MASK, OTHER):
        got, gradient = run(X, mask)
        close(got, normalized(mask))
        # A padded row moves no statistic, so its gradient is that of its own normalization alone.
        deviation = np.sqrt(X[mask > 0].var((0, 1, 2)) + 1e-5)
        close(gradient[mask == 0], (np.cos(normalized(mask)) / deviation)[mask == 0])
    whole = jax.jit(lambda x: WAYS[way](x))(X)
    close(whole, normalized(np.ones(8)))
    with batch_context(mask=OTHER):
        close(jax.jit(lambda x: WAYS[way](x))(X), normalized(OTHER))


def test_the_nnx_bridge():
    model = nnx.bridge.ToNNX(BatchNorm(momentum=0.5), rngs=nnx.Rngs(0)).lazy_init(X, use_running_average=True)

    @nnx.jit
    def run(model, x):
        return model(x, use_running_average=False, mutable=["batch_stats"])

    for mask in (MASK, OTHER):
        with batch_context(mask=mask):
            found = run(model, X)
        close(found[0] if isinstance(found, tuple) else found, normalized(mask))


def test_rows_of_another_batch():
    with batch_context(mask=MASK):
        with pytest.raises(ValueError, match=r"x must have the 8 rows of the batch's mask .*; got \(6, 3, 2, 4\)"):
            apply(X[:6])
        with batch_context(mask=None):
            apply(X[:6])


class Before(nn.Module):
    """Synchronised BatchNorm without padding, and nothing else."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        mean, var = (self.variable("batch_stats", name, jnp.zeros, (4,), jnp.float32) for name in ("mean", "var"))
        scale, bias = (self.param(name, nn.initializers.zeros, (4,), jnp.float32) for name in ("scale", "bias"))
        moments = jnp.stack([channel_sum(x), channel_sum(jnp.square(x))]) / (x.size // x.shape[-1])
        if self.axis_name is not None:
            moments = jax.lax.pmean(moments, self.axis_name)
        m, square = moments
        v = jnp.maximum(0.0, square - jnp.square(m))
        mean.value = 0.5 * mean.value + (1 - 0.5) * m
        var.value = 0.5 * var.value + (1 - 0.5) * v
        return _standardize(1e-5, x.dtype, x, m, v, scale, bias)


def program(norm, context, axis_name=None):
    def loss(variables, x):
        with batch_context(**context):
            y, updates = norm.apply(variables, x, mutable=["batch_stats"])
        return jnp.sin(y).sum(), updates

    run = jax.grad(loss, argnums=(0, 1), has_aux=True)
    if axis_name is None:
        return jax.jit(run).lower(VARIABLES, X).as_text()
    return jax.pmap(run, axis_name, in_axes=(None, 0)).lower(VARIABLES, X.reshape(4, 2, *X.shape[1:])).as_text()


def test_synchronised_without_padding_costs_nothing():
    """The program is that of a BatchNorm which knows no modes."""
    want = program(Before(), {})
    for context in ({}, {"shards": 8}, {"mask": None}):
        assert program(NORM, context) == want
    mapped = program(Before(axis_name="data"), {}, "data")
    assert program(NORM, {"axis_name": "data"}, "data") == mapped
    assert program(NORM.clone(axis_name="data"), {}, "data") == mapped
    assert program(NORM, {"mask": MASK}) != want


@pytest.mark.parametrize("fields", [{"mode": "local"}, {"mode": "ghost", "ghost_size": 2}], ids=["local", "ghost"])
def test_local_statistics_stay_on_their_device(fields):
    """Output and gradient of the rows of a device need no other device."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def run(norm, x, mask):
        def loss(x):
            with batch_context(mask=mask, shards=4):
                y = apply(x, norm)
            return jnp.sin(y).sum(), y

        return jax.grad(loss, has_aux=True)(x)

    def collectives(norm):
        lowered = jax.jit(partial(run, norm), in_shardings=rows, out_shardings=rows).lower(X, MASK)
        text = lowered.compile().as_text()
        return [name for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if name in text]

    assert collectives(NORM) == ["all-reduce"]
    assert collectives(NORM.clone(**fields)) == []


@pytest.mark.parametrize("mode", ["sync", "ghost"])
def test_derivatives_with_padding(mode):
    """Both modes of differentiation, twice, against finite differences in float64."""
    with jax.enable_x64(True):
        norm = BatchNorm(use_running_average=False, mode=mode, ghost_size=4 if mode == "ghost" else None)
        x, mask = jnp.asarray(X[:, :1, :, :2], jnp.float64), MASK

        variables = norm.init(jax.random.key(0), x)

        @jax.jit
        def run(x):
            with batch_context(mask=mask):
                return norm.apply(variables, x, mutable=["batch_stats"])[0]

        check_grads(run, (x,), order=2, modes=("fwd", "rev"), eps=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "global"}, "mode must be one of sync, local, ghost, frozen; got 'global'"),
        ({"mode": "ghost"}, "ghost_size must be at least 1 for mode='ghost'; got None"),
        ({"mode": "ghost", "ghost_size": 0}, "ghost_size must be at least 1 for mode='ghost'; got 0"),
        ({"ghost_size": 2}, "ghost_size must be None unless mode is 'ghost'; got 2 for 'sync'"),
    ],
)
def test_modes_that_do_not_exist(fields, message):
    with pytest.raises(ValueError, match=message):
        BatchNorm(**fields)
