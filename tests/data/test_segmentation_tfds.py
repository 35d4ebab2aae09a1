"""TFDS sets of images with masks: prepared small, with the features of TFDS's own builders."""

import functools

import numpy as np
import pytest

from flaxvision import data
from flaxvision.data import segmentation_classes
from tests.data.conftest import png

SIZES = [(6, 9), (5, 4)]
RNG = np.random.default_rng(0)
# Two masks of each set as arrays.
MASKS = {
    "oxford_iiit_pet": [RNG.integers(1, 4, size).astype(np.uint8) for size in SIZES],
    "cityscapes": [RNG.integers(0, 34, size).astype(np.uint8) for size in SIZES],
    "scene_parse150": [RNG.integers(0, 101, (*size, 3)).astype(np.uint8) for size in SIZES],
}


def prepare(folder, name, masks):
    """Prepares a set with one training image for each mask, in shades of its number."""
    import tensorflow_datasets as tfds

    base = tfds.builder_cls(name)

    class Builder(base, skip_registration=True):
        pass

    Builder.name, Builder.__module__ = base.name, base.__module__
    image, mask = {
        "oxford_iiit_pet": ("image", "segmentation_mask"),
        "cityscapes": ("image_left", "segmentation_label"),
        "scene_parse150": ("image", "annotation"),
    }[name]
    others = {
        "oxford_iiit_pet": {
            "label": 3,
            "species": 0,
            "file_name": "a",
            "head_bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
        },
        "cityscapes": {"image_id": "a"},
        "scene_parse150": {},
    }[name]

    def examples(self):
        for index, indices in enumerate(masks):
            picture = np.full((*SIZES[index], 3), index, np.uint8)
            yield index, {image: png(picture), mask: png(indices), **others}

    Builder._generate_examples = examples
    Builder._split_generators = lambda self, manager: {"train": self._generate_examples()}
    Builder(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds_masks")
    for name, masks in MASKS.items():
        prepare(folder, name, masks)
    return folder


def by_number(source):
    """The examples in the order of `MASKS`; TFDS shuffles."""
    return sorted((source[i] for i in range(len(source))), key=lambda example: example["image"][0, 0, 0])


@pytest.mark.parametrize("name", MASKS)
def test_labels(folder, name):
    source = data.load_segmentation(name, "train", data_dir=folder)
    examples = by_number(source)
    assert len(examples) == 2
    known = {"oxford_iiit_pet": range(1, 4), "cityscapes": segmentation_classes._CITYSCAPES_IDS}.get(
        name, range(1, 101)
    )
    for example, mask, size in zip(examples, MASKS[name], SIZES, strict=True):
        assert example["image"].shape == (*size, 3)
        raw = mask[..., 0] if mask.ndim == 3 else mask
        want = [[[*known].index(value) if value in known else 255 for value in row] for row in raw]
        np.testing.assert_array_equal(example["label"], want)
        assert example["label"].dtype == np.int32
    data.validate(source, task="segmentation", channels=3)
    assert len(source.classes) == len(known)


def test_options(folder):
    load = functools.partial(data.load_segmentation, "oxford_iiit_pet", data_dir=folder)
    plain, part = load("train"), load("train[:1]")
    assert (plain.classes, len(part)) == (("pet", "background", "border"), 1)
    kept = load("train", size=(8, 8), channels=1, cache=True)
    example = kept[0]
    assert (example["image"].shape, example["label"].shape) == ((8, 8, 1), (8, 8))
    example["label"][:] = 7
    assert not (kept[0]["label"] == 7).any()
    two = load("train", classes=("background", "pet"), values={1: 1, 2: 0, 3: 255})
    for mine, mask in zip(by_number(two), MASKS["oxford_iiit_pet"], strict=True):
        np.testing.assert_array_equal(mine["label"], np.asarray([255, 1, 0, 255])[mask])
    assert len({source.fingerprint for source in (plain, part, kept, two)}) == 4
    versioned = data.load_segmentation("oxford_iiit_pet:4.0.0", "train", data_dir=folder)
    np.testing.assert_array_equal(versioned[0]["label"], plain[0]["label"])


def test_a_mask_that_does_not_fit(tmp_path):
    prepare(tmp_path, "oxford_iiit_pet", [np.full(SIZES[0], 4, np.uint8), np.ones((3, 3), np.uint8)])
    source = data.load_segmentation("oxford_iiit_pet", "train", data_dir=tmp_path)
    messages = []
    for index in range(2):
        with pytest.raises(ValueError, match=rf"oxford_iiit_pet/train\[{index}\] must") as raised:
            source[index]
        messages.append(str(raised.value))
    assert any("must be in [1, 2, 3]; got 4 at row 0, column 0" in message for message in messages)
    assert any("must have the size of its image, 5x4; got 3x3" in message for message in messages)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("oxford", {}, "name must be one of shapes, folder, voc, ade20k, oxford_iiit_pet, .*; got 'oxford'"),
        ("voc/2012", {}, "name must be one of shapes, .*; got 'voc/2012'"),
        (
            "oxford_iiit_pet",
            {"split": "val"},
            "split must name one or more of 'train' for 'oxford_iiit_pet'; got 'val'",
        ),
        ("oxford_iiit_pet", {"classes": ("a",)}, "classes and values must be given together for 'oxford_iiit_pet'"),
        (
            "oxford_iiit_pet",
            {"classes": ("a",), "values": {1: 1}},
            "values must give classes below 1 or 255; got 1 for 1",
        ),
        ("oxford_iiit_pet", {"instances": True}, "instances must be left out for the TFDS set 'oxford_iiit_pet'"),
        ("cityscapes/stereo_disparity", {}, "name must be a TFDS set with image_left and segmentation_label; got"),
    ],
)
def test_errors(folder, name, options, message):
    with pytest.raises(ValueError, match=message):
        data.load_segmentation(name, **{"split": "train", "data_dir": folder, **options})


def test_a_set_that_is_not_prepared(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"'cityscapes' is not prepared in .*; download leftImg8bit_trainvaltest\.zip"
    ):
        data.load_segmentation("cityscapes", "train", data_dir=tmp_path)


def test_names_of_ade20k():
    """The classes of its instances are in the order of all classes."""
    every, some = segmentation_classes.ADE20K_CLASSES, segmentation_classes.ADE20K_INSTANCE_CLASSES
    assert (len(set(every)), len(set(some))) == (150, 100)
    assert (every[0], every[12], every[149]) == ("wall", "person", "flag")
    assert (some[0], some[3], some[57], some[99]) == ("bed", "person", "television", "flag")


@pytest.mark.reference
def test_cityscapes_against_torchvision():
    from parity import libraries

    libraries._import_torchvision()
    from torchvision.datasets import Cityscapes

    theirs = {each.id: each.train_id for each in Cityscapes.classes if each.id >= 0}
    assert theirs == segmentation_classes.CITYSCAPES_VALUES
    names = {each.train_id: each.name for each in Cityscapes.classes if 0 <= each.train_id < 19}
    assert tuple(names[i] for i in range(19)) == segmentation_classes.CITYSCAPES_CLASSES
