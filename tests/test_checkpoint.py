import dataclasses
import errno
import os
import threading

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flaxvision.checkpoint import Checkpoints, folders, pieces


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
    chex.assert_trees_all_equal_structs(restored.state, state)
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


@pytest.mark.parametrize("layout", ["one device", "replicated", "sharded", "pmap"])
def test_training_may_donate_the_state_while_it_is_saved(tmp_path, monkeypatch, layout):
    go_on = threading.Event()
    real = pieces.table_of

    def late(arrays):  # the thread reads the first value after the training has gone on
        go_on.wait(60)
        return real(arrays)

    monkeypatch.setattr(pieces, "table_of", late)
    state = {"w": jnp.arange(200_000, dtype=jnp.float32) % 50, "n": jnp.arange(4)}
    if layout != "one device":
        spec = PartitionSpec("data") if layout == "sharded" else PartitionSpec()
        state = jax.device_put(state, NamedSharding(mesh_of(4), spec))

    def step(state, rows):
        return jax.tree.map(lambda x: x * 3 + rows[0].astype(x.dtype), state)

    donating, rows = jax.jit(step, donate_argnums=0), jnp.ones(4)
    if layout == "pmap":
        options = {"in_axes": (None, 0), "out_axes": None, "donate_argnums": 0, "devices": jax.devices()[:4]}
        donating = jax.pmap(lambda state, row: step(state, row[None]), **options)
    expected = {"w": np.arange(200_000, dtype=np.float32) % 50, "n": np.arange(4, dtype=np.int32)}
    with Checkpoints(tmp_path, keep_latest=5) as checkpoints:
        for number in range(3):
            saved = expected
            go_on.clear()
            checkpoints.save(number, state, progress={})
            for _ in range(3):
                state, expected = donating(state, rows), {name: x * 3 + 1 for name, x in expected.items()}
            jax.block_until_ready(state)
            go_on.set()
            assert bits(checkpoints.restore(saved).state) == bits(saved)
        assert bits(state) == bits(expected)
        restored = checkpoints.restore(state).state
    expected = {name: x * 3 + 1 for name, x in saved.items()}
    assert bits(donating(restored, rows)) == bits(expected)  # what was restored goes on as if nothing had been


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
        assert "saving checkpoint 0, but restore will use the newer 1" in caplog.text


def test_another_run_is_refused(tmp_path, caplog):
    manifest = {"model": "lenet5", "overrides": {"num_classes": 10, "sizes": (1, 2)}, "versions": {"jax": "0.1"}}
    save_three(tmp_path, manifest=manifest)
    template = make_state()
    assert Checkpoints(tmp_path, manifest=manifest).restore(template).step == 300
    assert Checkpoints(tmp_path).restore(template).step == 300  # nothing claimed, nothing compared
    assert not caplog.records
    assert Checkpoints(tmp_path, manifest=manifest | {"versions": {"jax": "0.2"}}).restore(template).step == 300
    assert "checkpoint 300 was saved with versions.jax 0.1 (now 0.2)" in caplog.text
    for change, message in (
        ({"model": "mlp"}, r"model must be 'lenet5' as in checkpoint 300 .* belongs to another run; got 'mlp'"),
        ({"overrides": {"num_classes": 7, "sizes": [1, 2]}}, r"overrides.num_classes must be 10 .*; got 7"),
        ({"overrides": {"num_classes": 10}}, r"overrides.sizes must be \[1, 2\] .*; got None"),
        ({"data": "abc"}, r"data must be None .*; got 'abc'"),
    ):
        with pytest.raises(ValueError, match=message):
            Checkpoints(tmp_path, manifest=manifest | change).restore(template)


def test_a_state_of_another_shape_is_refused(tmp_path):
    save_three(tmp_path)
    state = make_state()
    checkpoints = Checkpoints(tmp_path)
    conv1 = state.params["conv1"]
    for params, message in (
        ({"conv1": conv1, "new": jnp.ones(1)}, "params/new is missing from the checkpoint"),
        ({"conv1": {"kernel": conv1["kernel"]}}, "params/conv1/bias is missing from the state"),
        (
            {"conv1": conv1 | {"bias": jnp.ones(7)}},
            r"params/conv1/bias is float32\[6\] in the checkpoint but float32\[7\] in the state",
        ),
        ({"conv1": conv1 | {"bias": jnp.ones(6, jnp.bfloat16)}}, r"bias is float32\[6\].* bfloat16\[6\] in the state"),
        ({"conv1": conv1 | {"bias": jax.random.split(jax.random.key(0), 6)}}, r"but key<fry>\[6, 2\] in the state"),
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
        with pytest.raises(TypeError, match="state must have arrays as leaves; got float at a/0"):
            checkpoints.save(1, {"a": [0.5]}, progress={})
        with pytest.raises(ValueError, match="state must have different paths for all leaves; got a/b twice"):
            checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, progress={})
        with pytest.raises(TypeError, match=r"progress.a\[1\] must be a JSON value; got .* of type object"):
            checkpoints.save(1, make_state(), progress={"a": [1, object()]})
        with pytest.raises(TypeError, match=r"progress.by must be a JSON value; got \{1: 2\}"):
            checkpoints.save(1, make_state(), progress={"by": {1: 2}})
        with pytest.raises(TypeError, match=r"manifest\.a"):
            Checkpoints(tmp_path, manifest={"a": {1, 2}})
        with pytest.raises(TypeError, match=r"run\.a must be a JSON value"):
            Checkpoints(tmp_path, run={"a": object()})
        with pytest.raises(ValueError, match="keep_latest must be at least 1; got 0"):
            Checkpoints(tmp_path, keep_latest=0)
        with pytest.raises(ValueError, match="best_mode must be 'max' or 'min'; got 'best'"):
            Checkpoints(tmp_path, best_mode="best")
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="directory must not be a file"):
        Checkpoints(tmp_path / "file")
    with Checkpoints(tmp_path / "file/below") as checkpoints:
        with pytest.raises(NotADirectoryError, match=r"cannot be written: .*below"):
            checkpoints.prepare()
        with pytest.raises(NotADirectoryError, match=r"cannot be written: .*below"):
            checkpoints.save(1, make_state(), progress={}, wait=True)


def test_a_read_only_directory(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    save_three(tmp_path)
    monkeypatch.setattr(folders.tempfile, "TemporaryFile", refuse)  # chmod would not stop root
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state()).step == 300
        with pytest.raises(PermissionError, match=r"cannot be written: Permission denied"):
            checkpoints.prepare()
