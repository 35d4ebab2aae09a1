"""Callbacks, the profiler, and how far the loop runs ahead."""

import jax
import pytest

from flaxvision.train import Profiler, loop, monitor
from tests.train.fakes import LOSS, START, raising_after, run


def test_the_loop_is_at_most_a_few_steps_ahead_of_the_device(monkeypatch):
    waited, started = [], []
    monkeypatch.setattr(loop.jax, "block_until_ready", lambda x: waited.append((len(started), x)))
    bad = []
    merge = monitor._merge

    def recorded(*args):
        result = merge(*args)
        bad.append(result[1])
        return result

    def step(state, batch, rng):
        started.append(batch)
        return state, LOSS

    monkeypatch.setattr(monitor, "_merge", recorded)
    run(step, log_every=100)
    assert [n for n, _ in waited] == [5, 6, 7, 8, 9, 10]
    assert all(x is bad[n - 5] for n, x in waited)  # after step n, that of step n - 4


def test_callbacks_see_every_step_and_every_evaluation():
    seen = []

    class Everything:
        def on_start(self, step, state):
            seen.append(("start", step, state))

        def on_step(self, step, state, metrics):
            seen.append((step, state, metrics))

        def on_evaluation(self, step, state, values):
            seen.append((step, state, values))

        def close(self):
            seen.append("closed")

    class Nothing:
        pass

    values = {"loss": 0.25}
    run(num_steps=3, callbacks=[Nothing(), Everything()], evaluate=lambda state: values, eval_every=2)
    one, two, three = ((n, START, LOSS) for n in (1, 2, 3))
    assert seen == [("start", 0, START), one, two, (2, START, values), three, (3, START, values), "closed"]
    seen.clear()
    with pytest.raises(OSError, match="in the step"):
        run(raising_after(1, OSError("in the step")), callbacks=[Everything()])
    assert seen[-1] == "closed"


def test_the_profiler_starts_and_ends_where_it_should(monkeypatch):
    log = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: log.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: log.append("stop"))
    for first, last, steps, want in [
        (1, 2, 4, ["start t", "step 1", "step 2", "stop", "step 3", "step 4"]),
        (3, 3, 4, ["step 1", "step 2", "start t", "step 3", "stop", "step 4"]),
        (2, 9, 3, ["step 1", "start t", "step 2", "step 3", "stop"]),
        (7, 9, 2, ["step 1", "step 2"]),
    ]:
        log.clear()
        done = iter(range(1, 10))

        def step(state, batch, rng, done=done):
            log.append(f"step {next(done)}")
            return state, LOSS

        run(step, num_steps=steps, callbacks=[Profiler("t", first, last)])
        assert log == want
    log.clear()
    profiler = Profiler("t", 10, 20)
    profiler.on_start(15, START)  # a run that resumes within the range
    profiler.close()
    assert log == ["start t", "stop"]
    with pytest.raises(ValueError, match="1 <= first <= last; got 5 and 4"):
        Profiler("t", 5, 4)
