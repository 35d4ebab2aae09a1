"""experiments/capsnet_mnist.py with a small network."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
from PIL import Image

import flaxvision as fv

SCRIPT = Path(__file__).parents[1] / "experiments" / "capsnet_mnist.py"


def script():
    found = importlib.util.spec_from_file_location("capsnet_experiment", SCRIPT)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


capsnet = script()
SMALL = {"conv_features": 8, "primary_features": 1, "batch_size": 64, "decay": 0.1, "log_every": 4, "progress": False}


@pytest.mark.slow
def test_trains_draws_and_goes_on(tmp_path, capsys):
    workdir = tmp_path / "run"
    config = capsnet.Config(workdir=str(workdir), epochs=0.5, eval_every=0.25, **SMALL)
    assert capsnet.main(config) == 0
    output = capsys.readouterr().out
    assert "not MNIST" in output
    assert "on 359 images" in output
    for name, ratio in (("reconstructions", 1.5), ("perturbations", 1), ("curves", 1)):
        with Image.open(workdir / f"{name}.png") as picture:
            assert picture.size[0] > max(600, ratio * picture.size[1])
    records = fv.train.read_records(workdir / "metrics.jsonl")
    assert {r["split"] for r in records} == {"train", "validation"}
    losses = [r["loss"] for r in records if r["split"] == "validation"]
    assert losses[-1] < losses[0]
    rates = [r["learning_rate"] for r in records if r["split"] == "train"]
    assert 1e-3 > rates[0] > rates[-1] > 1e-3 * config.decay
    # Running the same command again trains nothing and draws the pictures again.
    (workdir / "reconstructions.png").unlink()
    assert capsnet.main(config) == 0
    assert output.splitlines()[-3:] == capsys.readouterr().out.splitlines()[-3:]
    assert fv.train.read_records(workdir / "metrics.jsonl") == records
    assert (workdir / "reconstructions.png").exists()
    with pytest.raises(ValueError, match="holds another run: routing_iterations was 3, now 1"):
        capsnet.main(capsnet.Config(**vars(config) | {"routing_iterations": 1}))


@pytest.mark.parametrize("field", ["epochs", "decay", "batch_size", "conv_features", "primary_features"])
def test_nonsense_numbers(tmp_path, field):
    for value in (0, math.inf):
        with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} must be positive and finite; got {value}"):
            capsnet.main(capsnet.Config(workdir=str(tmp_path / "run"), **SMALL | {field: value}))


def test_shifts_are_not_negative(tmp_path):
    with pytest.raises(ValueError, match="--shift must not be negative; got -3"):
        capsnet.main(capsnet.Config(workdir=str(tmp_path / "run"), **SMALL | {"shift": -3}))
