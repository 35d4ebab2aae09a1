"""What surrounds the arrays of a checkpoint: run, changes, evaluations, and the order of writes on the disk."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.checkpoint import Checkpoints, orbax
from tests.test_checkpoint import bits, files_of, make_state, save_three


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run", "file:///run", Path("gs://bucket/run")])
def test_a_url_is_refused(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"directory must be a local or mounted path, .*; got (gs|s3|file):/"):
        Checkpoints(url)
    assert not list(tmp_path.iterdir())
    assert Checkpoints("a:b/c").directory == tmp_path / "a:b/c"


def test_the_run_stands_beside_every_checkpoint(tmp_path):
    run = {"commit": "abc", "devices": 8, "versions": {"jax": "0.10.1"}}
    save_three(tmp_path, run=run)
    for step in (100, 200, 300):
        assert json.loads((tmp_path / f"{step:09d}" / "run.json").read_text()) == run
    save_three(tmp_path / "none")
    assert not (tmp_path / "none/000000300/run.json").exists()
    assert Checkpoints(tmp_path, run={}).restore(make_state()).step == 300


def test_allowed_keys_may_differ(tmp_path, caplog):
    manifest = {"model": "lenet5", "data": {"files": 3, "digest": "a"}}
    save_three(tmp_path, manifest=manifest)
    changed = manifest | {"data": {"files": 2, "digest": "a"}}
    with pytest.raises(ValueError, match=r"data\.files must be 3 as in checkpoint 300"):
        Checkpoints(tmp_path, manifest=changed, allow=["model"]).restore(make_state())
    for restore in ("restore", "restore_best"):
        caplog.clear()
        with Checkpoints(tmp_path, manifest=changed, allow=["data"]) as checkpoints:
            assert getattr(checkpoints, restore)(make_state()).step == 300
        assert "checkpoint 300 was saved with data.files 3 (now 2)" in caplog.text
    with Checkpoints(tmp_path, manifest=changed, allow=["data"]) as checkpoints:
        checkpoints.save(400, make_state(400), progress={})
    assert Checkpoints(tmp_path, manifest=changed).restore(make_state()).step == 400  # the change is recorded


def test_an_evaluation_is_added_to_a_saved_step(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, progress={"evaluated": False}, wait=True)
        before = {path: path.read_bytes() for path in files_of(tmp_path)}
        assert checkpoints.best_step is None
        checkpoints.amend(1, progress={"evaluated": (1, 0.1 + 0.2)}, metrics={"accuracy": np.float32(0.5)})
        checkpoints.wait()
        assert {path: path.read_bytes() for path in before} == before  # the arrays are not written again
        assert len(files_of(tmp_path)) == len(before) + 1
        assert checkpoints.best_step == 1
        checkpoints.amend(1, progress={"evaluated": [1, 0.1 + 0.2]}, metrics={"accuracy": 0.75})  # once more
    for restored in (Checkpoints(tmp_path).restore(state), Checkpoints(tmp_path).restore_best(state)):
        assert bits(restored.state) == bits(state)
        assert restored.progress == {"evaluated": [1, 0.1 + 0.2]}
        assert restored.metrics == {"accuracy": 0.75}


def test_an_amended_step_is_ranked_and_the_others_pruned(tmp_path):
    reader = Checkpoints(tmp_path)
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        for step, accuracy in enumerate([0.5, 0.9, 0.7, 0.95]):
            checkpoints.save(step, make_state(step), progress={})
            best = checkpoints.best_step
            assert checkpoints.steps() == ((step,) if best is None else (best, step))
            assert reader.best_step == best
            checkpoints.amend(step, progress={}, metrics={"accuracy": accuracy})  # does not wait for the save
            checkpoints.wait()
            assert checkpoints.best_step == reader.best_step == (0, 1, 1, 3)[step]
        assert checkpoints.steps() == (3,)  # the old best was needed until the evaluation only


def test_a_step_that_is_not_saved_cannot_be_amended(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), progress={})
        with pytest.raises(TypeError, match=r"progress\.a must be a JSON value"):
            checkpoints.amend(1, progress={"a": object()}, metrics=None)
        checkpoints.amend(2, progress={}, metrics=None)
        with pytest.raises(ValueError, match=r"step must be one of the saved \[1\]; got 2"):
            checkpoints.wait()


def test_the_same_arrays_are_not_written_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), progress={"a": 1}, metrics={"accuracy": 0.5}, wait=True)
        before = {path: path.stat().st_mtime_ns for path in files_of(tmp_path)}
        checkpoints.save(1, make_state(1), progress={"a": 2}, wait=True)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        restored = checkpoints.restore(make_state())
        assert (restored.progress, restored.metrics) == ({"a": 2}, {"accuracy": 0.5})


def test_what_is_sharded_over_devices_is_not_read_as_a_whole_state(tmp_path):
    """Arrays are read in groups, so that the host holds no second state."""
    state = {f"layer{number:02d}": jnp.full((1000, 10), number, jnp.float32) for number in range(20)}
    sizes = []
    real = orbax._read_group

    def recorded(path, names):
        sizes.append(len(names))
        return real(path, names)

    with pytest.MonkeyPatch.context() as patch, Checkpoints(tmp_path) as checkpoints:
        patch.setattr(orbax, "_GROUP", 100_000)
        patch.setattr(orbax, "_read_group", recorded)
        checkpoints.save(1, state, progress={}, wait=True)
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        assert bits(checkpoints.restore(template).state) == bits(state)
    assert sizes == [3, 3, 3, 3, 3, 3, 2] * 2  # once to verify the save, once to restore


def test_contents_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append(("rename", Path(target)))
        replace(source, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("the names of open files are not known here")
    directory = tmp_path / "new" / "checkpoints"
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with Checkpoints(directory, keep_latest=1, run={"commit": "abc"}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), progress={}, wait=True)
            final, staged = directory / f"{step:09d}", directory / f"{step:09d}.saving"
            renamed = events.index(("rename", final))
            flushed = {path for kind, path in events[:renamed] if kind == "fsync"}
            files = {staged / path.relative_to(final) for path in final.rglob("*")}
            assert {staged, *files} <= flushed
            assert events[renamed + 1] == ("fsync", directory)
        # The old one is deleted only after the name of the new one is on the disk, and the directory has a name too.
        assert events.index(("rename", directory / "000000001.deleted")) > renamed + 1
        assert {tmp_path, tmp_path / "new"} <= {path for kind, path in events if kind == "fsync"}
