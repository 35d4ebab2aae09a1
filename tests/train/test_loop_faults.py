"""What must cost no work: evaluations, data and checkpoints that fail, signals at a bad moment."""

import os
import signal

import pytest

import flaxvision as fv
from flaxvision.train import EarlyStopping
from tests.train.runs import EVAL, SOURCE, InEvaluation, KilledError, Seen, bits, raising, records_of, run, state_of


@pytest.mark.parametrize("number", [pytest.param(2, marks=pytest.mark.slow), 4])  # 4: after the last step
@pytest.mark.parametrize("error", [KilledError(), MemoryError("in the evaluation")], ids=["kill", "error"])
def test_an_evaluation_that_fails_costs_nothing(tmp_path, uninterrupted, number, error):
    with pytest.raises(type(error)):
        run(tmp_path, evaluate=InEvaluation(number, raising(error)))
    step = 5 * number
    restored = fv.checkpoint.Checkpoints(tmp_path / "checkpoints").restore(state_of())
    assert (restored.step, restored.metrics, restored.progress["evaluation_due"]) == (step, None, True)
    data = Seen()
    result = run(tmp_path, data)
    want, records, rows, whole = uninterrupted
    assert data.rows[: 20 - step] == rows[step:]  # no step is repeated
    assert bits(result.state) == want
    assert records_of(tmp_path) == records
    assert result.metrics == whole.metrics
    restored = fv.checkpoint.Checkpoints(tmp_path / "checkpoints").restore_best(state_of())
    best = max((r for r in records if r["split"] == "validation"), key=lambda r: (r["accuracy"], -r["step"]))
    assert (restored.step, restored.metrics["accuracy"]) == (best["step"], best["accuracy"])


def test_a_kill_between_the_record_of_an_evaluation_and_its_checkpoint_repeats_no_record(tmp_path, uninterrupted):
    class Killer:
        def on_evaluation(self, step, state, values):
            if step == 10:
                raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path, callbacks=[Killer()])
    assert records_of(tmp_path)[-1]["split"] == "validation"
    result = run(tmp_path)
    assert bits(result.state) == uninterrupted[0]
    assert records_of(tmp_path) == uninterrupted[1]


def test_an_evaluation_that_fails_between_checkpoints_costs_nothing(tmp_path, uninterrupted):
    with pytest.raises(MemoryError):
        run(tmp_path, evaluate=InEvaluation(2, raising(MemoryError())), checkpoint_every=7)
    data = Seen()
    assert bits(run(tmp_path, data, checkpoint_every=7).state) == uninterrupted[0]
    assert data.rows[0][0] == 10
    assert records_of(tmp_path) == uninterrupted[1]


def test_an_error_in_the_data_saves_the_state(tmp_path, uninterrupted):
    with pytest.raises(OSError, match="unreadable"):
        run(tmp_path, Seen(7, raising(OSError("unreadable"))))
    data = Seen()
    assert bits(run(tmp_path, data).state) == uninterrupted[0]
    assert data.rows[0][0] == 7
    assert records_of(tmp_path) == uninterrupted[1]


def test_a_run_without_a_step_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="unreadable"):
        run(tmp_path, Seen(0, raising(OSError("unreadable"))))
    assert fv.checkpoint.Checkpoints(tmp_path / "checkpoints").latest_step is None


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("evaluation", [2, 4])
def test_a_signal_in_an_evaluation_is_honoured_at_the_next_batch(tmp_path, uninterrupted, number, evaluation):
    seen = []

    class Batches:
        def __iter__(self):
            for batch in fv.data.eval_batches(SOURCE, 16):
                seen.append(batch)
                if len(seen) == 4 * evaluation - 2:  # 4 batches; those ahead of the second one are read already
                    os.kill(os.getpid(), number)
                yield batch

    result = run(tmp_path, evaluate=fv.train.Evaluation(EVAL, Batches()))
    assert result.stopped == signal.Signals(number).name
    assert int(result.state.step) == 5 * evaluation
    assert len(seen) < 4 * evaluation
    assert [r["step"] for r in records_of(tmp_path) if r["split"] == "validation"] == list(range(5, 5 * evaluation, 5))
    again = run(tmp_path)
    assert bits(again.state) == uninterrupted[0]
    assert records_of(tmp_path) == uninterrupted[1]


def test_a_misspelt_metric_of_early_stopping_costs_nothing(tmp_path, uninterrupted):
    with pytest.raises(ValueError, match=r"metric must be .* such as accuracy; got 'acuracy'"):
        run(tmp_path, early_stopping=EarlyStopping(3, metric="acuracy"))
    data = Seen()
    result = run(tmp_path, data, early_stopping=EarlyStopping(100, metric="accuracy"))
    assert data.rows[0][0] == 5
    assert bits(result.state) == uninterrupted[0]
    assert records_of(tmp_path) == uninterrupted[1]
