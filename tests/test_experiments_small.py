"""The two small experiments, run as a user runs them: what they print, draw and refuse."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image
from sklearn.datasets import load_sample_images

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and tyro look the module up by its name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def iris():
    return load("perceptron_iris")


@pytest.fixture(scope="module")
def photos():
    return load("feature_maps")


def assert_drawn(path):
    """The file is a picture of many shades, not one blank area."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), np.float32)
    assert min(pixels.shape) > 200
    assert pixels.std() > 10


def wrong_flowers(text):
    return int(re.search(r"(\d+) of 150 flowers are wrong", text).group(1))


def rule(text, species):
    """The decision printed as `species where a length b width c >= 0`."""
    number = r"([+-]\d+\.?\d*(?:e[+-]\d+)?)"
    found = re.search(f"{species} where {number} length {number} width {number} >= 0", text)
    return [float(each) for each in found.groups()]


@pytest.mark.parametrize("shuffle", [True, False])
def test_perceptron_separates_setosa(iris, tmp_path, capsys, shuffle):
    assert iris.main(iris.Config(workdir=str(tmp_path / "new" / "run"), shuffle=shuffle)) == 0
    text = capsys.readouterr().out
    mistakes = [int(m) for m in re.findall(r"^pass \d+: (\d+) mistakes?$", text, re.MULTILINE)]
    assert mistakes[0] > 0
    assert mistakes[-1] == 0
    assert 0 not in mistakes[:-1]
    assert f"converged after {len(mistakes)} passes" in text
    assert "did not converge" not in text
    assert "separates setosa without error: 0 of 150 flowers are wrong" in text

    features, species = iris.load_iris(return_X_y=True)
    a, b, c = rule(text, "setosa")  # four digits are enough here: no flower is near the line
    np.testing.assert_array_equal(a * features[:, 2] + b * features[:, 3] + c >= 0, species == 0)
    assert_drawn(tmp_path / "new" / "run" / "decision_boundary.png")
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["decision_boundary.png"]


def test_perceptron_says_that_versicolor_does_not_converge(iris, tmp_path, capsys):
    assert iris.main(iris.Config(species="versicolor", epochs=6, workdir=str(tmp_path))) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^pass ", text, re.MULTILINE)) == 6
    assert "did not converge" in text
    assert "separates versicolor without error" not in text
    assert wrong_flowers(text) > 0
    assert_drawn(tmp_path / "decision_boundary.png")


def test_perceptron_orders_follow_the_seed(iris, tmp_path, capsys):
    texts = []
    for seed, rate in ((1, 1.0), (1, 1.0), (2, 1.0), (1, 0.5)):
        iris.main(iris.Config("virginica", epochs=3, seed=seed, learning_rate=rate, workdir=str(tmp_path)))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    # A power of two scales the weights exactly, and nothing else.
    np.testing.assert_allclose(rule(texts[3], "virginica"), np.multiply(rule(texts[0], "virginica"), 0.5), rtol=1e-3)
    assert texts[3].splitlines()[:3] == texts[0].splitlines()[:3]


def test_feature_maps_draws_every_picture(photos, tmp_path, capsys):
    assert photos.main(photos.Config(workdir=str(tmp_path))) == 0
    names = {"filters.png", "feature_maps.png", "details.png", "pooling.png", "depthwise.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert_drawn(tmp_path / name)

    table = capsys.readouterr().out
    for photo, image in zip(("temple", "dahlia"), load_sample_images().images, strict=True):
        printed = [float(each) for each in re.search(f"^{photo} +(.*)$", table, re.MULTILINE).group(1).split()]
        means = (image / 255).mean((0, 1))
        np.testing.assert_allclose(printed[:3], means, atol=6e-4)
        # Each filter is three channels of seven ones; the zeros beyond the border take a little away.
        np.testing.assert_allclose(printed[3:], 2 * [7 * means.sum()], rtol=0.02)


@pytest.mark.parametrize("corner", [(0, 0), (200, 300), (417, 626)])
def test_line_maps_equal_a_numpy_convolution(photos, corner):
    image = load_sample_images().images[0] / np.float64(255)
    maps = photos.line_maps((image[None]).astype(np.float32), photos.line_filters(7, 3))
    assert maps.shape == (1, 427, 640, 2)

    padded = np.pad(image.sum(-1), 3)
    for i in range(corner[0], corner[0] + 10):
        for j in range(corner[1], corner[1] + 14):
            vertical = sum(padded[i + k, j + 3] for k in range(7))
            horizontal = sum(padded[i + 3, j + k] for k in range(7))
            np.testing.assert_allclose(maps[0, i, j], [vertical, horizontal], rtol=1e-5)


def test_grey_keeps_the_order_of_two_maps(photos):
    maps = np.arange(24, dtype=np.float32).reshape(3, 4, 2) - 5
    images = np.asarray(photos.grey(maps))
    assert images.shape == (2, 3, 4, 3)
    np.testing.assert_allclose(images[..., 0], np.moveaxis((maps + 5) / 23, -1, 0), rtol=1e-6)
    np.testing.assert_array_equal(images[..., 0], images[..., 2])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("iris", "epochs", 0),
        ("iris", "learning_rate", 0.0),
        ("iris", "learning_rate", float("nan")),
        ("photos", "kernel_size", 4),
        ("photos", "kernel_size", 65),
        ("photos", "pool", 0),
    ],
)
def test_bad_values_are_refused_by_flag_and_value(name, field, value, request, tmp_path):
    module = request.getfixturevalue(name)
    config = dataclasses.replace(module.Config(workdir=str(tmp_path / "run")), **{field: value})
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} .*got {value}"):
        module.main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "args", "hint"),
    [
        ("iris", ["--learning-rat", "1"], "--learning-rate"),
        ("iris", ["--species", "rose"], "versicolor"),
        ("photos", ["--kernel-sise", "7"], "--kernel-size"),
    ],
)
def test_unknown_flags_and_species_are_refused_with_what_would_do(name, args, hint, request, capsys):
    module = request.getfixturevalue(name)
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(module.Config, args=args)
    assert stopped.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("name", ["iris", "photos"])
def test_every_flag_has_a_help_text(name, request, capsys):
    module = request.getfixturevalue(name)
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(module.Config, args=["--help"], description=module.__doc__)
    assert stopped.value.code == 0
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name.replace('_', '-')} " in text.replace(",", " ")
    assert text.count("(default:") == len(dataclasses.fields(module.Config))
    assert f"python experiments/{Path(module.__file__).name}" in text
