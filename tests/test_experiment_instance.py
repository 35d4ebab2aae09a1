"""experiments/instance.py: a run on a folder of instance maps, what it leaves behind, and prediction from it."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from flaxvision import cli
from flaxvision.data import rle
from tests.scripts import load_script

RNG = np.random.default_rng(0)


instance = load_script("instance")
TINY = {
    **instance.SMALL,
    "stage_sizes": (1, 1),
    "features": (12, 24),
    "stages": ("stage1", "stage2"),
    "fpn_features": 16,
    "head_features": 32,
    "mask_features": (16,),
    "anchor_sizes": ((10,), (16,), (24,)),
    "rpn_pre_nms_train": 50,
    "rpn_pre_nms_eval": 50,
    "rpn_post_nms_train": 30,
    "rpn_post_nms_eval": 30,
    "rpn_sample_size": 32,
    "box_sample_size": 16,
}


def cells(root):
    """Bright blobs on a dark ground, and their instance maps."""
    for part, count in (("train", 16), ("val", 4)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for i in range(count):
            y, x = np.mgrid[:40, :48] + 0.5
            numbers = np.zeros((40, 48), np.uint8)
            for k, centre in enumerate(((12, 12), (12, 34), (28, 22))):
                at = np.array(centre) + RNG.integers(-3, 4, 2)
                numbers[(y - at[0]) ** 2 + (x - at[1]) ** 2 < RNG.uniform(5, 8) ** 2] = k + 1
            image = np.where(numbers > 0, 200, 40) + RNG.integers(-20, 20, numbers.shape)
            Image.fromarray(image.astype(np.uint8)).save(root / part / "images" / f"{i}.png")
            Image.fromarray(numbers).save(root / part / "masks" / f"{i}.png")
    return root


@pytest.mark.slow
def test_a_run_on_instance_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(instance.Config, "SMALL", ("mask_rcnn_resnet50_fpn", TINY))
    folder = cells(tmp_path / "cells")
    flags = ["--dataset", "instances", "--data-dir", folder, "--canvases", "40x48", "--batch-size", 8, "--epochs", 60]
    flags += ["--eval-every", 30, "--eval-batch-size", 8, "--no-progress", "--learning-rate", 0.01, "--vertical-flip"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert instance.main(instance.parse([*map(str, flags), "--workdir", str(tmp_path / "run")])) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["masks_ap50"] > 0.8
    assert results["mask_classes"][0]["objects"] == 12
    assert f"AP50 {results['masks_ap50']:.3f}" in printed.getvalue()
    for name in ("samples", "detections", "curves"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 1000
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"coco_ap50", "masks_ap50", "mask"} <= records[-1].keys()

    photo, picture = folder / "val" / "images" / "0.png", tmp_path / "boxes.png"
    command = ["predict", "mask_rcnn_resnet50_fpn", f"{tmp_path}/run/weights.safetensors", str(photo)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.main([*command, "--json", "--score", "0.5", "--out", str(picture)])
    (found,) = json.loads(printed.getvalue())
    truth = np.asarray(Image.open(folder / "val" / "masks" / "0.png"))
    masks = [each["segmentation"] for each in found["objects"]]
    assert all(mask["size"] == [40, 48] for mask in masks)
    decoded = rle.decode([mask["counts"].encode() for mask in masks], (40, 48)) > 0
    for number in (1, 2, 3):
        inside = truth == number
        assert max((inside & mask).sum() / (inside | mask).sum() for mask in decoded) > 0.6
    assert picture.stat().st_size > 1000


def test_recipes_and_other_models():
    assert instance.parse([]).recipe == "small"
    assert instance.parse(["--model", "mask_rcnn_resnet50_fpn"]).learning_rate == 0.02
    with pytest.raises(ValueError, match=r"--model must be small or a detector with masks \(mask_rcnn_resnet50_fpn\)"):
        instance.main(instance.parse(["--model", "yolo_v3"]))
