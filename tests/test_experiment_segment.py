"""experiments/segment.py: a run on a folder that resumes exactly, what it leaves behind, and prediction from it."""

import contextlib
import dataclasses
import io
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from flaxvision import cli
from flaxvision.models.fcn import bilinear_kernel
from tests.models.smallest import filled
from tests.scripts import load_script

segment = load_script("segment")
RNG = np.random.default_rng(0)


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """A folder of grey images with instance masks, and a network that compiles quickly."""
    monkeypatch.setattr(segment.segment_models, "SMALL", {"features": (4, 8), "decoder_features": (4,)})
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
    flags += ["--border-weights", "--loss", "cross_entropy"]
    flags += ["--channels", 1, "--batch-size", 8, "--eval-batch-size", 8, "--no-progress"]
    flags += ["--elastic", 1.0, "--crop", 16, 20, "--padding", 2, "--learning-rate", 0.02, "--warmup-epochs", 0]
    printed = run(*flags, "--epochs", 40, "--eval-every", 20, "--workdir", tmp_path / "a")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["mean_iou"] > 0.8
    assert f"mean IoU {results['mean_iou']:.3f}" in printed
    assert results["pq"] > 0.5
    assert f"{results['separated']:.0f} of {results['touching']:.0f} touching pairs separated" in printed
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
    rates = [segment.parse(["--recipe", f"fcn{stride}s"]).learning_rate for stride in (32, 16, 8)]
    assert [rates[0] / rate for rate in rates] == pytest.approx([1, 100, 10_000])
    assert segment.parse([]).epochs == segment.RECIPES["small"].epochs
    for flags, message in (
        (("--model", "resnet50"), "--model must be small or a segmenter"),
        (("--eval-only",), "--weights FILE-OR-TAG must be given"),
        (("--border-weights",), "--border-weights must be left out without --instances"),
        (
            ("--border-weights", "--instances"),
            "--border-weights must be used with --loss cross_entropy; got --loss dice",
        ),
        (("--components", "disc", "--instances"), "--components must be left out with --instances"),
        (("--components", "star"), "--components must be one of background, disc, box, triangle; got 'star'"),
        (("--backbone-model", "resnet50"), "must be given together"),
        (("--dataset", "folder", "--values", "1-2"), "--values must be pairs VALUE:CLASS; got 1-2"),
        (("--dataset", "pets"), r"name must be one of shapes, folder, .*, oxford_iiit_pet, .*; got 'pets'"),
        (("--no-per-image", "--parallel", "pmap"), "--per-image must be left on with --parallel pmap"),
    ):
        with pytest.raises(ValueError, match=message):
            segment.main(segment.parse([*flags, "--workdir", "/nowhere"]))


def test_sets_of_tfds(monkeypatch):
    """The names, splits and options that reach the data set."""
    opened = []

    def load_segmentation(name, split, **options):
        opened.append((name, split))
        assert options == {
            "data_dir": None, "classes": None, "values": None, "channels": 3, "size": (64, 64), "cache": True
        }  # fmt: skip
        return fv.data.ArraySource(np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 4), np.int32), ("a", "b"))

    monkeypatch.setattr(fv.data, "load_segmentation", load_segmentation)
    for name in ("oxford_iiit_pet", "cityscapes/semantic_segmentation"):
        segment.load(segment.parse(["--dataset", name, "--size", "64", "64"]))
    pets, city = "oxford_iiit_pet", "cityscapes/semantic_segmentation"
    assert opened == [(pets, "train"), (pets, "test"), (pets, "test")] + [
        (city, split) for split in ("train", "validation", "validation")
    ]


FCN = {"stage_sizes": (1,) * 5, "features": (2,) * 5, "hidden_features": 4}


def narrow_fcn32s(path):
    """Writes the weights of a narrow FCN-32s with two classes, and returns them."""
    model = fv.create_model("fcn32s_vgg16", **FCN, num_classes=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 20, 24, 3)))
    variables = filled(shapes)
    fv.weights.save(path, variables, name="fcn32s_vgg16", **FCN, num_classes=2)
    return variables


def test_a_coarser_fcn_starts_a_finer_one(tmp_path, capsys):
    """The parts of the finer network that are fresh are printed, and its fields are those of the coarser one."""
    trained = narrow_fcn32s(tmp_path / "coarse.safetensors")
    flags = ["--weights", f"{tmp_path}/coarse.safetensors", "--recipe", "fcn16s", "--model"]
    built = segment.segment_models.build(segment.parse([*flags, "fcn16s_vgg16"]), 2, 3)
    fresh = "newly initialized: score_stage4, upsample, upsample_stage4"
    assert f"starts from fcn32s_vgg16 in {tmp_path}/coarse.safetensors; {fresh}" in capsys.readouterr().out
    assert (built.model.hidden_features, built.model.skips) == (4, ("stage4",))
    assert fv.create_model(built.name, **built.overrides) == built.model
    params = built.variables["params"]
    for name in ("backbone", "fc6", "fc7", "score"):
        chex.assert_trees_all_equal(params[name], trained["params"][name])
    assert not np.any(params["score_stage4"]["kernel"])
    with pytest.raises(ValueError, match=r"trained must be the parameters .* got score/bias \(2,\) for \(3,\)"):
        segment.segment_models.build(segment.parse([*flags, "fcn16s_vgg16"]), 3, 3)
    for wrong in ([*flags, "fcn8s_vgg16", "--eval-only"], [*flags, "fcn_resnet50"]):
        with pytest.raises(ValueError, match=r"name must be fcn32s_vgg16, the model of .*coarse\.safetensors"):
            segment.segment_models.build(segment.parse(wrong), 2, 3)


@pytest.mark.slow
def test_training_in_stages(cells, tmp_path):
    """FCN-16s from FCN-32s and FCN-8s from FCN-16s; upsampling stays bilinear, and the new scores learn."""
    narrow_fcn32s(tmp_path / "32.safetensors")
    weights = tmp_path / "32.safetensors"
    for stride, new in ((16, "score_stage4"), (8, "score_stage3")):
        flags = ["--recipe", f"fcn{stride}s", "--model", f"fcn{stride}s_vgg16", "--weights", weights]
        flags += ["--dataset", "folder", "--data-dir", cells, "--classes", "background", "cell", "--instances"]
        flags += ["--epochs", 1, "--batch-size", 8, "--eval-batch-size", 8, "--learning-rate", 0.01, "--no-progress"]
        printed = run(*flags, "--workdir", tmp_path / str(stride))
        assert f"in {weights}; newly initialized: {new}" in printed
        weights = tmp_path / str(stride) / "weights.safetensors"
        card = fv.weights.read_card(weights)
        assert (card["model"], card["overrides"]["hidden_features"]) == (f"fcn{stride}s_vgg16", 4)
        params = fv.weights.load_model(card["model"], weights)[1]["params"]
        assert np.abs(params[new]["bias"]).max() > 0
        kernel = np.einsum("hw,io->hwio", bilinear_kernel(stride), np.eye(2))
        np.testing.assert_allclose(params["upsample"]["kernel"], kernel, rtol=1e-6)
