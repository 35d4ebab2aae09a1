"""The sharded state: its layout, its memory and its results."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import flaxvision as fv
from flaxvision.train import create_state, eval_step, jit_step, make_mesh, state_sharding, train_step
from flaxvision.train.sharding import place, release

OBJECTIVE = fv.train.classification()
STEP = partial(train_step, objective=OBJECTIVE)
RNG = jax.random.key(7)
SAMPLE = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(48, (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="conv2")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape((len(x), -1)))
        return nn.Dense(10, name="head")(x)


def batch_of(step=0, rows=16):
    rng = np.random.default_rng(step)
    return {
        "image": rng.normal(size=(rows, 8, 8, 3)).astype(np.float32),
        "label": rng.integers(0, 10, rows).astype(np.int32),
    }


def state_of():
    return create_state(Net(), optax.adam(0.01), jax.random.key(0), SAMPLE, ema_decay=0.9)


def bytes_on(device, tree):
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)


def test_the_largest_dimension_that_the_devices_divide_is_split():
    mesh = make_mesh()
    shapes = {
        "kernel": (3, 3, 64, 128),
        "square": (512, 512),
        "tall": (25088, 4096),
        "odd": (4097, 16),
        "indivisible": (4097, 5),
        "small": (64,),
        "scalar": (),
    }
    state = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    got = {name: sharding.spec for name, sharding in state_sharding(state, mesh).items()}
    assert got == {
        "kernel": P(None, None, None, "data"),
        "square": P(None, "data"),
        "tall": P("data"),
        "odd": P(None, "data"),
        "indivisible": P(),
        "small": P(),
        "scalar": P(),
    }
    assert state_sharding(state, mesh, small=1)["small"].spec == P("data")
    assert state_sharding(state, make_mesh(jax.devices()[:1]))["tall"].spec == P()


@pytest.mark.slow
def test_the_results_are_those_of_a_replicated_state():
    whole, split = jit_step(STEP), jit_step(STEP, shard_state=True)
    measure = [jit_step(partial(eval_step, objective=OBJECTIVE, use_ema=True), shard_state=s) for s in (False, True)]
    a, b = state_of(), state_of()
    for i in range(6):
        a, ma = whole(a, batch_of(i), RNG)
        b, mb = split(b, batch_of(i), RNG)
    kernel = b.params["conv2"]["kernel"]
    assert kernel.sharding.spec == P(None, None, None, "data")
    assert b.opt_state[0].mu["conv2"]["kernel"].sharding == kernel.sharding
    assert b.ema["params"]["conv2"]["kernel"].sharding == kernel.sharding
    for x, y in zip(jax.tree.leaves(jax.device_get((a, ma))), jax.tree.leaves(jax.device_get((b, mb))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    want, got = (fv.metrics.compute(step(s, batch_of(9))) for step, s in zip(measure, (a, b), strict=True))
    assert got == pytest.approx(want, rel=1e-5)
    # A state passes from one layout to the other.
    c, _ = whole(split(whole(state_of(), batch_of(0), RNG)[0], batch_of(1), RNG)[0], batch_of(2), RNG)
    assert int(c.step) == 3


def test_initialization_in_parts():
    mesh = make_mesh()
    create = partial(create_state, Net(), optax.adam(0.01), jax.random.key(0), SAMPLE, ema_decay=0.9)
    state = jax.jit(create, out_shardings=state_sharding(jax.eval_shape(create), mesh))()
    step = jit_step(STEP, mesh, shard_state=True)
    assert step.place(state) is state
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), jax.device_get(state), jax.device_get(create()))


def test_no_device_holds_two_states():
    """Although the caller still has a reference to the first one."""
    for shard_state, share in ((False, 1), (True, 1 / 8)):
        step, state = jit_step(STEP, shard_state=shard_state), state_of()
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        placed = step.place(state, donate=True)
        copied = zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
        assert all(x.is_deleted() for x, y in copied if not y.is_fully_replicated)
        assert bytes_on(jax.devices()[0], placed) < 1.5 * share * size  # small arrays stay whole
        values = jax.device_get(placed)
        release(placed)
        assert all(x.is_deleted() for x in jax.tree.leaves(placed))
        restored = place(values, step.state_sharding(values))
        assert step.place(restored) is restored


def test_states_of_one_structure_and_other_shapes_have_layouts_of_their_own():
    step = jit_step(lambda state, batch: jax.tree.map(jnp.sum, state), shard_state=True)
    for shape, spec in (((8, 1024), P(None, "data")), ((4096, 3), P("data")), ((5, 7), P())):
        state = {"w": jnp.ones(shape)}
        assert step.place(state)["w"].sharding.spec == spec
        assert int(step(state, batch_of())["w"]) == np.prod(shape)


@pytest.mark.slow
def test_the_memory_of_vgg16_per_device_falls_with_the_number_of_devices():
    model = fv.create_model("vgg16", num_classes=1000)
    sample = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    create = partial(create_state, model, optax.sgd(0.1, momentum=0.9), jax.random.key(0), sample, ema_decay=0.99)
    state = jax.eval_shape(create)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    # One row a device, so that the activations of a device do not change with the number of devices.
    batch = {
        "image": jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    whole, split = (
        jit_step(STEP, shard_state=shard_state).lower(state, batch, RNG).compile().memory_analysis()
        for shard_state in (False, True)
    )
    assert whole.argument_size_in_bytes == pytest.approx(size, rel=0.01)
    assert split.argument_size_in_bytes == pytest.approx(size / 8, rel=0.01)
    # With gradients, activations and parameters that are collected for their layer; on a CPU, `peak_memory_in_bytes`
    # counts the arguments only. What does not fall are the activations, and the gradients until they are summed.
    peak = [m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
            for m in (whole, split)]  # fmt: skip
    assert peak[1] < peak[0] / 2
