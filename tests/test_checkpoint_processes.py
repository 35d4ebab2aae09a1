"""Checkpoints that several processes write together and any number of processes and devices restores."""

import json
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flaxvision import manifest
from flaxvision.checkpoint import Checkpoints, pieces
from flaxvision.manifest import Damage
from tests.multiprocess import finish, run, start

COMMON = """
import logging, os, pathlib, sys, time
logging.basicConfig(level=logging.WARNING)
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from flaxvision.checkpoint import Checkpoints

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
first = jax.process_index() == 0

def values(step):
    rng = np.random.default_rng(step)
    return {
        "rows": np.float32(rng.normal(size=(24, 3))),
        "columns": np.float32(rng.normal(size=(5, 24))),
        "replicated": np.float32(rng.normal(size=(7,))),
        "bfloat16": jnp.bfloat16(rng.normal(size=(24, 2))),
        "scalar": np.int32(step),
        "local": np.float32(rng.normal(size=3)),
        "empty": np.zeros((0, 8), np.float32),
    }

SPECS = {"rows": P("data"), "columns": P(None, "data"), "bfloat16": P("data"), "local": None}

def place(name, value):
    if SPECS.get(name, P()) is None:
        return jnp.asarray(value)
    sharding = NamedSharding(mesh, SPECS.get(name, P()))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

def state_of(step):
    state = {name: place(name, value) for name, value in values(step).items()}
    key = jax.random.key_data(jax.random.key(step))
    data = jax.make_array_from_callback(key.shape, NamedSharding(mesh, P()), lambda index: np.asarray(key)[index])
    return state | {"key": jax.random.wrap_key_data(data)}

def template():
    state = state_of(0)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None), state
    )

def check(restored, step):
    expected = values(step) | {"key": np.asarray(jax.random.key_data(jax.random.key(step)))}
    for name, array in restored.items():
        if name == "key":
            array = jax.random.key_data(array)
        assert array.dtype == expected[name].dtype, name
        if SPECS.get(name, P()) is not None:
            assert len(array.sharding.device_set) == jax.device_count(), name
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[name][shard.index], err_msg=name)
"""

SAVE = """
with Checkpoints(sys.argv[1], manifest={"model": "a"}, run={"processes": jax.process_count()}) as checkpoints:
    checkpoints.prepare()
    assert checkpoints.restore(template()) is None
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), progress={"step": step})
        checkpoints.amend(step, progress={"step": step, "evaluated": True}, metrics={"accuracy": -step})
    checkpoints.wait()
    assert checkpoints.steps() == (1, 2, 3), checkpoints.steps()
    assert checkpoints.best_step == 1
    files = {path: path.stat().st_mtime_ns for path in pathlib.Path(sys.argv[1]).rglob("*")}
    checkpoints.save(3, state_of(3), progress={"step": 3, "evaluated": True})  # nothing new
    checkpoints.wait()
    assert files == {path: path.stat().st_mtime_ns for path in pathlib.Path(sys.argv[1]).rglob("*")}
"""

RESTORE = """
for restored in (Checkpoints(sys.argv[1], manifest={"model": "a"}).restore(template()),):
    assert (restored.step, restored.progress["step"], restored.metrics) == (3, 3, {"accuracy": -3.0})
    check(restored.state, 3)
with Checkpoints(sys.argv[1], manifest={"model": "a"}) as checkpoints:
    best = checkpoints.restore_best(template())
    assert best.step == 1
    check(best.state, 1)
    checkpoints.save(4, state_of(4), progress={}, wait=True)
    assert checkpoints.steps() == (1, 3, 4)
    check(checkpoints.restore(template()).state, 4)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "restored"), [((2, 2), [(4, 1), (1, 2)]), ((1, 2), [(2, 1)])])
def test_saved_and_restored_by_other_numbers_of_processes(tmp_path, saved, restored):
    run(COMMON + SAVE, *saved, arguments=[tmp_path / "saved"])
    newest = tmp_path / "saved" / "000000003"
    assert json.loads((newest / "run.json").read_text()) == {"processes": saved[0]}
    written = sorted(path.name for path in newest.glob("process-*"))
    assert len(written) == (0 if saved[0] == 1 else 2 * saved[0])
    for index, (count, devices) in enumerate(restored):
        shutil.copytree(tmp_path / "saved", tmp_path / str(index))
        run(COMMON + RESTORE, count, devices, arguments=[tmp_path / str(index)])


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A checkpoint as two processes would write it, and the means to read it in this process."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    values = {"rows": np.arange(24, dtype=np.float32).reshape(8, 3), "whole": np.arange(5, dtype=np.int8)}
    leaves = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in values.items()}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts = {
            "rows": [
                (((2 * i, 2 * i + 2), (0, 3)), values["rows"][2 * i : 2 * i + 2]) for i in (2 * index, 2 * index + 1)
            ]
        }
        if index == 0:
            parts["whole"] = [(((0, 5),), values["whole"])]
        table = pieces.table_of(parts)
        pieces.write(tmp_path, parts, table, leaves)
        assert not parts  # the host holds the arrays no longer
    monkeypatch.undo()
    return tmp_path, leaves, values, sharding


def test_only_the_pieces_that_a_device_needs_are_read(alone, monkeypatch):
    directory, leaves, values, _ = alone
    read = []
    real = pieces._read

    def recorded(path, row, about):
        read.append((path.name, row["index"]))
        return real(path, row, about)

    monkeypatch.setattr(pieces, "_read", recorded)
    reader = pieces.Reader(directory, leaves, 2)
    (rows,) = reader(["rows"])
    np.testing.assert_array_equal(rows((slice(2, 4), slice(None))), values["rows"][2:4])
    assert read == [("process-0-of-2.pieces", [[2, 4], [0, 3]])]
    read.clear()
    np.testing.assert_array_equal(rows((slice(3, 5), slice(1, 2))), values["rows"][3:5, 1:2])
    assert [index for _, index in read] == [[[2, 4], [0, 3]], [[4, 6], [0, 3]]]


def test_pieces_make_up_arrays_of_any_sharding(alone):
    directory, leaves, values, sharding = alone
    for template in (
        {"rows": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding), "whole": np.zeros(5, np.int8)},
        {"rows": jnp.zeros((8, 3)), "whole": jax.ShapeDtypeStruct((5,), jnp.int8)},
    ):
        state = pieces.place(template, leaves, pieces.Reader(directory, leaves, 2))
        for name, value in values.items():
            np.testing.assert_array_equal(state[name], value)
            assert state[name].dtype == value.dtype
        assert isinstance(state["whole"], np.ndarray) == isinstance(template["whole"], np.ndarray)
        if template["rows"].sharding == sharding:
            assert state["rows"].sharding == sharding


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "table", "row"])
def test_damage_to_a_piece_is_found(alone, harm):
    directory, leaves, _, _ = alone
    path, table = directory / "process-1-of-2.pieces", directory / "process-1-of-2.json"
    data = path.read_bytes()
    if harm == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "truncate":
        path.write_bytes(data[:-1])
    elif harm == "remove":
        path.unlink()
    elif harm == "table":
        table.write_bytes(table.read_bytes()[:-9])
    else:
        rows = pieces.read_table(table)
        table.write_text(json.dumps(manifest.seal({"pieces": rows[:-1]})))
    with pytest.raises(Damage):
        pieces.place({"rows": np.zeros((8, 3)), "whole": np.zeros(5)}, leaves, pieces.Reader(directory, leaves, 2))


DISAGREE = """
directory = pathlib.Path(sys.argv[1])
mine = directory / ("shared" if len(sys.argv) < 3 else f"of-{jax.process_index()}")
try:
    with Checkpoints(mine / "checkpoints", timeout=20) as checkpoints:
        MODE
except Exception as error:
    print(type(error).__name__, error, flush=True)
from flaxvision import processes
processes.barrier("end")
time.sleep(0.5 * first)  # the coordinator leaves last
os._exit(0)
"""


def disagree(tmp_path, mode, *arguments):
    return run(COMMON + DISAGREE.replace("MODE", mode), 2, arguments=[tmp_path, *arguments])


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_refused(tmp_path):
    for out in disagree(tmp_path, "checkpoints.prepare()", "apart"):
        assert out.startswith("ValueError directory must be on storage that all processes share; got ")
        assert "where processes [1] do not see the files of process 0" in out


@pytest.mark.slow
def test_an_error_in_one_process_is_an_error_in_all(tmp_path):
    mode = """
        import errno
        from flaxvision.checkpoint import pieces
        real = pieces.write
        def full(*args):
            raise OSError(errno.ENOSPC, "full")
        checkpoints.save(1, state_of(1), progress={}, wait=True)
        if not first:
            pieces.write = full
        checkpoints.save(2, state_of(2), progress={})
        try:
            checkpoints.wait()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        pieces.write = real
        assert checkpoints.steps() == (1,), checkpoints.steps()
        checkpoints.save(3, state_of(3), progress={}, wait=True)
        print(checkpoints.steps(), sorted(os.listdir(checkpoints.directory)), flush=True)"""
    first, second = disagree(tmp_path, mode)
    assert "ProcessError process 1 could not write" in first
    assert "No space left" in second
    for out in (first, second):
        assert out.splitlines()[-1] == "(1, 3) ['000000001', '000000003']"


@pytest.mark.slow
def test_damage_that_one_process_finds_counts_for_all(tmp_path):
    mode = """
        for step in (1, 2):
            checkpoints.save(step, state_of(step), progress={}, wait=True)
        path = checkpoints.directory / "000000002" / "process-1-of-2.pieces"
        if first:
            path.write_bytes(path.read_bytes()[:-8] + bytes(8))
        from flaxvision import processes
        processes.barrier("harmed")
        restored = checkpoints.restore(template())
        check(restored.state, 1)
        print(restored.step, checkpoints.steps(), flush=True)
        checkpoints.save(3, state_of(3), progress={}, wait=True)
        print(sorted(os.listdir(checkpoints.directory)), flush=True)"""
    for out in disagree(tmp_path, mode):
        assert out.splitlines() == ["1 (1,)", "['000000001', '000000002.damaged', '000000003']"]


@pytest.mark.slow
def test_a_process_that_is_missing_is_an_error_in_time(tmp_path):
    mode = """
        checkpoints.save(1, state_of(1), progress={}, wait=True)
        checkpoints._writer.timeout = 2
        if not first:
            checkpoints.save(2, state_of(2), progress={}, wait=True)
        time.sleep(4)"""
    _, second = disagree(tmp_path, mode)
    assert second.startswith("ProcessError process 0 must answer")


WORKER = """
with Checkpoints(sys.argv[1], timeout=60) as checkpoints:
    restored = checkpoints.restore(template())
    step = restored.step if restored else 0
    if restored:
        check(restored.state, step)
    print("resumed", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, state_of(step), progress={"step": step}, metrics={"accuracy": -(step % 3)}, wait=True)
        print("saved", step, flush=True)
"""


@pytest.mark.slow
def test_sigkill_of_any_process_loses_no_completed_checkpoint(tmp_path):
    generator, completed = np.random.default_rng(0), 0
    for count in (2, 3, 1, 2):
        workers = start(COMMON + WORKER, count, arguments=[tmp_path])
        try:
            for worker in workers:
                line = worker.stdout.readline()
                assert line == f"resumed {completed}\n", line + worker.communicate()[1][-4000:]
            assert workers[0].stdout.readline() == f"saved {completed + 1}\n"
            time.sleep(generator.uniform(0, 0.3))
            for index in generator.permutation(count):
                workers[index].send_signal(signal.SIGKILL)
                time.sleep(generator.uniform(0, 0.05))
        finally:
            for worker in workers:
                worker.kill()
        printed = [worker.communicate(timeout=60)[0] for worker in workers]
        saved = [int(line.split()[1]) for out in printed for line in out.splitlines() if line.startswith("saved")]
        newest = max([completed + 1, *saved])
        completed = Checkpoints(tmp_path).latest_step
        assert completed in (newest, newest + 1)
    finish(start(COMMON + RESTORE_ANY, 1, 2, arguments=[tmp_path, completed]))


RESTORE_ANY = """
restored = Checkpoints(sys.argv[1]).restore(template())
assert restored.step == int(sys.argv[2])
check(restored.state, restored.step)
"""


TWO_RUNS = """
def slow(checkpoints):
    real = checkpoints._writer._plan
    def plan(*args):
        time.sleep(1)
        return real(*args)
    checkpoints._writer._plan = plan

runs = [Checkpoints(pathlib.Path(sys.argv[1]) / name / "checkpoints", timeout=60) for name in "ab"]
with runs[0], runs[1]:
    slow(runs[jax.process_index()])  # each process is late with another run
    for step in (1, 2):
        for number, each in enumerate(runs):
            each.save(10 * step + number, state_of(10 * step + number), progress={})
for number, each in enumerate(runs):
    restored = each.restore(template())
    check(restored.state, 20 + number)
    print(restored.step, each.steps(), flush=True)
"""


@pytest.mark.slow
def test_runs_in_directories_of_the_same_name_do_not_mix(tmp_path):
    for out in run(COMMON + TWO_RUNS, 2, arguments=[tmp_path]):
        assert out.splitlines()[-2:] == ["20 (10, 20)", "21 (11, 21)"]
