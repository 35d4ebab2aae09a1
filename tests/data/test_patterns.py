"""The drawn patterns, and the small things around sources that the big experiments need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flaxvision import data
from flaxvision.data.augment import cutmix, mixing, mixup


def test_patterns_are_drawn_from_their_index_alone():
    train, test = data.load("patterns", "train", as_stored=True), data.load("patterns", "test", as_stored=True)
    assert (len(train), len(test), len(train.classes)) == (1000, 250, 10)
    sizes = {train[i]["image"].shape for i in range(20)}
    assert len(sizes) > 10
    assert all(72 <= side <= 128 for shape in sizes for side in shape[:2])
    np.testing.assert_array_equal(train[17]["image"], data.load("patterns", "train", as_stored=True)[17]["image"])
    np.testing.assert_array_equal(train[-1]["image"], train[999]["image"])
    assert train[3]["image"].shape != test[3]["image"].shape or (train[3]["image"] != test[3]["image"]).any()
    assert train.fingerprint != test.fingerprint
    data.validate(train, channels=3)
    with pytest.raises(ValueError, match="split must be one of 'train', 'test' for patterns; got 'val'"):
        data.load("patterns", "val")


def test_patterns_of_one_size_live_in_memory():
    source = data.load("patterns", "test", image_size=16)
    assert isinstance(source, data.ArraySource)
    assert source.image.shape == (250, 16, 16, 3)
    assert np.bincount(source.label).tolist() == [25] * 10
    assert data.load("patterns", "test").image.shape[1:] == (64, 64, 3)
    warm = source.image[source.label % 2 == 0].mean((0, 1, 2))
    cool = source.image[source.label % 2 == 1].mean((0, 1, 2))
    assert warm[0] > warm[2] + 50
    assert cool[2] > cool[0] + 50


def test_mapped_images_go_through_the_function():
    source = data.load("digits", "test")
    halved = data.Mapped(source, lambda image: image[::2, ::2], "halved")
    assert (len(halved), halved.classes, halved.name) == (359, source.classes, "digits/test/halved")
    np.testing.assert_array_equal(halved[5]["image"], source[5]["image"][::2, ::2])
    assert halved[5]["label"] == source[5]["label"]
    assert halved.fingerprint != source.fingerprint
    batches = list(data.eval_batches(halved, 100))
    assert [b["image"].shape for b in batches] == [(100, 4, 4, 1)] * 4
    assert sum(b["mask"].sum() for b in batches) == 359


def test_channel_statistics():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 4, 6, 3), np.uint8)
    image[..., 2] = 51
    mean, std = data.channel_statistics(data.ArraySource(image, np.zeros(50, int)))
    np.testing.assert_allclose(mean, image.mean((0, 1, 2)) / 255)
    np.testing.assert_allclose(std[:2], image.std((0, 1, 2))[:2] / 255)
    assert (mean[2], std[2]) == (pytest.approx(0.2), 1e-3)
    every_second = data.channel_statistics(data.ArraySource(image / 255.0, np.zeros(50, int)), samples=25)
    np.testing.assert_allclose(every_second[0], image[::2].mean((0, 1, 2)) / 255)


@pytest.fixture
def photos(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    for k, name in enumerate("ab"):
        for i in range(5):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (20 + i, 30), (50 * k, 0, 0)).save(tmp_path / name / f"{i}.png", exif=exif)
    return tmp_path


def test_photographs_as_they_are_stored(photos):
    stored, shown = data.load(photos, "all", as_stored=True), data.load(photos, "all", image_size=8)
    assert [stored[i]["image"].shape for i in range(5)] == [(30, 20 + i, 3) for i in range(5)]
    assert shown[0]["image"].shape == (8, 8, 3)
    assert stored.fingerprint != shown.fingerprint
    upright = data.FolderSource(photos, stored.paths, stored.label, stored.classes, "x", image_size=None)
    assert upright[1]["image"].shape == (21, 30, 3)


def test_a_folder_without_parts_can_be_taken_whole(photos):
    assert [len(data.load(photos, split)) for split in ("all", "train", "test")] == [10, 8, 2]
    assert data.load(photos, "all").label.tolist() == [0] * 5 + [1] * 5
    (photos / "a").rename(photos.parent / "a_moved")
    (photos / "val").mkdir()
    with pytest.raises(ValueError, match=r"split must be .*; got 'all'"):
        data.load(photos, "all")


def test_validation_without_decoding_every_file(photos):
    (photos / "b" / "4.png").write_bytes(b"no picture")
    source = data.load(photos, "all", as_stored=True)
    part = data.FolderSource(photos, source.paths * 50, np.tile(source.label, 50), source.classes, "x", image_size=8)
    with pytest.raises(ValueError, match="50 of 500 images cannot be decoded"):
        data.validate(part)
    with pytest.raises(ValueError, match=r"b/4\.png is not a readable image"):
        data.validate(source, verify=False)  # ten images: each is looked at
    few = data.subset(part, np.arange(9), "few")
    data.validate(few, verify=False)
    with pytest.raises(ValueError, match="cannot be decoded"):
        data.validate(few)


def test_mixing_takes_one_of_the_two_for_each_batch():
    batch = {"image": jax.random.uniform(jax.random.key(1), (6, 8, 8, 3)), "label": jnp.arange(6), "mask": jnp.ones(6)}
    assert mixing(6) is None
    either = jax.jit(mixing(6, mixup_alpha=0.3, cutmix_alpha=1.0))
    found = []
    for seed in range(8):
        key = jax.random.key(seed)
        out, rest = either(key, batch), jax.random.split(key)[1]
        options = [
            mixup(rest, batch, alpha=0.3, num_classes=6),
            cutmix(rest, batch, alpha=1.0, num_classes=6),
        ]
        same = [bool(jnp.allclose(out["image"], o["image"], atol=1e-6)) for o in options]
        assert sum(same) == 1
        found.append(same[0])
        np.testing.assert_allclose(out["label"], options[same.index(True)]["label"], atol=1e-6)
    assert 0 < sum(found) < 8
    for name, function in (("mixup_alpha", mixup), ("cutmix_alpha", cutmix)):
        out = mixing(6, **{name: 0.7})(jax.random.key(3), batch)
        expected = function(jax.random.key(3), batch, alpha=0.7, num_classes=6)
        np.testing.assert_array_equal(out["image"], expected["image"])
