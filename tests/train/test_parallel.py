"""Compiling steps for several devices: donation, layouts and what moves between devices. See also test_step.py."""

import logging
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxvision as fv
from flaxvision.train import compile_steps, create_state, eval_step, jit_step, make_mesh, pmap_step, train_step

OBJECTIVE = fv.train.classification()
STEP = partial(train_step, objective=OBJECTIVE)
RNG = jax.random.key(7)
SAMPLE = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)
COMPILERS = [jit_step, pmap_step, partial(jit_step, shard_state=True)]
IDS = ["jit", "pmap", "sharded"]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Dense(128, name="hidden")(x.reshape((len(x), -1))))
        return nn.Dense(3, name="head")(x)


def batch_of(step=0, rows=16):
    rng = np.random.default_rng(step)
    return {
        "image": rng.normal(size=(rows, 6, 6, 2)).astype(np.float32),
        "label": rng.integers(0, 3, rows).astype(np.int32),
    }


def state_of():
    return create_state(Net(), optax.adam(0.01), jax.random.key(0), SAMPLE, ema_decay=0.9)


@pytest.mark.parametrize("compiled", COMPILERS, ids=IDS)
def test_a_train_step_frees_the_state_that_it_gets(compiled):
    """The second state has the layout of the step; the first one does not, and a copy of it would stay on device 0."""
    step = compiled(STEP)
    for state in (first := state_of(), step(jax.tree.map(jnp.copy, first), batch_of(), RNG)[0]):
        step(state, batch_of(), RNG)
        assert all(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("compiled", COMPILERS, ids=IDS)
def test_the_memory_of_the_state_is_reused(compiled):
    """XLA writes the new state into the buffers of the old one: all of its bytes are aliased."""
    step, state = compiled(STEP), state_of()
    state, _ = step(state, batch_of(), RNG)
    lowered = step.lower(state, batch_of(), RNG)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= held


@pytest.mark.parametrize("compiled", COMPILERS, ids=IDS)
def test_an_eval_step_keeps_the_state(compiled):
    step, state = compiled(partial(eval_step, objective=OBJECTIVE)), state_of()
    step(state, batch_of())
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("compiled", COMPILERS, ids=IDS)
def test_a_state_moves_once(compiled):
    step = compiled(STEP)
    state, _ = step(state_of(), batch_of(), RNG)
    assert step.place(state) is state
    wanted = jax.tree.leaves(step.state_sharding(state))
    assert [x.sharding for x in jax.tree.leaves(state)] == wanted


@pytest.mark.parametrize("compiled", COMPILERS, ids=IDS)
def test_a_placed_state_is_the_same(compiled):
    state = state_of()
    want = jax.device_get(state)
    placed = compiled(STEP).place(state, donate=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), want)


@pytest.mark.parametrize(("accumulate", "said"), [(2, False), (4, True)])
def test_parts_that_the_devices_do_not_divide_are_gathered_and_said(accumulate, said, caplog):
    """Parts of 8 rows stay on the 8 devices. Parts of 4 rows are not possible there: XLA gathers the whole batch."""
    state, batch = state_of(), batch_of()
    step = jit_step(partial(STEP, accumulate=accumulate))
    with caplog.at_level(logging.WARNING, "flaxvision"):
        text = step.lower(step.place(state), batch, RNG).compile().as_text()
    gathered = [int(rows) for rows in re.findall(r"f32\[(\d+),[\d,]*6,6,2\]\S* all-gather", text)]
    assert bool(gathered) == said
    message = (
        "accumulate=4 makes parts of 4 rows, which is not a multiple of 8 devices: each device receives the whole "
        "batch; use a batch size that is a multiple of 32"
    )
    assert caplog.messages == ([message] if said else [])


def test_steps_on_chosen_devices():
    mesh = make_mesh(jax.devices()[2:6])
    for parallel in ("jit", "pmap"):
        train, evaluate = compile_steps(OBJECTIVE, parallel=parallel, mesh=mesh)
        state, metrics = train(state_of(), batch_of(), RNG)
        assert all(x.devices() == set(jax.devices()[2:6]) for x in jax.tree.leaves((state, metrics)))
        assert float(evaluate(state, batch_of())["loss"].weight) == 16


def test_pmap_has_no_sharded_state():
    with pytest.raises(ValueError, match="shard_state must be False for parallel='pmap'"):
        compile_steps(OBJECTIVE, parallel="pmap", shard_state=True)
