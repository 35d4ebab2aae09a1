"""When the loop saves, and what it does when data or saves fail in the background."""

import signal
import threading
import time

import numpy as np
import pytest

from flaxvision.train import Evaluation, InputTimeoutError, monitor
from flaxvision.train import input as input_lib
from tests.train.fakes import LOSS, Data, Saves, run


@pytest.fixture
def no_state(monkeypatch):
    monkeypatch.setattr(monitor, "check_state", lambda *args: None)


def test_there_is_a_checkpoint_every_thousand_steps_without_an_evaluation(no_state):
    saves = Saves()
    run(num_steps=2500, data=Data(2500), log_every=1000, checkpoints=saves)
    assert saves.steps == [1000, 2000, 2500]


def test_a_checkpoint_comes_before_its_evaluation(no_state):
    saves, seen = Saves(), []

    def evaluation(state):
        seen.append((list(saves.steps), list(saves.amended)))
        return {"loss": 1.0}

    run(checkpoints=saves, evaluate=evaluation, eval_every=5)
    one = (5, False, {"loss": 1.0})
    assert seen == [([5], []), ([5, 10], [one])]
    assert saves.amended == [one, (10, False, {"loss": 1.0})]


def test_the_error_of_a_save_is_raised_at_the_next_step(no_state):
    saves, steps = Saves(), []

    def step(state, batch, rng):
        steps.append(batch)
        if len(steps) == 6:
            saves.error = OSError("no space left")
        return state, LOSS

    with pytest.raises(OSError, match="no space left") as raised:
        run(step, checkpoints=saves, checkpoint_every=5)
    assert len(steps) == 6
    assert not hasattr(raised.value, "__notes__")


def test_the_state_is_saved_if_the_input_hangs(no_state):
    release, saves = threading.Event(), Saves()

    class Hung(Data):
        def from_step(self, step):
            yield from super().from_step(step)
            release.wait(60)

    start = time.monotonic()
    try:
        with pytest.raises(InputTimeoutError, match=r"the data must give a batch within 0\.3 s; got none"):
            run(data=Hung(7), checkpoints=saves, input_timeout=0.3)
        assert input_lib.hung()
        assert time.monotonic() - start < 20
        assert saves.steps == [7]
    finally:
        release.set()
    for thread in input_lib._hung:
        thread.join(10)
    assert not input_lib.hung()


def test_an_evaluation_whose_input_hangs_ends():
    release = threading.Event()

    class Hung:
        def __iter__(self):
            yield {"image": np.zeros((2, 1))}
            release.wait(60)

    try:
        with pytest.raises(InputTimeoutError):
            run(evaluate=Evaluation(lambda state, batch: LOSS, Hung(), input_timeout=0.3))
    finally:
        release.set()


def test_a_signal_does_not_wait_for_the_input(no_state):
    release, saves = threading.Event(), Saves()

    class Late(Data):
        def from_step(self, step):
            yield from super().from_step(step)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            release.wait(60)
            yield {"image": np.zeros((2, 1))}

    timer = threading.Timer(1.0, release.set)
    timer.start()
    result = run(data=Late(3), checkpoints=saves)
    assert result.stopped == "SIGTERM"
    assert saves.steps == [2]  # after the step in progress; the next batch is not used
    timer.join()
