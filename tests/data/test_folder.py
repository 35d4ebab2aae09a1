"""Folders of class folders and the decoding of pictures."""

import errno
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxvision import data
from flaxvision.data import folder
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


def fingerprint(folder, split="train", **options):
    return data.train_batches(data.load(folder, split, **options), 2, seed=0).fingerprint


def test_folder_fingerprint_names_content_and_no_place(flat_folder, tmp_path):
    before = fingerprint(flat_folder)
    moved = shutil.copytree(flat_folder, tmp_path / "mnt" / "other-name")
    assert fingerprint(moved) == before
    mapped = [data.Mapped(data.load(root, "train"), np.fliplr, "flip") for root in (flat_folder, moved)]
    assert mapped[0].name != mapped[1].name
    assert mapped[0].fingerprint == mapped[1].fingerprint != data.load(moved, "train").fingerprint
    assert json.loads(json.dumps(before)) == before
    assert fingerprint(flat_folder, "test") != before
    assert len({fingerprint(flat_folder, as_stored=stored)["source"] for stored in (True, False)}) == 2


def test_changes_of_a_folder_are_described(flat_folder):
    before = fingerprint(flat_folder, "all")
    (flat_folder / "cat" / "3.png").unlink()
    save_picture(flat_folder / "dog" / "4.png", "red", size=(30, 40))
    (flat_folder / "fox").rename(flat_folder / "wolf")
    after = fingerprint(flat_folder, "all", image_size=32)
    assert data.describe_changes(before, after) == [
        "length was 30, is 29",
        "image_size was 224, is 32",
        "class 'cat' had 10 images, has 9",
        "class 'dog' has images of other names or sizes",
        "class 'fox' had 10 images, has 0",
        "class 'wolf' had 0 images, has 10",
    ]


def test_very_many_classes_are_not_listed(flat_folder, monkeypatch):
    before = fingerprint(flat_folder)
    monkeypatch.setattr(folder, "_MAX_CLASSES", 2)
    after = fingerprint(flat_folder)
    assert after["source"] == before["source"]
    assert (len(before["contents"]["classes"]), after["contents"]["classes"]) == (3, {})
    save_picture(flat_folder / "dog" / "4.png", "red", size=(30, 40))
    assert data.describe_changes(after, fingerprint(flat_folder)) == ["the examples of the source differ"]


def test_a_file_costs_one_question_to_the_file_system(flat_folder, monkeypatch):
    for i in range(200):
        shutil.copy(flat_folder / "cat" / "0.png", flat_folder / "cat" / f"more{i}.png")
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: asked.append(args) or stat(*args, **kwargs))
    source = data.load(flat_folder, "all")
    assert len(source) == 230
    assert len(asked) < 40  # the class folders, and not the files
    asked.clear()
    assert source.fingerprint == source.fingerprint
    assert len(asked) == 230


def test_a_listing_is_recursive_sorted_and_ignores_what_is_hidden(tmp_path):
    for name in (
        "b/2.png",
        "b/10.PNG",
        "b/sub/deeper/1.jpeg",
        "b/sub.png/1.gif",
        "b/.hidden.png",
        "b/notes.txt",
        "b/png",
    ):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "set" / ".git").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.png").touch()
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "b" / "link.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "set" / "b" / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "set" / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    source = data.load(tmp_path / "set", "all")
    below_b = ("b/10.PNG", "b/2.png", "b/link.png", "b/sub.png/1.gif", "b/sub/deeper/1.jpeg")
    assert (source.classes, source.paths, source.label.tolist()) == (
        ("a", "b"),
        ("a/0.png", *below_b),
        [0, 1, 1, 1, 1, 1],
    )


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


@pytest.fixture
def broken_folder(flat_folder):
    """Nine whole pictures of cats, ten of dogs and eight of foxes."""
    (flat_folder / "cat" / "3.png").write_bytes(b"no picture")
    (flat_folder / "fox" / "1.png").write_bytes((flat_folder / "fox" / "1.png").read_bytes()[:40])
    (flat_folder / "fox" / "9.png").write_bytes(b"")
    return flat_folder


def test_broken_images_can_be_left_out(broken_folder):
    source = data.load(broken_folder, "all", image_size=8)
    assert list(source.find_broken()) == [3, 21, 29]
    sound, broken = source.without_broken(progress=False)
    assert len(broken) == 3
    for text, path in zip(broken, ("cat/3.png", "fox/1.png", "fox/9.png"), strict=True):
        assert f"{path} is not a readable image: " in text
    assert (sound.classes, sound.name, len(sound)) == (source.classes, source.name, 27)
    assert np.bincount(sound.label).tolist() == [9, 10, 8]
    assert sound[0]["image"].shape == (8, 8, 3)
    sound.verify()
    assert sound.without_broken() == (sound, [])
    # The same content as if the files were not there.
    for path in ("cat/3.png", "fox/1.png", "fox/9.png"):
        (broken_folder / path).unlink()
    assert data.load(broken_folder, "all", image_size=8).fingerprint == sound.fingerprint
    save_picture(broken_folder / "cat" / "3.png", "white")
    assert data.load(broken_folder, "all", image_size=8).fingerprint != sound.fingerprint
    shutil.rmtree(broken_folder)
    with pytest.raises(ValueError, match=r"'animals/all' has no sound image: .*cat/0\.png"):
        sound.without_broken()


def test_broken_images_of_a_subset_and_of_a_mapped_source(broken_folder):
    source = data.load(broken_folder, "all", image_size=8)
    part, broken = data.subset(source, np.array([29, 5, 3, 0]), "part").without_broken()
    assert (part.indices.tolist(), part.name) == ([5, 0], "part")
    assert ["fox/9.png" in broken[0], "cat/3.png" in broken[1], len(broken)] == [True, True, 2]
    assert part.without_broken() == (part, [])
    with pytest.raises(ValueError, match=r"'part' has no sound image: .*cat/3\.png"):
        data.subset(source, np.array([3]), "part").without_broken()
    flipped, broken = data.Mapped(source, np.fliplr, "flip").without_broken()
    assert (len(flipped), len(broken), flipped.name) == (27, 3, f"{source.name}/flip")
    np.testing.assert_array_equal(flipped[3]["image"], np.fliplr(source[4]["image"]))
    assert flipped.without_broken() == (flipped, [])
    arrays = data.Mapped(data.load("digits", "test"), np.fliplr, "flip")
    assert arrays.without_broken() == (arrays, [])


def test_a_mapped_source_verifies_its_files(flat_folder):
    for i in range(200):
        shutil.copy(flat_folder / "cat" / "0.png", flat_folder / "cat" / f"more{i}.png")
    source = data.load(flat_folder, "all", image_size=8)
    sampled = np.linspace(0, len(source) - 1, 64).astype(int)  # what is read in any case
    broken = source.paths[next(i for i in range(20, 200) if i not in sampled)]
    (flat_folder / broken).write_bytes(b"no picture")
    mapped = data.Mapped(source, np.fliplr, "flip")
    data.validate(mapped, verify=False)
    with pytest.raises(ValueError, match=rf"1 of 230 images cannot be decoded: .*{broken}"):
        data.validate(mapped)


def test_a_failing_file_system_is_no_damage(flat_folder, monkeypatch):
    source, failures, pauses = data.load(flat_folder, "all", image_size=8), [], []
    monkeypatch.setattr(folder.time, "sleep", pauses.append)
    whole = source[7]["image"]

    def flaky(path, **options):
        if failures and path == flat_folder / source.paths[7]:
            raise failures.pop(0)
        return decode_image(path, **options)

    monkeypatch.setattr(folder, "decode_image", flaky)
    failures[:] = [OSError(errno.ESTALE, "stale file handle"), OSError(errno.EIO, "input/output error")]
    np.testing.assert_array_equal(source[7]["image"], whole)
    assert (failures, pauses) == ([], [0.5, 2.0])
    failures[:] = [OSError(errno.EIO, "input/output error")] * 3
    with pytest.raises(OSError, match="input/output error"):
        source.without_broken(progress=False)
    failures[:] = [MemoryError()]
    with pytest.raises(MemoryError):
        source.verify(progress=False)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_decoding_tells_the_file_system_from_the_file(monkeypatch, tmp_path, number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        decode_image(tmp_path / "photo.jpg")


def test_verifying_takes_bounded_memory(flat_folder, monkeypatch):
    monkeypatch.setattr(folder, "decode_image", lambda path, **options: None)
    source = data.load(flat_folder, "all")
    source.paths, source.label = source.paths * 200, np.tile(source.label, 200)
    tracemalloc.start()
    try:
        source.verify(progress=False)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


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
