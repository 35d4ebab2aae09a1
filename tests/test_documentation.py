"""The examples of the README and of the docstrings run as they are printed."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import shlex
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import flaxvision as fv
from flaxvision import cli

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    """The README's examples in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def drawn(like, seed=0):
    """Small random numbers, shaped as the leaves of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.uniform(0, 0.05, leaf.shape).astype(np.float32), like)


def test_the_first_example_of_the_readme():
    example = blocks("python")[0]
    assert len(example.strip().splitlines()) <= 15
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(example, {})
    assert float(re.search(r"'accuracy': ([\d.]+)", printed.getvalue())[1]) > 0.9


@pytest.mark.slow
def test_the_examples_of_backbones_and_weights(tmp_path, monkeypatch, capsys):
    """On images of 32 pixels, with drawn weights in the place of the published files."""
    _, backbones, segments, weights = blocks("python")
    model = fv.create_model("resnet50", num_classes=10)
    images = jnp.zeros((1, 32, 32, 3))
    variables = drawn(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images))
    names = {"fv": fv, "jnp": jnp, "images": images, "variables": variables}
    exec(backbones, names)
    assert list(names["stages"]) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert names["stages"]["stage4"].shape[1:3] == (2, 2)  # stride 16
    assert names["logits"].shape == (1, 10)
    assert names["backbone"].strides == {"stage2": 8, "stage3": 16}

    model = fv.create_model("unet_same", num_classes=3)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    names = {"fv": fv, "images": images, "variables": drawn(shapes)}
    exec(segments, names)
    assert names["labels"].shape == (1, 32, 32)

    model = fv.create_model("resnet50")
    variables = drawn(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images))
    theirs = fv.weights.export("resnet50", variables, source="torchvision")
    save_file(theirs, tmp_path / "published.safetensors")
    keras = fv.weights.export("resnet50", variables, source="keras", **fv.weights.fields("resnet50", "keras"))
    monkeypatch.chdir(tmp_path)
    layers = sorted({name.rpartition("/")[0] for name in keras})
    with h5py.File("resnet50.h5", "w") as file:
        file.attrs["layer_names"] = layers
        for layer in layers:
            mine = [name for name in keras if name.rpartition("/")[0] == layer]
            file.create_group(layer).attrs["weight_names"] = [f"{name}:0" for name in mine]
            for name in mine:
                file[layer][f"{name}:0"] = keras[name]
    monkeypatch.setitem(fv.weights.load.__globals__, "fetch", lambda *_, **__: tmp_path / "published.safetensors")
    photo = np.zeros((40, 50, 3), np.uint8)
    names = {"fv": fv, "photo": photo, "state_dict": theirs}
    exec(weights, names)
    assert names["logits"].shape == (1, 1000)
    jax.tree.map(np.testing.assert_array_equal, names["variables"], variables)

    from PIL import Image

    Image.fromarray(photo).save("photo.jpg")
    (block,) = [block for block in blocks("sh") if "flaxvision predict" in block]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [command[1] for command in commands] == ["predict", "list", "convert"]
    for command in commands:
        assert cli.main(command[1:]) == 0
    assert len(re.findall(r"photo\.jpg .*%", capsys.readouterr().out)) == 5
    assert Path("resnet50.safetensors").exists()


def modules():
    return ["flaxvision"] + [m.name for m in pkgutil.walk_packages(fv.__path__, "flaxvision.")]


def test_the_examples_of_docstrings():
    found = 0
    for name in modules():
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
        assert not result.failed, name
        found += result.attempted
    assert found >= 18
