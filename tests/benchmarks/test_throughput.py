"""benchmarks/throughput.py: what it measures and writes, and what it refuses."""

import json
import os
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

import flaxvision as fv
from benchmarks import machine, throughput
from parity import peers


def settings(tmp_path, **options):
    options = {"model": "mlp", "batch_size": 4, "steps": 3, "warmup": 1, "block": 2, **options}
    return throughput.Config(**options, output=tmp_path / "new" / "results.jsonl")


def test_a_line_per_run(tmp_path, capsys):
    first = throughput.main(settings(tmp_path))
    second = throughput.main(settings(tmp_path, mode="forward", dtype="bfloat16", devices=2))
    lines = (tmp_path / "new" / "results.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [first, second]
    assert first["params"] == fv.model_info("mlp").params
    assert first["input"] == [4, 28, 28, 1]
    for name in ("device", "platform", "cpu", "cores", "python", "jax", "jaxlib", "flax", "time"):
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
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{}, {"fuse": 3, "chain": 2}, {"donate": False, "uint8": True}])
def test_the_train_step_trains(tmp_path, options):
    work = throughput.Workload(settings(tmp_path, **options))
    step, lower = work.train()
    losses = [float(jax.tree.leaves(step.run()[1]["loss"])[0]) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    flops = throughput.flops_of(throughput.Workload(settings(tmp_path)).train()[1])
    assert throughput.flops_of(lower) == pytest.approx(flops, rel=0.01)
    assert work.batch["image"].dtype == ("uint8" if options.get("uint8") else "float32")


def test_several_steps_in_one_program_are_several_steps(tmp_path):
    steps = {fuse: throughput.Workload(settings(tmp_path, fuse=fuse)).train()[0] for fuse in (1, 3)}
    state, _ = steps[3].run()
    for _ in range(3):
        expected, _ = steps[1].run()
    assert state.step == 3
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5, atol=1e-7)


def test_uint8_pixels_are_about_the_same_pixels(tmp_path):
    work = throughput.Workload(settings(tmp_path, uint8=True))
    assert np.abs(work._normalise(work.batch)["image"] - work.images.clip(-3, 3)).max() < 1 / 39


def test_weights_come_in_the_order_of_the_layers():
    model = fv.create_model("mlp")
    variables = throughput.variables_of(model, (28, 28, 1))
    weights = throughput.ordered_weights(model, variables, (28, 28, 1))
    assert [w.shape for w in weights] == [(784, 300), (300,), (300, 100), (100,), (100, 10), (10,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "lenet_dl"}, "lenet_dli"),
        ({"model": "lenet5", "vs": (("keras",),)}, "--model with --vs keras must be one of .*; got 'lenet5'"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"devices": 99}, "devices must be at most 8"),
        ({"devices": 2, "vs": (("torch",),)}, "devices must be 1 with --vs or --against; got 2"),
        ({"vs": (("torch",),), "against": machine.ROOT}, "--vs must be empty with --against; got torch"),
    ],
)
def test_refuses(tmp_path, options, message):
    config = settings(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        throughput.main(config)
    assert not config.output.exists()


@pytest.mark.parametrize(("library", "package"), [("keras", "keras"), ("torch", "torch"), ("torch_compile", "torch")])
def test_names_the_extra_of_a_missing_library(monkeypatch, tmp_path, library, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is not installed.*--vs {library}.*\[reference\]"):
        throughput.main(settings(tmp_path, vs=((library,),)))


def test_refuses_another_network(monkeypatch, tmp_path):
    other = peers.Peer("0", 1, lambda: None, lambda: None)
    monkeypatch.setattr(peers, "check_available", lambda library, model: None)
    monkeypatch.setitem(peers.LOADERS, "torch", lambda problem: other)
    with pytest.raises(RuntimeError, match="torch's network must have 266,610 parameters; got 1"):
        throughput.main(settings(tmp_path, mode="forward", vs=(("torch",),)))
    problem = peers.Problem("mlp", np.zeros(1), np.zeros(1), False, [np.zeros((2, 3))], np.ones((1, 2)))
    with pytest.raises(RuntimeError, match=r"must have the shapes \[\(2, 3\)\]; got \[\(3, 2\)\]"):
        peers._check_shapes("torch", [(3, 2)], problem.weights)
    with pytest.raises(RuntimeError, match=r"got an error of 1\.0e-03"):
        peers._check_logits("torch", np.full((1, 2), 1.001), problem)


def test_a_peer_is_timed_beside_ours(monkeypatch, tmp_path):
    peer = peers.Peer("1.2", 266_610, lambda: None, lambda: None, peak_memory=lambda: 7)
    monkeypatch.setattr(peers, "check_available", lambda library, model: None)
    monkeypatch.setitem(peers.LOADERS, "torch_compile", lambda problem: peer)
    record = throughput.main(settings(tmp_path, mode="train", vs=(("torch_compile",),)))
    assert record["torch_compile"] == "1.2"
    assert record["train"]["torch_compile"]["peak_memory_bytes"] == 7
    assert record["train"]["speedup"]["torch_compile"]["ratio"] < 1


def test_a_peer_that_fails_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    record = throughput.main(settings(tmp_path, mode="forward", vs=(("torch",),), lenient=True))
    assert record["left_out"]["torch"].startswith("ImportError: torch is not installed")
    assert record["forward"]["speedup"] == {}


def test_every_chain_names_a_model():
    assert set(peers.CHAINS) <= set(fv.list_models(task="classification"))


@pytest.mark.reference
@pytest.mark.parametrize("model", ["mlp", "lenet5_modern", "lenet_dli", "fashion_cnn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_network_in_keras_and_torch(tmp_path, model, dtype):
    # In its own process: Keras does not work under rank_promotion=raise. The program compares weights and logits.
    options = f"--model {model} --dtype {dtype} --batch-size 2 --steps 1 --warmup 1 --vs keras torch"
    command = [sys.executable, "-m", "benchmarks.throughput", *options.split(), "--output", tmp_path / "r.jsonl"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=machine.ROOT)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r.jsonl").read_text())
    for mode in ("forward", "train"):
        assert set(record[mode]["speedup"]) == {"keras", "torch"}
        assert record[mode]["keras"]["ms"] > 0
        assert record[mode]["torch"]["ms"] > 0
