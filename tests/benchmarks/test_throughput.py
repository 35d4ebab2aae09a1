"""benchmarks/throughput.py and tracing.py: what they write, and what they refuse."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flaxvision as fv

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def throughput(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("throughput", "references", "published", "libraries", "drawing", "machine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("throughput")
    yield module
    for name in ("throughput", "references", "published", "libraries", "drawing", "machine"):
        sys.modules.pop(name, None)


@pytest.fixture
def references(throughput):
    return throughput.references


def test_a_line_per_run(throughput, tmp_path, capsys):
    output = tmp_path / "new" / "results.jsonl"
    small = {"model": "mlp", "batch_size": 4, "steps": 3, "warmup": 1, "block": 2, "output": output}
    returned = throughput.main(throughput.Config(**small))
    throughput.main(throughput.Config(**small, mode="forward", dtype="bfloat16", devices=2))
    first, second = map(json.loads, output.read_text().splitlines())
    assert first == returned
    assert first["params"] == fv.model_info("mlp").params
    assert first["input"] == [4, 28, 28, 1]
    for name in ("device", "platform", "cores", "python", "jax", "jaxlib", "flax", "time"):
        assert first[name]
    for mode in ("forward", "train"):
        ours = first[mode]["flaxvision"]
        for name in ("images_per_s", "ms", "compile_s", "peak_memory_bytes", "flops", "flops_per_s"):
            assert ours[name] > 0, name
        assert ours["ms_q1"] <= ours["ms"] <= ours["ms_q3"]
        assert ours["images_per_s"] == pytest.approx(4e3 / ours["ms"], rel=1e-4)
    # Two FLOPs for each of the kernels' entries and image; the first layer's input has no gradient.
    kernels = 784 * 300 + 300 * 100 + 100 * 10
    assert first["forward"]["flaxvision"]["flops"] == pytest.approx(2 * 4 * kernels, rel=0.01)
    assert first["train"]["flaxvision"]["flops"] > 2 * 4 * (3 * kernels - 784 * 300)
    assert second["dtype"] == "bfloat16"
    assert second["devices"] == 2
    assert "train" not in second
    assert "img/s" in capsys.readouterr().out


def test_turns_and_speedup(throughput, monkeypatch):
    order = []
    monkeypatch.setattr(throughput, "_seconds", lambda run: run())
    ours = throughput.Contender(lambda: order.append("ours") or 2.0)
    theirs = throughput.Contender(lambda: order.append("theirs") or 3.0)
    throughput.time_in_turns([ours, theirs], steps=5, block=2)
    assert order == ["ours"] * 2 + ["theirs"] * 4 + ["ours"] * 3 + ["theirs"]
    assert throughput.speedup({"flaxvision": ours, "keras": theirs}, "keras", block=2) == {
        "ratio": 1.5,
        "q1": 1.5,
        "q3": 1.5,
    }
    assert ours.result(8)["images_per_s"] == 4.0


def test_the_train_step_trains(throughput):
    model = fv.create_model("mlp")
    mesh = fv.train.make_mesh(throughput.jax.devices()[:1])
    batch = {"image": np.ones((2, 28, 28, 1), np.float32), "label": np.zeros(2, np.int32)}
    run, _ = throughput.make_train(model, batch, mesh)
    losses = [float(run()["loss"]) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


def test_weights_come_in_the_order_of_the_layers(throughput):
    weights, outputs = throughput.initial_weights(fv.create_model("mlp"), np.zeros((1, 28, 28, 1), np.float32))
    assert [w.shape for w in weights] == [(784, 300), (300,), (300, 100), (100,), (100, 10), (10,)]
    assert outputs == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "lenet_dl"}, "no model named 'lenet_dl'; the nearest are lenet_dli"),
        ({"model": "lenet5", "vs": (("keras",),)}, "no network for 'lenet5' in keras; it has fashion_cnn"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"devices": 99}, "devices must be at most 8"),
        ({"devices": 2, "vs": (("torch",),)}, "--vs compares on one device"),
    ],
)
def test_refuses(throughput, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        throughput.main(throughput.Config(**settings, output=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("library", ["keras", "torch"])
def test_names_the_extra_of_a_missing_library(throughput, monkeypatch, tmp_path, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"--vs {library} needs {library}.*\[reference\]"):
        throughput.main(throughput.Config(model="mlp", vs=((library,),), output=tmp_path / "none"))


def test_refuses_another_network(throughput, references, monkeypatch, tmp_path):
    other = references.Reference("0", 1, lambda: None, lambda: None)
    monkeypatch.setattr(references, "check_available", lambda library, model: None)
    monkeypatch.setitem(references.LOADERS, "torch", lambda problem: other)
    config = throughput.Config(model="mlp", batch_size=1, mode="forward", vs=(("torch",),), output=tmp_path / "none")
    with pytest.raises(RuntimeError, match="the torch network has 1 parameters, ours has 266,610"):
        throughput.main(config)
    problem = references.Problem("mlp", np.zeros(1), np.zeros(1), False, [np.zeros((2, 3))], np.ones((1, 2)))
    with pytest.raises(RuntimeError, match=r"its parameters are \[\(3, 2\)\], ours are \[\(2, 3\)\]"):
        references._check_shapes("torch", [(3, 2)], problem.weights)
    with pytest.raises(RuntimeError, match=r"its logits are off by 1\.0e-03"):
        references._check_logits("torch", np.full((1, 2), 1.001), problem)


def test_every_reference_names_a_model(references):
    assert set(references.CHAINS) <= set(fv.list_models(task="classification"))


@pytest.mark.reference
@pytest.mark.parametrize("model", ["mlp", "lenet5_modern", "lenet_dli", "fashion_cnn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_network_in_keras_and_torch(tmp_path, model, dtype):
    # In its own process: Keras does not live under rank_promotion=raise. The program compares weights and logits.
    options = f"--model {model} --dtype {dtype} --batch-size 2 --steps 1 --warmup 1 --vs keras torch --output r.jsonl"
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), *options.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r.jsonl").read_text())
    for mode in ("forward", "train"):
        assert set(record[mode]["speedup"]) == {"keras", "torch"}
        assert record[mode]["keras"]["ms"] > 0
        assert record[mode]["torch"]["ms"] > 0


def test_tracing(tmp_path):
    output = tmp_path / "results.jsonl"
    command = [sys.executable, str(BENCHMARKS / "tracing.py"), "--repetitions", "2"]
    subprocess.run([*command, "--models", "mlp", "--output", str(output)], check=True, capture_output=True)
    line = json.loads(output.read_text())
    assert line["model"] == "mlp"
    assert len(line["seconds"]) == 2
    assert 0 < max(line["seconds"]) < 60
    refused = subprocess.run([*command, "--models", "nothing*"], check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "error: no model has a name like 'nothing*'" in refused.stderr
