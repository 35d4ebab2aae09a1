"""What the loop does with its records, its data and its metrics when something goes wrong."""

import os
import re
import signal
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from flaxvision import metrics as fm
from flaxvision.train import evaluate, monitor
from tests.train.fakes import LOSS, Data, Writer, metrics_step, raising_after, run


@pytest.fixture
def slow(monkeypatch):
    """Makes a record ready only when the loop waits for it."""
    fetch = monitor._fetch

    def late(*args):
        time.sleep(0.2)
        return fetch(*args)

    monkeypatch.setattr(monitor, "_fetch", late)


@pytest.mark.parametrize("where", ["step", "data"])
def test_an_error_loses_no_record(slow, where):
    writer, error = Writer(), OSError("damaged")
    step = raising_after(5, error) if where == "step" else metrics_step
    with pytest.raises(OSError, match="damaged") as raised:
        run(step, Data(5, error) if where == "data" else Data(), writers=[writer])
    assert raised.value is error
    assert not hasattr(error, "__notes__")
    assert writer.steps == [2, 4, "closed"]


def test_a_second_interrupt_loses_no_record(monkeypatch):
    """The second SIGINT arrives where it is most likely: while the loop waits for the values of a record."""
    writer, fetch, waits = Writer(), monitor._fetch, []

    def late(*args):
        waits.append(True)
        if len(waits) == 2:
            time.sleep(0.1)  # by now the loop waits for this record, the last one
            for _ in range(2):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.1)
        return fetch(*args)

    monkeypatch.setattr(monitor, "_fetch", late)
    with pytest.raises(KeyboardInterrupt):
        run(num_steps=4, writers=[writer])
    assert writer.steps == [2, 4, "closed"]


def test_an_interrupt_in_a_step_loses_no_record(slow):
    writer = Writer()

    def step(state, batch, rng):
        if not writer.steps and len(batches) == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        batches.append(batch)
        return state, LOSS

    batches = []
    with pytest.raises(KeyboardInterrupt):
        run(step, log_every=4, writers=[writer])
    assert writer.steps == [4, "closed"]


def test_a_record_that_cannot_be_written_is_a_note_of_the_error(slow):
    class Full(Writer):
        def write(self, record):
            raise OSError("no space left")

    nan = {"loss": fm.Mean(np.float32(np.nan), np.float32(2))}
    for writer, metrics, note in [(Full(), LOSS, "no space left"), (Writer(), nan, "not finite at step 1")]:
        error, done = KeyError("of the step"), iter(range(3))

        def step(state, batch, rng, error=error, done=done, metrics=metrics):
            if next(done, None) is None:
                raise error
            return state, metrics

        with pytest.raises(KeyError) as raised:
            run(step, writers=[writer])
        assert raised.value is error
        (found,) = error.__notes__
        assert found.startswith("the last training record was not written: ")
        assert note in found
        assert writer.steps == ["closed"]


def test_a_record_is_written_at_the_first_step_that_finds_it_ready(monkeypatch):
    writer, fetch, release, at_step = Writer(), monitor._fetch, threading.Event(), []

    def late(*args):
        assert release.wait(30)
        return fetch(*args)

    def step(state, batch, rng):
        at_step.append(list(writer.steps))
        if len(at_step) == 5:
            release.set()
            while not log.queued.done():
                time.sleep(0.001)
        return state, LOSS

    class Log(monitor.Log):
        def begin(self, *args):
            nonlocal log
            super().begin(*args)
            log = SimpleNamespace(queued=self._pending[2])

    log: Any = None
    monkeypatch.setattr(monitor, "_fetch", late)
    monkeypatch.setattr(monitor, "Log", Log)
    run(step, log_every=3, num_steps=9, writers=[writer])
    assert at_step[:6] == [[], [], [], [], [], [3]]  # ready during step 5, so written after it and not at step 6
    assert writer.steps == [3, 6, 9, "closed"]


@pytest.mark.parametrize("length", [0, 1, 7])
def test_data_that_end_early(length):
    writer = Writer()
    with pytest.raises(ValueError, match=f"data must give batches for 10 steps; got {length}$"):
        run(data=Data(length), writers=[writer])
    assert writer.steps == [*range(2, length + 1, 2), "closed"]


@struct.dataclass
class Rows(fm.Accumulator):
    """Keeps every value."""

    values: Any

    def merge(self, other):
        return Rows(jnp.concatenate([self.values, other.values]))

    def to_host(self):
        return HostRows(np.asarray(self.values))


class HostRows:
    def __init__(self, values):
        self.values = values

    def merge(self, other):
        return HostRows(np.concatenate([self.values, other.values]))

    def compute(self):
        return float(np.median(self.values))


GROWING = LOSS | {"rows": Rows(np.arange(3.0))}


@pytest.mark.parametrize("log_every", [1, 100])
def test_training_metrics_that_grow_are_refused(log_every):
    before, steps = monitor._merge._cache_size(), []

    def step(state, batch, rng):
        steps.append(batch)
        return state, GROWING

    match = r"training metrics must keep .* shapes; got \{'rows': \[\(3,\)\]\} and then \{'rows': \[\(6,\)\]\}"
    with pytest.raises(ValueError, match=match):
        run(step, log_every=log_every)
    assert len(steps) <= 2
    assert monitor._merge._cache_size() == before


def test_training_metrics_that_change_from_step_to_step_are_refused():
    for second, match in [
        ({"sums": fm.Mean(np.ones(3), np.ones(3))}, r"got \{'sums': \[\(2,\), \(2,\)\]\} and then .*\(3,\)"),
        ({}, r"got \{'sums': \[\(2,\), \(2,\)\]\} and then \{\}"),
    ]:
        metrics = iter([LOSS | {"sums": fm.Mean(np.ones(2), np.ones(2))}, LOSS | second])
        with pytest.raises(ValueError, match=match):
            run(lambda state, batch, rng, metrics=metrics: (state, next(metrics)))


@pytest.mark.parametrize(
    ("metrics", "got"),
    [({"error": LOSS["loss"]}, "{'error': 'Mean'}"), ({"loss": GROWING["rows"]}, "{'loss': 'Rows'}")],
)
def test_training_metrics_include_the_loss(metrics, got):
    match = re.escape(f"training metrics must include 'loss', a Mean; got {got}")
    with pytest.raises(ValueError, match=match):
        run(partial(metrics_step, metrics=metrics))


def test_evaluation_metrics_may_grow():
    batches = [{"image": np.full((2, 1), i)} for i in range(3)]
    eval_step = lambda state, batch: {"rows": Rows(batch["image"][: int(batch["image"][0, 0]) + 1, 0])}
    result = run(evaluate=partial(evaluate, eval_step=eval_step, batches=batches), eval_every=5)
    assert result.metrics == {"rows": 1.0}  # the median of 0, 1, 1, 2, 2
