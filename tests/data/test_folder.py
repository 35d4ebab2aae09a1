"""Folders of class folders and the decoding of pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxvision import data
from flaxvision.data.decode import decode_image


def save_picture(path, color, size=(20, 12), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def flat_folder(tmp_path):
    root = tmp_path / "animals"
    for k, name in enumerate(["cat", "dog", "fox"]):
        for i in range(10):
            save_picture(root / name / f"{i}.png", (40 * k, 10 * i, 7))
    return root


# folders


def test_flat_folder_is_split_once_and_stratified(flat_folder):
    train, test = data.load(flat_folder, "train", image_size=8), data.load(flat_folder, "test", image_size=8)
    assert train.classes == test.classes == ("cat", "dog", "fox")
    assert (len(train), len(test)) == (24, 6)
    assert np.bincount(test.label).tolist() == [2, 2, 2]
    assert not set(train.paths) & set(test.paths)
    assert len(set(train.paths) | set(test.paths)) == 30
    assert test.paths == data.load(flat_folder, "test", image_size=8).paths
    assert test.paths != data.load(flat_folder, "test", seed=5, image_size=8).paths
    for index, path in enumerate(test.paths):
        example = test[index]
        name, number = Path(path).parts
        k = ["cat", "dog", "fox"].index(name)
        assert example["label"] == k
        assert example["label"].dtype == np.int32
        assert example["image"].shape == (8, 8, 3)
        assert (example["image"] == [40 * k, 10 * int(Path(number).stem), 7]).all()


def test_a_relative_path_and_a_string_do_as_well(flat_folder, monkeypatch):
    monkeypatch.chdir(flat_folder.parent)
    expected = data.load(flat_folder, "train").fingerprint
    for name in ("./animals", "animals", str(flat_folder)):
        assert data.load(name, "train").fingerprint == expected


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder_with_its_own_parts(tmp_path, held_out):
    for i in range(3):
        save_picture(tmp_path / "set" / "train" / "a" / f"{i}.png", "red")
        save_picture(tmp_path / "set" / "train" / "b" / "deep" / f"{i}.JPG", "blue", format="JPEG")
    save_picture(tmp_path / "set" / held_out / "b" / "x.png", "blue")
    (tmp_path / "set" / "train" / "a" / "notes.txt").write_text("not an image")
    train = data.load(tmp_path / "set", "train")
    assert train.paths == ("a/0.png", "a/1.png", "a/2.png", "b/deep/0.JPG", "b/deep/1.JPG", "b/deep/2.JPG")
    for split in ("test", "val"):
        test = data.load(tmp_path / "set", split)
        assert (test.paths, test.classes, test.label.tolist()) == (("b/x.png",), ("a", "b"), [1])


def test_train_folder_alone_is_split(flat_folder):
    (flat_folder.parent / "set").mkdir()
    flat_folder.rename(flat_folder.parent / "set" / "train")
    parts = [data.load(flat_folder.parent / "set", split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [24, 6]
    assert parts[0].classes == ("cat", "dog", "fox")


def test_grey_folder(flat_folder):
    source = data.load(flat_folder, "train", channels=1, image_size=10)
    assert source[0]["image"].shape == (10, 10, 1)
    with pytest.raises(ValueError, match="channels must be 3 for RGB or 1 for grayscale; got 2"):
        data.load(flat_folder, "train", channels=2)
    with pytest.raises(ValueError, match="image_size must be at least 1; got -1"):
        data.load(flat_folder, "train", image_size=-1)


def test_folder_fingerprint_follows_the_files(flat_folder):
    first = data.load(flat_folder, "train").fingerprint
    assert first == data.load(flat_folder, "train").fingerprint
    assert first != data.load(flat_folder, "train", image_size=32).fingerprint
    save_picture(flat_folder / "cat" / "new.png", "white")
    save_picture(flat_folder / "cat" / "newer.png", "white")
    assert first != data.load(flat_folder, "train").fingerprint


def test_empty_folders_are_named(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    with pytest.raises(ValueError, match=r"set has no class folders"):
        data.load(root, "train")
    (root / "cat").mkdir()
    with pytest.raises(ValueError, match=r"cat has no images"):
        data.load(root, "train")
    save_picture(root / "cat" / "a.png", "red")
    (root / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog has no images"):
        data.load(root, "train")


def test_folder_parts_must_fit(tmp_path):
    save_picture(tmp_path / "set" / "test" / "cat" / "a.png", "red")
    with pytest.raises(ValueError, match="no subfolder 'train'"):
        data.load(tmp_path / "set", "train")
    save_picture(tmp_path / "set" / "train" / "dog" / "a.png", "red")
    with pytest.raises(ValueError, match=r"cat is a class that the training part .* lacks"):
        data.load(tmp_path / "set", "test")
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'test', 'val' for .*; got 'all'"):
        data.load(tmp_path / "set", "all")


def test_damaged_images_are_named_before_training(flat_folder):
    save_picture(flat_folder / "dog" / "photo.jpg", "red", size=(200, 200), quality=95)
    Image.fromarray(noise((200, 200, 3))).save(flat_folder / "dog" / "photo.jpg")
    whole = (flat_folder / "dog" / "photo.jpg").read_bytes()
    source = data.load(flat_folder, "train", image_size=16)
    data.validate(source)
    for content in (whole[: len(whole) // 2], b"", b"no picture"):
        (flat_folder / "dog" / "photo.jpg").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"1 of \d+ images cannot be decoded: .*dog/photo\.jpg is not a readable image"
        ):
            data.validate(data.load(flat_folder, "train" if "dog/photo.jpg" in source.paths else "test", image_size=16))
    with pytest.raises(ValueError, match=r"dog/photo\.jpg is not a readable image"):
        decode_image(flat_folder / "dog" / "photo.jpg")


def test_a_subset_of_a_folder(flat_folder):
    source = data.load(flat_folder, "train", image_size=4)
    part = data.subset(source, np.array([13, 1]), "part")
    assert (len(part), part.classes, part.name) == (2, source.classes, "part")
    for mine, theirs in zip((part[0], part[1]), (source[13], source[1]), strict=True):
        np.testing.assert_array_equal(mine["image"], theirs["image"])
        assert mine["label"] == theirs["label"]
    other = data.subset(source, np.array([1, 13]), "part")
    assert len({source.fingerprint, part.fingerprint, other.fingerprint}) == 3
    data.validate(part, channels=3)
    batch = next(iter(data.eval_batches(part, 2)))
    assert batch["label"].tolist() == [source.label[13], source.label[1]]


# decoding


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    assert (decode_image(tmp_path / "deep.png", channels=1) == 0x80).all()


def test_decoding_resizes_the_shorter_side_and_cuts_the_middle(tmp_path):
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 200
    Image.fromarray(image).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "wide.png", image_size=20), np.full((20, 20, 3), 200))
    tall = Image.fromarray(image.transpose(1, 0, 2))
    tall.save(tmp_path / "tall.png")
    assert decode_image(tmp_path / "tall.png", image_size=33).shape == (33, 33, 3)
    assert decode_image(tmp_path / "tall.png").shape == (60, 20, 3)


def test_decoding_antialiases(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 254
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = decode_image(tmp_path / "stripes.png", image_size=8)
    assert abs(small.astype(int) - 127).max() <= 12


def test_decoding_applies_the_exif_orientation(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    upright = decode_image(tmp_path / "turned.png")
    assert upright.shape == (16, 8, 3)
    assert upright[:8].min() == 255
    assert upright[8:].max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "LA"])
def test_decoding_modes(tmp_path, mode):
    grey = np.full((6, 6), 255, np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(np.full((6, 6), 65535, np.uint16))
    else:
        picture = Image.fromarray(grey).convert("RGB" if mode in ("CMYK", "P") else mode).convert(mode)
    picture.save(tmp_path / "picture.tif")
    for channels in (1, 3):
        np.testing.assert_array_equal(decode_image(tmp_path / "picture.tif", channels=channels), 255)
        assert decode_image(tmp_path / "picture.tif", channels=channels).shape == (6, 6, channels)
