"""Sources in memory and on disk, `load` by name, and the check before training."""

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxvision import data
from flaxvision.data.arrays import read_idx
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


@pytest.fixture
def npz_arrays():
    return {
        "train_image": noise((12, 6, 5, 3)),
        "train_label": np.arange(12) % 4,
        "test_image": noise((5, 6, 5, 3), 1),
        "test_label": np.arange(5) % 5,
    }


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
    with pytest.raises(ValueError, match=r"fraction: received 1\.5"):
        data.stratified_split(label, fraction=1.5)


# arrays and .npz


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
        # The label 4 occurs in the test part only.
        assert source.classes == ("0", "1", "2", "3", "4")
    grey = {key: a[..., 0] if "image" in key else a for key, a in npz_arrays.items()}
    np.savez(path, classes=np.array(list("abcde")), **grey)
    source = data.load(str(path), "train")
    assert source.image.shape == (12, 6, 5, 1)
    assert source.classes == tuple("abcde")


def test_npz_faults_name_the_file(tmp_path, npz_arrays):
    path = tmp_path / "toy.npz"
    with pytest.raises(ValueError, match=r"toy\.npz.*no such file"):
        data.load(path, "train")
    np.savez(path, **{key: a for key, a in npz_arrays.items() if key != "test_label"})
    with pytest.raises(ValueError, match=r"toy\.npz: the array 'test_label' is missing"):
        data.load(path, "test")
    with pytest.raises(ValueError, match=r"split: received 'val' for .*toy\.npz"):
        data.load(path, "val")
    np.savez(path, **{**npz_arrays, "train_label": np.array([None] * 12, object)})
    with pytest.raises(ValueError, match=r"toy\.npz: not a readable \.npz"):
        data.load(path, "train")
    np.savez(path, **npz_arrays)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"toy\.npz: not a readable \.npz"):
            data.load(path, "train")
    flipped = bytearray(whole)
    flipped[whole.index(b"NUMPY") + 300] ^= 255
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"toy\.npz: not a readable \.npz"):
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
    with pytest.raises(ValueError, match="train-images.*cannot be read"):
        read_idx(path)
    write_idx(path, noise((3, 4, 4)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    with pytest.raises(ValueError, match="train-images.*cannot be read"):
        read_idx(path)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ValueError, match=r"announces \[3, 4, 4\] bytes, the file holds 47"):
        read_idx(path)
    path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(path)


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
    with pytest.raises(ValueError, match="channels: received 2"):
        data.load(flat_folder, "train", channels=2)
    with pytest.raises(ValueError, match="image_size: received -1"):
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
    with pytest.raises(ValueError, match=r"set: no class folders"):
        data.load(root, "train")
    (root / "cat").mkdir()
    with pytest.raises(ValueError, match=r"cat: no images in this class folder"):
        data.load(root, "train")
    save_picture(root / "cat" / "a.png", "red")
    (root / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog: no images in this class folder"):
        data.load(root, "train")


def test_folder_parts_must_fit(tmp_path):
    save_picture(tmp_path / "set" / "test" / "cat" / "a.png", "red")
    with pytest.raises(ValueError, match="no subfolder train"):
        data.load(tmp_path / "set", "train")
    save_picture(tmp_path / "set" / "train" / "dog" / "a.png", "red")
    with pytest.raises(ValueError, match=r"cat: the training part .* has no such class"):
        data.load(tmp_path / "set", "test")
    with pytest.raises(ValueError, match="split: received 'all'"):
        data.load(tmp_path / "set", "all")


def test_damaged_images_are_named_before_training(flat_folder):
    save_picture(flat_folder / "dog" / "photo.jpg", "red", size=(200, 200), quality=95)
    Image.fromarray(noise((200, 200, 3))).save(flat_folder / "dog" / "photo.jpg")
    whole = (flat_folder / "dog" / "photo.jpg").read_bytes()
    source = data.load(flat_folder, "train", image_size=16)
    data.validate(source)
    for content in (whole[: len(whole) // 2], b"", b"no picture"):
        (flat_folder / "dog" / "photo.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"1 of \d+ images are damaged: .*dog/photo\.jpg: not a readable image"):
            data.validate(data.load(flat_folder, "train" if "dog/photo.jpg" in source.paths else "test", image_size=16))
    with pytest.raises(ValueError, match=r"dog/photo\.jpg: not a readable image"):
        decode_image(flat_folder / "dog" / "photo.jpg")


# decoding


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


# names


@pytest.mark.parametrize(
    ("name", "nearest"), [("minst", "mnist"), ("digit", "digits"), ("fashion-mnist", "fashion_mnist"), ("zzz", "digits")]
)
def test_an_unknown_name_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"name: received '{name}'.*nearest names are .*\b{nearest}\b"):
        data.load(name, "train")


def test_missing_paths_and_splits(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        data.load(tmp_path / "nowhere", "train")
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(ValueError, match=r"file\.txt.*a file must be an \.npz"):
        data.load(tmp_path / "file.txt", "train")
    with pytest.raises(ValueError, match="split: received 'val' for digits"):
        data.load("digits", "val")


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys; import flaxvision.data; import flaxvision.data.sources, flaxvision.data.pipeline; "
        "print([m for m in ('tensorflow', 'torch', 'grain', 'matplotlib', 'tensorflow_datasets', 'sklearn') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
    assert set(data.__all__) <= set(dir(data))
    assert all(getattr(data, name) for name in data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        data.nothing  # noqa: B018


# the check before training


def toy(image=None, label=None, classes=None):
    image = noise((6, 4, 4, 3)) if image is None else image
    label = np.arange(len(image)) % 3 if label is None else label
    return data.ArraySource(image, label, classes, "toy")


def test_a_sound_source_passes():
    data.validate(toy(), channels=3, num_classes=3, image_size=4)
    data.validate(toy(noise((6, 4, 5, 1)).astype(np.float32) / 255), channels=1, image_size=(4, 5))
    data.validate(data.load("digits", "test"), channels=1, num_classes=10, image_size=8)


def with_pixel(value, dtype=np.float32):
    image = np.zeros((3000, 2, 2, 1), dtype)
    image[2500, 1, 0, 0] = value
    return image


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (toy(noise((0, 4, 4, 3)), np.zeros(0, int)), {}, "source: 'toy' is empty"),
        (toy(noise((6, 4, 4))), {}, r"image: received 2 dimensions \[4, 4\] in 'toy'; an image must have three"),
        (toy(noise((6, 1, 4, 4, 3))), {}, r"image: received 4 dimensions"),
        (toy(), {"channels": 1}, "image: received 3 channels in 'toy'; they must be 1"),
        (toy(), {"image_size": 5}, "image: received 4x4 pixels in 'toy'; they must be 5x5"),
        (toy(noise((6, 4, 4, 3)).astype(np.int64)), {}, "image: received int64 pixels"),
        (toy(noise((6, 0, 4, 3))), {}, "no side may be 0"),
        (toy(with_pixel(np.nan)), {}, "image: received nan among the pixels of 'toy' at index 2500"),
        (toy(with_pixel(-np.inf)), {}, "image: received -inf among the pixels of 'toy' at index 2500"),
        (toy(label=np.array([0, 1, 2, 0, 3, 1]), classes="abc"), {}, "label: received 3 in 'toy' at index 4.* 0 and 2"),
        (toy(label=np.array([0, 1, -1, 0, 1, 1])), {}, "label: received -1 in 'toy' at index 2"),
        (toy(), {"num_classes": 2}, r"label: received 2 .* between 0 and 1 \(2 classes\)"),
        (toy(label=np.arange(6) / 2), {}, "label: received float64"),
        (toy(label=np.eye(6, dtype=int)), {}, r"label: received the shape \[6, 6\] for 6 images"),
        (toy(label=np.arange(5) % 3), {}, r"label: received the shape \[5\] for 6 images"),
    ],
)
def test_faults_are_named(source, options, message):
    with pytest.raises(ValueError, match=message):
        data.validate(source, **options)


class Listed:
    """A user's own source: nothing but the protocol."""

    name, classes, fingerprint = "listed", ("a", "b"), "none"

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index, /):
        return self.examples[index]


def test_other_sources_are_sampled():
    good = {"image": noise((4, 4, 3)), "label": np.int32(1)}
    data.validate(Listed([good] * 5), channels=3)
    for bad, message in [
        ({**good, "label": np.int32(2)}, r"label: received 2 in 'listed\[3\]'"),
        ({**good, "image": np.full((4, 4, 3), np.nan)}, r"image: received nan among the pixels of 'listed\[3\]'"),
        ({**good, "image": noise((4, 4))}, r"image: received 2 dimensions"),
        ({**good, "image": noise((4, 4, 1))}, r"image: received 1 channels in 'listed\[3\]'"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.validate(Listed([good, good, good, bad]), channels=3)


@pytest.mark.data
def test_real_originals_and_photos():
    root = Path(os.environ["FLAXVISION_DATA"])
    train = data.load(root / "mnist", "train")
    assert train.image.shape == (60000, 28, 28, 1)
    assert np.bincount(train.label).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(train.image.mean() - 33.3184) < 1e-3
    test = data.load(root / "fashion_mnist", "test")
    assert np.bincount(test.label).tolist() == [1000] * 10
    flowers = data.load(root / "flowers5", "train", image_size=64)
    assert flowers.classes == ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    data.validate(flowers, channels=3, image_size=64)
