"""experiments/cifar10.py: its recipes, a run of a tiny net, an evaluation of given weights."""

import dataclasses
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from flaxvision import registry
from flaxvision.models.resnet import CifarResNet, CifarResNetBackbone
from tests.models.smallest import filled
from tests.scripts import load_script

cifar10 = load_script("cifar10")


@pytest.fixture
def tiny(monkeypatch):
    """A registered ResNet with one unit, which compiles quickly."""
    info = dataclasses.replace(
        fv.model_info("resnet20_cifar"), name="tiny", defaults=(("stage_sizes", (1,)), ("features", (8,)))
    )
    monkeypatch.setitem(registry._MODELS, "tiny", registry._Entry(CifarResNet, CifarResNetBackbone, info))
    return "tiny"


@pytest.fixture
def npz(tmp_path):
    """Dark and light images of 10 classes: the label is how light."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 160), ("test", 27)):
        label = np.arange(count) % 10
        noise = rng.integers(0, 12, (count, 32, 32, 3))
        arrays |= {f"{split}_image": (25 * label[:, None, None, None] + noise).astype(np.uint8)}
        arrays |= {f"{split}_label": label}
    np.savez(tmp_path / "shades.npz", **arrays)
    return str(tmp_path / "shades.npz")


def test_he_2015_in_numbers():
    recipe = cifar10.RECIPES["he"]
    steps = 50_000 // recipe.batch_size
    assert recipe.num_steps(steps) == 64_000
    rates = recipe.learning_rate_schedule(steps)
    for step, rate in ((0, 0.1), (31_999, 0.1), (32_001, 0.01), (47_999, 0.01), (48_001, 0.001), (63_999, 0.001)):
        assert float(rates(step)) == pytest.approx(rate)
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay) == (128, 0.9, 1e-4)
    assert (recipe.crop_padding, recipe.flip, recipe.cutout) == (4, True, 0)


@pytest.mark.parametrize(("flags", "recipe", "changed"), [
    ([], "demo", {}),
    (["--dataset", "cifar10"], "he", {}),
    (["--manual-dir=/some_where"], "he", {}),
    (["--data_dir", "x", "--recipe=fast", "--epochs", "3"], "fast", {"epochs": 3.0}),
    (["--recipe", "he", "--learning-rate", "0.2", "--no-flip"], "he", {"learning_rate": 0.2, "flip": False}),
])  # fmt: skip
def test_a_recipe_sets_the_defaults_of_the_other_flags(flags, recipe, changed):
    config = cifar10.parse(flags)
    assert config.recipe == recipe
    expected = dataclasses.asdict(cifar10.RECIPES[recipe]) | changed
    assert {k: v for k, v in dataclasses.asdict(config).items() if k in expected} == expected


def test_the_help_shows_every_flag_with_the_recipes_values(capsys):
    with pytest.raises(SystemExit) as stopped:
        cifar10.parse(["--help", "--recipe", "fast"])
    assert stopped.value.code == 0
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    for field in dataclasses.fields(cifar10.Config):
        assert f"--{field.name.replace('_', '-')} " in text.replace(",", " ")
    assert f"(default: {cifar10.RECIPES['fast'].epochs})" in text
    with pytest.raises(SystemExit) as stopped:
        cifar10.parse(["--recipe", "slow"])
    assert stopped.value.code == 2
    assert "fast" in capsys.readouterr().err


def config_of(tmp_path, npz, **options):
    defaults = {"recipe": "fast", "dataset": npz, "model": "tiny", "epochs": 3.0, "batch_size": 32, "progress": False}
    options = {"workdir": str(tmp_path / "run"), "eval_batch_size": 16, "log_every": 5} | options
    return cifar10.Config(**dataclasses.asdict(cifar10.RECIPES["fast"]) | defaults | options)


@pytest.mark.slow
def test_a_run_learns_and_goes_on(tmp_path, npz, tiny, capsys):
    config = config_of(tmp_path, npz, learning_rate=0.05, cutout=4, mixup=0.1)
    assert cifar10.main(config) == 0
    text = capsys.readouterr().out
    assert re.search(r"test accuracy \d+\.\d\d%, top-5 \d+\.\d\d%, loss \d\.\d+, on 27 images", text)
    records = fv.train.read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "validation"] == [10, 15]
    losses = [r["loss"] for r in records if r["split"] == "train"]
    assert losses[-1] < losses[0]
    for name in ("samples.png", "curves.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert np.asarray(picture.convert("L"), float).std() > 10
    # Done: nothing is trained again. Neither of these flags changes the run.
    assert cifar10.main(dataclasses.replace(config, eval_batch_size=9, log_every=1)) == 0
    assert capsys.readouterr().out == text
    assert fv.train.read_records(tmp_path / "run" / "metrics.jsonl") == records
    weights = str(tmp_path / "run" / "weights.safetensors")
    assert len(fv.weights.read_card(weights)["class_names"]) == fv.weights.load_model("tiny", weights)[0].num_classes
    assert cifar10.main(dataclasses.replace(config, eval_only=True, weights=weights)) == 0
    assert capsys.readouterr().out == text.splitlines(keepends=True)[0]
    with pytest.raises(ValueError, match=r"holds another run: weight_decay was 0\.0005, now 0\.1"):
        cifar10.main(dataclasses.replace(config, weight_decay=0.1))


def test_given_weights_are_measured_on_every_image_once(tmp_path, npz, tiny, capsys):
    model = fv.create_model("tiny")
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32) * np.where(rng.random(x.shape) < 0.5, -1, 1),
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)),
    )
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    fv.weights.save(tmp_path / "tiny.safetensors", variables, name="tiny")
    test = fv.data.load(npz, "test")
    mean, std = (np.array(x, np.float32) for x in (fv.model_info("tiny").mean, fv.model_info("tiny").std))
    logits = jax.jit(model.apply)(variables, (test.image / np.float32(255) - mean) / std)
    expected = float(np.mean(np.argmax(logits, -1) == test.label))
    config = config_of(tmp_path, npz, eval_only=True, weights=str(tmp_path / "tiny.safetensors"))
    assert cifar10.main(config) == 0
    assert f"test accuracy {expected:.2%}, top-5" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="--weights FILE-OR-TAG must be given together; got True and None"):
        cifar10.main(dataclasses.replace(config, weights=None))
    seven = fv.create_model("tiny", num_classes=7)
    other = filled(jax.eval_shape(seven.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)))
    fv.weights.save(tmp_path / "seven.safetensors", other, name="tiny", num_classes=7)
    config = dataclasses.replace(config, dataset="patterns", weights=str(tmp_path / "seven.safetensors"))
    with pytest.raises(ValueError, match=r"--weights must be for the 10 classes of patterns/test; got .* for 7"):
        cifar10.main(config)
    assert "drawn patterns" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["eval_every", "log_every", "eval_batch_size"])
def test_nonsense_numbers(tmp_path, npz, tiny, field):
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} must be positive and finite; got 0"):
        cifar10.main(config_of(tmp_path, npz, **{field: 0}))


def test_models_for_grey_images(tmp_path, npz):
    with pytest.raises(ValueError, match="--model must take colour images; got capsnet, which takes"):
        cifar10.main(config_of(tmp_path, npz, model="capsnet"))


@pytest.mark.data
def test_the_published_resnet20_scores_what_was_published(tmp_path, capsys):
    """$FLAXVISION_DATA/cifar10 holds lossless sheets, $FLAXVISION_DATA/weights the network."""
    root = Path(os.environ["FLAXVISION_DATA"])
    sheets = [np.asarray(Image.open(root / "cifar10" / f"test_{k:02d}.webp").convert("RGB")) for k in range(10)]
    tiles = [s.reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3).reshape(1000, 3072) for s in sheets]
    label = np.fromfile(root / "cifar10" / "test_labels.u8", np.uint8)
    np.concatenate([label[:, None], np.concatenate(tiles)], 1).tofile(tmp_path / "test_batch.bin")
    weights = str(root / "weights" / "resnet20_cifar10.npz")
    config = cifar10.Config(manual_dir=str(tmp_path), eval_only=True, weights=weights, source="akamaster")
    assert cifar10.main(dataclasses.replace(config, eval_batch_size=1000)) == 0
    assert "test accuracy 91.73%, top-5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", float("inf"), "epochs must be positive and finite; got inf"),
        ("momentum", 1.5, r"momentum must be in \[0, 1\); got 1\.5"),
        ("rms_decay", -0.1, r"rms_decay must be in \[0, 1\)"),
        ("ema_decay", 1.0, r"ema_decay must be in \[0, 1\)"),
        ("epsilon", 0.0, "epsilon must be positive"),
        ("cutout", -3, "cutout must not be negative; got -3"),
        ("mixup", -1.0, "mixup must not be negative"),
    ],
)
def test_recipes_refuse_what_is_out_of_range(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(cifar10.RECIPES["fast"], **{field: value})
