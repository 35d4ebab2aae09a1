"""experiments/imagenet.py: its recipes, runs of a tiny net on a folder, an evaluation of given weights."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import flaxvision as fv
from flaxvision import registry
from flaxvision.models.resnet import CifarResNet, CifarResNetBackbone
from tests.models.smallest import filled
from tests.scripts import load_script

imagenet = load_script("imagenet")


@pytest.fixture
def tiny(monkeypatch):
    """A registered ResNet with one unit, which compiles quickly."""
    info = dataclasses.replace(
        fv.model_info("resnet20_cifar"), name="tiny", defaults=(("stage_sizes", (1,)), ("features", (8,)))
    )
    monkeypatch.setitem(registry._MODELS, "tiny", registry._Entry(CifarResNet, CifarResNetBackbone, info))
    return "tiny"


@pytest.fixture
def folder(tmp_path):
    """Dark and light photographs of different sizes, in train and val."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 7)):
        for name, level in (("dark", 30), ("light", 200)):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(40, 70, 2)
                pixels = level + rng.integers(0, 40, (height, width, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / part / name / f"{i}.jpg")
    return str(tmp_path / "photos")


def config_of(tmp_path, recipe, folder, **options):
    defaults = {"recipe": recipe, "dataset": folder, "model": "tiny", "epochs": 3.0, "batch_size": 16}
    options = {"workdir": str(tmp_path / "run"), "eval_batch_size": 8, "log_every": 1, "threads": 2} | options
    return imagenet.Config(**dataclasses.asdict(imagenet.RECIPES[recipe]) | defaults | options, progress=False)


def test_every_classifier_of_images_has_a_recipe_that_can_run():
    chosen = {}
    for name in fv.list_models(task="classification"):
        chosen[name] = imagenet.parse(["--model", name, "--dataset", "imagenet2012"]).recipe
    for name, recipe in {
        "resnet50": "resnet", "alexnet": "alexnet", "zfnet": "alexnet", "vgg16_bn": "vgg", "googlenet": "googlenet",
        "inception_resnet_v2": "inception", "se_inception_v3": "inception", "se_resnet50": "senet", "senet154": "senet",
        "xception": "xception", "mobilenet_v2": "mobilenet", "squeezenet1_0": "squeezenet", "bn_inception": "inception",
    }.items():  # fmt: skip
        assert chosen[name] == recipe
    assert set(chosen.values()) < set(imagenet.RECIPES)
    for recipe in imagenet.RECIPES.values():
        steps = 1_281_167 // recipe.batch_size
        assert np.isfinite(float(recipe.learning_rate_schedule(steps)(recipe.num_steps(steps) - 1)))
        recipe.make_optimizer(recipe.learning_rate_schedule(steps))


@pytest.mark.parametrize(("recipe", "rates"), [
    ("resnet", {29: 0.1, 31: 0.01, 61: 1e-3, 81: 1e-4}),
    ("resnet_cosine", {5.1: 0.4, 47.5: 0.2}),
    ("long", {5: 0.5, 302.5: 0.25}),
    ("alexnet", {29: 0.01, 31: 1e-3}),
    ("googlenet", {7: 0.01, 9: 0.0096, 249: 0.01 * 0.96**31}),
    ("inception", {1: 0.045, 3: 0.045 * 0.94, 99: 0.045 * 0.94**49}),
    ("senet", {29: 0.6, 31: 0.06, 91: 6e-4}),
    ("squeezenet", {34: 0.02}),
    ("mobilenet", {0.5: 0.045, 10.5: 0.045 * 0.98**10}),
])  # fmt: skip
def test_the_rates_of_the_papers_by_epoch(recipe, rates):
    schedule = imagenet.RECIPES[recipe].learning_rate_schedule(1000)
    for epoch, rate in rates.items():
        assert float(schedule(int(epoch * 1000))) == pytest.approx(rate, rel=1e-3)


def test_an_evaluation_takes_no_sizes_from_recipes():
    for flags in ([], ["--model", "alexnet", "--dataset", "x"], ["--recipe", "long"]):
        config = imagenet.parse([*flags, "--eval-only", "--weights", "x"])
        assert (config.eval_size, config.eval_shorter) == (None, None)
    assert imagenet.parse(["--eval_only", "--eval-size", "40"]).eval_size == 40
    assert imagenet.parse(["--eval_only"]).eval_size is None


def images_of_the_demo():
    names = fv.list_models(task="classification")
    return [n for n in names if imagenet.parse(["--model", n]).size and len(fv.model_info(n).input_size) == 2]


def smallest_of_each_class():
    classes = {}
    for name in sorted(images_of_the_demo(), key=lambda name: fv.model_info(name).params):
        classes.setdefault((type(fv.create_model(name)), imagenet.parse(["--model", name]).size), name)
    return set(classes.values())


@pytest.mark.parametrize("part", ["smallest of each class", pytest.param("the others", marks=pytest.mark.slow)])
def test_the_demo_fits_every_model_of_images(part):
    smallest = smallest_of_each_class()
    for name in images_of_the_demo():
        if (name in smallest) != (part == "smallest of each class") or name in (
            "mlp",
            "lenet_dli",
            "fashion_cnn",
            "capsnet",
        ):
            continue
        config = imagenet.parse(["--model", name])
        assert config.size == config.eval_size
        assert not config.aux_weight
        images = jax.ShapeDtypeStruct((1, config.size, config.size, 3), np.float32)
        out, _ = jax.eval_shape(fv.create_model(name, num_classes=7).init_with_output, jax.random.key(0), images)
        assert out.shape == (1, 7), name


@pytest.mark.parametrize(("options", "message"), [
    ({"model": "alexnet", "size": 64, "eval_size": 96}, "--eval-size must fit alexnet at --size 64; got 96"),
    ({"size": -5}, "size must be at least 1; got -5"),
    ({"eval_size": 0}, "eval_size must be at least 1; got 0"),
])  # fmt: skip
def test_sizes_that_do_not_fit(tmp_path, folder, tiny, options, message):
    with pytest.raises(ValueError, match=message):
        imagenet.main(config_of(tmp_path, "alexnet", folder, **{"shorter": (100, 100), "eval_shorter": 110} | options))


def test_flags_override_the_recipe():
    config = imagenet.parse(
        ["--dataset", "somewhere", "--model=vgg11", "--batch-size", "64", "--shorter", "256", "300"]
    )
    assert (config.recipe, config.epochs, config.weight_decay, config.crop) == ("vgg", 74.0, 5e-4, "scaled")
    assert (config.batch_size, config.shorter) == (64, (256, 300))
    assert imagenet.parse([]).recipe == "demo"
    assert imagenet.parse(["--recipe=resnet_cosine"]).warmup_epochs == 5.0
    assert imagenet.parse(["--recipe", "long", "--model", "vgg11"]).epochs == 600.0


def test_the_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        imagenet.parse(["--help"])
    assert stopped.value.code == 0
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    for field in dataclasses.fields(imagenet.Config):
        assert f"--{field.name.replace('_', '-')} " in text.replace(",", " ")


LONG = {"size": 24, "eval_size": 32, "eval_shorter": 36, "warmup_epochs": 0.0, "learning_rate": 0.1}
ALEXNET = {"size": 32, "shorter": (36, 40), "eval_shorter": 36, "parallel": "pmap", "learning_rate": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "options"), [("long", LONG), ("alexnet", ALEXNET)])
def test_a_folder_trains_and_every_photograph_counts_once(tmp_path, folder, tiny, recipe, options, capsys):
    config = config_of(tmp_path, recipe, folder, **options)
    assert imagenet.main(config) == 0
    text = capsys.readouterr().out
    assert re.search(r"top-1 \d+\.\d\d%, loss \d\.\d+, on 14 images", text)
    records = fv.train.read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "validation"] == [3, 6, 9]
    assert all(r["accuracy"] * 14 == pytest.approx(round(r["accuracy"] * 14)) for r in records if len(r) < 5)
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert np.asarray(picture.convert("L"), float).std() > 10
    assert imagenet.main(config) == 0  # done: nothing is trained again
    assert capsys.readouterr().out == text
    assert fv.train.read_records(tmp_path / "run" / "metrics.jsonl") == records
    weights = str(tmp_path / "run" / "weights.safetensors")
    assert len(fv.weights.read_card(weights)["class_names"]) == fv.weights.load_model("tiny", weights)[0].num_classes
    assert imagenet.main(dataclasses.replace(config, eval_only=True, weights=weights)) == 0
    figures = re.compile(r"top-1 (.*)%, loss (.*), on 14")
    (top1, loss), (again, close) = (figures.search(t).groups() for t in (text, capsys.readouterr().out))
    assert again == top1
    assert float(close) == pytest.approx(float(loss), abs=2e-4)


@pytest.mark.parametrize("part", ["train", "val"])
def test_verifying_covers_both_parts(tmp_path, folder, tiny, part):
    for i in range(100, 300):
        Path(folder, part, "dark", f"{i}.jpg").hardlink_to(Path(folder, part, "dark", "0.jpg"))
    source = fv.data.load(folder, part)
    sampled = np.linspace(0, len(source) - 1, 64).astype(int)  # what is read in any case
    broken = Path(folder, part, source.paths[next(i for i in range(20, 200) if i not in sampled)])
    broken.unlink()
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=rf"images cannot be decoded: .*{part}/dark/{broken.name}"):
        imagenet.main(config_of(tmp_path, "demo", folder, verify=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_continues_from_a_mended_folder_elsewhere(tmp_path, folder, tiny, monkeypatch, caplog):
    def fail(state):
        raise RuntimeError("the first evaluation fails")  # after the checkpoint

    config = config_of(tmp_path, "demo", folder)
    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "evaluation", lambda *args: fail)
        with pytest.raises(RuntimeError, match="the first evaluation fails"):
            imagenet.main(config)
    moved = Path(folder).rename(tmp_path / "elsewhere")
    (moved / "train" / "dark" / "3.jpg").write_bytes(b"no picture")
    config = dataclasses.replace(config, dataset=str(moved), skip_broken=True)
    with pytest.raises(
        ValueError, match=r"data must be as in checkpoint 3 .*; got differences: length was 48, is 47; class 'dark'"
    ):
        imagenet.main(config)
    assert imagenet.main(dataclasses.replace(config, allow_changes=True)) == 0
    assert "class 'dark' had 24 images, has 23; a run that resumes from it differs" in caplog.text


@pytest.mark.slow
def test_given_weights_see_the_preprocessing_that_belongs_to_them(tmp_path, tiny, capsys):
    model = fv.create_model("tiny")
    rng = np.random.default_rng(2)
    variables = jax.tree.map(
        lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32) * np.where(rng.random(x.shape) < 0.5, -1, 1),
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)),
    )
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    photos = fv.data.load("patterns", "test", as_stored=True)
    usual = fv.weights.preprocessing_for("tiny")
    own = dataclasses.replace(usual, crop=40, resize=44, interpolation="bicubic")
    options = {"eval_only": True, "eval_batch_size": 64}
    said = []
    for prepare, metadata, more in (
        (usual, {}, {}),
        (dataclasses.replace(usual, crop=48, resize=55), {}, {"eval_size": 48}),
        (own, {"preprocessing": dataclasses.asdict(own)}, {}),
    ):
        fv.weights.save(tmp_path / "tiny.safetensors", variables, name="tiny", metadata=metadata)
        logits = jax.jit(model.apply)(variables, np.stack([prepare(photos[i]["image"]) for i in range(len(photos))]))
        ranks = np.argsort(-np.asarray(logits), -1)
        top1, top5 = (np.mean([photos.label[i] in ranks[i, :k] for i in range(250)]) for k in (1, 5))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, photos.label[:250]).mean().item()
        config = config_of(tmp_path, "demo", "patterns", weights=str(tmp_path / "tiny.safetensors"), **options, **more)
        assert imagenet.main(config) == 0
        text = capsys.readouterr().out
        assert "drawn patterns" in text
        assert f"top-1 {top1:.2%}, top-5 {top5:.2%}, loss" in text
        assert "on 250 images" in text
        assert float(re.search(r"loss ([\d.]+)", text)[1]) == pytest.approx(loss, rel=1e-5)
        said.append(text)
    assert len(set(said)) == 3
    assert not (tmp_path / "run").exists()


def test_what_can_not_be_evaluated_is_refused(tmp_path, folder, tiny):
    with pytest.raises(ValueError, match="--weights FILE-OR-TAG must be given together; got True and None"):
        imagenet.main(config_of(tmp_path, "demo", folder, eval_only=True))
    with pytest.raises(ValueError, match="must be given together; got False and torchvision/IMAGENET1K_V1"):
        imagenet.main(config_of(tmp_path, "demo", folder, weights="torchvision/IMAGENET1K_V1"))
    ten = jax.eval_shape(
        fv.create_model("tiny").init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    )
    fv.weights.save(tmp_path / "ten.safetensors", filled(ten), name="tiny")
    options = {"eval_only": True, "weights": str(tmp_path / "ten.safetensors")}
    with pytest.raises(ValueError, match=r"--weights must be for the 2 classes of photos/test; got .* for 10"):
        imagenet.main(config_of(tmp_path, "demo", folder, **options))
    with pytest.raises(ValueError, match="--eval-shorter must be at least 32, the size of the crop; got 10"):
        imagenet.main(config_of(tmp_path, "demo", folder, eval_shorter=10))
    for field, value in (("area", (0.9, 0.1)), ("area", (2.0, 3.0)), ("shorter", (40, 30)), ("lighting", -1.0)):
        with pytest.raises(ValueError, match=f"{field} must"):
            config_of(tmp_path, "demo", folder, **{field: value})
    with pytest.raises(ValueError, match="--eval-every must be positive and finite; got -1"):
        imagenet.main(config_of(tmp_path, "demo", folder, eval_every=-1.0))
    broken = Path(folder) / "val" / "dark" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"dark/0\.jpg is not a readable image"):
        imagenet.main(config_of(tmp_path, "demo", folder))
    assert not (tmp_path / "run").exists()
