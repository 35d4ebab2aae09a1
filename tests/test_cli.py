"""Tests of the command line."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from flaxvision import cli
from flaxvision.weights.convert import nested, shapes_of
from tests.models.smallest import filled

NAME = "resnet20_cifar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with weights of another library, an image and class names."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    shapes = shapes_of(NAME, fv.create_model(NAME))
    leaves = {k: rng.uniform(0.5, 1, v.shape).astype(np.float32) / max(1, v.size) ** 0.5 for k, v in shapes.items()}
    variables = nested(leaves)
    np.savez(folder / "theirs.npz", **fv.weights.export(NAME, variables, source="akamaster"))
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "photo.png")
    (folder / "names.txt").write_text("".join(f"class {i}\n" for i in range(10)))
    return folder


def test_list(capsys):
    assert cli.main(["list", "resnet5?"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[:4] == ["resnet50", "2015", "224x224x3", "25,557,032"]
    assert line.split()[4:] == list(fv.weights.tags("resnet50"))
    assert cli.main(["list", "--task", "classification"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(fv.list_models(task="classification"))


def test_predict_and_convert(folder, capsys):
    theirs, bundle, photo = (str(folder / name) for name in ("theirs.npz", "bundle.safetensors", "photo.png"))
    flags = ["--top", "3"]
    assert cli.main(["predict", NAME, theirs, photo, photo, "--source", "akamaster", *flags]) == 0
    said = capsys.readouterr().out
    lines = [line.rsplit("  ", 2) for line in said.splitlines()]
    model, variables = fv.weights.load_model(NAME, theirs, source="akamaster")
    pixels = fv.weights.preprocessing_for(NAME, "akamaster")(Image.open(photo))
    logits = np.asarray(jax.jit(model.apply)(variables, pixels[None]))[0]
    likely = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-likely)[:3]
    cifar = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert [line[2] for line in lines] == [cifar[i] for i in order] * 2
    assert [float(line[1].strip(" %")) for line in lines[:3]] == pytest.approx(100 * likely[order], abs=0.006)

    assert cli.main(["convert", NAME, theirs, bundle, "--source", "akamaster"]) == 0
    assert "269,722 parameters" in capsys.readouterr().out
    assert cli.main(["predict", NAME, bundle, photo, photo, *flags]) == 0
    assert capsys.readouterr().out == said
    assert cli.main(["predict", NAME, bundle, photo, *flags, "--classes", str(folder / "names.txt")]) == 0
    assert [line.rsplit("  ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [f"class {i}" for i in order]
    assert fv.weights.preprocessing_for(NAME, bundle) == fv.weights.preprocessing_for(NAME, "akamaster")


def test_convert_for_other_classes_and_channels(folder, capsys):
    path, again = folder / "grey.safetensors", folder / "again.safetensors"
    flags = ["--source", "akamaster", "--num-classes", "7", "--channels", "1"]
    assert cli.main(["convert", NAME, str(folder / "theirs.npz"), str(path), *flags]) == 0
    variables, card = fv.weights.read_bundle(path)
    assert (card["overrides"], card["channels"]) == ({"num_classes": 7}, 1)
    assert card["class_names"] is None  # the new head has other classes
    assert variables["params"]["head"]["bias"].shape == (7,)
    # A bundle of a bundle keeps what its card says.
    assert cli.main(["convert", NAME, str(path), str(again)]) == 0
    assert fv.weights.read_card(again)["metadata"]["preprocessing"] == card["metadata"]["preprocessing"]
    capsys.readouterr()
    for bundle in (path, again):
        assert cli.main(["predict", NAME, str(bundle), str(folder / "photo.png"), "--top", "7"]) == 0
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == 7
        assert not said.err


def test_networks_that_flatten_keep_their_size(folder, capsys):
    model = fv.create_model("lenet_dli")
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)))
    path, again = folder / "lenet.safetensors", folder / "lenet2.safetensors"
    fv.weights.save(path, variables, name="lenet_dli", channels=3, input_size=(32, 32), metadata={"licence": "MIT"})
    assert fv.weights.preprocessing_for("lenet_dli", str(path)).crop == 32
    assert cli.main(["convert", "lenet_dli", str(path), str(again)]) == 0
    assert fv.weights.read_card(again)["metadata"]["licence"] == "MIT"
    assert cli.main(["predict", "lenet_dli", str(again), str(folder / "photo.png"), "--top", "1"]) == 0


def test_features_are_no_classes(folder, capsys):
    path = str(folder / "headless.safetensors")
    flags = ["--source", "akamaster", "--num-classes", "0"]
    assert cli.main(["convert", NAME, str(folder / "theirs.npz"), path, *flags]) == 0
    assert cli.main(["predict", NAME, path, str(folder / "photo.png")]) == 1
    assert "headless.safetensors, which gives features" in capsys.readouterr().err


def test_a_bundle_without_a_transform_has_the_models_own(folder):
    variables = fv.weights.load(NAME, folder / "theirs.npz", source="akamaster")
    fv.weights.save(folder / "bare.safetensors", variables, name=NAME)
    path = str(folder / "bare.safetensors")
    assert fv.weights.preprocessing_for(NAME, path) == fv.weights.preprocessing_for(NAME)
    card = json.loads((folder / "bare.json").read_text())
    (folder / "bare.json").write_text(json.dumps(card | {"metadata": {"preprocessing": {"cropp": 3}}}))
    with pytest.raises(ValueError, match="holds an invalid evaluation transform"):
        fv.weights.preprocessing_for(NAME, path)


def test_a_library_tells_the_transform_where_its_tags_agree(folder, capsys):
    assert fv.weights.preprocessing_for("xception", "timm") == fv.weights.preprocessing_for("xception", "timm/tf_in1k")
    usual = fv.weights.preprocessing_for("resnet50", "timm")
    assert (usual.crop, usual.resize) == (224, 256)
    assert fv.weights.preprocessing_for("resnet50", "timm/a1_in1k") != usual
    variables = fv.weights.load(NAME, folder / "theirs.npz", source="akamaster")
    fv.weights.save(folder / "silent.safetensors", variables, name=NAME)
    args = ["predict", NAME, str(folder / "silent.safetensors"), str(folder / "photo.png")]
    assert cli.main(args) == 0
    assert "this is a guess" in capsys.readouterr().err
    assert cli.main([*args, "--preprocessing", "akamaster"]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["list", "nosuch*"], "pattern must match a model; got 'nosuch*'"),
        (["list", "yolo*", "--task", "segmentation"], "must match a model with the task segmentation; got 'yolo*'"),
        (["predict", "resnet5", "x.npz", "photo.png"], "; got 'resnet5'"),
        (["predict", NAME, "theirs.npz", "nosuch.png", "--source", "akamaster"], "No such file"),
        (["predict", NAME, "theirs.npz", "names.txt", "--source", "akamaster"], "cannot identify image file"),
        (["predict", NAME, "theirs.npz", "photo.png"], "source must name the library of theirs.npz"),
        (
            ["predict", NAME, "theirs.npz", "--source", "akamaster"],
            "IMAGE must be the path of at least one",
        ),
        (["predict", NAME, "theirs.npz", "photo.png", "--source", "akamaster", "--top", "0"], "--top must be at least"),
        (
            ["convert", NAME, "theirs.npz", "out.npz", "--source", "akamaster"],
            "must end in .safetensors; got out.npz",
        ),
        (
            ["convert", NAME, "nosuch.npz", "out.safetensors", "--source", "akamaster"],
            "must be an existing file; got nosuch",
        ),
    ],
)
def test_one_line_for_each_error(folder, monkeypatch, capsys, args, message):
    monkeypatch.chdir(folder)
    assert cli.main(args) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_the_numbers_of_names_and_classes(folder, capsys):
    (folder / "few.txt").write_text("cat\n")
    args = ["predict", NAME, str(folder / "theirs.npz"), str(folder / "photo.png"), "--source", "akamaster"]
    assert cli.main([*args, "--classes", str(folder / "few.txt")]) == 1
    assert "--classes must have one name for each of 10 classes; got 1 names" in capsys.readouterr().err
