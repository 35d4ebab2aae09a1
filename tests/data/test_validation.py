"""The check of a source before training."""

import numpy as np
import pytest

from flaxvision import data


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


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


def test_a_part_of_a_folder_is_verified_too(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(80):
            Image.fromarray(np.full((6, 6, 3), i, np.uint8)).save(tmp_path / name / f"{i}.png")
    broken = tmp_path / "b" / "77.png"
    broken.write_bytes(broken.read_bytes()[:40])
    source = data.load(tmp_path, "train", image_size=6)
    part = data.subset(source, np.arange(len(source)), "part")
    np.testing.assert_array_equal(part.label, source.label)
    test = data.load(tmp_path, "test", image_size=6)
    if any(
        str(path).endswith("77.png") for path in source.paths if str(path).startswith("b")
    ):  # which part it fell into is the split's affair
        damaged = part
    else:
        damaged = data.subset(test, np.arange(3), "other")
    with pytest.raises(ValueError, match=r"b/77\.png"):
        data.validate(damaged)


def test_floats_beyond_one_are_refused():
    label = np.zeros(4, np.int64)
    with pytest.raises(ValueError, match=r"pixels from 0 to 255 .* must be in \[0, 1\], or uint8"):
        data.validate(data.ArraySource(np.linspace(0, 255, 16, dtype=np.float32).reshape(4, 2, 2, 1), label))
    data.validate(data.ArraySource(np.linspace(-3, 3, 16, dtype=np.float32).reshape(4, 2, 2, 1), label))


def test_absurd_labels_are_refused_before_their_classes_are_made(tmp_path):
    image, label = np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 2, 2_000_000_000])
    np.savez(tmp_path / "x.npz", train_image=image, train_label=label, test_image=image, test_label=label % 2)
    with pytest.raises(ValueError, match="must be class indices from 0 on; got 2000000000 among 4 labels"):
        data.load(tmp_path / "x.npz", "train")


def test_an_example_is_a_copy():
    source = data.ArraySource(np.full((2, 2, 2, 1), 9, np.uint8), np.zeros(2, np.int64))
    source[0]["image"][:] = 1
    assert source.image.min() == 9
