import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision import checkpoint
from flaxvision.checkpoint import Checkpoints, DamagedCheckpointError, orbax

LIMIT_S = 60  # for a subprocess, on a machine that is busy with other things


def make_state(step=0):
    kernel = np.random.default_rng(step).normal(size=(5, 5, 1, 6)).astype(np.float32)
    params = {"conv1": {"kernel": jnp.asarray(kernel), "bias": jnp.full(6, step, jnp.float32)}}
    return {"step": jnp.int32(step), "params": params}


def bits(tree):
    """Path, dtype, shape and bytes of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), str(x.dtype), x.shape, np.asarray(x).tobytes()) for path, x in leaves]


def save_three(directory, **kwargs):
    with Checkpoints(directory, keep_latest=3, **kwargs) as checkpoints:
        for step in (100, 200, 300):
            checkpoints.save(step, make_state(step), progress={"epoch": step / 7}, metrics={"accuracy": step / 1000})


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip(path, generator):
    data = bytearray(path.read_bytes())
    data[generator.integers(len(data))] ^= 1 << generator.integers(8)
    path.write_bytes(data)


def truncate(path, generator):
    os.truncate(path, generator.integers(path.stat().st_size))


def remove(path, generator):
    path.unlink()


@pytest.mark.parametrize(
    ("harm", "rounds"), [(flip, 1), pytest.param(flip, 4, marks=pytest.mark.slow), (truncate, 1), (remove, 1)]
)
def test_damage_to_any_file_is_harmless_or_found(tmp_path, caplog, harm, rounds):
    save_three(tmp_path / "good")
    generator = np.random.default_rng(0)
    expected = {step: bits(make_state(step)) for step in (200, 300)}
    found = 0
    names = [path.relative_to(tmp_path / "good") for path in files_of(tmp_path / "good/000000300")]
    for name in [name for name in names if (tmp_path / "good" / name).stat().st_size] * rounds:
        shutil.copytree(tmp_path / "good/000000200", tmp_path / "bad/000000200")
        shutil.copytree(tmp_path / "good/000000300", tmp_path / "bad/000000300")
        harm(tmp_path / "bad" / name, generator)
        caplog.clear()
        restored = Checkpoints(tmp_path / "bad").restore(make_state())
        assert bits(restored.state) == expected[restored.step], name
        assert restored.progress == {"epoch": restored.step / 7}, name
        if restored.step == 200:
            found += 1
            assert caplog.messages[0].startswith("checkpoint 300 is damaged"), name
            assert caplog.messages[-1] == "using checkpoint 200 instead of 300", name
        shutil.rmtree(tmp_path / "bad")
    assert found >= 4 * rounds


def damage_all(directory):
    """Zeroes in the middle of every larger file."""
    for path in files_of(directory):
        size = path.stat().st_size
        if size > 100:
            with path.open("r+b") as file:
                file.seek(size // 2)
                file.write(bytes(16))


def test_checksums_name_the_leaf(tmp_path, monkeypatch, caplog):
    save_three(tmp_path)
    real = orbax._orbax

    class Rotten:  # Orbax over a disk whose bits flip where no format notices
        def __init__(self, ocp):
            self.checkpointables_metadata = ocp.checkpointables_metadata
            self.load = ocp.load_checkpointables

        def load_checkpointables(self, path, abstract):
            loaded = self.load(path, abstract)
            if path.name == "000000300":
                loaded["state"]["params/conv1/kernel"].view(np.uint8).reshape(-1)[5] ^= 1
            return loaded

    @contextlib.contextmanager
    def rotten():
        with real() as ocp:
            yield Rotten(ocp)

    monkeypatch.setattr(orbax, "_orbax", rotten)
    assert Checkpoints(tmp_path).restore(make_state()).step == 200
    assert "checkpoint 300 is damaged (params/conv1/kernel must have the checksum" in caplog.text


def test_all_damaged_is_an_error_and_a_damaged_best_gives_the_next(tmp_path, caplog):
    save_three(tmp_path)
    damage_all(tmp_path / "000000300")
    with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
        assert checkpoints.best_step in (200, 300)  # the metric may still be readable
        assert checkpoints.restore_best(make_state()).step == 200
        assert checkpoints.best_step == 200
        assert checkpoints.steps() == (100, 200)
        checkpoints.save(300, make_state(300), progress={}, wait=True)  # the damaged one is set aside
        assert (tmp_path / "000000300.damaged").is_dir()
        assert checkpoints.restore(make_state()).step == 300
        assert checkpoints.steps() == (100, 200, 300)
    for path in tmp_path.iterdir():
        damage_all(path)
    with Checkpoints(tmp_path) as checkpoints:
        for restore in (checkpoints.restore, checkpoints.restore_best, checkpoints.restore):
            with pytest.raises(DamagedCheckpointError, match=r"000000100.*000000200.*000000300"):
                restore(make_state())
        checkpoints.save(50, make_state(50), progress={}, wait=True)
        assert checkpoints.steps() == (50,)
        assert checkpoints.restore(make_state()).step == 50
        names = ["000000050", *(f"{step:09d}.damaged" for step in (100, 200, 300)), "000000300.damaged-2"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names  # renamed, not deleted


def test_a_run_with_damaged_checkpoints_alone_does_not_begin_anew(tmp_path):
    save_three(tmp_path)
    for path in list(tmp_path.iterdir()):
        damage_all(path)
    with Checkpoints(tmp_path) as checkpoints:
        for prepare in (False, True, True):
            if prepare:
                checkpoints.prepare()
            with pytest.raises(DamagedCheckpointError, match=r"000000100.*000000200.*000000300.*move them away"):
                checkpoints.restore(make_state())
    assert len(list(tmp_path.glob("*.damaged"))) == 3
    with pytest.raises(DamagedCheckpointError):
        Checkpoints(tmp_path).restore(make_state())


def test_an_error_of_the_thread_is_raised_once(tmp_path, monkeypatch):
    class Full:
        def save_checkpointables(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, "full")

    save_three(tmp_path)
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(orbax, "_orbax", lambda: contextlib.nullcontext(Full()))
            checkpoints.save(400, make_state(400), progress={})
            assert checkpoints.steps() == (100, 200, 300)  # nothing deleted
            with pytest.raises(OSError, match=r"checkpoint 400 cannot be written: No space left on device") as info:
                checkpoints.save(500, make_state(500), progress={})
            assert info.value.errno == errno.ENOSPC
            assert "000000400" in info.value.filename
        checkpoints.wait()
        checkpoints.save(500, make_state(500), progress={})
        assert checkpoints.restore(make_state()).step == 500
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
            checkpoints.save(600, make_state(600), progress={})
            with pytest.raises(OSError, match=r"checkpoint 600 needs \d+ bytes; the disk has 0 left"):
                checkpoints.close()
    assert Checkpoints(tmp_path).steps()[-1] == 500


def test_leftovers_are_invisible_and_removed_by_the_next_save(tmp_path):
    save_three(tmp_path)
    leftovers = ["000000400.saving", "000000400.saving.orbax-checkpoint-tmp", "000000100-r1.deleted"]
    for name in leftovers:
        shutil.copytree(tmp_path / "000000300", tmp_path / name)
    (tmp_path / "notes").mkdir()
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        assert checkpoints.restore(make_state()).step == 300
        assert all((tmp_path / name).exists() for name in leftovers)  # a reader leaves them to the writer
        checkpoints.save(400, make_state(400), progress={}, wait=True)
        assert checkpoints.steps() == (300, 400)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000300", "000000400", "notes"]


def test_two_writers_in_one_process(tmp_path):
    with Checkpoints(tmp_path / "a") as a, Checkpoints(tmp_path / "b") as b:
        for step in range(4):  # Orbax itself mixes up saves that overlap
            a.save(step, make_state(step), progress={})
            b.save(step, make_state(step + 10), progress={})
        assert bits(a.restore(make_state()).state) == bits(make_state(3))
        assert bits(b.restore(make_state()).state) == bits(make_state(13))


def start(code, *arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_write_that_the_system_refuses(tmp_path):
    save_three(tmp_path)
    worker = start(
        """
        import resource, sys
        from flaxvision.checkpoint import Checkpoints
        assert not any(name.startswith("orbax") for name in sys.modules)  # imported when first needed
        import numpy as np
        noise = np.random.default_rng(0).normal(size=300_000)
        with Checkpoints(sys.argv[1]) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
            try:
                checkpoints.save(400, {"noise": noise}, progress={}, wait=True)
            except OSError as error:
                print(error)
            checkpoints.save(500, {"noise": noise[:1000]}, progress={}, wait=True)
            print(checkpoints.steps())
        left = Checkpoints(sys.argv[1])  # neither waited for nor closed
        left.save(600, {"noise": noise[:100_000]}, progress={})
        lost = Checkpoints(sys.argv[1] + "/000000600.py")
        try:
            lost.save(700, {"noise": noise}, progress={})
        except OSError as error:  # raised at once from Python 3.12 on, logged at the end before
            print(error, file=sys.stderr)
        """,
        tmp_path,
    )
    out, err = worker.communicate(timeout=LIMIT_S)
    assert worker.returncode == 0, err
    message, steps = out.splitlines()
    assert "checkpoint 400 cannot be written: File too large" in message
    assert str(tmp_path / "000000400") in message
    assert "orbax" not in err  # no pages of tracebacks beside the message
    assert steps == "(300, 500)"
    assert Checkpoints(tmp_path).restore({"noise": np.zeros(100_000)}).step == 600
    assert "checkpoint 700 cannot be written: File too large" in err


WORKER = """
import sys
import numpy as np
from flaxvision.checkpoint import Checkpoints

def state(step):
    return {"noise": np.random.default_rng(step).normal(size=100_000), "step": np.array(step)}

with Checkpoints(sys.argv[1]) as checkpoints:
    restored = checkpoints.restore(state(0))
    step = restored.step if restored else 0
    print("resumed", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, state(step), progress={"step": step}, metrics={"accuracy": -(step % 3)})
        checkpoints.wait()
        print("saved", step, flush=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_sigkill_at_any_moment_loses_no_completed_checkpoint(tmp_path, kills):
    def expected(step):
        return {"noise": np.random.default_rng(step).normal(size=100_000), "step": np.array(step)}

    completed = 0
    for delay in np.random.default_rng(0).uniform(0, 0.4, kills):
        worker = start(WORKER, tmp_path)
        assert worker.stdout.readline() == f"resumed {completed}\n", worker.communicate()[1]
        worker.stdout.readline()  # the first save has imports in it; from here on there is always one under way
        completed += 1
        time.sleep(delay)
        worker.send_signal(signal.SIGKILL)
        out, err = worker.communicate(timeout=LIMIT_S)
        assert worker.returncode == -signal.SIGKILL, err
        printed = [int(line.split()[1]) for line in out.splitlines() if line.startswith("saved")]
        restored = Checkpoints(tmp_path).restore(expected(0))
        assert restored.step in (max([completed, *printed]), max([completed, *printed]) + 1)
        assert bits(restored.state) == bits(expected(restored.step))
        assert restored.progress == {"step": restored.step}
        completed = restored.step
    assert completed >= kills
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(completed + 1, expected(completed + 1), progress={}, wait=True)
        assert len(list(tmp_path.iterdir())) == len(checkpoints.steps()) <= 3
