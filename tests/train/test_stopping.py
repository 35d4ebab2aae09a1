"""When a run stops: early stopping, signals that outlive a run, a time budget, agreement between processes."""

import json
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.train import EarlyStopping, fit, stopping
from tests import multiprocess
from tests.train.runs import RNG, STEP, interrupted_after, run, state_of


def test_early_stopping_by_itself():
    rule = EarlyStopping(patience=2, metric="accuracy", mode="max", min_delta=0.1)
    for value, stop in [(0.5, False), (0.55, False), (0.65, False), (0.7, False), (0.7, True)]:
        rule.update({"accuracy": value})
        assert rule.stop == stop
    assert rule.best == 0.65
    again = EarlyStopping(patience=2, metric="accuracy", mode="max").from_json(json.loads(json.dumps(rule.to_json())))
    assert (again.best, again.waited, again.stop) == (0.65, 2, True)
    by_loss = EarlyStopping(patience=2)
    for value in (np.nan, 1.0, np.nan):
        by_loss.update({"loss": value})
    assert (by_loss.best, by_loss.waited) == (1.0, 1)
    with pytest.raises(ValueError, match=r"metric must be a value of the evaluation, such as loss; got 'accuracy'"):
        rule.update({"loss": 1.0})
    rule.metric = "acuracy"
    with pytest.raises(ValueError, match=r"such as accuracy; got 'acuracy'"):
        rule.update({"loss": 1.0, "accuracy": 0.5, "top5_error": 0.1})
    with pytest.raises(ValueError, match="patience must be at least 1; got 0"):
        EarlyStopping(0)
    with pytest.raises(ValueError, match="mode must be 'max' or 'min'; got 'up'"):
        EarlyStopping(1, mode="up")


def steps_of(**options):
    """Runs without a work directory, in the same process as the run before."""
    data = fv.data.train_batches(
        fv.data.ArraySource(np.zeros((16, 2, 2, 1), np.float32), np.arange(16) % 3), 16, seed=0
    )
    result = fit(state_of(), STEP, data, num_steps=20, rng=RNG, **options)
    return int(result.state.step), result.stopped


def test_a_rule_that_is_false_as_a_condition_is_used():
    class Rule(EarlyStopping):
        def __bool__(self):
            return False

    rule = Rule(patience=2)
    assert steps_of(early_stopping=rule, evaluate=lambda state: {"loss": 1.0}, eval_every=4) == (12, "early_stopping")


def test_sigterm_outlives_the_run(tmp_path):
    assert run(tmp_path, step=interrupted_after(7)).stopped == "SIGTERM"
    assert stopping.requested() == "SIGTERM"
    assert steps_of() == (0, "SIGTERM")
    stopping.clear()
    assert stopping.requested() is None
    assert steps_of() == (20, None)


def test_sigint_ends_one_run_only():
    class Interrupt:
        def on_step(self, step, state, metrics):
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    assert steps_of(callbacks=[Interrupt()]) == (3, "SIGINT")
    assert steps_of() == (20, None)


def test_handlers_come_back_and_runs_may_be_nested():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    inner = []

    class Nested:
        def on_step(self, step, state, metrics):
            if step == 2:
                inner.append(steps_of(callbacks=[Terminate()]))

    class Terminate:
        def on_step(self, step, state, metrics):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    assert steps_of(callbacks=[Nested()]) == (2, "SIGTERM")
    assert inner == [(5, "SIGTERM")]
    assert {number: signal.getsignal(number) for number in before} == before
    assert stopping.current() is None


def test_a_run_in_another_thread_leaves_signals_alone():
    results = []
    thread = threading.Thread(target=lambda: results.append(steps_of()))
    thread.start()
    thread.join()
    assert results == [(20, None)]


def test_time_budget(tmp_path):
    class Slow:
        def on_step(self, step, state, metrics):
            time.sleep(0.1)

    start = time.monotonic()
    result = run(tmp_path, num_steps=1000, time_budget=0.5, callbacks=[Slow()])
    assert result.stopped == "time_budget"
    assert time.monotonic() - start < 20
    assert 1 <= int(result.state.step) <= 6
    assert fv.checkpoint.Checkpoints(tmp_path / "checkpoints").latest_step == int(result.state.step)
    assert stopping.requested() is None
    with pytest.raises(ValueError, match="time_budget must be positive; got 0"):
        run(tmp_path, time_budget=0)


PROCESSES = """
import json, os, signal, time
from flaxvision.train import stopping

index, results = jax.process_index(), []

def work(units, at=None, number=None, budget=None, asked=()):
    count = 0
    try:
        with stopping.Stop(budget if index == 1 else None) as stop:
            for _ in range(units):
                if index in asked and count == at:
                    os.kill(os.getpid(), number)
                stop.claim()
                count += 1
                time.sleep(0.002 * (1 + index))  # they run at different speeds, but within four units
                if count % 4 == 0:
                    processes.barrier("units")
        return count, None
    except stopping.Interrupted as interrupted:
        return count, interrupted.reason
"""


def agreed(program, count=3):
    outputs = [json.loads(output.splitlines()[-1]) for output in multiprocess.run(PROCESSES + program, count)]
    assert all(output == outputs[0] for output in outputs), outputs
    return outputs[0]


@pytest.mark.slow
def test_all_processes_stop_at_the_same_unit():
    program = """
results.append(work(200, 10, signal.SIGTERM, asked=(1,)))
results.append(work(200))  # SIGTERM lasts in every process, not only in the one that got it
stopping.clear()
results.append(work(200, 20, signal.SIGINT, asked=(0, 2)))
results.append(work(2000, budget=0.3))
results.append(work(21))
print(json.dumps(results))
"""
    first, after, second, third, whole = agreed(program)
    assert first[1] == "SIGTERM"
    assert 10 <= first[0] <= 16
    assert after == [0, "SIGTERM"]
    assert second[1] == "SIGINT"
    assert 20 <= second[0] <= 26
    assert third[1] == "time_budget"
    assert 10 <= third[0] <= 200
    assert whole == [21, None]


@pytest.mark.slow
def test_a_request_after_a_process_has_finished_stops_nobody():
    program = """
if index == 1:
    processes.barrier = lambda name: None
def late():
    with stopping.Stop() as stop:
        for count in range(8):
            stop.claim()
            if index == 0 and count == 6:
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
    return count
print(json.dumps([late()]))
"""
    assert agreed(program) == [7]


@pytest.mark.slow
def test_a_loop_that_waits_for_another_process_does_not_keep_it_from_stopping():
    """Process 0 waits, on the device, for a step that process 1 has not dispatched when it is asked to stop."""
    program = """
import jax.numpy as jnp
from jax.experimental import multihost_utils
results = []
try:
    with stopping.Stop() as stop:
        for count in range(100):
            if index == 1 and count == 5:
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGTERM)
            stop.claim()
            multihost_utils.process_allgather(jnp.float32(count))
except stopping.Interrupted as interrupted:
    results = [count, interrupted.reason]
print(json.dumps(results))
"""
    assert agreed(program, 2) == [6, "SIGTERM"]


def test_one_process_starts_no_thread():
    before = threading.active_count()
    with stopping.Stop() as stop:
        stop.claim()
        assert threading.active_count() == before
    assert jax.process_count() == 1


def test_a_claim_costs_little():
    with stopping.Stop(time_budget=1000) as stop:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(1000):
                stop.claim()
            times.append((time.perf_counter() - start) / 1000)
    assert min(times) < 2e-5
