import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flaxvision import checkpoint
from flaxvision.checkpoint import Checkpoints, DamagedCheckpointError

LIMIT_S = 60  # for a subprocess, on a machine that is busy with other things


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    ema: dict | None = None


def make_state(step=0):
    kernel = jax.random.normal(jax.random.key(step), (5, 5, 1, 6))
    params = {"conv1": {"kernel": kernel, "bias": jnp.full(6, step, jnp.float32)}}
    return State(jnp.int32(step), params, optax.sgd(0.1, momentum=0.9).init(params))


def bits(tree):
    """Path, dtype, shape and bytes of every leaf."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            found.append((jax.tree_util.keystr(path), str(jax.random.key_impl(leaf))))
            leaf = jax.random.key_data(leaf)
        found.append((jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()))
    return found


def save_three(directory, **kwargs):
    with Checkpoints(directory, keep_latest=3, **kwargs) as checkpoints:
        for step in (100, 200, 300):
            checkpoints.save(step, make_state(step), progress={"epoch": step / 7}, metrics={"accuracy": step / 1000})


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def odd_state():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "empty": {}}
    return {
        "nan": jnp.asarray(np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000], np.uint32).view(np.float32)),
        "minus_zero": jnp.full((3, 2), -0.0),
        "bfloat16": jnp.array([1.5, -0.0, jnp.nan, jnp.inf], jnp.bfloat16),
        "float16": jnp.array([65504, 6e-8], jnp.float16),
        "int8": jnp.array([-128, 127], jnp.int8),
        "int32": jnp.array([-(2**31), 2**31 - 1], jnp.int32),
        "uint32": jnp.array([0, 2**32 - 1], jnp.uint32),
        "bool": jnp.array([True, False]),
        "scalar": jnp.float32(1 / 3),
        "nothing": jnp.zeros((0, 4), jnp.bfloat16),
        "none": None,
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3),
        "no_keys": jax.random.split(jax.random.key(4), 1)[:0],
        "numpy": np.array([1 / 3, np.pi], np.float64),
        "optax": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 9))).init(
            params
        ),
        "list": [jnp.ones(1), (jnp.zeros(2), {})],
    }


@pytest.mark.parametrize("abstract", [False, True])
def test_every_bit_comes_back(tmp_path, abstract):
    state = odd_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, progress={})
        template = jax.eval_shape(lambda: odd_state()) if abstract else state
        if abstract:
            template["numpy"] = state["numpy"]
        restored = checkpoints.restore(template)
    assert bits(restored.state) == bits(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert isinstance(restored.state["numpy"], np.ndarray)
    assert isinstance(restored.state["bool"], jax.Array)
    np.testing.assert_array_equal(jax.random.uniform(restored.state["key"]), jax.random.uniform(state["key"]))


def test_progress_metrics_and_step_come_back_exactly(tmp_path):
    progress = {
        "epoch": 3,
        "loss": 0.1 + 0.2,
        "best": float("inf"),
        "history": [1e-323, -0.0],
        "done": False,
        "by": None,
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            np.int64(12), make_state(), progress=progress, metrics={"accuracy": jnp.float32(0.7)}, wait=True
        )
    restored = Checkpoints(tmp_path).restore(make_state())
    assert restored.progress == progress
    assert str(restored.progress["history"][1]) == "-0.0"
    assert (restored.step, restored.metrics) == (12, {"accuracy": float(np.float32(0.7))})
    with pytest.raises(dataclasses.FrozenInstanceError):
        restored.step = 1


def test_a_state_without_elements(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, state in enumerate([{}, {"a": None, "b": jnp.zeros((0, 2))}]):
            checkpoints.save(step, state, progress={"step": step})
            restored = checkpoints.restore(state)
            assert bits(restored.state) == bits(state)
            assert restored.progress == {"step": step}


def test_nothing_there(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(make_state()) is None
        assert checkpoints.restore_best(make_state()) is None
        assert (checkpoints.steps(), checkpoints.latest_step, checkpoints.best_step) == ((), None, None)
        checkpoints.wait()
    assert not (tmp_path / "new").exists()  # reading makes no directory


def test_training_may_donate_the_state_while_it_is_saved(tmp_path):
    def step(state):
        return jax.tree.map(lambda x: x * 3 + 1, state)

    donating, plain = jax.jit(step, donate_argnums=0), jax.jit(step)
    state = {"w": jnp.arange(200_000, dtype=jnp.float32), "n": jnp.int32(1)}
    expected = jax.tree.map(jnp.copy, state)
    with Checkpoints(tmp_path, keep_latest=5) as checkpoints:
        for number in range(4):
            checkpoints.save(number, state, progress={})
            state, expected = donating(state), plain(expected)
        assert bits(state) == bits(expected)
        restored = checkpoints.restore(state).state
    assert bits(donating(restored)) == bits(expected)  # what was restored goes on as if nothing had been


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def on_mesh(count):
    mesh = mesh_of(count)
    return {
        "split": NamedSharding(mesh, PartitionSpec("data")),
        "whole": NamedSharding(mesh, PartitionSpec()),
        "key": NamedSharding(mesh, PartitionSpec()),
    }


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("abstract", [False, True])
def test_saved_on_eight_devices_restored_on_fewer(tmp_path, count, abstract):
    state = {"split": jnp.arange(16.0).reshape(8, 2), "whole": jnp.arange(3), "key": jax.random.key(1)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(state, on_mesh(8)), progress={})
        template = jax.device_put(jax.tree.map(jnp.zeros_like, state | {"key": jnp.zeros(1)}), on_mesh(count))
        template["key"] = jax.device_put(jax.random.key(0), on_mesh(count)["key"])
        if abstract:
            template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
        restored = checkpoints.restore(template).state
    assert bits(restored) == bits(state)
    assert jax.tree.map(lambda x: x.sharding, restored) == on_mesh(count)


def test_without_a_sharding_arrays_stay_uncommitted(tmp_path):
    state = {"a": jnp.ones(3), "b": jax.device_put(jnp.ones(3), jax.devices()[2])}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, progress={})
        same = checkpoints.restore(state).state
        bare = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)).state
    assert not same["a"].committed
    assert same["b"].devices() == {jax.devices()[2]}
    assert not bare["b"].committed
    assert bare["b"].devices() == {jax.devices()[0]}


@pytest.mark.parametrize(
    ("mode", "metrics", "kept", "best"),
    [
        ("max", [0.5, 0.9, 0.7, 0.6, 0.8], (1, 3, 4), 1),
        ("max", [0.5, 0.9, 0.9, 0.9, 0.1], (1, 3, 4), 1),  # of equals the earlier
        ("min", [0.5, 0.1, 0.7, 0.6, 0.8], (1, 3, 4), 1),
        ("max", [0.1, 0.2, 0.3, 0.4, 0.5], (3, 4), 4),  # the best is among the latest
        ("max", [0.1, None, float("nan"), None, None], (0, 3, 4), 0),
        ("max", [None] * 5, (3, 4), None),
    ],
)
def test_latest_and_best_are_kept(tmp_path, mode, metrics, kept, best):
    with Checkpoints(tmp_path, best_mode=mode) as checkpoints:
        for step, value in enumerate(metrics):
            given = None if value is None else {"accuracy": value, "loss": 1.0}
            checkpoints.save(step, make_state(step), progress={}, metrics=given, wait=step == 4)
            assert checkpoints.latest_step == step
    again = Checkpoints(tmp_path, best_mode=mode)  # from the files alone
    for each in (checkpoints, again):
        assert (each.steps(), each.best_step) == (kept, best)
    assert len(list(tmp_path.iterdir())) == len(kept)  # nothing twice, nothing left over
    restored = again.restore_best(make_state())
    assert restored is None if best is None else bits(restored.state) == bits(make_state(best))


def test_other_metrics_and_counts(tmp_path):
    with Checkpoints(tmp_path, best_metric="loss", best_mode="min", keep_best=2, keep_latest=1) as checkpoints:
        for step, loss in enumerate([0.3, 0.1, 0.2, 0.5, 0.4]):
            checkpoints.save(step, make_state(), progress={}, metrics={"loss": loss})
        assert checkpoints.steps() == (1, 2, 4)
    with Checkpoints(tmp_path / "none", best_metric=None, keep_latest=1) as checkpoints:
        for step in range(3):
            checkpoints.save(step, make_state(), progress={}, metrics={"accuracy": -step})
        assert (checkpoints.steps(), checkpoints.best_step) == ((2,), None)


def test_a_step_saved_again(tmp_path, caplog):
    with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
        checkpoints.save(1, make_state(1), progress={"a": 1}, metrics={"accuracy": 0.5}, wait=True)
        before = {path: path.stat().st_mtime_ns for path in files_of(tmp_path)}
        checkpoints.save(1, make_state(1), progress={"a": 1}, wait=True)  # the same, metrics not known any more
        assert {path: path.stat().st_mtime_ns for path in files_of(tmp_path)} == before
        checkpoints.save(1, make_state(2), progress={"a": 1}, wait=True)  # another state
        assert bits(checkpoints.restore(make_state()).state) == bits(make_state(2))
        assert checkpoints.restore(make_state()).metrics == {"accuracy": 0.5}
        checkpoints.save(1, make_state(2), progress={"a": 1}, metrics={"accuracy": 0.75}, wait=True)
        assert checkpoints.restore_best(make_state()).metrics == {"accuracy": 0.75}
        assert (checkpoints.steps(), len(list(tmp_path.iterdir()))) == ((1,), 1)
        assert not caplog.records
        checkpoints.save(0, make_state(0), progress={}, wait=True)
        assert "saving checkpoint 0 below 1" in caplog.text


def flip(path, generator):
    data = bytearray(path.read_bytes())
    data[generator.integers(len(data))] ^= 1 << generator.integers(8)
    path.write_bytes(data)


def truncate(path, generator):
    os.truncate(path, generator.integers(path.stat().st_size))


def remove(path, generator):
    path.unlink()


@pytest.mark.parametrize(("harm", "rounds"), [(flip, 4), (truncate, 1), (remove, 1)])
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
    real = checkpoint._orbax

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

    monkeypatch.setattr(checkpoint, "_orbax", rotten)
    assert Checkpoints(tmp_path).restore(make_state()).step == 200
    assert "checkpoint 300 is damaged (params/conv1/kernel: checksum" in caplog.text


def test_all_damaged_is_an_error_and_a_damaged_best_gives_the_next(tmp_path, caplog):
    save_three(tmp_path)
    damage_all(tmp_path / "000000300")
    with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
        assert checkpoints.best_step in (200, 300)  # the metric may still be readable
        assert checkpoints.restore_best(make_state()).step == 200
        assert checkpoints.best_step == 200
        assert checkpoints.steps() == (100, 200)
        checkpoints.save(300, make_state(300), progress={}, wait=True)  # the damaged one is replaced
        assert checkpoints.restore(make_state()).step == 300
        assert checkpoints.steps() == (100, 200, 300)
    for path in tmp_path.iterdir():
        damage_all(path)
    with Checkpoints(tmp_path) as checkpoints:
        for restore in (checkpoints.restore, checkpoints.restore_best, checkpoints.restore):
            with pytest.raises(DamagedCheckpointError, match=r"000000100.*000000200.*000000300"):
                restore(make_state())
        # Damaged ones neither count among the latest nor survive the next good one.
        checkpoints.save(50, make_state(50), progress={}, wait=True)
        assert [path.name for path in tmp_path.iterdir()] == ["000000050"]


def test_another_run_is_refused(tmp_path, caplog):
    manifest = {"model": "lenet5", "overrides": {"num_classes": 10, "sizes": (1, 2)}, "versions": {"jax": "0.1"}}
    save_three(tmp_path, manifest=manifest)
    template = make_state()
    assert Checkpoints(tmp_path, manifest=manifest).restore(template).step == 300
    assert Checkpoints(tmp_path).restore(template).step == 300  # nothing claimed, nothing compared
    assert not caplog.records
    assert Checkpoints(tmp_path, manifest=manifest | {"versions": {"jax": "0.2"}}).restore(template).step == 300
    assert "checkpoint 300 was saved with versions.jax 0.1, this is 0.2" in caplog.text
    for change, message in (
        ({"model": "mlp"}, r"checkpoint 300 .* its model is 'lenet5', this run's is 'mlp'"),
        ({"overrides": {"num_classes": 7, "sizes": [1, 2]}}, r"its overrides.num_classes is 10, this run's is 7"),
        ({"overrides": {"num_classes": 10}}, r"its overrides.sizes is \[1, 2\], this run's is None"),
        ({"data": "abc"}, r"its data is None, this run's is 'abc'"),
    ):
        with pytest.raises(ValueError, match=message):
            Checkpoints(tmp_path, manifest=manifest | change).restore(template)


def test_a_state_of_another_shape_is_refused(tmp_path):
    save_three(tmp_path)
    state = make_state()
    checkpoints = Checkpoints(tmp_path)
    conv1 = state.params["conv1"]
    for params, message in (
        ({"conv1": conv1, "new": jnp.ones(1)}, "params/new is not in the checkpoint"),
        ({"conv1": {"kernel": conv1["kernel"]}}, "params/conv1/bias is not in the state"),
        (
            {"conv1": conv1 | {"bias": jnp.ones(7)}},
            r"params/conv1/bias is float32\[6\] in the checkpoint and float32\[7\] in the state",
        ),
        ({"conv1": conv1 | {"bias": jnp.ones(6, jnp.bfloat16)}}, r"bias is float32\[6\].* bfloat16\[6\] in the state"),
        ({"conv1": conv1 | {"bias": jax.random.split(jax.random.key(0), 6)}}, r"and key<fry>\[6, 2\] in the state"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(state.replace(params=params))
    with pytest.raises(ValueError, match=r"and 3 more$"):
        checkpoints.restore(state.replace(ema={f"e{number}": jnp.ones(1) for number in range(11)}))


def test_what_cannot_be_saved_is_refused(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        for step in (-1, 0.5):
            with pytest.raises(ValueError, match="step must be"):
                checkpoints.save(step, make_state(), progress={})
        with pytest.raises(TypeError, match="leaf a/0 is of type float"):
            checkpoints.save(1, {"a": [0.5]}, progress={})
        with pytest.raises(ValueError, match="two leaves of the state have the path a/b"):
            checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, progress={})
        with pytest.raises(TypeError, match=r"progress.a\[1\] is .* of type object"):
            checkpoints.save(1, make_state(), progress={"a": [1, object()]})
        with pytest.raises(TypeError, match=r"progress.by is \{1: 2\}"):
            checkpoints.save(1, make_state(), progress={"by": {1: 2}})
        with pytest.raises(TypeError, match=r"manifest\.a"):
            Checkpoints(tmp_path, manifest={"a": {1, 2}})
        with pytest.raises(ValueError, match="keep_latest"):
            Checkpoints(tmp_path, keep_latest=0)
        with pytest.raises(ValueError, match="best_mode"):
            Checkpoints(tmp_path, best_mode="best")
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="this is a file"):
        Checkpoints(tmp_path / "file")
    with Checkpoints(tmp_path / "file/below") as checkpoints:
        with pytest.raises(NotADirectoryError, match=r"cannot be written here .*below"):
            checkpoints.prepare()
        with pytest.raises(NotADirectoryError, match=r"cannot be written here .*below"):
            checkpoints.save(1, make_state(), progress={}, wait=True)


def test_a_read_only_directory(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    save_three(tmp_path)
    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)  # chmod would not stop root
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state()).step == 300
        with pytest.raises(PermissionError, match=r"cannot be written here \(Permission denied\)"):
            checkpoints.prepare()


def test_an_error_of_the_thread_is_raised_once(tmp_path, monkeypatch):
    class Full:
        def save_checkpointables(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, "full")

    save_three(tmp_path)
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_orbax", lambda: contextlib.nullcontext(Full()))
            checkpoints.save(400, make_state(400), progress={})
            assert checkpoints.steps() == (100, 200, 300)  # nothing deleted
            with pytest.raises(
                OSError, match=r"checkpoint 400 could not be written \(No space left on device\)"
            ) as info:
                checkpoints.save(500, make_state(500), progress={})
            assert info.value.errno == errno.ENOSPC
            assert "000000400" in info.value.filename
        checkpoints.wait()
        checkpoints.save(500, make_state(500), progress={})
        assert checkpoints.restore(make_state()).step == 500
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
            checkpoints.save(600, make_state(600), progress={})
            with pytest.raises(OSError, match=r"checkpoint 600 needs \d+ bytes, the disk has 0 left"):
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
        lost.save(700, {"noise": noise}, progress={})
        """,
        tmp_path,
    )
    out, err = worker.communicate(timeout=LIMIT_S)
    assert worker.returncode == 0, err
    message, steps = out.splitlines()
    assert "checkpoint 400 could not be written (File too large)" in message
    assert str(tmp_path / "000000400") in message
    assert "orbax" not in err  # no pages of tracebacks beside the message
    assert steps == "(300, 500)"
    assert Checkpoints(tmp_path).restore({"noise": np.zeros(100_000)}).step == 600
    assert "checkpoint 700 could not be written (File too large)" in err


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


def test_sigkill_at_any_moment_loses_no_completed_checkpoint(tmp_path):
    def expected(step):
        return {"noise": np.random.default_rng(step).normal(size=100_000), "step": np.array(step)}

    completed = 0
    for delay in np.random.default_rng(0).uniform(0, 0.4, 6):
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
    assert completed >= 6
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(completed + 1, expected(completed + 1), progress={}, wait=True)
        assert len(list(tmp_path.iterdir())) == len(checkpoints.steps()) <= 3
