"""Evaluations: what is checked before a run, and batches that end."""

from functools import partial

import numpy as np
import pytest

import flaxvision as fv
from flaxvision.train import Evaluation, eval_step, evaluate, jit_step, parallel, pmap_step
from tests.train import runs
from tests.train.fakes import LOSS, START, Data, run


def test_every_batch_size_is_checked_before_the_first_step():
    sharding = jit_step(lambda state, batch: batch).batch_sharding  # over 8 devices

    def step(*args):
        raise AssertionError("a step ran")

    class Sized(Data):
        batch_size = 12

    class Batches(list):
        batch_size = 500

    step.batch_sharding = sharding
    with pytest.raises(ValueError, match="the batch size must be a multiple of the 8 devices, such as 8; got 12"):
        run(step, Sized())
    eval_step = lambda state, batch: LOSS
    eval_step.batch_sharding = sharding
    match = "the batch size of the evaluation must be a multiple of the 8 devices, such as 496; got 500"
    with pytest.raises(ValueError, match=match):
        run(step, evaluate=Evaluation(eval_step, Batches()))


def test_the_shapes_of_an_evaluation_are_checked_before_the_first_step():
    source = fv.data.ArraySource(np.zeros((9, 3, 3, 1), np.float32), np.arange(9) % 3)  # the model takes 2 by 2 pixels
    evaluation = Evaluation(runs.EVAL, fv.data.eval_batches(source, 4))
    match = r"the eval step must take batches of image \[4, 3, 3, 1\], label \[4\], mask \[4\]; got \w+: "
    with pytest.raises(ValueError, match=match):
        evaluation.check(runs.state_of())
    for step in (runs.EVAL, pmap_step(partial(eval_step, objective=runs.OBJECTIVE))):
        Evaluation(step, fv.data.eval_batches(runs.SOURCE, 16)).check(runs.state_of())


def test_a_check_costs_no_second_trace():
    traces = []

    def body(state, batch):
        traces.append(batch)
        return eval_step(state, batch, objective=runs.OBJECTIVE)

    evaluation = Evaluation(jit_step(body), fv.data.eval_batches(runs.SOURCE, 16))
    state = runs.state_of()
    evaluation.check(state)
    assert len(traces) == 1
    evaluation(state)
    assert len(traces) == 1


def test_a_state_is_moved_once(monkeypatch):
    moved = []
    place = parallel.place
    monkeypatch.setattr(parallel, "place", lambda state, *args, **options: (moved.append(1), place(state, *args))[1])
    step = jit_step(partial(eval_step, objective=runs.OBJECTIVE))
    evaluate(runs.state_of(), step, fv.data.eval_batches(runs.SOURCE, 16))  # four batches
    assert moved == [1]


def test_an_evaluation_needs_batches_that_last():
    batches = ({"image": np.zeros((2, 1))} for _ in range(3))
    with pytest.raises(ValueError, match=r"batches must be an object that every evaluation .*; got generator"):
        Evaluation(lambda state, batch: LOSS, batches)
    eval_step = lambda state, batch: LOSS
    assert evaluate(START, eval_step, batches) == {"loss": 0.5}
    with pytest.raises(ValueError, match=r"at least one batch; got none \(a generator ends after one pass\)"):
        evaluate(START, eval_step, batches)
