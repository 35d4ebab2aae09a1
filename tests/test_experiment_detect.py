"""experiments/detect.py: recipes, a run on two canvases that resumes exactly, and what it leaves behind."""

import contextlib
import io
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision import cli
from flaxvision.data import shapes
from tests.data import detection_files as files
from tests.scripts import load_script

detect = load_script("detect")


@pytest.fixture
def tiny(monkeypatch):
    """A few images, and a network that compiles quickly."""
    monkeypatch.setattr(shapes, "_SPLITS", {"train": 24, "val": 8, "test": 11})
    small = {
        "convs": (((4, 3),), ((4, 3),), ((8, 3),), ((8, 3),), ((8, 3),)),
        "stages": ("stage3", "stage4"),
        "last_pool": False,
        "necks": (((8, 1),), ()),
        "head_features": (8, 8),
        "lateral_features": (8,),
    }
    monkeypatch.setattr(detect.Config, "SMALL", ("yolo_v3_tiny", small))


def run(*flags):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert detect.main(detect.parse([str(flag) for flag in flags])) == 0
    return printed.getvalue()


FLAGS = ("--epochs", 2, "--batch-size", 8, "--eval-every", 1, "--eval-batch-size", 8, "--no-progress", "--log-every", 1)


@pytest.mark.slow
def test_a_run_on_two_canvases(tiny, tmp_path, monkeypatch):
    traced = {"train": [], "eval": []}
    for name in traced:
        step = getattr(fv.train.step, f"{name}_step")

        def counted(state, batch, *rest, name=name, step=step, **options):
            traced[name].append(batch["image"].shape)
            return step(state, batch, *rest, **options)

        monkeypatch.setattr(fv.train.parallel, f"{name}_step", counted)
    flags = (*FLAGS, "--canvases", "96x80", "96", "--mosaic", 0.5, "--zoom", 0.8, 1.2)
    printed = run(*flags, "--workdir", tmp_path / "a")
    # Each step is traced once for each canvas.
    assert sorted(traced["train"]) == [(8, 96, 80, 3), (8, 96, 96, 3)]
    assert sorted(traced["eval"]) == [(8, 96, 80, 3), (8, 96, 96, 3)]
    assert "shapes/test: 11 images" in printed
    assert "triangle" in printed
    names = {path.name for path in (tmp_path / "a").rglob("*.png")}
    assert {"samples.png", "detections.png", "curves.png", "0000003.png", "0000006.png"} <= names
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["ap50_low"] <= results["coco_ap50"] <= results["ap50_high"]
    assert [row["name"] for row in results["classes"]] == list(shapes.CLASSES)
    records = fv.train.read_records(tmp_path / "a" / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "validation"] == [3, 6]

    # A run that lost its last steps takes them again, and ends with the same bits.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    newest = max((tmp_path / "b" / "checkpoints").iterdir(), key=lambda path: (path.is_dir(), path.name))
    assert "6" in newest.name
    shutil.rmtree(newest)
    run(*flags, "--workdir", tmp_path / "b")
    a, b = (fv.weights.read(tmp_path / name / "weights.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])

    # The weights know their canvases and their classes.
    from PIL import Image

    Image.fromarray(fv.data.ShapesSource("test")[0]["image"]).save(tmp_path / "x.png")
    bundle = str(tmp_path / "a" / "weights.safetensors")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        arguments = ["predict", "yolo_v3_tiny", bundle, str(tmp_path / "x.png"), "--json", "--score", "0.0001"]
        assert cli.main(arguments) == 0
    (found,) = json.loads(out.getvalue())
    assert {one["name"] for one in found["objects"]} <= set(shapes.CLASSES)
    assert found["objects"]


@pytest.mark.slow
def test_a_folder_of_voc_from_given_weights(tiny, tmp_path):
    run(*FLAGS, "--workdir", tmp_path / "a")
    for i in range(8):
        files.voc(tmp_path / "voc", [("cat", 3, 5, 30 + i, 35), ("cat", 4, 4, 4, 9)], size=(64, 90), stem=f"t{i}")
    for split in ("val", "test"):
        objects = [("dog", 3, 5, 30, 35, 1), ("cat", 3, 5, 30, 35)]
        files.voc(tmp_path / "voc", objects, size=(90, 64), stem=split, split=split)
    data = ("--dataset", "voc_xml", "--data-dir", tmp_path / "voc", "--no-progress", "--batch-size", 8)
    weights = ("--weights", tmp_path / "a" / "weights.safetensors", "--anchors", 2)
    printed = run(*data, *weights, "--epochs", 1, "--workdir", tmp_path / "b", "--eval-batch-size", 8)
    assert "left out of voc/train: box 2 (cat)" in printed
    assert "the best checkpoint is the one with the highest voc_map50 on voc/val" in printed
    (record,) = [r for r in fv.train.read_records(tmp_path / "b" / "metrics.jsonl") if r["split"] == "validation"]
    assert 0 <= record["voc_map50"] <= 1
    again = ("--eval-only", "--weights", tmp_path / "b" / "weights.safetensors")
    printed = run(*data, *again, "--workdir", tmp_path / "c", "--eval-batch-size", 8)
    stored = json.loads((tmp_path / "b" / "results.json").read_text())
    assert json.loads((tmp_path / "c" / "results.json").read_text())["coco_ap50"] == pytest.approx(stored["coco_ap50"])
    with pytest.raises(ValueError, match=r"box 2 \(cat\) in .* must have an area above 0"):
        run(*data, "--faulty-boxes", "refuse", "--workdir", tmp_path / "d")


def test_a_folder_of_voc_without_a_test_split(tmp_path):
    for split in ("train", "val"):
        files.voc(tmp_path, [("cat", 3, 5, 20, 15)], stem=split, split=split)
    flags = ["--dataset", "voc_xml", "--data-dir", str(tmp_path)]
    train, val, test = detect.load(detect.parse(flags))
    assert test is val
    assert train is not val
    files.voc(tmp_path, [("cat", 3, 5, 20, 15)], stem="test", split="test")
    assert detect.load(detect.parse(flags))[2].name.endswith("/test")


@pytest.mark.parametrize(("dataset", "metric"), [("voc_xml", "voc_map50"), ("shapes", "coco_ap50")])
def test_the_metric_that_chooses_the_best_checkpoint(tiny, tmp_path, monkeypatch, dataset, metric):
    """On PASCAL VOC, difficult objects must not count."""
    found, flags = {}, ["--dataset", dataset, "--workdir", str(tmp_path / "run"), "--batch-size", "1"]
    if dataset == "voc_xml":
        for split in ("train", "val"):
            files.voc(tmp_path, [("cat", 3, 5, 20, 15), ("cat", 3, 5, 20, 15, 1)], stem=split, split=split)
        flags += ["--data-dir", str(tmp_path)]

    def average_precision(model, num_classes, *, metrics, **options):
        found["metrics"] = metrics

    def fit(*rest, **options):
        found.update(options)
        return SimpleNamespace(exit_status=3)

    monkeypatch.setattr(fv.train, "average_precision", average_precision)
    monkeypatch.setattr(fv.train, "compile_steps", lambda *rest, **options: (None, None))
    monkeypatch.setattr(detect.detect_models, "build", lambda *rest: SimpleNamespace(
        model=None, name="x", overrides={}, mean=(0.0,) * 3, std=(1.0,) * 3
    ))  # fmt: skip
    monkeypatch.setattr(detect.Run, "create_state", lambda *rest: None)
    monkeypatch.setattr(fv.train, "fit_in_workdir", fit)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert detect.main(detect.parse(flags)) == 3
    assert (found["best_metric"], found["best_mode"]) == (metric, "max")
    assert metric.partition("_")[0] in found["metrics"]
    assert f"the best checkpoint is the one with the highest {metric} on " in printed.getvalue()


def test_published_weights_are_evaluated_in_their_own_classes(tmp_path):
    """torchvision's weights for COCO have 90 labels, and COCO has 80 classes."""
    box = {"image_id": 7, "bbox": [1, 2, 3, 4], "area": 5, "iscrowd": 0}
    files.coco(tmp_path, [{**box, "category_id": 2}, {**box, "category_id": 5}])
    splits = [flag for split in ("train", "eval", "test") for flag in (f"--{split}-split", "val")]
    model = ["--model", "faster_rcnn_resnet50_fpn", "--eval-only", "--weights", "torchvision/COCO_V1"]
    config = detect.parse(["--dataset", "coco", "--data-dir", str(tmp_path), *splits, *model])
    source = detect.load(config)[0]
    assert len(source.classes) == 90
    assert [source.classes[label] for label in source[1]["labels"]] == ["cat", "dog"]
    model = ["--model", "yolo_v3", "--eval-only", "--weights", "x.weights", "--source", "darknet"]
    config = detect.parse(["--dataset", "coco", "--data-dir", str(tmp_path), *splits, *model])
    assert detect.load(config)[0].classes == ("cat", "dog")


@pytest.mark.slow
def test_a_backbone_from_a_classifier_whose_first_stages_stay(tiny, tmp_path):
    convs = detect.Config.SMALL[1]["convs"]
    donor = fv.create_model("darknet19", convs=convs, num_classes=2)
    variables = jax.jit(donor.init)(jax.random.key(9), jnp.zeros((1, 32, 32, 3)))
    file = tmp_path / "donor.safetensors"
    fv.weights.save(file, variables, name="darknet19", convs=convs, num_classes=2)
    backbone = ("--backbone-model", "darknet19", "--backbone-weights", file, "--frozen-stages", 2)
    run(*FLAGS, *backbone, "--weight-decay", 0.5, "--workdir", tmp_path / "a")
    given, found = fv.weights.read(file), fv.weights.read(tmp_path / "a" / "weights.safetensors")
    kernels = [key for key in given if "backbone/" in key and key.endswith("_conv1/conv/kernel")]
    assert [("stem" in key or "stage1" in key) for key in sorted(kernels)] == [True, False, False, False, True]
    for key in kernels:
        same = np.allclose(found[key], given[key], rtol=1e-5, atol=0)
        assert same == ("stem" in key or "stage1" in key), key
        # All of them started from the classifier: one epoch changes them little.
        assert np.corrcoef(found[key].ravel(), given[key].ravel())[0, 1] > 0.9, key


def built(*flags, classes=3):
    config = detect.parse([str(flag) for flag in flags])
    detect.check(config)
    return detect.detect_models.build(
        config, classes, lambda count: tuple((32 * i, 64 * i) for i in range(1, count + 1))
    )


def test_faster_rcnn_from_nothing_and_from_a_classifier():
    """The frozen statistics, the epsilon of 0 and the frozen stages of the published network need trained weights."""
    backbone = built("--model", "faster_rcnn_resnet50_fpn").model.backbone
    assert (backbone.batch_norm, backbone.epsilon, backbone.frozen_stages) == ("sync", 1e-5, 0)
    donor = ("--backbone-model", "resnet50", "--backbone-weights", "x")
    backbone = built("--model", "faster_rcnn_resnet50_fpn", *donor).model.backbone
    assert (backbone.batch_norm, backbone.epsilon, backbone.frozen_stages) == ("frozen", 1e-5, 2)
    chosen = ("--batch-norm", "sync", "--frozen-stages", 0)
    backbone = built("--model", "faster_rcnn_resnet50_fpn", *donor, *chosen).model.backbone
    assert (backbone.batch_norm, backbone.frozen_stages) == ("sync", 0)
    found = built("--model", "mask_rcnn_resnet50_fpn", *donor).model
    assert (found.num_classes, found.backbone.frozen_stages, found.backbone.epsilon) == (4, 2, 1e-5)


def test_a_mosaic_keeps_the_objects_of_all_four_images(tiny, tmp_path):
    """An object that is left out would be learned as background."""
    config = detect.parse(["--mosaic", "1.0"])
    made = detect.Run(config, *detect.load(config), tmp_path)
    examples = [made.train_source[i] for i in range(8)]
    batch = {key: np.stack([one[key] for one in examples]) for key in examples[0]}
    valid = np.asarray(jax.jit(made.view)(jax.random.key(0), batch)["valid"])
    assert valid.sum(1).max() > made.train_source.max_objects


def test_anchors_are_in_the_unit_of_the_model():
    assert built("--model", "yolo_v3", "--anchors", 9).model.anchors[1] == (64, 128)
    found = built("--model", "yolo_v2", "--anchors", 5).model
    assert found.anchors[1] == (2, 4)
    assert next(iter(found.heads.values())).sizes[1] == (64, 128)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "resnet18"), "--model must be small, a .cfg file or a detector .*; got 'resnet18'"),
        (("--eval-only",), "--weights FILE-OR-TAG must be given with --eval-only; got none"),
        (("--canvases", "big"), "--canvases must be sides or HEIGHTxWIDTH; got big"),
        (("--dataset", "yolo"), "data_dir must be the folder of the data set for 'yolo'; got None"),
        (("--max-detections", "0"), "--max-detections must be positive; got 0"),
    ],
)
def test_settings_that_cannot_be(tiny, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(*flags, "--workdir", tmp_path / "x")


def test_every_recipe_can_be_chosen():
    for name, recipe in detect.RECIPES.items():
        config = detect.parse(["--recipe", name])
        assert config.recipe == name
        assert config.learning_rate == recipe.learning_rate
        assert detect.canvases(config, config.canvases).sizes
        assert recipe.num_steps(1000) >= 1
        recipe.learning_rate_schedule(1000)(0)
    for model in fv.list_models(task="detection"):
        family = model.removesuffix("_tiny").removesuffix("_spp").removesuffix("_resnet50_fpn")
        assert detect.parse(["--model", model]).recipe == family.replace("mask_rcnn", "faster_rcnn")


def test_anchors_are_those_of_the_boxes_on_their_canvases(tiny):
    source = fv.data.on_canvases(fv.data.ShapesSource("train"), fv.data.Canvases(((256, 256),)))
    anchors = detect.detect_report.anchors_of(source, 4, 0)
    areas = [w * h for w, h in anchors]
    assert areas == sorted(areas)
    sides = np.concatenate([source[i]["boxes"][source[i]["valid"]] for i in range(len(source))])
    sides = sides[:, 2:] - sides[:, :2]
    assert np.prod(sides, -1).min() < areas[0] < np.median(np.prod(sides, -1)) < areas[-1] < np.prod(sides, -1).max()


def test_anchors_of_several_scales_are_those_of_evaluation(tiny, tmp_path, monkeypatch):
    found = {}

    def build(config, classes, find_anchors):
        found["anchors"] = find_anchors(3)
        return SimpleNamespace(model=None, mean=(0.0,) * 3, std=(1.0,) * 3)

    monkeypatch.setattr(fv.train, "compile_steps", lambda *rest, **options: (None, None))
    monkeypatch.setattr(detect.detect_models, "build", build)
    config = detect.parse(["--canvases", "64", "192", "256", "--multiscale", "2", "--eval-canvases", "192", "--resize"])
    train, val, test = detect.load(config)
    detect.Run(config, train, val, test, tmp_path)
    assert found["anchors"] == detect.detect_report.anchors_of(fv.data.on_canvases(train, 192), 3, 0)


def test_the_warm_up_of_yolo_v2_is_for_runs_from_nothing(tiny, tmp_path, monkeypatch):
    """The step gets the number of images that the run has seen before."""
    found = {}
    monkeypatch.setattr(fv.train, "compile_steps", lambda *rest, **options: found.update(options) or (None, None))
    monkeypatch.setattr(
        detect.detect_models, "build", lambda *rest: SimpleNamespace(model=None, mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    for weights, known in (((), True), (("--weights", "x"), False)):
        config = detect.parse(["--model", "yolo_v2", "--canvases", "96", "--no-flip", "--zoom", "1", "1", *weights])
        made = detect.Run(config, *detect.load(config), tmp_path)
        with fv.data.train_batches(made.train_source, 4, seed=0).from_step(2) as iterator:
            batch = found["train_transform"](jax.random.key(0), next(iterator))
        assert ("seen" in batch) == known
        assert np.asarray(batch.get("seen", [8, 9, 10, 11])).tolist() == [8, 9, 10, 11]
