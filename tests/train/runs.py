"""A small run that trains, evaluates and saves, for the tests of the loop."""

import json
import os
import signal
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flaxvision as fv
from flaxvision.train import JsonlWriter, create_state, eval_step, fit, jit_step, make_mesh, train_step


class Net(nn.Module):
    """BatchNorm and dropout: everything that a resume could lose."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(not train, momentum=0.9, name="norm")(x.reshape((len(x), -1)))
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(nn.Dense(8, name="hidden")(x)))
        return nn.Dense(3, name="head")(x)


SOURCE = fv.data.ArraySource(
    np.random.default_rng(0).normal(size=(50, 2, 2, 1)).astype(np.float32), np.random.default_rng(1).integers(0, 3, 50)
)
OBJECTIVE = fv.train.classification()
MESH = make_mesh(jax.devices()[:1])
STEP = jit_step(partial(train_step, objective=OBJECTIVE), MESH)
EVAL = jit_step(partial(eval_step, objective=OBJECTIVE, use_ema=True), MESH)
RNG = jax.random.key(3)


class Seen:
    """A source that records which rows were read and runs `action` when the batch of step `at` is asked for."""

    def __init__(self, at=None, action=None):
        self.rows, self.at, self.action = [], at, action
        self.inner = fv.data.train_batches(SOURCE, 16, seed=5)
        self.fingerprint = self.inner.fingerprint

    def from_step(self, step):
        for i, batch in enumerate(self.inner.from_step(step), step):
            if i == self.at:
                self.action()
            self.rows.append((i, batch["image"].tobytes()))
            yield batch


def state_of():
    tx = fv.train.optimizer("adam", fv.train.schedule("cosine", 0.05, 20))
    return create_state(Net(), tx, jax.random.key(0), jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32), ema_decay=0.9)


def run(folder, data=None, num_steps=20, keep_latest=10, step=STEP, **options):
    fv.train.stopping.clear()  # as a new process
    data = data or Seen()
    evaluate = fv.train.Evaluation(EVAL, fv.data.eval_batches(SOURCE, 16))
    options = {"eval_every": 5, "log_every": 4, "writers": [JsonlWriter(folder / "metrics.jsonl")]} | options
    with fv.checkpoint.Checkpoints(
        folder / "checkpoints", manifest={"data": data.fingerprint}, keep_latest=keep_latest
    ) as checkpoints:
        return fit(
            state_of(), step, data, num_steps=num_steps, rng=RNG, checkpoints=checkpoints,
            **{"evaluate": evaluate} | options,
        )  # fmt: skip


def bits(state):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): (x.dtype, x.shape, np.asarray(x).tobytes()) for path, x in leaves}


def records_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing may handle it."""


def killed_in_step(number):
    def step(*args):
        if int(args[0].step) == number:
            raise KilledError
        return STEP(*args)

    return step


class InEvaluation:
    """An evaluation that runs `action` at its call number `number`."""

    def __init__(self, number, action):
        self.number, self.action, self.calls = number, action, 0

    def __call__(self, state):
        self.calls += 1
        if self.calls == self.number:
            self.action()
        return fv.train.evaluate(state, EVAL, fv.data.eval_batches(SOURCE, 16))


def raising(error):
    def action():
        raise error

    return action


def interrupted_after(last):
    def step(*args):
        if int(args[0].step) == last - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return STEP(*args)

    return step
