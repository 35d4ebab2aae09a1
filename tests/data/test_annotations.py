"""Readers of VOC, COCO and YOLO annotations, and of TFDS sets with boxes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from flaxvision import data
from flaxvision.data.annotations import pad_objects
from tests.data import detection_files as files

CAT = ("cat", 3, 5, 12, 15)


def test_voc(tmp_path):
    files.voc(tmp_path, [CAT, ("dog", 1, 1, 30, 20, 1)])
    files.voc(tmp_path, [], stem="b", size=(11, 12))
    files.voc(tmp_path, [("bird", 1, 1, 4, 4)], stem="c", split="test")
    source = data.load_detection("voc_xml", "train", data_dir=tmp_path)
    assert source.classes == ("bird", "cat", "dog")  # those of every split
    assert len(source) == 2
    assert source.sizes.tolist() == [[20, 30], [11, 12]]
    assert source.counts.tolist() == [2, 0]
    example = source[0]
    assert example["image"].shape == (20, 30, 3)
    assert example["image"].dtype == np.uint8
    # Pixels count from 1, and the last one belongs to the box.
    assert example["boxes"].tolist() == [[2, 4, 12, 15], [0, 0, 30, 20]]
    assert example["boxes"].dtype == np.float32
    assert example["labels"].tolist() == [1, 2]
    assert example["labels"].dtype == np.int32
    assert example["difficult"].tolist() == [False, True]
    assert example["crowd"].tolist() == [False, False]
    assert example["valid"].tolist() == [True, True]
    assert source[1]["boxes"].shape == (0, 4)  # an image without objects stays
    data.validate(source, task="detection", channels=3)
    assert len(data.load_voc(tmp_path, "all")) == 3
    plain = data.load_voc(tmp_path, "train", one_based=False)
    assert plain[0]["boxes"][0].tolist() == [3, 5, 12, 15]
    assert plain.fingerprint != source.fingerprint == data.load_voc(tmp_path, "train").fingerprint


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (
            [CAT, ("cat", 4, 4, 32, 9)],
            r"box 2 \(cat\) in .*a.xml must lie in its image of 20x30 pixels; got \[3.0, 3.0",
        ),
        ([("cat", 12, 4, 4, 9)], r"box 1 \(cat\) in .*a.xml must have its first corner at the top left; got \[12.0"),
        ([("cat", "nan", 4, 4, 9)], r"box 1 \(cat\) in .*a.xml must be finite; got \[nan"),
        ([("cat", 4, 4, 4, 9)], r"box 1 \(cat\) in .*a.xml must have an area above 0 .*; got \[4.0, 4.0, 4.0, 9.0\]"),
        ([("cat", "x", 4, 4, 9)], r"a.xml must have numbers for xmin, ymin, xmax, ymax; got \['x'"),
        ([("cow", 1, 1, 4, 9)], r"every class in .*a.xml must be a known one \(such as cat, dog\); got 'cow'"),
    ],
)
def test_faults_of_voc(tmp_path, objects, message):
    files.voc(tmp_path, objects)
    with pytest.raises(ValueError, match=message):
        data.load_voc(tmp_path, "train", classes=("cat", "dog"))


def test_missing_files_of_voc(tmp_path):
    with pytest.raises(ValueError, match="it has no folder Annotations"):
        data.load_voc(tmp_path, "train")
    files.voc(tmp_path, [CAT])
    with pytest.raises(ValueError, match=r"split must be one of train, all for .*; got 'tset'"):
        data.load_voc(tmp_path, "tset")
    files.picture(tmp_path / "JPEGImages" / "a.png", (21, 30))
    with pytest.raises(ValueError, match=r"a.png is 21x30 pixels high and wide, but .*a.xml states 20x30: correct"):
        data.load_voc(tmp_path, "train")[0]
    (tmp_path / "JPEGImages" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a.xml has no image: .*JPEGImages/a.png is missing"):
        data.load_voc(tmp_path, "train")
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"a.xml is not a readable annotation"):
        data.load_voc(tmp_path, "train")


def test_boxes_without_an_area_are_dropped_on_request_and_listed(tmp_path):
    files.voc(tmp_path, [CAT, ("cat", 7, 8, 7, 8)])
    source = data.load_voc(tmp_path, "train", drop_empty=True)
    assert source.counts.tolist() == [1]
    (text,) = source.dropped
    assert "box 2 (cat)" in text
    assert "a.xml has no area: [7.0, 8.0, 7.0, 8.0]" in text


def test_an_overhang_of_a_pixel_is_clipped(tmp_path):
    files.voc(tmp_path, [("cat", 1, 1, 31, 21)])
    assert data.load_voc(tmp_path, "train")[0]["boxes"].tolist() == [[0, 0, 30, 20]]


def note(image=7, category=5, box=(1, 2, 3, 4), **more):
    return {"image_id": image, "category_id": category, "bbox": list(box), "area": 5.5, "iscrowd": 0, **more}


def test_coco(tmp_path):
    files.coco(tmp_path, [note(), note(category=2, iscrowd=1, box=(0, 0, 30, 20))])
    source = data.load_detection("coco", "val", data_dir=tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.category_ids == (2, 5)
    assert source.counts.tolist() == [0, 2]  # sorted by the ids of the images
    example = source[1]
    assert example["boxes"].tolist() == [[1, 2, 4, 6], [0, 0, 30, 20]]
    assert example["labels"].tolist() == [1, 0]
    assert example["crowd"].tolist() == [False, True]
    assert example["area"].tolist() == [5.5, 5.5]


def test_coco_with_the_classes_of_a_model(tmp_path):
    """torchvision's detectors have a label for every category id, also for those that COCO does not use."""
    files.coco(tmp_path, [note(), note(category=2)])
    names = ("N/A", "dog", "N/A", "cat")
    source = data.load_detection("coco", "val", data_dir=tmp_path, classes=names)
    assert source.classes == names
    assert source[1]["labels"].tolist() == [1, 3]
    assert source.category_ids == (-1, 5, -1, 2)
    assert source.fingerprint != data.load_detection("coco", "val", data_dir=tmp_path).fingerprint
    with pytest.raises(ValueError, match=r"classes must include those of .*instances_val.json; got none named dog"):
        data.load_detection("coco", "val", data_dir=tmp_path, classes=("cat", "cow"))
    assert source[0]["area"].shape == (0,)
    data.validate(source, task="detection")


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (note(image=8), r"annotation 0 in .*instances_val.json must refer to an image in the file; got the image id 8"),
        (
            note(category=3),
            r"annotation 0 in .*instances_val.json must refer to a category in the file; got the category id 3",
        ),
        (
            note(box=(1, 2, 3)),
            r"annotation 0 in .*json must have a bbox of four numbers x, y, width, height; got \[1, 2, 3\]",
        ),
        (note(box=(1, 2, -3, 4)), r"box 1 \(dog\) in .*json \(image 7, 7.png\) must have its first corner"),
        (note(box=(1, 2, 0, 4)), r"box 1 \(dog\) in .*json \(image 7, 7.png\) must have an area above 0"),
        (note(box=(1, 2, 40, 4)), r"box 1 \(dog\) in .*json \(image 7, 7.png\) must lie in its image of 20x30 pixels"),
        (note(box=(1, 2, float("nan"), 4)), r"box 1 \(dog\) in .* must be finite"),
    ],
)
def test_faults_of_coco(tmp_path, annotation, message):
    files.coco(tmp_path, [annotation])
    with pytest.raises(ValueError, match=message):
        data.load_detection("coco", "val", data_dir=tmp_path)


def test_damaged_files_of_coco(tmp_path):
    files.coco(tmp_path, [note()])
    path = tmp_path / "annotations" / "instances_val.json"
    sound = json.loads(path.read_text())
    for part, key in (("images", "height"), ("images", "id"), ("categories", "name")):
        content = json.loads(path.read_text())
        del content[part][0][key]
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"each of the {part} in .*json must have id, "):
            data.load_detection("coco", "val", data_dir=tmp_path)
        path.write_text(json.dumps(sound))
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must have images, annotations and categories; got list"):
        data.load_detection("coco", "val", data_dir=tmp_path)


def test_an_object_of_voc_without_a_name(tmp_path):
    files.voc(tmp_path, [CAT, ("", 1, 1, 4, 4)])
    with pytest.raises(ValueError, match=r"every class in .* must be a known one \(such as cat\); got ''"):
        data.load_voc(tmp_path, "train")


def test_missing_files_of_coco(tmp_path):
    files.coco(tmp_path, [note()])
    with pytest.raises(
        ValueError, match=r"must have annotations of 'train' in annotations/instances_train.json; got none"
    ):
        data.load_detection("coco", "train", data_dir=tmp_path)
    (tmp_path / "val" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"instances_val.json has no image 3: .*3.png is missing"):
        data.load_detection("coco", "val", data_dir=tmp_path)
    path = tmp_path / "annotations" / "instances_val.json"
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="must have images, annotations and categories; got images"):
        data.load_detection("coco", "val", data_dir=tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a readable JSON file"):
        data.load_detection("coco", "val", data_dir=tmp_path)


def test_yolo(tmp_path):
    files.yolo(tmp_path, ["1 0.5 0.5 0.2 0.4", "", "0 0.5 0.5 1 1"])
    files.yolo(tmp_path, None, stem="b")
    files.yolo(tmp_path, [], stem="c")
    source = data.load_detection("yolo", "train", data_dir=tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.counts.tolist() == [2, 0, 0]
    np.testing.assert_allclose(source[0]["boxes"], [[12, 6, 18, 14], [0, 0, 30, 20]], rtol=1e-6)
    assert source[0]["labels"].tolist() == [1, 0]
    data.validate(source, task="detection")
    (tmp_path / "mine.txt").write_text("images/train/b.png\nimages/train/a.png\n")
    assert data.load_yolo(tmp_path, "mine").counts.tolist() == [0, 2]
    (tmp_path / "classes.txt").unlink()
    for text in ("names: [cat, 'dog']", "names:\n  0: cat\n  1: dog\nnc: 2", "names:\n- cat\n- dog # the second"):
        (tmp_path / "data.yaml").write_text("path: x\n" + text)
        assert data.load_yolo(tmp_path, "train").classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"the class in line 1 of .*a.txt must lie between 0 and 1; got 2"),
        ("-1 0.5 0.5 0.1 0.1", r"the class in line 1 of .*a.txt must lie between 0 and 1; got -1"),
        ("1 0.5 0.5 0.1", r"line 1 of .*a.txt must be a class index, x, y, width and height; got '1 0.5 0.5 0.1'"),
        ("1 0.9 0.5 0.9 0.1", r"box 1 \(dog\) in .*a.txt must lie in its image of 20x30 pixels"),
        ("1 0.5 0.5 nan 0.1", r"box 1 \(dog\) in .*a.txt must be finite"),
        ("1 0.5 0.5 -0.1 0.1", r"box 1 \(dog\) in .*a.txt must have its first corner"),
        ("1 0.3 0.5 0 0.1", r"box 1 \(dog\) in .*a.txt must have an area above 0"),
    ],
)
def test_faults_of_yolo(tmp_path, line, message):
    files.yolo(tmp_path, [line])
    with pytest.raises(ValueError, match=message):
        data.load_yolo(tmp_path, "train")


def test_missing_files_of_yolo(tmp_path):
    files.yolo(tmp_path, [])
    with pytest.raises(ValueError, match=r"split must be a folder images/SPLIT or a list SPLIT.txt in .* got 'val'"):
        data.load_yolo(tmp_path, "val")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"must have class names in classes\.txt, .*; got none"):
        data.load_yolo(tmp_path, "train")
    (tmp_path / "mine.txt").write_text("images/train/z.png\n")
    with pytest.raises(ValueError, match=r"mine.txt has no image: .*z.png is missing"):
        data.load_yolo(tmp_path, "mine")


def test_damaged_images_are_found(tmp_path):
    files.voc(tmp_path, [CAT])
    files.voc(tmp_path, [CAT], stem="b")
    (tmp_path / "JPEGImages" / "a.png").write_bytes(b"no image")
    source = data.load_voc(tmp_path, "train")
    with pytest.raises(ValueError, match="1 of 2 images cannot be decoded"):
        source.verify(progress=False)
    sound, broken = source.without_broken(progress=False)
    assert len(sound) == 1
    assert len(broken) == 1
    assert "a.png" in broken[0]
    assert sound[0]["boxes"].tolist() == [[2, 4, 12, 15]]


def test_names_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"name must be a known detection set \(nearest: shapes"):
        data.load_detection("shape", "train")
    with pytest.raises(ValueError, match="data_dir must be the folder of the data set for 'yolo'; got None"):
        data.load_detection("yolo", "train")
    with pytest.raises(ValueError, match="data_dir must be an existing folder; got"):
        data.load_detection("yolo", "train", data_dir=tmp_path / "none")
    with pytest.raises(ValueError, match="data_dir must be None for 'shapes'"):
        data.load_detection("shapes", "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="classes must be None for 'shapes'"):
        data.load_detection("shapes", "train", classes=["a"])


def test_objects_are_padded(tmp_path):
    example = {"boxes": np.ones((2, 4), np.float32), "labels": np.ones(2, np.int32), "valid": np.ones(2, bool)}
    padded = pad_objects(example, 3)
    assert padded["boxes"].tolist() == [[1] * 4, [1] * 4, [0] * 4]
    assert padded["valid"].tolist() == [True, True, False]
    with pytest.raises(ValueError, match="max_objects must be at least 2, the number of objects in x; got 1"):
        pad_objects(example, 1, "x")


@pytest.mark.data
def test_bccd():
    folder = Path(os.environ["FLAXVISION_DATA"]) / "bccd"
    with pytest.raises(ValueError, match=r"box 13 \(RBC\) in .*BloodImage_00338.xml must have an area above 0"):
        data.load_detection("voc_xml", "val", data_dir=folder)
    splits = {
        name: data.load_detection("voc_xml", name, data_dir=folder, drop_empty=True)
        for name in ("train", "val", "test")
    }
    assert {name: len(source) for name, source in splits.items()} == {"train": 205, "val": 87, "test": 72}
    assert sum(int(source.counts.sum()) for source in splits.values()) == 4886
    dropped = [text for source in splits.values() for text in source.dropped]
    assert len(dropped) == 2
    assert "BloodImage_00343" in dropped[0]
    assert "BloodImage_00338" in dropped[1]
    for source in splits.values():
        assert source.classes == ("Platelets", "RBC", "WBC")
        data.validate(source, task="detection", verify=False)
