"""Two processes that are killed at random moments and started again end in the bits of an uninterrupted run.

`FLAXVISION_KILLS=20 pytest -m slow tests/train/test_random_kills.py` kills more often than the default.
"""

import json
import os
import random
import signal
import time

import numpy as np
import pytest

from tests import multiprocess

PROGRAM = """
import time
import jax.numpy as jnp, numpy as np, optax
import flaxvision as fv

class Slow:  # so that kills hit the middle of the run
    first = None

    def on_step(self, step, state, metrics):
        if self.first is None:  # what is compiled before takes longer than the run
            self.first = step - 1
            print("started", self.first, flush=True)
        time.sleep(0.01)

folder = sys.argv[1]
digits = fv.data.load("digits", "train")
model = fv.create_model("mlp", features=(32,), num_classes=10)
transform = fv.data.augment.make_transform(mean=0.3, std=0.4)
train, measure = fv.train.compile_steps(fv.train.classification(), train_transform=transform, eval_transform=transform)
result = fv.train.fit_in_workdir(
    fv.train.open_workdir(folder, fv.train.RunSettings()),
    fv.train.create_state(model, optax.adam(1e-3), jax.random.key(0), jnp.zeros((1, 8, 8, 1)), ema_decay=0.99),
    train,
    fv.data.train_batches(digits, 64, seed=1),
    model="mlp",
    overrides={},
    num_steps=int(sys.argv[2]),
    rng=jax.random.key(2),
    evaluate=fv.train.Evaluation(measure, fv.data.eval_batches(digits, 512)),
    eval_every=100,
    checkpoint_every=10,
    callbacks=[Slow()],
)
leaves = [np.asarray(x) for x in jax.tree.leaves((result.state.params, result.state.opt_state, result.state.ema))]
if jax.process_index() == 0:
    np.savez(folder + "/final.npz", *leaves)
"""
BOUND = 60.0  # seconds that a process may outlive the other one


@pytest.mark.slow
def test_random_kills(tmp_path):
    kills = int(os.environ.get("FLAXVISION_KILLS", "4"))
    steps, chance = 200 + 100 * kills, random.Random(0)
    multiprocess.run(PROGRAM, 2, arguments=[tmp_path / "whole", steps])
    starts = []
    for number in range(kills):
        processes = multiprocess.start(PROGRAM, 2, arguments=[tmp_path / "killed", steps], start_timeout=40)
        if number % 4 == 3:  # while it starts, restores or compiles
            time.sleep(chance.uniform(0, 8))
        else:
            starts.append(started_at(processes[0]))
            time.sleep(chance.uniform(0, 3))  # the first checkpoint is complete after about 1.5 s
        targets = [processes[:1], processes[1:], processes][number % 3]
        for process in targets:
            process.send_signal(signal.SIGKILL)
        begin = time.monotonic()
        outputs = [process.communicate(timeout=BOUND) for process in processes]
        assert time.monotonic() - begin < BOUND
        for process, (_, errors) in zip(processes, outputs, strict=True):
            if process not in targets:
                assert process.returncode == 1, errors
                assert "error: " in errors
    multiprocess.run(PROGRAM, 2, arguments=[tmp_path / "killed", steps])
    assert starts[0] == 0
    assert starts == sorted(starts)  # nothing that was saved is lost
    assert starts[-1] > 0
    whole, killed = (np.load(tmp_path / name / "final.npz") for name in ("whole", "killed"))
    assert whole.files == killed.files
    for name in whole.files:
        np.testing.assert_array_equal(whole[name], killed[name])
    records = [strip(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert records[0] == records[1]


def started_at(process):
    """Returns the step at which a process starts, once it does."""
    for line in process.stdout:
        if line.startswith("started"):
            return int(line.split()[1])
    raise AssertionError(process.communicate()[1][-3000:])


def strip(path):
    """Returns the records without what depends on the time."""
    timing = ("time", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in path.read_text().splitlines()]
