"""CIFAR-10's binary version, from files of the right size that are zero but for a few records."""

import numpy as np
import pytest

from flaxvision import data

RECORD = 3073
FILES = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]


def write(folder, name, records=None, size=10_000 * RECORD):
    """A sparse file with the given records `{index: (label, image)}`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(size)
        for index, (label, image) in (records or {}).items():
            file.seek(index * RECORD)
            file.write(bytes([label]) + image.transpose(2, 0, 1).tobytes())


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    for k, name in enumerate(FILES):
        write(tmp_path / "set", name, {0: (k, picture(k)), 9_999: (9 - k, picture(10 + k))})
    return tmp_path / "set"


def test_records_become_images_in_the_order_of_the_files(folder):
    train, test = data.load(folder, "train"), data.load(folder, "test")
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.image.shape == (50_000, 32, 32, 3)
    assert train.classes[:3] == ("airplane", "automobile", "bird")
    assert len(train.classes) == 10
    for k in range(5):
        for at, label, seed in ((10_000 * k, k, k), (10_000 * k + 9_999, 9 - k, 10 + k)):
            np.testing.assert_array_equal(train[at]["image"], picture(seed))
            assert train[at]["label"] == label
    np.testing.assert_array_equal(test.image[-1], picture(15))
    assert not train.image[1].any()
    data.validate(test, channels=3, image_size=32)


def test_the_name_with_a_manual_dir_needs_no_tfds(folder):
    expected = data.load(folder, "test").fingerprint
    assert data.load("cifar10", "test", manual_dir=folder).fingerprint == expected
    folder.rename(folder.parent / "cifar-10-batches-bin")
    assert data.load("cifar10", "test", manual_dir=folder.parent).fingerprint == expected
    assert data.load(folder.parent, "test").fingerprint == expected


def test_damaged_sets_are_named(folder):
    write(folder, "data_batch_3.bin", size=9_999 * RECORD)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin must have 30,730,000 bytes.*; got 30,726,927"):
        data.load(folder, "train")
    data.load(folder, "test")
    write(folder, "test_batch.bin", {7: (10, picture(0))})
    with pytest.raises(ValueError, match=r"test_batch\.bin must be between 0 and 9; got 10 in record 7"):
        data.load(folder, "test")
    (folder / "test_batch.bin").unlink()
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(ValueError, match=r"set lacks files of the binary version of CIFAR-10: data_batch_2\.bin"):
        data.load(folder, "train")
    with pytest.raises(ValueError, match=r"CIFAR-10: test_batch\.bin"):
        data.load("cifar10", "test", manual_dir=folder)
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'test' for .*; got 'val'"):
        data.load(folder, "val")
