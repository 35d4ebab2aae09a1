"""experiments/segment.py: a run on a folder that resumes exactly, what it leaves behind, and prediction from it."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from flaxvision import cli

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load_script():
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        found = importlib.util.spec_from_file_location("segment_experiment", EXPERIMENTS / "segment.py")
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module
        found.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXPERIMENTS))
    return module


segment = load_script()
RNG = np.random.default_rng(0)


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """A folder of grey images with instance masks, and a network that compiles quickly."""
    monkeypatch.setattr(segment, "SMALL", {"features": (4, 8), "decoder_features": (4,)})
    for part, count in (("train", 8), ("val", 3)):
        for kind in ("images", "masks"):
            (tmp_path / "cells" / part / kind).mkdir(parents=True)
        for i in range(count):
            numbers = np.zeros((20, 24), np.uint8)
            numbers[2:9, 3:11], numbers[11:18, 5:12], numbers[4:10, 14:22] = 1, 2, 3
            image = np.where(numbers > 0, 200, 40) + RNG.integers(-20, 20, numbers.shape)
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "cells" / part / "images" / f"{i}.png")
            Image.fromarray(numbers).save(tmp_path / "cells" / part / "masks" / f"{i}.png")
    return tmp_path / "cells"


def run(*flags):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert segment.main(segment.parse([str(flag) for flag in flags])) == 0
    return printed.getvalue()


@pytest.mark.slow
def test_a_run_on_a_folder(cells, tmp_path):
    flags = ["--dataset", "folder", "--data-dir", cells, "--classes", "background", "cell", "--instances"]
    flags += ["--border-weights", "--channels", 1, "--batch-size", 8, "--eval-batch-size", 8, "--no-progress"]
    flags += ["--elastic", 1.0, "--crop", 16, 20, "--padding", 2, "--learning-rate", 0.02, "--warmup-epochs", 0]
    printed = run(*flags, "--epochs", 40, "--eval-every", 20, "--workdir", tmp_path / "a")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["mean_iou"] > 0.8
    assert f"mean IoU {results['mean_iou']:.3f}" in printed
    for name in ("samples", "worst", "middle", "best", "confusion", "curves"):
        assert (tmp_path / "a" / f"{name}.png").stat().st_size > 1000
    metrics = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert {"segmentation_mean_iou", "segmentation_dice", "accuracy"} <= metrics[-1].keys()

    # Stopped early and resumed, it ends with the same bits.
    stopped = segment.parse([*map(str, flags), "--epochs", "40", "--eval-every", "20", "--workdir", f"{tmp_path}/b"])
    assert segment.main(dataclasses.replace(stopped, time_budget=0.3)) == 0
    assert not (tmp_path / "b" / "results.json").exists()
    run(*flags, "--epochs", 40, "--eval-every", 20, "--workdir", tmp_path / "b")
    weights = [fv.weights.load("unet_same", tmp_path / part / "weights.safetensors") for part in "ab"]
    chex.assert_trees_all_equal(*weights)

    # The file carries its classes and preprocessing.
    photo = cells / "val" / "images" / "0.png"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.main(["predict", "unet_same", f"{tmp_path}/a/weights.safetensors", str(photo), "--json"])
    (found,) = json.loads(printed.getvalue())
    shares = {each["name"]: each["pixels"] for each in found["classes"]}
    assert shares["cell"] == pytest.approx(7 * 8 + 7 * 7 + 6 * 8, rel=0.25)


def test_recipes_and_wrong_flags():
    assert segment.parse(["--recipe", "unet"]).momentum == 0.99
    assert segment.parse([]).epochs == segment.RECIPES["small"].epochs
    for flags, message in (
        (("--model", "resnet50"), "--model must be small or a segmenter"),
        (("--eval-only",), "--weights FILE-OR-TAG must be given"),
        (("--border-weights",), "--border-weights must be left out without --instances"),
        (("--backbone-model", "resnet50"), "must be given together"),
        (("--dataset", "folder", "--values", "1-2"), "--values must be pairs VALUE:CLASS; got 1-2"),
    ):
        with pytest.raises(ValueError, match=message):
            segment.main(segment.parse([*flags, "--workdir", "/nowhere"]))
