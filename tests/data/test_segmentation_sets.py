"""Folders of images and masks, PASCAL VOC's layout, and the drawn shapes as label maps."""

import numpy as np
import pytest
from PIL import Image

from flaxvision import data
from flaxvision.data.segmentation_source import fitted

RNG = np.random.default_rng(0)
CLASSES = ("sky", "road", "car")


def folder(path, masks, images="images", kind="masks", sizes=None):
    """Writes images and masks by name; a mask is an array, uint8 [H, W] or [H, W, 3], or a PIL image."""
    for name in (images, kind):
        (path / name).mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        mask.save(path / kind / f"{name}.png")
        size = (mask.height, mask.width) if sizes is None else sizes
        Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8)).save(path / images / f"{name}.png")
    return path


def index_mask(*shape):
    return RNG.integers(0, 3, shape).astype(np.uint8)


def test_a_folder_of_indices(tmp_path):
    masks = {"a10": index_mask(4, 5), "a9": index_mask(4, 5), "b": index_mask(3, 6)}
    masks["b"][0, 0] = 255
    folder(tmp_path, masks)
    (tmp_path / "classes.txt").write_text("0 sky\n1 road\n2 car\n")
    source = data.load_segmentation("folder", "all", data_dir=tmp_path)
    assert source.classes == CLASSES
    assert [path.stem for path in source.images] == ["a9", "a10", "b"]  # natural order
    for example, name in zip((source[i] for i in range(3)), ("a9", "a10", "b"), strict=True):
        assert example["image"].dtype == np.uint8
        assert example["label"].dtype == np.int32
        np.testing.assert_array_equal(example["label"], masks[name])
    data.validate(source, task="segmentation")
    assert len(data.load_segmentation("folder", "all[1:]", data_dir=tmp_path)) == 2
    (tmp_path / "some.txt").write_text("b\na10\n")
    some = data.load_segmentation("folder", "some[1:2]", data_dir=tmp_path)
    assert [path.stem for path in some.images] == ["a10"]
    with pytest.raises(ValueError, match=r"split must hold images of .*; got none in 'all\[7:\]'"):
        data.load_segmentation("folder", "all[7:]", data_dir=tmp_path)
    assert source.fingerprint != data.load_segmentation("folder", "all[1:]", data_dir=tmp_path).fingerprint


def test_palette_grey_and_colour_masks_are_the_same(tmp_path):
    mask = index_mask(6, 7)
    mask[0] = 255
    table = {(0, 0, 0): 0, (128, 0, 0): 1, (0, 128, 0): 2, (224, 224, 192): 255}
    colours = np.zeros((256, 3), np.uint8)
    for colour, index in table.items():
        colours[index] = colour
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette(colours.ravel().tolist())
    folder(tmp_path / "grey", {"x": mask})
    folder(tmp_path / "palette", {"x": palette})
    folder(tmp_path / "colour", {"x": colours[mask]})
    for name, options in (
        ("grey", {}),
        ("palette", {}),
        ("palette", {"colours": table}),
        ("colour", {"colours": table}),
    ):
        source = data.load_segmentation("folder", "all", data_dir=tmp_path / name, classes=CLASSES, **options)
        np.testing.assert_array_equal(source[0]["label"], mask)


def test_values_instances_and_weights(tmp_path):
    folder(tmp_path, {"x": np.array([[0, 7, 7], [3, 3, 0]], np.uint8)})
    load = lambda **options: data.load_segmentation("folder", "all", data_dir=tmp_path, **options)[0]
    mapped = load(classes=CLASSES, values={0: 2, 3: 0, 7: 255})
    np.testing.assert_array_equal(mapped["label"], [[2, 255, 255], [0, 0, 2]])
    counted = load(classes=("background", "cell"), instances=True, weight=data.border_weights)
    np.testing.assert_array_equal(counted["label"], [[0, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(counted["instances"], [[0, 7, 7], [3, 3, 0]])
    np.testing.assert_array_equal(counted["weight"], data.border_weights(counted["instances"]))


def test_splits_by_folder_list_and_table(tmp_path):
    folder(tmp_path / "one" / "train", {"x": index_mask(4, 4)}, kind="labels")
    folder(tmp_path / "one" / "val", {"y": index_mask(4, 4)}, kind="labels")
    folder(tmp_path / "two", {name: index_mask(4, 4) for name in "xyz"})
    (tmp_path / "two" / "val.txt").write_text("z\n")
    folder(tmp_path / "three", {name: index_mask(4, 4) for name in "xyz"})
    (tmp_path / "three" / "index.csv").write_text("name,split\nx,train\ny.png,val\nz,val\n")
    names = lambda place, split: [
        path.stem for path in data.load_segmentation("folder", split, data_dir=tmp_path / place, classes=CLASSES).images
    ]
    assert (names("one", "train"), names("one", "val")) == (["x"], ["y"])
    assert names("two", "val") == ["z"]
    assert (names("three", "train"), names("three", "val")) == (["x"], ["y", "z"])
    with pytest.raises(ValueError, match=r"split must be one of train, val, or all, .*; got 'test'"):
        names("three", "test")
    with pytest.raises(ValueError, match=r"split must be a folder, a list nope.txt, or all, in .*; got 'nope'"):
        names("two", "nope")
    (tmp_path / "two" / "bad.txt").write_text("q\n")
    with pytest.raises(ValueError, match="must hold all images of 'bad'; got no q"):
        names("two", "bad")


def test_the_layout_of_voc(tmp_path):
    folder(tmp_path, {"x": index_mask(4, 4), "y": index_mask(4, 4)}, images="JPEGImages", kind="SegmentationClass")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("y\n")
    source = data.load_segmentation("voc", "val", data_dir=tmp_path)
    assert [path.stem for path in source.images] == ["y"]
    assert (len(source.classes), source.classes[0], source.classes[15]) == (21, "background", "person")


def test_the_layout_of_ade20k(tmp_path):
    mask = np.array([[0, 1, 2], [150, 13, 255]], np.uint8)
    for part, split in (("x", "training"), ("y", "validation")):
        place = folder(tmp_path / part, {part: np.minimum(mask, 150)})
        for kind, of in (("images", "images"), ("masks", "annotations")):
            (tmp_path / of).mkdir(exist_ok=True)
            (place / kind).rename(tmp_path / of / split)
    source = data.load_segmentation("ade20k", "validation", data_dir=tmp_path)
    assert [path.stem for path in source.images] == ["y"]
    np.testing.assert_array_equal(source[0]["label"], [[255, 0, 1], [149, 12, 149]])
    assert (len(source.classes), source.classes[12], source.classes[149]) == (150, "person", "flag")
    with pytest.raises(ValueError, match=r"images must have a folder of images, such as val; got none of val"):
        data.load_segmentation("ade20k", "val", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (index_mask(4, 5) + 9, {}, r"must be a class below 3 or 255; got \d+ at row \d, column \d"),
        (np.full((4, 4), 8, np.uint8), {"values": {0: 0}}, r"must be in \[0\]; got 8 at row 0, column 0"),
        (np.zeros((4, 4, 3), np.uint8), {}, "must be a palette or grey image of indices; got RGB; pass colours"),
        (np.zeros((4, 4), np.uint16), {}, "must be an 8-bit mask; got I;16, of 16 or 32 bits"),
        (
            np.zeros((4, 4), np.uint8),
            {"colours": {(0, 0, 0): 0}},
            "must be an RGB or palette image, because colours are given; got L",
        ),
        (
            np.full((4, 4, 3), (1, 2, 3), np.uint8),
            {"colours": {(0, 0, 0): 0}},
            r"colours must hold every colour of .*x.png; got \(1, 2, 3\) at row 0, column 0",
        ),
    ],
)
def test_wrong_masks(tmp_path, mask, options, message):
    folder(tmp_path, {"x": mask}, sizes=mask.shape[:2])
    source = data.load_segmentation("folder", "all", data_dir=tmp_path, classes=CLASSES, **options)
    with pytest.raises(ValueError, match=message):
        source[0]


def test_wrong_folders(tmp_path):
    load = lambda path, **options: data.load_segmentation(
        "folder", "all", data_dir=path, **{"classes": CLASSES} | options
    )
    sized = folder(tmp_path / "sized", {"x": index_mask(4, 5)}, sizes=(4, 6))
    with pytest.raises(ValueError, match=r"x.png must have the size of its image, 4x6; got 4x5"):
        load(sized)[0]
    lonely = folder(tmp_path / "lonely", {"x": index_mask(4, 5), "y": index_mask(4, 5)})
    (lonely / "masks" / "y.png").unlink()
    with pytest.raises(ValueError, match=r"y.png must have a mask of the same name in .*masks; got none"):
        load(lonely)
    (lonely / "images" / "y.png").rename(lonely / "masks" / "y.png")
    with pytest.raises(ValueError, match=r"y.png must have an image of the same name in .*images; got none"):
        load(lonely)
    with pytest.raises(ValueError, match=r"must have a folder of images, such as images; got none of"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"classes must be given, or listed in .*classes.txt; got None"):
        load(sized, classes=None)
    with pytest.raises(ValueError, match="values must give classes below 3 or 255; got 3 for 1"):
        load(sized, values={1: 3})
    with pytest.raises(ValueError, match="weight must be None without instances"):
        load(sized, weight=data.border_weights)
    with pytest.raises(ValueError, match=r"name must be one of shapes, folder, voc, .*; got 'imagenet'"):
        data.load_segmentation("imagenet", "train")
    with pytest.raises(ValueError, match="data_dir must be an existing folder for 'voc'; got None"):
        data.load_segmentation("voc", "train")
    (sized / "images" / "x.png").write_bytes(b"no image")
    (sized / "masks" / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x.png is not a readable image"):
        data.read_mask(sized / "masks" / "x.png")


def test_fitting_keeps_the_aspect_ratio_and_the_classes():
    label = np.repeat(np.repeat(index_mask(2, 4), 10, 0), 10, 1).astype(np.int32)
    image = np.repeat(label[..., None], 3, -1).astype(np.uint8) * 100
    out = fitted({"image": image, "label": label, "instances": label + 1}, (15, 20))
    assert out["image"].shape == (15, 20, 3)
    np.testing.assert_array_equal(out["label"][:10], label[::2, ::2])
    assert (out["label"][10:] == 255).all()
    assert (out["instances"][10:] == 0).all()
    assert (out["image"][10:] == 0).all()
    inner = np.s_[1:-1:5, 1:-1:5]
    np.testing.assert_array_equal(out["image"][:10][inner][..., 0], 100 * out["label"][:10][inner])


def test_shapes_as_maps():
    source = data.load_segmentation("shapes", "val", instances=True)
    drawn = data.ShapesSource("val", masks=True)
    data.validate(source, task="segmentation")
    assert source.classes == ("background", "disc", "box", "triangle")
    for i in range(6):
        example, truth = source[i], drawn[i]
        height, width = truth["image"].shape[:2]
        assert (example["label"][height:] == 255).all()
        assert (example["label"][:, width:] == 255).all()
        want = np.zeros((height, width), int)
        for k, (mask, label) in enumerate(zip(truth["masks"], truth["labels"], strict=True), start=1):
            want[mask] = label + 1
            np.testing.assert_array_equal(example["instances"][:height, :width] == k, mask)
        np.testing.assert_array_equal(example["label"][:height, :width], want)
        np.testing.assert_array_equal(example["image"][:height, :width], truth["image"])


def test_kept_examples_are_not_shared(tmp_path):
    folder(tmp_path, {"x": index_mask(4, 4)})
    source = data.load_segmentation("folder", "all", data_dir=tmp_path, classes=CLASSES, cache=True)
    first = source[0]
    first["label"][:] = 9
    assert (source[0]["label"] < 3).all()


def test_shapes_in_memory_are_those_that_are_drawn():
    kept, drawn = data.ShapesMaps("val", cache=True), data.ShapesMaps("val")
    first = kept[3]
    first["label"][:] = 9  # a copy
    for _ in range(2):
        for key, value in drawn[3].items():
            np.testing.assert_array_equal(kept[3][key], value)
    assert kept.fingerprint == drawn.fingerprint
