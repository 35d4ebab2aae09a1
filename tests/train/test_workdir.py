"""The work directory: its settings, its lock, and what a run in it keeps."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.train import lock, workdir
from tests.train.runs import EVAL, RNG, SOURCE, STEP, KilledError, killed_in_step, state_of


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "mlp"
    seed: int = 0
    data_dir: str | None = None


def test_workdir(tmp_path):
    folder = fv.train.open_workdir(tmp_path / "run", Config(), free=("data_dir",))
    written = json.loads((folder / "config.json").read_text())
    assert written["config"] == {"model": "mlp", "seed": 0, "data_dir": None}
    assert written["versions"]["jax"] == jax.__version__
    assert fv.train.open_workdir(folder, Config(data_dir="x"), free=("data_dir",)) == folder
    assert fv.train.open_workdir(folder, Config(seed=5)) == folder  # the run has not begun
    assert fv.train.open_workdir(folder, Config()) == folder
    (folder / "metrics.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"holds another run: model was 'mlp', now 'lenet5'; seed was 0, now 1"):
        fv.train.open_workdir(folder, Config(model="lenet5", seed=1))
    (folder / "config.json").write_text('{"config"')
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        fv.train.open_workdir(folder, Config())
    with pytest.raises(ValueError, match="must be a directory; got the file"):
        fv.train.open_workdir(folder / "config.json", Config())


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run")])
def test_a_url_is_refused(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the work directory must be a local or mounted path"):
        fv.train.open_workdir(url, Config())
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def another_process(folder):
    """Holds the lock of a folder. It loads only the file of the lock, which starts faster than the package."""
    code = (
        "import importlib.util, pathlib, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('lock', {lock.__file__!r})\n"
        "lock = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(lock)\n"
        "sys.argv = ['train.py', '--epochs=90']\n"
        f"lock.acquire(pathlib.Path({str(folder)!r}))\n"
        "print('locked', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_system_without_locks(tmp_path, monkeypatch, caplog):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "pwrite")
    lock.acquire(tmp_path)
    assert "this system has no file locks; only one run may use" in caplog.text
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    lock.release(tmp_path)


def test_a_second_run_is_refused_by_a_lock_that_names_the_first(tmp_path):
    with another_process(tmp_path) as process:
        with pytest.raises(fv.train.WorkdirInUseError) as raised:
            fv.train.open_workdir(tmp_path, Config())
        for part in (str(tmp_path), f"process {process.pid} on ", "train.py --epochs=90", "another --workdir"):
            assert part in str(raised.value)
        assert not (tmp_path / "config.json").exists()
    # SIGKILL has ended it, and the lock with it.
    assert fv.train.open_workdir(tmp_path, Config()) == tmp_path
    held = json.loads((tmp_path / "lock").read_text())
    assert set(held) == {"host", "pid", "command", "time"}
    assert fv.train.open_workdir(tmp_path, Config()) == tmp_path  # the same process may open it again
    lock.release(tmp_path)
    with another_process(tmp_path), pytest.raises(fv.train.WorkdirInUseError, match="in use by process"):
        fv.train.open_workdir(tmp_path, Config())


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl

    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    fv.train.open_workdir(tmp_path, Config())
    assert "has no locks" in caplog.text
    lock.release(tmp_path)


def run(folder, data=None, step=STEP, **options):
    fv.train.stopping.clear()
    return fv.train.fit_in_workdir(
        folder,
        state_of(),
        step,
        data or fv.data.train_batches(SOURCE, 16, seed=5),
        model="mlp",
        overrides={},
        rng=RNG,
        evaluate=fv.train.Evaluation(EVAL, fv.data.eval_batches(SOURCE, 16)),
        eval_every=2,
        **{"num_steps": 8} | options,
    )


def test_a_run_keeps_what_it_is_told_to(tmp_path):
    run(tmp_path, keep_latest=3, keep_best=0)
    steps = fv.checkpoint.Checkpoints(tmp_path / "checkpoints").steps()
    assert steps == (4, 6, 8)
    about = json.loads((tmp_path / "checkpoints" / "000000008" / "run.json").read_text())
    assert about["versions"]["jax"] == jax.__version__
    assert about["flags"]["jax_default_matmul_precision"] == "highest"
    assert "host_platform_device_count=8" in about["flags"]["XLA_FLAGS"]
    assert (about["device_kind"], about["devices"], about["processes"], about["seed"]) == ("cpu", 8, 1, 5)
    assert about["data"]["length"] == 50
    assert {"commit", "command"} <= set(about)


def test_early_stopping_keeps_its_own_best(tmp_path, capsys):
    stopping = fv.train.EarlyStopping(1, metric="accuracy", mode="min")  # the first evaluation is hardly the worst
    result = run(tmp_path, early_stopping=stopping, keep_latest=1)
    values = {
        r["step"]: r["accuracy"] for r in fv.train.read_records(tmp_path / "metrics.jsonl") if r["split"] != "train"
    }
    best = min(values, key=values.get)
    assert int(result.state.step) == best
    assert f"the best evaluation was at step {best}" in capsys.readouterr().out


def test_a_profile_of_some_steps(tmp_path):
    run(tmp_path, profile_steps="3:4")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match=r"FIRST:LAST with 1 <= FIRST <= LAST, such as 10:20; got '4:3'"):
        run(tmp_path, profile_steps="4:3")


def test_changed_data_continue_only_if_allowed(tmp_path, caplog):
    with pytest.raises(KilledError):
        run(tmp_path, step=killed_in_step(5))
    changed = fv.data.train_batches(fv.data.subset(SOURCE, np.arange(40), "part"), 16, seed=5)
    with pytest.raises(ValueError, match="data"):
        run(tmp_path, changed)
    result = run(tmp_path, changed, allow_changes=True)
    assert int(result.state.step) == 8
    assert "checkpoint 4 was saved with length was 50, is 40; the examples of the source differ" in caplog.text


def test_the_best_checkpoint_may_be_older_than_a_change_of_the_data(tmp_path):
    never = fv.train.EarlyStopping(100, metric="loss", mode="max")  # the first checkpoints are the best ones
    with pytest.raises(KilledError):
        run(tmp_path, step=killed_in_step(5), early_stopping=never)
    changed = fv.data.train_batches(fv.data.subset(SOURCE, np.arange(40), "part"), 16, seed=5)
    run(tmp_path, changed, allow_changes=True, num_steps=6, early_stopping=never)
    assert int(run(tmp_path, changed, early_stopping=never).state.step) == 2


def test_the_end_is_reported(tmp_path, capsys):
    class Slow:
        def on_step(self, step, state, metrics):
            import time

            time.sleep(0.2)

    run(tmp_path, time_budget=0.1, callbacks=[Slow()])
    assert "stopped by the time budget after step 1; run the same command to resume" in capsys.readouterr().out


def test_only_process_0_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.jax, "process_index", lambda: 1)
    fv.train.draw_samples(tmp_path / "samples.png", None, None, None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError(5, "failed", "file"), RuntimeError("late")])
def test_an_expected_error_ends_a_program_with_a_line(error, capsys):
    error.add_note("and more")

    def main(config):
        raise error

    before = workdir.signal.getsignal(workdir.signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as raised:
            fv.train.run_experiment(main, lambda: None)
    finally:
        workdir.signal.signal(workdir.signal.SIGTERM, before)
    assert raised.value.code == f"error: {error}\nand more"


HUNG = """
import time
import numpy as np
import flaxvision as fv
from tests.train.runs import RNG, STEP, SOURCE, state_of

class Source:
    name, classes, fingerprint = "hung", SOURCE.classes, "hung"
    def __len__(self):
        return 50
    def __getitem__(self, index):
        time.sleep(0 if next(count) < 70 else 1000)
        return SOURCE[index]

count = iter(range(10**6))
data = fv.data.train_batches(Source(), 16, seed=5)

def main(config):
    with fv.checkpoint.Checkpoints({folder!r}, manifest={{}}) as checkpoints:
        fv.train.fit(state_of(), STEP, data, num_steps=9, rng=RNG, checkpoints=checkpoints, input_timeout=1.0)
    return 0

fv.train.run_experiment(main, lambda: None)
"""


@pytest.mark.slow
def test_a_program_whose_input_hangs_ends(tmp_path):
    from tests.multiprocess import start

    (process,) = start(HUNG.format(folder=str(tmp_path)), 1)
    try:
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, out + error
    assert "error: the data must give a batch within 1 s; got none" in error
    step = fv.checkpoint.Checkpoints(tmp_path).latest_step
    assert step is not None
    assert step >= 1  # every step before it is saved
