"""TFDS sets: prepared and read without TensorFlow and without a network."""

import gzip
import hashlib
import importlib.util
import json
import os
import struct
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import mnist as tfds_mnist

from flaxvision import data
from flaxvision.data import tfds as reader


def picture(index, size=(6, 5)):
    return np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8)


def test_a_prepared_set_is_read_into_memory(tfds_dir):
    source = data.load("tiny_pictures", "train", data_dir=tfds_dir)
    assert isinstance(source, data.ArraySource)
    assert source.classes == tuple(f"c{k}" for k in range(9))
    assert source.label.dtype == np.int32
    assert sorted(source.label.tolist()) == list(range(9))
    for image, label in zip(source.image, source.label, strict=True):
        np.testing.assert_array_equal(image, picture(label))
    assert len(data.load("tiny_pictures", "test", data_dir=tfds_dir)) == 4
    data.validate(source, channels=3)
    assert source.fingerprint == data.load("tiny_pictures", "train", data_dir=tfds_dir).fingerprint
    assert not {"tensorflow", "grain"} & {*sys.modules}


def test_splits_in_tfds_words(tfds_dir):
    parts = [data.load("tiny_pictures", split, data_dir=tfds_dir) for split in ("train[:4]", "train[4:]", "train+test")]
    assert [len(part) for part in parts] == [4, 5, 13]
    whole = data.load("tiny_pictures", "train", data_dir=tfds_dir)
    assert [*parts[0].label, *parts[1].label] == whole.label.tolist()
    for split in ("tset", "train[:x]", "validation"):
        with pytest.raises(
            ValueError, match=r"split must name one or more of 'train', 'test' for 'tiny_pictures'; got"
        ):
            data.load("tiny_pictures", split, data_dir=tfds_dir)


def test_photographs_stay_on_disk_and_are_resized(tfds_dir):
    source = data.load("tiny_photos", "train", data_dir=tfds_dir, image_size=4)
    assert isinstance(source, data.TfdsSource)
    assert source[3]["image"].shape == (4, 4, 3)
    assert source[3]["label"].dtype == np.int32
    batch = next(iter(data.eval_batches(source, 9)))
    assert sorted(batch["label"].tolist()) == list(range(9))
    data.validate(source, channels=3, image_size=4)
    assert source.fingerprint != data.load("tiny_photos", "train", data_dir=tfds_dir, image_size=5).fingerprint
    assert data.load("tiny_photos", "train", data_dir=tfds_dir)[0]["image"].shape == (224, 224, 3)
    # "test" finds the validation part.
    assert len(data.load("tiny_photos", "test[:3]", data_dir=tfds_dir, image_size=4)) == 3


def test_photographs_as_they_are_stored(tfds_dir):
    source = data.load("tiny_photos", "train", data_dir=tfds_dir, as_stored=True)
    assert sorted(source[i]["image"].shape for i in range(9)) == [(6 + i, 9, 3) for i in range(9)]
    example = source[4]
    label = int(example["label"])
    np.testing.assert_array_equal(example["image"], picture(label, (6 + label, 9)))
    assert source.fingerprint != data.load("tiny_photos", "train", data_dir=tfds_dir).fingerprint
    assert isinstance(data.load("tiny_pictures", "train", data_dir=tfds_dir, as_stored=True), data.ArraySource)


def test_large_sets_stay_on_disk(tfds_dir, monkeypatch):
    whole = data.load("tiny_pictures", "train", data_dir=tfds_dir)
    monkeypatch.setattr(reader, "_MEMORY_BYTES", 9 * 6 * 5 * 3 - 1)
    source = data.load("tiny_pictures", "train", data_dir=tfds_dir)
    assert isinstance(source, data.TfdsSource)
    for index in range(9):
        np.testing.assert_array_equal(source[index]["image"], whole[index]["image"])
        assert source[index]["label"] == whole[index]["label"]


def test_sets_of_another_kind_are_refused(tfds_dir):
    with pytest.raises(ValueError, match=r"name must be .* one image and one label; got 'tiny_numbers' with"):
        data.load("tiny_numbers", "train", data_dir=tfds_dir)


def test_a_set_in_another_file_format_is_refused(tfds_dir, tmp_path):
    folder = tmp_path / "tiny_pictures" / "1.2.0"
    folder.mkdir(parents=True)
    for file in (tfds_dir / "tiny_pictures" / "1.2.0").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="'tiny_pictures' cannot be opened as array records"):
        data.load("tiny_pictures", "train", data_dir=tmp_path)


# preparing from the original files


class TinyMnist(tfds_mnist.MNIST, skip_registration=True):
    """MNIST with files of its own."""

    name = "mnist"
    URL = "http://example.invalid/"
    url_infos = None


def write_originals(folder, seed, counts=(7, 3)):
    """Writes four small IDX files and returns the arrays and what TFDS must know of the files."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    arrays, infos = {}, {}
    for split, stem, count in zip(("train", "test"), ("train", "t10k"), counts, strict=True):
        arrays[split] = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays[split], strict=True):
            content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
            path = folder / f"{stem}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(content))
            infos[TinyMnist.URL + path.name] = tfds.download.checksums.UrlInfo(
                size=path.stat().st_size, checksum=hashlib.sha256(path.read_bytes()).hexdigest(), filename=path.name
            )
    return arrays, infos


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no network")


def test_mnist_is_prepared_from_its_original_files(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for attempt in range(2):
        # Two sets whose files have the same names must not be mixed up.
        manual, name = tmp_path / f"originals{attempt}", ("mnist", "fashion_mnist")[attempt]
        arrays, infos = write_originals(manual, attempt)
        builder = type("Tiny", (TinyMnist,), {"name": name, "url_infos": infos}, skip_registration=True)
        reader._prepare(builder(data_dir=tmp_path / "sets", file_format="array_record"), manual)
        for split, (image, label) in arrays.items():
            source = data.load(name, split, data_dir=tmp_path / "sets")
            assert len(source) == len(image)
            order = np.argsort(source.label)
            np.testing.assert_array_equal(source.label[order], label)
            np.testing.assert_array_equal(source.image[order, :, :, 0], image)
    assert not {"tensorflow", "grain"} & {*sys.modules}


def test_a_wrong_original_file_is_refused(tmp_path):
    _, infos = write_originals(tmp_path / "originals", 0)
    path = tmp_path / "originals" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    builder = type("Tiny", (TinyMnist,), {"name": "mnist", "url_infos": infos}, skip_registration=True)
    with pytest.raises(RuntimeError, match=r"a file in manual_dir .* is not the original file"):
        reader._prepare(builder(data_dir=tmp_path / "sets", file_format="array_record"), tmp_path / "originals")


def test_manual_dir_must_hold_the_files(tmp_path):
    with pytest.raises(ValueError, match=r"manual_dir must have .*, which lacks train-images-idx3-ubyte\.gz"):
        data.load("mnist", "train", data_dir=tmp_path / "sets", manual_dir=tmp_path)
    with pytest.raises(ValueError, match=r"manual_dir must be an existing folder; got .*nowhere"):
        data.load("mnist", "train", data_dir=tmp_path / "sets", manual_dir=tmp_path / "nowhere")


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(
        RuntimeError, match=r"'mnist' is not in .* cannot be reached; .*manual_dir .*t10k-images.*data_dir"
    ):
        data.load("mnist", "train", data_dir=tmp_path)


def test_without_tensorflow_the_message_names_the_extra(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorflow" else find(name, *a))
    with pytest.raises(RuntimeError, match=r"'cifar10' is not in .*install 'flaxvision\[tfds\]'"):
        data.load("cifar10", "train", data_dir=tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(("name", "mean"), [("mnist", 33.3184), ("fashion_mnist", 72.9404)])
def test_real_sets_are_prepared_from_their_original_files(tmp_path, name, mean):
    root = Path(os.environ["FLAXVISION_DATA"])
    source = data.load(name, "train", data_dir=tmp_path, manual_dir=root / name)
    original = data.load(root / name, "train")
    assert len(source) == 60000
    assert abs(source.image.mean() - mean) < 1e-3
    assert sorted(map(bytes, source.image)) == sorted(map(bytes, original.image))
    assert np.bincount(source.label).tolist() == np.bincount(original.label).tolist()
    assert not {"tensorflow", "grain"} & {*sys.modules}
