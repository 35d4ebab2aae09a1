"""The loop: bit-exact resume, early stopping, NaN, signals, records."""

import os
import signal
import threading
import time
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.train import EarlyStopping, fit, jit_step, train_step
from tests.train.runs import (
    EVAL,
    MESH,
    OBJECTIVE,
    RNG,
    SOURCE,
    STEP,
    KilledError,
    Seen,
    bits,
    interrupted_after,
    killed_in_step,
    records_of,
    run,
    state_of,
)


def test_a_run_does_all_its_steps(uninterrupted):
    _, records, rows, result = uninterrupted
    assert int(result.state.step) == 20
    assert result.stopped is None
    assert len(rows) == 20
    assert [r["step"] for r in records if r["split"] == "train"] == [4, 5, 8, 10, 12, 15, 16, 20]
    assert [r["step"] for r in records if r["split"] == "validation"] == [5, 10, 15, 20]
    assert result.metrics["accuracy"] == records[-1]["accuracy"]


@pytest.mark.parametrize(
    ("killed_at", "checkpoint_every"),
    [
        (7, None),
        (13, 3),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0, None), (10, None), (19, None), (1, 3))),
    ],
)
def test_a_killed_run_ends_in_the_same_bits(tmp_path, uninterrupted, killed_at, checkpoint_every):
    with pytest.raises(KilledError):
        run(tmp_path, step=killed_in_step(killed_at), checkpoint_every=checkpoint_every)
    data = Seen()
    result = run(tmp_path, data, checkpoint_every=checkpoint_every)
    want, records, rows, _ = uninterrupted
    every = checkpoint_every or 5
    first = killed_at // every * every
    assert data.rows[: 20 - first] == rows[first:]
    assert bits(result.state) == want
    assert records_of(tmp_path) == records  # wherever the checkpoints were


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path, uninterrupted, number, name):
    before = signal.getsignal(number)
    steps = []

    def step(*args):
        steps.append(args)
        if len(steps) == 7:
            os.kill(os.getpid(), number)
        return STEP(*args)

    result = run(tmp_path, step=step)
    assert result.stopped == name
    assert int(result.state.step) == 7  # the current step is finished
    assert signal.getsignal(number) == before
    again = Seen()
    result = run(tmp_path, again)
    want, records, rows, _ = uninterrupted
    assert again.rows[:13] == rows[7:]  # no batch is repeated or lost
    assert bits(result.state) == want
    assert records_of(tmp_path) == records


def test_a_finished_run_does_nothing_more(tmp_path, uninterrupted):
    run(tmp_path)
    data = Seen()
    result = run(tmp_path, data)
    assert data.rows == []
    assert bits(result.state) == uninterrupted[0]
    assert result.metrics == uninterrupted[3].metrics


def test_a_damaged_checkpoint_costs_only_the_way_back(tmp_path, uninterrupted, caplog):
    run(tmp_path, num_steps=15)
    newest = tmp_path / "checkpoints" / f"{15:09d}"
    large = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(large.read_bytes())
    content[len(content) // 2] ^= 16
    large.write_bytes(content)
    data = Seen()
    result = run(tmp_path, data)
    assert data.rows[0][0] == 10
    assert "15" in caplog.text
    assert bits(result.state) == uninterrupted[0]
    assert records_of(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("shard_state", [False, True])
def test_a_resumed_run_holds_one_state(tmp_path, uninterrupted, shard_state):
    """Before the checkpoint is read the first state is freed, and each array goes where the step wants it."""
    run(tmp_path, num_steps=15)
    step = jit_step(partial(train_step, objective=OBJECTIVE), shard_state=shard_state) if shard_state else STEP
    state, seen = state_of(), []
    wanted = jax.tree.leaves(step.state_sharding(state))

    class Watched(fv.checkpoint.Checkpoints):
        def restore(self, template):
            seen.append([x.is_deleted() for x in jax.tree.leaves(state)])
            restored = super().restore(template)
            seen.append([x.sharding for x in jax.tree.leaves(restored.state)])
            return restored

    with Watched(tmp_path / "checkpoints") as checkpoints:
        data = fv.data.train_batches(SOURCE, 16, seed=5)
        result = fit(state, step, data, num_steps=20, rng=RNG, checkpoints=checkpoints)
    freed, shardings = seen
    assert all(freed)
    assert shardings == wanted
    if not shard_state:
        assert bits(result.state) == uninterrupted[0]


def test_another_data_order_is_refused(tmp_path):
    run(tmp_path, num_steps=5)
    data = Seen()
    data.inner = fv.data.train_batches(SOURCE, 16, seed=6)
    data.fingerprint = data.inner.fingerprint
    with pytest.raises(ValueError, match="seed"):
        run(tmp_path, data)


@pytest.mark.parametrize("poisoned", ["loss", "parameters", "opt_state", "ema"])
def test_nan_names_the_step_and_leaves_the_last_good_checkpoint(tmp_path, poisoned):
    def step(state, batch, rng):
        state, metrics = STEP(state, batch, rng)
        if int(state.step) == 8 and poisoned == "loss":
            metrics = metrics | {"loss": metrics["loss"].replace(total=metrics["loss"].total * np.nan)}
        if int(state.step) == 10 and poisoned == "parameters":  # the loss becomes NaN one step later
            state = state.replace(params=jax.tree.map(lambda p: p * np.nan, state.params))
        if int(state.step) == 10 and poisoned in ("opt_state", "ema"):  # the loss may never become NaN

            def overflow(x):
                return x + np.asarray(np.inf, x.dtype) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating) else x

            state = state.replace(**{poisoned: jax.tree.map(overflow, getattr(state, poisoned))})
        return state, metrics

    data = fv.data.train_batches(SOURCE, 16, seed=5)
    with fv.checkpoint.Checkpoints(tmp_path, manifest={}) as checkpoints:
        match = {
            "loss": "loss is not finite at step 8; the last checkpoint is step 5",
            "parameters": "a parameter is not finite after step 10; the last checkpoint is step 5",
            "opt_state": "the optimizer's state is not finite after step 10; the last checkpoint is step 5",
            "ema": "the moving average is not finite after step 10; the last checkpoint is step 5",
        }[poisoned]
        with pytest.raises(FloatingPointError, match=match):
            fit(
                state_of(),
                step,
                data,
                num_steps=20,
                rng=RNG,
                checkpoint_every=5,
                log_every=100,
                checkpoints=checkpoints,
            )
    with fv.checkpoint.Checkpoints(tmp_path, manifest={}) as checkpoints:
        restored = checkpoints.restore(state_of())
        assert restored.step == 5
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(jax.device_get(restored.state.params)))


def test_early_stopping_and_its_resume(tmp_path):
    losses = iter([1.0, 0.5, 0.6, 0.55, 0.4])
    stopping = EarlyStopping(patience=2)
    run_options = {"eval_every": 2, "writers": (), "early_stopping": stopping}
    evaluate = lambda state: {"loss": next(losses)}
    with fv.checkpoint.Checkpoints(tmp_path, manifest={}, best_metric="loss", best_mode="min") as checkpoints:
        data = fv.data.train_batches(SOURCE, 16, seed=5)
        result = fit(
            state_of(), STEP, data, num_steps=20, rng=RNG, evaluate=evaluate, checkpoints=checkpoints, **run_options
        )
        assert result.stopped == "early_stopping"
        assert int(result.state.step) == 8
        assert checkpoints.restore_best(state_of()).step == 4
        again = fit(
            state_of(), STEP, data, num_steps=20, rng=RNG, evaluate=evaluate, checkpoints=checkpoints, **run_options
        )
        assert again.stopped == "early_stopping"
        assert int(again.state.step) == 8
    assert stopping.best is None  # the caller's object is a setting, not the run's memory


def test_any_object_can_stop_a_run_early(tmp_path):
    class Twice:
        """Stops after two evaluations; what it remembers survives a restart."""

        def __init__(self, seen=()):
            self.seen = list(seen)

        def update(self, values):
            self.seen.append(values["accuracy"])

        @property
        def stop(self):
            return len(self.seen) == 3

        def to_json(self):
            return {"seen": self.seen}

        def from_json(self, stored):
            return Twice(stored["seen"])

    rule = Twice()
    with pytest.raises(KilledError):
        run(tmp_path, step=killed_in_step(12), early_stopping=rule)
    result = run(tmp_path, early_stopping=rule)
    assert (result.stopped, int(result.state.step), rule.seen) == ("early_stopping", 15, [])


def test_a_checkpoint_of_early_stopping_before_this_version_loads(tmp_path):
    run(tmp_path, num_steps=10)
    with fv.checkpoint.Checkpoints(tmp_path / "checkpoints", manifest={"data": Seen().fingerprint}) as checkpoints:
        restored = checkpoints.restore(state_of())
        progress = {"window": {}, "early_stopping": {"best": 2.0, "waited": 1}}
        checkpoints.save(10, restored.state, progress=progress)
    result = run(tmp_path, early_stopping=EarlyStopping(2, metric="accuracy", mode="max"), num_steps=30)
    assert (result.stopped, int(result.state.step)) == ("early_stopping", 15)


def test_early_stopping_by_itself():
    stopping = EarlyStopping(patience=2, metric="accuracy", mode="max", min_delta=0.1)
    for value, stop in [(0.5, False), (0.55, False), (0.65, False), (0.7, False), (0.7, True)]:
        stopping.update({"accuracy": value})
        assert stopping.stop == stop
    assert stopping.best == 0.65
    by_loss = EarlyStopping(patience=2)
    for value in (np.nan, 1.0, np.nan):
        by_loss.update({"loss": value})
    assert (by_loss.best, by_loss.waited) == (1.0, 1)
    with pytest.raises(ValueError, match=r"metric must be a value of the evaluation, such as loss; got 'accuracy'"):
        stopping.update({"loss": 1.0})
    stopping.metric = "acuracy"
    with pytest.raises(ValueError, match=r"such as accuracy; got 'acuracy'"):
        stopping.update({"loss": 1.0, "accuracy": 0.5, "top5_error": 0.1})
    with pytest.raises(ValueError, match="patience must be at least 1; got 0"):
        EarlyStopping(0)
    with pytest.raises(ValueError, match="mode must be 'max' or 'min'; got 'up'"):
        EarlyStopping(1, mode="up")


def test_an_evaluation_needs_batches():
    with pytest.raises(ValueError, match="batches must hold at least one batch; got none"):
        fv.train.evaluate(state_of(), EVAL, [])


def test_intervals_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="log_every must be at least 1; got 0"):
        run(tmp_path, log_every=0)


def test_the_loop_waits_for_no_value_between_records(monkeypatch):
    """The thread that fetches the values of a record gets them only once the loop has started the next record."""
    from jax._src.array import ArrayImpl

    from flaxvision.train import monitor

    dispatched, fetched, reads, records = [], [], [], []
    host_value, fetch = ArrayImpl._value, monitor._fetch

    def step(state, batch, rng):
        result = STEP(state, batch, rng)
        dispatched.append(batch)
        return result

    def late(window, learning_rate):
        fetched.append(window)
        due, limit = min(4 * (len(fetched) + 1), 16), time.monotonic() + 30
        while len(dispatched) < due and time.monotonic() < limit:
            time.sleep(0.001)
        assert len(dispatched) >= due, "the loop waited for the values of a record"
        return fetch(window, learning_rate)

    def value(array):
        reads.append((len(dispatched), threading.current_thread().name.startswith("flaxvision-metrics")))
        return host_value.fget(array)

    class Writer:
        def start(self, step):
            pass

        def write(self, record):
            records.append((len(dispatched), record["step"]))

        def close(self):
            pass

    state, schedule = state_of(), fv.train.schedule("cosine", 0.05, 16)
    monkeypatch.setattr(monitor, "_fetch", late)
    monkeypatch.setattr(ArrayImpl, "_value", property(value))
    data = fv.data.train_batches(SOURCE, 16, seed=5)
    fit(state, step, data, num_steps=16, log_every=4, rng=RNG, learning_rate=schedule, writers=[Writer()])
    assert records == [(8, 4), (12, 8), (16, 12), (16, 16)]  # one record late, except for the last
    assert any(in_thread for _, in_thread in reads)
    # The loop itself reads the first step, and then only values that the thread has fetched.
    assert {step for step, in_thread in reads if not in_thread} == {0, 8, 12, 16}


def test_batches_are_on_the_devices_ahead_of_the_step():
    log = []

    def batches():
        for i in range(5):
            log.append(f"read {i}")
            yield {"image": np.full((8, 2), i, np.float32)}

    sharding = jit_step(lambda state, batch: batch).batch_sharding
    for i, batch in enumerate(fv.train.prefetch(batches(), sharding)):
        assert batch["image"].sharding == sharding
        np.testing.assert_array_equal(batch["image"], i)
        log.append(f"step {i}")
    want = ["read 0", "read 1", "step 0", "read 2", "step 1", "read 3", "step 2", "read 4", "step 3", "step 4"]
    assert log == want
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        next(fv.train.prefetch(batches(), sharding, size=0))


def test_an_error_ahead_waits_for_its_turn():
    def batches():
        yield from ({"image": np.zeros((8, 1))} for _ in range(3))
        raise OSError("damaged")

    ahead = fv.train.prefetch(batches(), None, size=4)
    for _ in range(3):
        next(ahead)
    with pytest.raises(OSError, match="damaged"):
        next(ahead)


def test_a_checkpoint_of_sums_with_one_weight_still_loads(tmp_path, uninterrupted):
    """Before metrics were accumulators, the window in a checkpoint was one sum per name and one weight."""
    run(tmp_path, num_steps=20, step=interrupted_after(6))
    with fv.checkpoint.Checkpoints(tmp_path / "checkpoints", manifest={"data": Seen().fingerprint}) as checkpoints:
        restored = checkpoints.restore(state_of())
        window = restored.progress["window"]
        assert set(window) == {"accuracy", "loss"}
        old = {name: fields["total"] for name, fields in window.items()} | {"weight": window["loss"]["weight"]}
        assert old["weight"] == 16  # step 6: the record of step 5 closed the window before
        checkpoints.save(6, restored.state, progress=restored.progress | {"window": old})
    result = run(tmp_path)
    assert bits(result.state) == uninterrupted[0]
    assert records_of(tmp_path) == uninterrupted[1]


def test_a_compiled_step_is_traced_once_per_run():
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def traced(state, batch, rng):
        return train_step(state, batch, rng, objective=OBJECTIVE)

    data = fv.data.train_batches(SOURCE, 16, seed=5)
    result = fit(state_of(), jit_step(traced, MESH), data, num_steps=5, rng=RNG, log_every=2)
    assert int(result.state.step) == 5
