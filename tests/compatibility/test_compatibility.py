"""Bundles, checkpoints and runs that were written by commit f14330c load; see make_files.py."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.checkpoint import Checkpoints

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
OVERRIDES = {"stage_sizes": (1, 1, 1), "features": (4, 4, 4), "num_classes": 3}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    with zipfile.ZipFile(FOLDER / "before.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def expected(before):
    with np.load(before / "expected.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def model():
    return fv.create_model("resnet20_cifar", **OVERRIDES)


@pytest.fixture(scope="module")
def logits_of(model, expected):
    return lambda variables: jax.jit(model.apply)(variables, expected["images"])


def imported(path):
    """The module in a file outside of the package."""
    name = f"compatibility_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_bundle(before, expected, logits_of):
    path = before / "bundle" / "tiny.safetensors"
    variables, card = fv.weights.read_bundle(path)
    assert card["model"] == "resnet20_cifar"
    assert card["overrides"] == OVERRIDES
    assert card["metadata"] == {"accuracy": 0.5}
    chex.assert_trees_all_close(logits_of(variables), expected["bundle"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(fv.weights.load("resnet20_cifar", path, **OVERRIDES), variables)


def test_a_checkpoint(before, expected, model, logits_of):
    """Parameters, running statistics, the optimizer's state and the moving average."""
    sample = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    tx = fv.train.optimizer("momentum", 0.1)
    template = fv.train.create_state(model, tx, jax.random.key(7), sample, ema_decay=0.5)
    checkpoints = Checkpoints(
        before / "checkpoints", manifest={"model": "resnet20_cifar", "overrides": OVERRIDES}, keep_latest=1
    )
    restored = checkpoints.restore(template)
    assert (restored.step, restored.progress, restored.metrics) == (2, {"note": [1, "a"]}, {"accuracy": 0.25})
    state = restored.state
    assert int(state.step) == 2
    variables = {"params": state.params, **state.collections}
    chex.assert_trees_all_close(logits_of(variables), expected["checkpoint"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(logits_of(state.ema), expected["checkpoint_ema"], rtol=1e-5, atol=1e-6)
    assert not np.allclose(expected["checkpoint"], expected["checkpoint_ema"])
    best = checkpoints.restore_best(template)
    chex.assert_trees_all_equal(best.state, state)


def test_a_stopped_run_goes_on(before, expected):
    """Stopped between two records, so that the sums of its metrics go on too."""
    run = before / "run"
    recorded = (run / "metrics.jsonl").read_text().splitlines()
    mnist = imported(ROOT / "experiments" / "mnist.py")
    config = mnist.Config(
        workdir=str(run), model="mlp", hidden=(3,), epochs=4.0, batch_size=128, log_every=4, progress=False
    )
    assert mnist.main(config) == 0
    assert (run / "metrics.jsonl").read_text().splitlines()[: len(recorded)] == recorded, "it began anew"
    records = fv.train.read_records(run / "metrics.jsonl")
    whole = [json.loads(line) for line in str(expected["run_records"]).splitlines()]
    assert len(records) == len(whole)
    for record, other in zip(records, whole, strict=True):
        assert (record["step"], record["split"]) == (other["step"], other["split"])
        for name in ("loss", "accuracy", "top5_accuracy"):
            np.testing.assert_allclose(record[name], other[name], rtol=1e-4, err_msg=f"{name} at {record['step']}")
    tx = fv.train.optimizer("adam", fv.train.schedule("one_cycle", 2e-3, 44))
    model = fv.create_model("mlp", num_classes=10, features=(3,))
    template = fv.train.create_state(model, tx, jax.random.key(7), jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32))
    final = Checkpoints(run / "checkpoints").restore(template)
    assert final.step == 44
    params = {path: expected[f"run/params/{path}"] for path in ("hidden1/bias", "head/bias", "head/kernel")}
    found = {path: final.state.params[path.split("/")[0]][path.split("/")[1]] for path in params}
    chex.assert_trees_all_close(found, params, rtol=1e-3, atol=1e-5)


def test_the_order_of_the_data():
    """A run that resumes must see the batches that it would have seen."""
    orders = json.loads((FOLDER / "orders.json").read_text())
    for name in [key for key in orders if not key.startswith("[")]:
        assert fv.data.load(*name.split("/")).fingerprint == orders.pop(name), name
    for key, expected in orders.items():
        length, seed, shuffle, drop, index, count = json.loads(key)
        source = fv.data.ArraySource(np.zeros((length, 1, 1, 1), np.uint8), np.arange(length), name="numbered")
        options = {"seed": seed, "shuffle": shuffle, "drop_remainder": drop}
        batches = fv.data.train_batches(source, 4, process_index=index, process_count=count, **options)
        assert batches.fingerprint == expected["fingerprint"], key
        for step, labels in expected["steps"].items():
            with batches.from_step(int(step)) as iterator:
                assert next(iterator)["label"].tolist() == labels, (key, step)


@pytest.mark.slow
def test_parameters_keep_their_names_shapes_and_dtypes():
    make_files = imported(FOLDER / "make_files.py")
    for key, digest in json.loads((FOLDER / "parameters.json").read_text()).items():
        name, *parts = key.split()
        assert make_files.digest_of(name, **dict.fromkeys(parts, True)) == digest, key
