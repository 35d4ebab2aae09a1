"""benchmarks/layers.py and tracing.py, and two checkouts in one run."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import against, layers, machine, throughput, timing, tracing


def test_layers_beside_linen(tmp_path, capsys):
    output = tmp_path / "new" / "layers.jsonl"
    layers.main(layers.Config(quick=True, only="global m", seconds=0.1, output=output))
    (first,) = map(json.loads, output.read_text().splitlines())
    assert first["case"] == "global max pool"
    assert first["input"] == [1, 56, 56, 120]
    for mode in layers.MODES:
        assert set(first[mode]) == {"flaxvision", "reference", "speedup"}
        assert first[mode]["speedup"]["reference"]["ratio"] > 0
    assert first["cpu"]
    assert "global max pool" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--only must be part of a case's name \(.*\); got 'nothing'"):
        layers.main(layers.Config(only="nothing"))


def test_figures_of_several_processes():
    def record(ratio):
        mode = {
            "flaxvision": {"ms": 2.0},
            "against": {"ms": 2 * ratio},
            "speedup": {"against": {"ratio": ratio, "q1": 0.0, "q3": 9.0}},
        }
        return {"case": "pool", "input": (1, 2), "forward": mode, "train": mode}

    merged = layers.merge([record(ratio) for ratio in (0.5, 1.0, 2.0)])
    assert (merged["case"], merged["input"]) == ("pool", (1, 2))
    assert merged["train"]["against"] == {"ms": 2.0}
    assert merged["train"]["speedup"]["against"] == {"ratio": 1.0, "q1": 0.75, "q3": 1.5}
    assert merged["processes_ms"]["forward"] == [{"flaxvision": 2.0, "against": 2 * ratio} for ratio in (0.5, 1.0, 2.0)]
    with pytest.raises(ValueError, match="--processes must be 1 without --against, and from 1 to 32 with it; got 2"):
        layers.main(layers.Config(quick=True, processes=2))


def test_names_of_cases_are_unique():
    names = [case.name for case in layers.cases()]
    assert len(set(names)) == len(names)


@pytest.fixture
def workers(monkeypatch):
    """Two workers; this checkout also serves as the other one."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    return lambda benchmark: against.workers(machine.ROOT, benchmark)


@pytest.mark.slow
def test_two_checkouts_by_turns(workers):
    with workers("benchmarks.layers") as found:
        case = next(c for c in layers.cases() if c.name == "global avg pool")
        record = layers.measure(case, layers.Config(quick=True, seconds=0.1), found)
        with pytest.raises(RuntimeError, match="failed in 'prepare'"):
            against.Remote(found["against"], case="nothing", mode="train", quick=True)
    assert set(record["train"]) == {"flaxvision", "against", "speedup"}
    assert record["train"]["against"]["ms"] > 0
    assert record["train"]["speedup"]["against"]["q1"] > 0


@pytest.mark.slow
def test_a_train_step_of_two_checkouts(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    config = throughput.Config(
        model="mlp", batch_size=2, steps=2, block=1, against=machine.ROOT, output=tmp_path / "r.jsonl"
    )
    record = throughput.main(config)
    assert record["against"]["commit"] == machine.commit()
    assert record["train"]["speedup"]["against"]["ratio"] > 0


def test_a_folder_without_flaxvision_is_no_checkout(tmp_path):
    with pytest.raises(ValueError, match=r"--against must be the root of a checkout of flaxvision; got"):
        against.Worker(tmp_path, "benchmarks.layers")


def test_a_remote_contender_keeps_its_times():
    class Echo:
        def ask(self, request, **arguments):
            return {"warm_up": 2.5, "measure": [1.0] * arguments.get("count", 0)}.get(request)

    remote = against.Remote(Echo())
    remote.warm_up(2)
    timing.take_turns([remote], steps=4, block=2)
    assert (remote.first, remote.times) == (2.5, [1.0] * 4)


def test_tracing(tmp_path, monkeypatch):
    output = tmp_path / "results.jsonl"
    tracing.main(tracing.Config("mlp", repetitions=2, output=output))
    line = json.loads(output.read_text())
    assert line["model"] == "mlp"
    assert len(line["seconds"]) == 2
    assert 0 < max(line["seconds"]) < 60
    with pytest.raises(ValueError, match=r"--models must match .*; got 'nothing\*'"):
        tracing.main(tracing.Config("nothing*"))


def test_errors_of_the_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks.tracing", "--models", "nothing*"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    refused = subprocess.run(command, check=False, capture_output=True, text=True, cwd=machine.ROOT, env=environment)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: --models must match")
