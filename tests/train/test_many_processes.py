"""The same run in one process and in several: parameters, running statistics and evaluations agree."""

import json
import os

import numpy as np
import pytest

from tests import multiprocess

# The program of every process: 12 steps with BatchNorm, dropout and augmentation, then an evaluation with padding.
PROGRAM = """
import json
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

import flaxvision as fv
from flaxvision.train import create_state, eval_step, jit_step, pmap_step, train_step


class Net(nn.Module):
    axis_name: str | None = None
    dropout_rate: float = 0.5

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(64, (3, 3), name="conv1")(x)
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name if train else None, name="norm")(x)
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv2")(x)).reshape((len(x), -1))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(10, name="head")(x)


def train(compiled, augmented, axis_name, steps=12):
    source = fv.data.subset(fv.data.load("digits", "train"), np.arange(203), "part")
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = fv.data.train_batches(source, 16, seed=3, **share)
    a = fv.data.augment
    ops = (partial(a.random_shift, max_shift=1), a.random_flip) if augmented else ()
    transform = a.make_transform(*ops, size=(8, 8), mean=(0.3,), std=(0.4,))
    model = Net(axis_name, 0.5 if augmented else 0.0)
    sample = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    state = create_state(model, optax.sgd(0.02, 0.9), jax.random.key(0), sample, ema_decay=0.9)
    objective = fv.train.classification()
    step = compiled(partial(train_step, objective=objective, transform=transform))
    measure = compiled(partial(eval_step, objective=objective, transform=transform))
    rng, losses = jax.random.key(5), []
    with batches.from_step(0) as iterator:
        for batch in fv.train.prefetch((next(iterator) for _ in range(steps)), step.batch_sharding):
            state, metrics = step(state, batch, rng)
            losses.append(float(metrics["loss"].compute()))
    values = fv.train.evaluate(state, measure, fv.data.eval_batches(source, 16, **share))
    merged = None
    for batch in fv.data.eval_batches(source, 16, **share):
        merged = fv.metrics.merge(merged, fv.metrics.to_host(measure(state, batch)))
    everywhere = all(len(x.sharding.device_set) == jax.device_count() for x in jax.tree.leaves(state))
    state = jit_step(train_step).place(state)  # a process cannot read the parts that others hold
    leaves = jax.device_get((state.params, state.collections, state.ema))
    flat = jax.tree_util.tree_leaves_with_path(leaves)
    return {
        "state": {jax.tree_util.keystr(path): np.asarray(x).ravel()[:500].tolist() for path, x in flat},
        "sums": {jax.tree_util.keystr(path): float(np.abs(x).sum()) for path, x in flat},
        "losses": losses,
        "values": {name: float(value) for name, value in values.items()},
        "counted": float(merged["loss"].weight),
        "everywhere": everywhere,
    }


def main():
    return {
        "jit": train(jit_step, True, None),
        "sharded": train(partial(jit_step, shard_state=True), True, None),
        "pmap": train(pmap_step, True, "data"),
        "plain pmap": train(pmap_step, False, "data"),
        "plain jit": train(jit_step, False, None),
    }
"""


WRITE = """
with open(f"{sys.argv[1]}/{jax.process_index()}.json", "w") as file:
    json.dump(main(), file)
"""


def results(path, count, devices):
    path.mkdir()
    multiprocess.run(PROGRAM + WRITE, count, devices, arguments=[path], timeout=900)  # a pipe is too small
    return [json.loads((path / f"{index}.json").read_text()) for index in range(count)]


def check(got, want, tolerance=1e-5):
    assert got["state"].keys() == want["state"].keys()
    for name, values in want["state"].items():
        np.testing.assert_allclose(got["state"][name], values, atol=tolerance, err_msg=name)
        assert got["sums"][name] == pytest.approx(want["sums"][name], rel=1e-5, abs=1e-4), name
    np.testing.assert_allclose(got["losses"], want["losses"], atol=tolerance)
    assert got["values"] == pytest.approx(want["values"], rel=1e-5)
    assert got["counted"] == want["counted"] == 203
    assert got["everywhere"]


@pytest.mark.slow
def test_several_processes_give_the_results_of_one(tmp_path):
    """4 devices in 1, 2 and 4 processes; with FLAXVISION_LONG=1 also 8 devices in 4 processes."""
    cases = [(2, 2), (4, 1), *([(4, 2)] if os.environ.get("FLAXVISION_LONG") else [])]
    alone = {total: results(tmp_path / f"1x{total}", 1, total)[0] for total in {a * b for a, b in cases}}
    for count, devices in cases:
        one = alone[count * devices]
        for got in results(tmp_path / f"{count}x{devices}", count, devices):
            for name in ("jit", "sharded"):
                check(got[name], one["jit"])
            # Under pmap, dropout and augmentation draw by device; without them it agrees with jit.
            check(got["pmap"], one["pmap"])
            check(got["plain pmap"], one["plain jit"])
            check(got["plain jit"], one["plain jit"])
    assert one["jit"]["losses"] != one["plain jit"]["losses"]


DIFFERENT = """
import jax.numpy as jnp, optax, numpy as np
from functools import partial
import flaxvision as fv
seed = jax.process_index() if sys.argv[1] == "seed" else 0
model = fv.create_model("mlp", features=(8,), num_classes=3)
sample = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
state = fv.train.create_state(model, optax.sgd(0.1), jax.random.key(seed), sample)
compiled = fv.train.pmap_step if sys.argv[2] == "pmap" else fv.train.jit_step
step = compiled(partial(fv.train.train_step, objective=fv.train.classification()))
batch = {"image": np.ones((2, 4, 4, 1), np.float32), "label": np.zeros(2, np.int32)}
try:
    step(state, batch, jax.random.key(0))
    print("trained")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_processes_that_start_from_different_states_are_told(parallel):
    outputs = multiprocess.run(DIFFERENT, 2, arguments=["seed", parallel])
    for output in outputs:
        assert "the state must be the same in all processes; got different values of params/" in output
        assert "in processes 0 and 1" in output
        assert "trained" not in output
    outputs = multiprocess.run(DIFFERENT, 2, arguments=["same", parallel])
    for output in outputs:
        assert "trained" in output, output  # a line of Gloo may come between the word and the end of its line
