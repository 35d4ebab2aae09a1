"""Sources in memory and `load` by name."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from flaxvision import data
from flaxvision.data import cifar, sources
from flaxvision.data.decode import adapt_image, decode_image
from flaxvision.data.readers import read_idx


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


NPZ_ARRAYS = {
    "train_image": noise((12, 6, 5, 3)),
    "train_label": np.arange(12) % 4,
    "test_image": noise((5, 6, 5, 3), 1),
    "test_label": np.arange(5) % 5,
}


@pytest.fixture
def npz_arrays():
    return NPZ_ARRAYS


# digits


def test_digits_splits_are_the_whole_set_stratified():
    from sklearn.datasets import load_digits

    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.image.dtype == np.uint8
    assert train.image.shape[1:] == (8, 8, 1)
    assert train.classes == tuple("0123456789")
    example = train[5]
    assert example["label"].dtype == np.int32
    assert example["image"].shape == (8, 8, 1)
    digits = load_digits()
    expected = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    both = np.concatenate([train.image, test.image])
    assert sorted(map(bytes, both)) == sorted(map(bytes, expected))
    share = np.bincount(test.label) / np.bincount(digits.target)
    np.testing.assert_allclose(share, 0.2, atol=0.003)


def test_digits_are_the_same_for_every_seed_and_run():
    a, b = data.load("digits", "test"), data.load("digits", "test", seed=3)
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint != data.load("digits", "train").fingerprint
    # The split may never change: published accuracies depend on it.
    assert a.label[:10].tolist() == [0, 4, 5, 6, 6, 5, 1, 2, 3, 2]


def test_stratified_split_keeps_one_example_on_either_side():
    label = np.array([0] * 10 + [1] * 2 + [2])
    train, test = data.stratified_split(label, fraction=0.2, seed=1)
    assert sorted([*train, *test]) == list(range(13))
    assert np.bincount(label[test], minlength=3).tolist() == [2, 1, 0]
    other = data.stratified_split(label, fraction=0.2, seed=2)[1]
    assert test.tolist() != other.tolist()
    with pytest.raises(ValueError, match=r"fraction must be strictly between 0 and 1; got 1\.5"):
        data.stratified_split(label, fraction=1.5)


# arrays and .npz


def test_a_subset_in_memory():
    source = data.ArraySource(noise((6, 4, 4, 3)), np.arange(6) % 3, name="toy")
    part = data.subset(source, np.array([3, 1]), "part")
    assert isinstance(part, data.ArraySource)
    assert (len(part), part.classes, part.name) == (2, source.classes, "part")
    np.testing.assert_array_equal(part.image, source.image[[3, 1]])
    assert part.label.tolist() == [0, 1]


def test_array_source_gathers_what_it_indexes():
    source = data.ArraySource(noise((7, 4, 4, 3)), np.arange(7) % 3, name="toy")
    batch = source.gather(np.array([6, 0, 0, 3]))
    assert batch["label"].dtype == np.int32
    for row, index in enumerate([6, 0, 0, 3]):
        np.testing.assert_array_equal(batch["image"][row], source[index]["image"])
        assert batch["label"][row] == source[index]["label"]
    assert source.classes == ("0", "1", "2")
    assert isinstance(source, data.Source)


def test_fingerprint_tells_content_and_name_apart():
    image, label = noise((7, 4, 4, 3)), np.arange(7) % 3
    first = data.ArraySource(image, label, name="a").fingerprint
    assert first == data.ArraySource(image.copy(), label.copy(), name="a").fingerprint
    changed = image.copy()
    changed[3, 2, 1, 0] ^= 1
    others = [
        data.ArraySource(changed, label, name="a"),
        data.ArraySource(image, label[::-1].copy(), name="a"),
        data.ArraySource(image, label, name="b"),
        data.ArraySource(image.reshape(7, 8, 2, 3), label, name="a"),
    ]
    assert len({first, *(source.fingerprint for source in others)}) == 5


def test_npz(tmp_path, npz_arrays):
    path = tmp_path / "toy.npz"
    np.savez(path, **npz_arrays)
    for split in ("train", "test"):
        source = data.load(path, split)
        np.testing.assert_array_equal(source.image, npz_arrays[f"{split}_image"])
        np.testing.assert_array_equal(source.label, npz_arrays[f"{split}_label"])
        # The label 4 occurs in the test part only: the training labels count the classes.
        assert source.classes == ("0", "1", "2", "3")
    grey = {key: a[..., 0] if "image" in key else a for key, a in npz_arrays.items()}
    np.savez(path, classes=np.array(list("abcde")), **grey)
    source = data.load(str(path), "train")
    assert source.image.shape == (12, 6, 5, 1)
    assert source.classes == tuple("abcde")


def test_npz_faults_name_the_file(tmp_path, npz_arrays):
    path = tmp_path / "toy.npz"
    with pytest.raises(ValueError, match=r"name must be an existing file or folder; got .*toy\.npz"):
        data.load(path, "train")
    np.savez(path, **{key: a for key, a in npz_arrays.items() if key != "test_label"})
    with pytest.raises(ValueError, match=r"toy\.npz has no array 'test_label'"):
        data.load(path, "test")
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'test' for .*toy\.npz; got 'val'"):
        data.load(path, "val")
    np.savez(path, **{**npz_arrays, "train_label": np.array([None] * 12, object)})
    with pytest.raises(ValueError, match=r"toy\.npz is not a readable \.npz"):
        data.load(path, "train")
    np.savez(path, **npz_arrays)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"toy\.npz is not a readable \.npz"):
            data.load(path, "train")
    flipped = bytearray(whole)
    flipped[whole.index(b"NUMPY") + 300] ^= 255
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"toy\.npz is not a readable \.npz"):
        data.load(path, "train")


# the original files of MNIST


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_idx_folder(folder, counts=(9, 4), suffix=".gz"):
    folder.mkdir(exist_ok=True)
    written = {}
    for stem, split, count in zip(("train", "t10k"), ("train", "test"), counts, strict=True):
        image, label = noise((count, 28, 28), count), np.arange(count) % 7
        write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", image)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{suffix}", label)
        written[split] = (image, label)
    return written


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_idx_folder(tmp_path, suffix):
    written = write_idx_folder(tmp_path / "letters", suffix=suffix)
    for split, (image, label) in written.items():
        source = data.load(tmp_path / "letters", split)
        np.testing.assert_array_equal(source.image[..., 0], image)
        np.testing.assert_array_equal(source.label, label)
        assert source.name == f"letters/{split}"
        assert source.classes == tuple("0123456")


def test_idx_faults_name_the_file(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with pytest.raises(ValueError, match=r"train-images.* cannot be read"):
        read_idx(path)
    write_idx(path, noise((3, 4, 4)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    with pytest.raises(ValueError, match=r"train-images.* cannot be read"):
        read_idx(path)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(
        ValueError, match=r"its header declares the shape \[3, 4, 4\], but it has 47 bytes of data; get it again"
    ):
        read_idx(path)
    path.write_bytes(b"\x89PNG")
    with pytest.raises(
        ValueError, match=r"is not an IDX file of unsigned bytes: it starts with '89504e47' and has 4 b"
    ):
        read_idx(path)


# names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("minst", "mnist"), ("digit", "digits"), ("fashion-mnist", "fashion_mnist"), ("zzz", "digits")],
)
def test_an_unknown_name_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"name must be a known data set \(nearest: .*\b{nearest}\b.*; got '{name}'"):
        data.load(name, "train")


def test_missing_paths_and_splits(tmp_path):
    with pytest.raises(ValueError, match="name must be an existing file or folder"):
        data.load(tmp_path / "nowhere", "train")
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(ValueError, match=r"name must be a folder or an \.npz file; got the file .*file\.txt"):
        data.load(tmp_path / "file.txt", "train")
    with pytest.raises(ValueError, match="split must be one of 'train', 'test' for digits; got 'val'"):
        data.load("digits", "val")


# options


@pytest.fixture(scope="module")
def places(tmp_path_factory, tfds_dir):
    """One data set of every kind: name, shape of an image, options that place it, whether its images have one size."""
    folder = tmp_path_factory.mktemp("places")
    write_idx_folder(folder / "letters")
    np.savez(folder / "colour.npz", **NPZ_ARRAYS)
    floats = {key: np.float32(a) / 255 if "image" in key else a for key, a in NPZ_ARRAYS.items()}
    np.savez(folder / "float.npz", **floats)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(noise((12, 10 + i, 3), i)).save(folder / "photos" / name / f"{i}.png")
    for files in cifar.CIFAR10_FILES.values():
        (folder / "cifar").mkdir(exist_ok=True)
        for file in files:
            records = np.zeros((4, 3073), np.uint8)
            records[:, 1:] = noise((4, 3072))
            records.tofile(folder / "cifar" / file)
    prepared = {"data_dir": tfds_dir}
    return {
        "digits": ("digits", (8, 8, 1), {}),
        "patterns": ("patterns", (64, 64, 3), {}),
        "npz": (folder / "colour.npz", (6, 5, 3), {}),
        "npz of floats": (folder / "float.npz", (6, 5, 3), {}),
        "idx": (folder / "letters", (28, 28, 1), {}),
        "cifar10 files": (folder / "cifar", (32, 32, 3), {}),
        "cifar10": ("cifar10", (32, 32, 3), {"manual_dir": folder / "cifar"}),
        "tfds": ("tiny_pictures", (6, 5, 3), prepared),
        "tfds photographs": ("tiny_photos", (224, 224, 3), prepared),
        "folder": (folder / "photos", (224, 224, 3), {}),
    }


KINDS = [
    "digits",
    "patterns",
    "npz",
    "npz of floats",
    "idx",
    "cifar10 files",
    "cifar10",
    "tfds",
    "tfds photographs",
    "folder",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_honours_size_and_channels(places, kind, monkeypatch):
    monkeypatch.setattr(cifar, "_RECORDS", 4)
    name, shape, where = places[kind]
    stored = data.load(name, "test", **where)
    assert stored[0]["image"].shape == shape
    for size, channels in ((9, None), (None, 1), (None, 3), (7, 1), (9, 3)):
        source = data.load(name, "test", image_size=size, channels=channels, **where)
        height, width = (size, size) if size else shape[:2]
        image = source[0]["image"]
        assert image.shape == (height, width, channels or shape[-1])
        assert image.dtype == stored[0]["image"].dtype
        assert (len(source), source.classes) == (len(stored), stored.classes)
        assert source[1]["label"] == stored[1]["label"]
        changed = image.shape != shape
        assert (source.fingerprint != stored.fingerprint) == changed
        if channels == 3 and shape[-1] == 1:
            assert (image == image[..., :1]).all()
    same = {} if kind in ("npz", "npz of floats", "tfds") else {"image_size": shape[0]}
    assert data.load(name, "test", channels=shape[-1], **same, **where).fingerprint == stored.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_options_out_of_range_or_of_no_use_are_refused(places, kind, monkeypatch):
    monkeypatch.setattr(cifar, "_RECORDS", 4)
    name, _, where = places[kind]
    for options, said in (
        ({"channels": 2}, "channels must be 3 for RGB or 1 for grayscale; got 2"),
        ({"image_size": 0}, "image_size must be at least 1; got 0"),
        ({"image_size": 8, "as_stored": True}, "image_size must be None with as_stored=True; got 8"),
        ({"split": "nothing"}, "split must .*; got 'nothing'"),
    ):
        with pytest.raises(ValueError, match=said):
            data.load(**{"name": name, "split": "test", **where, **options})
    if not where:
        for option in ("data_dir", "manual_dir"):
            with pytest.raises(ValueError, match=f"{option} must be None for .*, which is not a TFDS set; got 'x'"):
                data.load(name, "test", **{option: "x"})


def test_adapted_images_have_the_values_of_decoded_ones(tmp_path):
    """One resizing and one luma for arrays and for files."""
    image = noise((12, 17, 3))
    Image.fromarray(image).save(tmp_path / "a.png")
    for size, channels in ((5, 3), (20, 3), (5, 1), (None, 1)):
        expected = decode_image(tmp_path / "a.png", channels=channels, image_size=size).astype(int)
        found = adapt_image(image, channels=channels, image_size=size)
        assert np.abs(found - expected).max() <= 1  # Pillow rounds the luma in fixed point
        floats = adapt_image(np.float32(image) / 255, channels=channels, image_size=size)
        np.testing.assert_allclose(floats * 255, expected, atol=2)


def test_large_adapted_sets_are_adapted_on_access(monkeypatch):
    whole = data.load("digits", "test", image_size=9, channels=3)
    monkeypatch.setattr(sources, "_MEMORY_BYTES", 359 * 9 * 9 * 3 - 1)
    source = data.load("digits", "test", image_size=9, channels=3)
    assert isinstance(source, data.Mapped)
    np.testing.assert_array_equal(source.label, whole.label)
    for index in (0, 7, 358):
        np.testing.assert_array_equal(source[index]["image"], whole[index]["image"])


def test_images_of_other_channels_are_not_converted(tmp_path):
    arrays = {key: a[..., [0, 1, 2, 0]] if "image" in key else a for key, a in NPZ_ARRAYS.items()}
    np.savez(tmp_path / "four.npz", **arrays)
    assert data.load(tmp_path / "four.npz", "test", image_size=4)[0]["image"].shape == (4, 4, 4)
    with pytest.raises(
        ValueError, match=r"channels .* must be None for 'four\.npz/test', which has .* \[6, 5, 4\]; got"
    ):
        data.load(tmp_path / "four.npz", "test", channels=3)
