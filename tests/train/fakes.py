"""Steps, data, writers and checkpoints without a model, for the tests of the loop."""

from types import SimpleNamespace

import jax
import numpy as np

from flaxvision import metrics as fm
from flaxvision.train import fit

START = SimpleNamespace(step=0)
LOSS = {"loss": fm.Mean(np.float32(1), np.float32(2))}


class Data:
    """`length` batches; then the data end, or `error` is raised."""

    def __init__(self, length=1000, error=None):
        self.length, self.error = length, error

    def from_step(self, step):
        for _ in range(step, self.length):
            yield {"image": np.zeros((2, 1))}
        if self.error:
            raise self.error


class Writer:
    def __init__(self):
        self.steps = []

    def start(self, step):
        pass

    def write(self, record):
        self.steps.append(record["step"])

    def close(self):
        self.steps.append("closed")


def metrics_step(state, batch, rng, metrics=LOSS):
    return state, metrics


def raising_after(last, error):
    done = iter(range(last))

    def step(state, batch, rng):
        if next(done, None) is None:
            raise error
        return state, LOSS

    return step


def run(step=metrics_step, data=None, **options):
    options = {"num_steps": 10, "log_every": 2, "rng": jax.random.key(0)} | options
    return fit(START, step, data or Data(), **options)


class Saves:
    """Checkpoints that only count; `error` is that of a save in the background."""

    latest_step = None

    def __init__(self):
        self.steps, self.amended, self.error = [], [], None

    def restore(self, template):
        return None

    def save(self, step, state, *, progress, metrics):
        self.steps.append(step)

    def amend(self, step, *, progress, metrics):
        self.amended.append((step, progress["evaluation_due"], metrics))

    def check(self):
        if self.error:
            raise self.error

    wait = check
