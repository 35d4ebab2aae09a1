"""Masks of COCO: polygons and run lengths, compared with pycocotools' own reader, and moved along with the image."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from flaxvision import data
from flaxvision.data.coco_masks import encode_mask
from flaxvision.data.rle import runs_of
from tests.data import detection_files as files

SIZE = (20, 30)
TRIANGLE = [3.5, 2.2, 14.0, 2.6, 8.1, 12.9]
SQUARE = [18, 4, 26, 4, 26, 11, 18, 11]


def runs(mask):
    """Column by column, the lengths of the runs of zeros and ones; the first one is of zeros."""
    flat = np.concatenate([[0], np.asarray(mask).T.ravel(), [0]]) if mask[0][0] else np.asarray(mask).T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], ends, [len(flat)]]))
    return [0, *counts[1:-1].tolist()] if mask[0][0] else counts.tolist()


def drawn(seed=0, size=SIZE):
    return (np.random.default_rng(seed).random(size) < 0.3).astype(np.uint8)


def compressed(mask):
    counts = rle.encode(np.asfortranarray(mask))["counts"]
    return {"size": list(np.shape(mask)), "counts": counts.decode()}


def note(segmentation, image=7, **more):
    box = {"image_id": image, "category_id": 5, "bbox": [1, 2, 20, 15], "area": 5, "iscrowd": 0}
    return {**box, **more} if segmentation is None else {**box, "segmentation": segmentation, **more}


@pytest.fixture
def notes():
    crowd = drawn(1)
    return [
        note([TRIANGLE]),
        note([TRIANGLE, SQUARE], category_id=2),
        note({"size": list(SIZE), "counts": runs(crowd)}, iscrowd=1),
        note(compressed(drawn(2))),
    ]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with NumPy 2
def test_masks_are_those_of_pycocotools(tmp_path, notes):
    files.coco(tmp_path, notes)
    source = data.load_detection("coco", "val", data_dir=tmp_path, masks=True)
    example = source[1]
    assert (example["masks"].shape, example["masks"].dtype) == ((4, *SIZE), np.uint8)
    assert source[0]["masks"].shape == (0, 25, 15)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(tmp_path / "annotations" / "instances_val.json")
    for number, mask in enumerate(example["masks"]):
        np.testing.assert_array_equal(mask, theirs.annToMask(theirs.anns[number]))
    np.testing.assert_array_equal(example["masks"][2:], [drawn(1), drawn(2)])
    assert example["crowd"].tolist() == [False, False, True, False]
    assert example["masks"][1][5:10, 19:25].all()
    assert not example["masks"][0][:, 16:].any()
    data.validate(source, task="detection")
    example["masks"][:] = 0  # an example belongs to the caller
    assert source[1]["masks"].any()


def test_masks_are_read_on_request_only(tmp_path, notes):
    files.coco(tmp_path, notes)
    with_masks, without = (data.load_detection("coco", "val", data_dir=tmp_path, masks=on) for on in (True, False))
    assert "masks" not in without[1]
    assert without.fingerprint != with_masks.fingerprint
    files.coco(tmp_path, [*notes[:3], note(compressed(drawn(3)))])
    assert data.load_detection("coco", "val", data_dir=tmp_path, masks=True).fingerprint != with_masks.fingerprint
    files.coco(tmp_path, [note(None)])
    assert len(data.load_detection("coco", "val", data_dir=tmp_path)[1]["boxes"]) == 1


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, r"annotation 0 in .*val.json must have a segmentation, because masks are read; got None"),
        ([], r"must have a segmentation, because masks are read; got \[\]"),
        ([[1, 2, 3, 4]], r"must have polygons of at least three finite corners x, y; got \[1, 2, 3, 4\]"),
        ([[1, 2, 3, 4, 5, 6, 7]], r"must have polygons of at least three finite corners x, y; got \[1, 2"),
        ([[1, 2, 3, 4, 5, float("nan")]], r"must have polygons of at least three finite corners x, y; got \[1, 2"),
        ([5], r"must have polygons of at least three finite corners x, y; got 5"),
        ([["a"] * 6], r"must have polygons of at least three finite corners x, y; got \['a'"),
        ("abc", r"must have polygons of at least three finite corners x, y; got a"),
        ([[1, 2, 32, 4, 5, 6]], r"must have a polygon in its image of 20x30 pixels; got \[1, 2, 32, 4, 5, 6\]"),
        ([[1e9, 2, 3, 4, -5, 6]], r"must have a polygon in its image of 20x30 pixels; got \[1000000000.0, 2"),
        ({"size": [30, 20], "counts": [600]}, r"must have an RLE of its image's size .*; got the size \[30, 20\]"),
        ({"size": [20, 30], "counts": [9, 590]}, r"must have an RLE whose counts add up to 600 pixels; got \[9, 590\]"),
        ({"size": [20, 30], "counts": [9, -9, 600]}, r"whose counts add up to 600 pixels; got \[9, -9, 600\]"),
        ({"size": [20, 30], "counts": ["a"]}, r"whose counts add up to 600 pixels; got \['a'\]"),
        ({"size": [20, 30], "counts": "~~~"}, r"whose counts add up to 600 pixels; got ~~~"),
        ({"size": [20, 30], "counts": "o" * 99}, r"whose counts add up to 600 pixels; got ooo.*\.\.\."),
        ({"size": [20, 30], "counts": compressed(drawn(0))["counts"][:-1]}, r"whose counts add up to 600 pixels; got"),
        ({"size": [20, 30]}, r"must have an RLE whose counts add up to 600 pixels; got None"),
        ({"size": [20, 30], "counts": [600]}, r"box 1 \(dog\) in .* must have a mask with a pixel .*; got none"),
        ([[3.1, 3.1, 3.2, 3.1, 3.2, 3.2]], r"box 1 \(dog\) in .* must have a mask with a pixel .*; got none"),
    ],
)  # fmt: skip
def test_faults(tmp_path, segmentation, message):
    files.coco(tmp_path, [note(segmentation)])
    with pytest.raises(ValueError, match=message):
        data.load_detection("coco", "val", data_dir=tmp_path, masks=True)


def test_objects_without_a_pixel_are_dropped_on_request_and_listed(tmp_path):
    files.coco(tmp_path, [note([TRIANGLE]), note([[3.1, 3.1, 3.2, 3.1, 3.2, 3.2]])])
    source = data.load_detection("coco", "val", data_dir=tmp_path, masks=True, drop_empty=True)
    assert source.counts.tolist() == [0, 1]
    assert len(source[1]["masks"]) == 1
    assert "box 2 (dog)" in source.dropped[0]
    assert source.dropped[0].endswith("has a mask without a pixel")


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (200, 333)])
def test_compressed_runs_are_read_as_pycocotools_writes_them(size):
    """Short and long runs, at the start, at the end, and of all pixels."""
    rng = np.random.default_rng(0)
    for share in (0.0, 0.002, 0.5, 1.0):
        mask = (rng.random(size) < share).astype(np.uint8)
        given = compressed(mask)
        found = runs_of(given["counts"].encode())
        assert found.sum() == mask.size
        assert found[1::2].sum() == mask.sum()
        assert encode_mask(given, size, "x") == encode_mask({"size": list(size), "counts": found.tolist()}, size, "x")


def test_masks_lie_on_the_canvas_of_their_image(tmp_path, notes):
    files.coco(tmp_path, notes)
    source = data.load_detection("coco", "val", data_dir=tmp_path, masks=True)
    placed = data.on_canvases(source, 90)
    old, new = source[1], placed[1]
    assert new["size"].tolist() == [60, 90]
    assert (new["masks"].shape, new["masks"].dtype) == ((4, 90, 90), np.uint8)
    np.testing.assert_array_equal(new["masks"][:, :60], old["masks"].repeat(3, 1).repeat(3, 2))
    assert not new["masks"][:, 60:].any()
    assert placed[0]["masks"].shape == (4, 90, 90)  # padded to the largest number of objects
    assert not placed[0]["masks"].any()
    (batch,) = data.eval_batches(placed, 2)
    assert batch["masks"].shape == (2, 4, 90, 90)
    data.validate(placed, task="detection")


def test_sets_without_masks(tmp_path):
    (tmp_path / "coco" / "2017" / "1.1.0").mkdir(parents=True)
    (tmp_path / "coco" / "2017" / "1.1.0" / "dataset_info.json").write_text("{}")
    for name in ("voc_xml", "yolo"):
        with pytest.raises(ValueError, match=f"masks must be False for '{name}', whose annotations have no masks; got"):
            data.load_detection(name, "train", data_dir=tmp_path, masks=True)
    for name in ("coco", "coco/2017", "voc/2007"):
        message = f"masks must be False for '{name}', because TFDS has no masks; got True .*data_dir must be the folder"
        with pytest.raises(ValueError, match=message):
            data.load_detection(name, "train2017", data_dir=tmp_path, masks=True)
    assert data.load_detection("shapes", "val", masks=True)[0]["masks"].ndim == 3
