"""The drawn shapes: exact boxes and masks, the same pixels everywhere."""

import hashlib

import numpy as np
import pytest

from flaxvision import data


@pytest.fixture(scope="module")
def examples():
    source = data.ShapesSource("train", masks=True, length=60)
    return [source[index] for index in range(len(source))]


def test_boxes_enclose_the_visible_parts(examples):
    for example in examples:
        assert example["masks"].shape == (len(example["boxes"]), *example["image"].shape[:2])
        assert example["masks"].sum(0).max(initial=0) <= 1  # a pixel shows one object
        for box, mask in zip(example["boxes"], example["masks"], strict=True):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_the_masks_have_the_shapes_of_their_classes(examples):
    """Of objects that nothing hides: the share of the box that a disc, a rotated box or a triangle fills."""
    shares = [[], [], []]
    for example in examples:
        for box, label, mask in zip(example["boxes"], example["labels"], example["masks"], strict=True):
            area = (box[2] - box[0]) * (box[3] - box[1])
            shares[label].append(mask.sum() / area)
    discs, boxes, triangles = (np.array(share) for share in shares)
    assert np.isclose(np.median(discs), np.pi / 4, atol=0.02)
    assert 0.4 <= np.median(triangles) <= 0.55
    assert boxes.max() > 0.9
    assert boxes.min() < 0.7


def test_what_the_images_have_in_them(examples):
    counts = np.array([len(example["boxes"]) for example in examples])
    assert counts.min() == 0
    assert counts.max() >= 5
    overlaps = sum(
        bool((np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all())
        for example in examples
        for k, a in enumerate(example["boxes"])
        for b in example["boxes"][:k]
    )
    assert overlaps >= 20
    assert {len(np.unique(example["image"])) > 100 for example in examples} == {True}  # textured and noisy
    assert len({example["image"].shape for example in examples}) > 30


def test_the_splits():
    sources = {split: data.load_detection("shapes", split) for split in ("train", "val", "test")}
    assert {split: len(source) for split, source in sources.items()} == {"train": 2000, "val": 200, "test": 500}
    firsts = {source[0]["image"].tobytes() for source in sources.values()}
    assert len(firsts) == 3
    assert len({source.fingerprint for source in sources.values()}) == 3
    source = sources["test"]
    data.validate(source, task="detection", channels=3)
    data.validate(data.ShapesSource("val", masks=True, length=8), task="detection")
    assert source.sizes[3].tolist() == list(source[3]["image"].shape[:2])
    assert max(len(source[i]["boxes"]) for i in range(20)) <= source.counts[0]
    with pytest.raises(ValueError, match="split must be one of 'train', 'val', 'test' for shapes; got 'all'"):
        data.ShapesSource("all")
    with pytest.raises(ValueError, match="length must be at least 1 or None; got 0"):
        data.ShapesSource("val", length=0)


def test_the_pixels_never_change():
    """Published figures depend on them."""
    digest = hashlib.blake2b(digest_size=8)
    for split in ("train", "val", "test"):
        source = data.ShapesSource(split)
        for index in range(5):
            example = source[index]
            digest.update(example["image"].tobytes() + example["boxes"].tobytes() + example["labels"].tobytes())
    assert digest.hexdigest() == "05d629e37aae7306"
