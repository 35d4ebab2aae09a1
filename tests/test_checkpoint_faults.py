"""Errors of storage, memory and saves: nothing sound counts as damaged, and no error is swallowed."""

import contextlib
import errno
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from flaxvision import manifest
from flaxvision.checkpoint import Checkpoints, orbax
from tests.test_checkpoint_damage import LIMIT_S, bits, flip, make_state, remove, save_three, truncate


def failing_reads(monkeypatch, directory, error, times):
    """Lets the next reads of files in a directory fail; returns a list of the failures."""
    failures = []
    real = Path.open

    def read(path, mode="r", *args, **kwargs):
        if mode == "rb" and directory in path.parents and len(failures) < times:
            failures.append(path.name)
            raise error
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read)
    monkeypatch.setattr(manifest, "_PAUSES", (0.0, 0.0))
    return failures


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale"), OSError(errno.EIO, "Input/output"), MemoryError()])
def test_a_read_error_that_passes_is_no_damage(tmp_path, monkeypatch, caplog, error):
    save_three(tmp_path)
    failures = failing_reads(monkeypatch, tmp_path / "000000300", error, times=2)
    with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
        assert checkpoints.restore(make_state()).step == 300
        assert len(failures) == 2
        assert "reading again" in caplog.text
        assert "damaged" not in caplog.text
        checkpoints.save(400, make_state(400), progress={}, wait=True)
        assert checkpoints.steps() == (200, 300, 400)


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale"), MemoryError()])
def test_a_read_error_that_stays_is_raised_and_costs_no_checkpoint(tmp_path, monkeypatch, caplog, error):
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        for step, accuracy in ((100, 0.9), (200, 0.1), (300, 0.2)):
            checkpoints.save(step, make_state(step), progress={}, metrics={"accuracy": accuracy})
    names = sorted(path.name for path in tmp_path.iterdir())
    for step in (100, 300):  # the best one and the newest one
        with monkeypatch.context() as patch, Checkpoints(tmp_path, keep_latest=2) as checkpoints:
            failing_reads(patch, tmp_path / f"{step:09d}", error, times=1000)
            with pytest.raises(type(error)) as info:
                (checkpoints.restore_best if step == 100 else checkpoints.restore)(make_state())
            assert info.value is error
            assert sorted(path.name for path in tmp_path.iterdir()) == names
    with monkeypatch.context() as patch, Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        failing_reads(patch, tmp_path / "000000100", error, times=1000)
        checkpoints.save(400, make_state(400), progress={}, wait=True)  # does not know which one is the best
        assert {"000000100", "000000400"} <= {path.name for path in tmp_path.iterdir()}
    assert "damaged" not in caplog.text
    assert Checkpoints(tmp_path).restore_best(make_state()).step == 100


def test_an_error_of_the_system_inside_of_orbax_is_no_damage(tmp_path, monkeypatch):
    save_three(tmp_path)
    real, errors = orbax._orbax, []

    @contextlib.contextmanager
    def failing():
        if errors:
            raise errors.pop()
        with real() as ocp:
            yield ocp

    monkeypatch.setattr(orbax, "_orbax", failing)
    monkeypatch.setattr(manifest, "_PAUSES", (0.0, 0.0))
    stale = ValueError(f"DATA_LOSS: Error reading d/x [os_error_code='{errno.ESTALE}']")
    errors += [stale, MemoryError()]
    assert Checkpoints(tmp_path).restore(make_state()).step == 300
    errors += [stale] * 3
    with pytest.raises(OSError, match=r"Stale.*000000300") as info:
        Checkpoints(tmp_path).restore(make_state())
    assert info.value.errno == errno.ESTALE
    errors[:] = [ValueError("a version that nobody knows")]
    with pytest.raises(RuntimeError, match=r"Orbax must be able to read .*000000300; got ValueError: a version"):
        Checkpoints(tmp_path).restore(make_state())


def test_a_checkpoint_that_a_running_program_deletes_is_skipped(tmp_path, monkeypatch, caplog):
    save_three(tmp_path)
    real = manifest.check_files

    def deleting(directory):
        if directory.name == "000000300" and directory.exists():
            shutil.rmtree(directory)
        real(directory)

    monkeypatch.setattr(manifest, "check_files", deleting)
    assert Checkpoints(tmp_path).restore(make_state()).step == 200
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("harm", [flip, truncate, remove])
def test_a_damaged_evaluation_costs_only_the_evaluation(tmp_path, caplog, harm):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), progress={"evaluated": 0})
        checkpoints.amend(1, progress={"evaluated": 1}, metrics={"accuracy": 0.5})
        checkpoints.wait()
        harm(tmp_path / "000000001" / "evaluation.json", np.random.default_rng(0))
        restored = Checkpoints(tmp_path).restore(make_state())
        assert bits(restored.state) == bits(make_state(1))
        assert (restored.progress, restored.metrics) == ({"evaluated": 0}, None)
        assert ("checkpoint 1 counts as not evaluated" in caplog.text) == (harm is not remove)
        checkpoints.amend(1, progress={"evaluated": 1}, metrics={"accuracy": 0.5})
    assert Checkpoints(tmp_path).restore(make_state()).metrics == {"accuracy": 0.5}


def test_check_raises_the_error_of_a_save_and_never_waits(tmp_path, monkeypatch):
    go_on = threading.Event()

    class Slow:
        def save_checkpointables(self, *args, **kwargs):
            go_on.wait(LIMIT_S)
            raise OSError(errno.ENOSPC, "full")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.check()
        with monkeypatch.context() as patch:
            patch.setattr(orbax, "_orbax", lambda: contextlib.nullcontext(Slow()))
            checkpoints.save(1, make_state(1), progress={})
            checkpoints.amend(1, progress={}, metrics={"accuracy": 0.5})
            checkpoints.check()  # still under way
            go_on.set()
            assert checkpoints.steps() == ()  # waits
        with pytest.raises(OSError, match="checkpoint 1 cannot be written: No space left"):
            checkpoints.check()
        checkpoints.check()  # raised once; the amendment has no error of its own
        checkpoints.save(1, make_state(1), progress={})
    assert Checkpoints(tmp_path).steps() == (1,)
