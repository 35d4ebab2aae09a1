"""`flaxvision predict` for detectors: from a file to boxes in its pixels."""

import importlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from flaxvision import cli, predict

SMALL = {
    "convs": (((4, 3),), ((4, 3),), ((8, 3),), ((8, 3),), ((8, 3),)),
    "stages": ("stage3", "stage4"),
    "last_pool": False,
    "necks": (((8, 1),), ()),
    "head_features": (8, 8),
    "lateral_features": (8,),
    "anchors": ((20, 20), (40, 30)),
    "num_classes": 2,
}
CARD = {"sizes": [[32, 48], [48, 32]], "shorter": None, "longer": None, "resize": True, "larger": "resize", "fill": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle of a detector that finds something everywhere, and two photographs."""
    path = tmp_path_factory.mktemp("predict")
    model = fv.create_model("yolo_v3_tiny", **SMALL)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    fv.weights.save(
        path / "boxes.safetensors",
        variables,
        name="yolo_v3_tiny",
        class_names=("cat", "dog"),
        metadata={"canvases": CARD | {"mean": [0.0] * 3, "std": [1.0] * 3, "padding": 0.25}},
        **SMALL,
    )
    for name, size in (("wide", (60, 90)), ("tall", (100, 40))):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{name}.png")
    return path


def run(*arguments):
    return cli.main([str(each) for each in arguments])


def test_a_table_and_a_picture(folder, capsys):
    flags = ("--score", "0.05", "--out", folder / "out.png")
    assert run("predict", "yolo_v3_tiny", folder / "boxes.safetensors", folder / "wide.png", *flags) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) > 1
    assert all("wide.png" in line and "%" in line and (" cat " in line or " dog " in line) for line in lines)
    with Image.open(folder / "out.png") as image:
        assert min(image.size) > 100


def test_json_of_several_images(folder, capsys):
    images = (folder / "wide.png", folder / "tall.png")
    flags = ("--json", "--score", "0.05", "--out", folder / "pictures")
    assert run("predict", "yolo_v3_tiny", folder / "boxes.safetensors", *images, *flags) == 0
    content = json.loads(capsys.readouterr().out)
    assert [(each["height"], each["width"]) for each in content] == [(60, 90), (100, 40)]
    for each in content:
        scores = [one["score"] for one in each["objects"]]
        assert scores == sorted(scores, reverse=True)
        assert scores[-1] > 0.04
        for one in each["objects"]:
            x1, y1, x2, y2 = one["box"]
            assert 0 <= x1 < x2 <= each["width"]
            assert 0 <= y1 < y2 <= each["height"]
            assert one["name"] == ("cat", "dog")[one["label"]]
        assert max(one["box"][3] for one in each["objects"]) > 0.7 * each["height"]  # in the pixels of the file
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["tall.png", "wide.png"]


def test_nothing_found(folder, capsys):
    bundle = folder / "boxes.safetensors"
    assert run("predict", "yolo_v3_tiny", bundle, folder / "wide.png", "--score", "0.9999") == 0
    assert "wide.png  nothing found" in capsys.readouterr().out


def test_the_transform_of_a_bundle_of_a_tag_and_of_a_size(folder):
    image = np.full((60, 90, 3), 255, np.uint8)
    pixels, size = predict.detector_transform("yolo_v3_tiny", str(folder / "boxes.safetensors"))(image)
    assert pixels.shape == (32, 48, 3)
    assert size == (32, 48)
    pixels, size = predict.detector_transform("yolo_v3_tiny", str(folder / "boxes.safetensors"), 64)(image)
    assert pixels.shape == (64, 64, 3)
    assert size == (43, 64)
    assert pixels[42].min() == 1
    assert pixels[43:].min() == pixels[43:].max() == 0.25
    pixels, size = predict.detector_transform("yolo_v3_tiny", "darknet")(image)
    assert pixels.shape == (416, 416, 3)
    assert size == (277, 416)
    pixels, size = predict.detector_transform("faster_rcnn_resnet50_fpn", "torchvision")(image)
    assert size == (800, 1200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wide.png", "tall.png", "--out", "x.png"), "--out must be a folder for 2 images; got the file x.png"),
        (("none.png",), "none.png is not a readable image"),
        ((), "IMAGE must be the path of at least one image; got none"),
    ],
)
def test_errors(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert run("predict", "yolo_v3_tiny", "boxes.safetensors", *arguments) == 1
    assert message in capsys.readouterr().err


def test_a_cfg_file(folder, capsys, tmp_path):
    """A network that darknet describes, on a canvas of its own size, which is not square."""
    head = "[yolo]\nmask=0\nanchors=20,20\nnum=1\nclasses=2\n"
    conv = "[convolutional]\nfilters={}\nsize=3\npad=1\nstride={}\nactivation=linear\n"
    net = "[net]\nheight=32\nwidth=48\nchannels=3\n"
    (tmp_path / "x.cfg").write_text(net + conv.format(4, 8) + conv.format(7, 1) + head)
    model = fv.weights.read_cfg(tmp_path / "x.cfg")
    values = np.random.default_rng(0).normal(0, 0.3, fv.weights.darknet.values_of(model)).astype(np.float32)
    fv.weights.write_darknet(tmp_path / "x.weights", fv.weights.DarknetFile(values))
    (tmp_path / "x.names").write_text("cat\ndog\n")
    files = (tmp_path / "x.cfg", tmp_path / "x.weights", folder / "wide.png")
    assert run("predict", *files, "--classes", tmp_path / "x.names", "--score", "0.1", "--json") == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert (found["height"], found["width"]) == (60, 90)
    assert {each["name"] for each in found["objects"]} <= {"cat", "dog"}
    assert max(each["box"][2] for each in found["objects"]) > 60  # pixels of the file
    pixels, size = predict.cfg_transform(model)(np.zeros((60, 90, 3), np.uint8))
    assert (pixels.shape, size) == ((32, 48, 3), (32, 48))
    (tmp_path / "x.cfg").write_text(net + conv.format(4, 8))
    fv.weights.write_darknet(tmp_path / "x.weights", fv.weights.DarknetFile(values[:112]))
    assert run("predict", *files) == 1
    assert "MODEL must have [yolo] or [region] heads; got" in capsys.readouterr().err


def test_a_tag_of_darknet(folder, capsys, tmp_path, monkeypatch):
    """The published file has no names: it is read for the model, and its classes are those of COCO."""
    model = fv.create_model("yolo_v3_tiny")
    values = np.random.default_rng(0).normal(0, 0.05, fv.weights.darknet.values_of(model)).astype(np.float32)
    fv.weights.write_darknet(tmp_path / "yolov3-tiny.weights", fv.weights.DarknetFile(np.abs(values)))
    asked = []
    load = importlib.import_module("flaxvision.weights.load")
    fetch = lambda url, digest, revision: asked.append((url, digest)) or tmp_path / url.rpartition("/")[2]
    monkeypatch.setattr(load, "fetch", fetch)
    arguments = (
        "predict",
        "yolo_v3_tiny",
        "darknet/coco",
        folder / "wide.png",
        "--json",
        "--score",
        0.01,
        "--size",
        64,
    )
    assert run(*arguments) == 0
    assert [digest for _, digest in asked] == [fv.weights.tag_of("yolo_v3_tiny", "darknet/coco").digest]
    (found,) = json.loads(capsys.readouterr().out)
    names = fv.weights.class_names_for("yolo_v3_tiny", "darknet/coco")
    assert found["objects"]
    assert all(one["name"] == names[one["label"]] for one in found["objects"])


def test_flags_of_detectors_are_refused_for_classifiers(folder, capsys):
    assert run("predict", "resnet18", "x.npz", folder / "wide.png", "--json") == 1
    assert "--out and --json must be left out for a classifier; got resnet18" in capsys.readouterr().err


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A bundle of a segmenter whose classes follow the brightness of the pixels, and a photograph."""
    path = tmp_path_factory.mktemp("segmenter")
    fields = {"features": (2, 2), "decoder_features": (2,), "num_classes": 2}
    model = fv.create_model("unet_same", **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    variables = jax.tree.map(lambda x: np.full(x.shape, 0.1, np.float32), shapes)
    variables["batch_stats"] = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes["batch_stats"])
    variables["params"]["logits"]["kernel"][..., 1] = 1.0
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 15:] = 255
    logits = jax.jit(model.apply)(variables, (pixels[None] / np.float32(255) - 0.5) / 0.25)[0, 10]
    margins = logits[:, 1] - logits[:, 0]
    variables["params"]["logits"]["bias"] = np.array([0, -(margins[3] + margins[26]) / 2], np.float32)
    transform = {"crop": None, "resize": None, "mean": [0.5] * 3, "std": [0.25] * 3}
    fv.weights.save(
        path / "a.safetensors",
        variables,
        name="unet_same",
        channels=3,
        class_names=("background", "light"),
        metadata={"preprocessing": transform},
        **fields,
    )
    Image.fromarray(pixels).save(path / "half.png")
    return path


def test_a_segmenter_prints_shares_and_draws_overlays(segmenter, capsys):
    arguments = ("unet_same", segmenter / "a.safetensors", segmenter / "half.png")
    assert run("predict", *arguments, "--json", "--out", segmenter / "out.png") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["height"], found["width"]) == (20, 30)
    shares = {each["name"]: each["pixels"] for each in found["classes"]}
    assert sum(shares.values()) == 600
    assert shares["light"] == pytest.approx(300, abs=90)
    assert (segmenter / "out.png").stat().st_size > 1000
    assert run("predict", *arguments) == 0
    first = capsys.readouterr().out.splitlines()[0].split()
    assert first[0].endswith("half.png")
    assert first[2] in ("background", "light")
    assert run("predict", "resnet18", "a.safetensors", "half.png", "--tile", 32) == 1
    assert "--tile and --overlap must be left out" in capsys.readouterr().err
