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
        (toy(noise((0, 4, 4, 3)), np.zeros(0, int)), {}, "source must hold at least one example; got 'toy'"),
        (toy(noise((6, 4, 4))), {}, r"image must be \[H, W, C\]; got shape \[4, 4\] in 'toy'"),
        (toy(noise((6, 1, 4, 4, 3))), {}, r"image must be \[H, W, C\]; got shape \[1, 4, 4, 3\]"),
        (toy(), {"channels": 1}, "image must have 1 channels; got 3 channels in 'toy'"),
        (toy(), {"image_size": 5}, "image must have 5x5 pixels; got 4x4 in 'toy'"),
        (toy(noise((6, 4, 4, 3)).astype(np.int64)), {}, "image must be uint8 or floating point; got int64"),
        (toy(noise((6, 0, 4, 3))), {}, "image must not be empty"),
        (toy(with_pixel(np.nan)), {}, "image must be finite; got nan in 'toy' at index 2500"),
        (toy(with_pixel(-np.inf)), {}, "image must be finite; got -inf in 'toy' at index 2500"),
        (
            toy(label=np.array([0, 1, 2, 0, 3, 1]), classes="abc"),
            {},
            "label must lie .* 0 and 2 .* got 3 .* at index 4",
        ),
        (toy(label=np.array([0, 1, -1, 0, 1, 1])), {}, "got -1 in 'toy' at index 2"),
        (toy(), {"num_classes": 2}, r"label must lie between 0 and 1 \(2 classes\); got 2"),
        (toy(label=np.arange(6) / 2), {}, "label must be integer class indices; got float64"),
        (toy(label=np.eye(6, dtype=int)), {}, r"label must be one integer class index; got shape \[6\]"),
        (
            toy(label=np.arange(5) % 3),
            {},
            r"label must have one row for each of the 6 images .*; got shape \[5\]",
        ),
        (
            toy(),
            {"task": "detection"},
            r"an example must hold 'boxes' for detection; got \['image', 'label'\] in 'toy'",
        ),
        (toy(), {"task": "sorting"}, "task must be one of classification, multilabel, .*; got 'sorting'"),
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
        ({**good, "label": np.int32(2)}, r"label must lie .*; got 2 in 'listed\[3\]'"),
        ({**good, "image": np.full((4, 4, 3), np.nan)}, r"image must be finite; got nan in 'listed\[3\]'"),
        ({**good, "image": noise((4, 4))}, r"image must be \[H, W, C\]"),
        ({**good, "image": noise((4, 4, 1))}, r"image must have 3 channels; got 1 channels in 'listed\[3\]'"),
        (
            {"image": good["image"]},
            r"must hold 'label' for classification; got \['image'\] in 'listed\[3\]'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            data.validate(Listed([good, good, good, bad]), channels=3)


IMAGE = noise((4, 6, 3))
BOXES = {
    "image": IMAGE,
    "boxes": np.array([[0, 0, 6, 4], [1, 1, 2, 2.5], [np.nan, 0, 0, 0]], np.float32),
    "labels": np.array([0, 1, 9]),
    "valid": np.array([1, 1, 0], np.float32),
}
SOUND = {
    "multilabel": {"image": IMAGE, "label": np.array([0, 1])},
    "regression": {"image": IMAGE, "label": np.array([0.5, -3.0, 2.0])},
    "segmentation": {"image": IMAGE, "label": np.where(noise((4, 6)) > 127, 255, noise((4, 6), 1) % 2)},
    "detection": BOXES,
}


@pytest.mark.parametrize("task", SOUND)
def test_every_task_has_its_targets(task):
    data.validate(Listed([SOUND[task]] * 3), task=task)
    if task != "detection":
        label = np.stack([SOUND[task]["label"]] * 3)
        data.validate(data.ArraySource(np.stack([IMAGE] * 3), label, ("a", "b")), task=task)
    with pytest.raises(ValueError, match="label"):
        data.validate(Listed([SOUND[task]] * 3), task="classification")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("multilabel", {"label": np.array([0, 2])}, r"label must be 0 or 1; got 2 in 'listed\[1\]'"),
        ("multilabel", {"label": np.array([0, 1, 0])}, r"label must have shape \[2\]; got \[3\]"),
        ("regression", {"label": np.array([0.5, np.inf, 0])}, "label must be finite; got inf"),
        ("regression", {"label": np.array([0.5])}, r"label must have shape \[3\] as in the first example; got \[1\]"),
        ("regression", {"label": np.array("x")}, r"label must be a number or a vector \[D\]; got <U1 of shape \[\]"),
        ("segmentation", {"label": np.full((4, 6), 2)}, r"label must lie between 0 and 1 .* or be 255; got 2"),
        (
            "segmentation",
            {"label": np.zeros((4, 5), int)},
            r"must have the image's size \[4, 6\]; got \[4, 5\]",
        ),
        ("segmentation", {"label": np.zeros((4, 6))}, "label must be integer class indices; got float64"),
        ("detection", {"boxes": np.zeros((3, 5))}, r"boxes must be \[M, 4\]; got shape \[3, 5\]"),
        ("detection", {"labels": np.array([0, 1])}, r"labels must have one entry for each of the 3 boxes; got .*\[2\]"),
        ("detection", {"labels": np.array([0, 2, 0])}, r"labels must lie between 0 and 1 .*; got 2"),
        ("detection", {"valid": np.array([1, 0.5, 0])}, r"valid must be 0 or 1; got 0\.5"),
        ("detection", {"valid": np.ones(3)}, r"boxes must be xyxy .*; got \[nan, 0\.0"),
        (
            "detection",
            {"boxes": BOXES["boxes"][:, [2, 1, 0, 3]]},
            r"boxes must be xyxy with 0 <= x1 < x2 <= 6",
        ),
        (
            "detection",
            {"boxes": BOXES["boxes"] * 2},
            r"y1 < y2 <= 4; got \[0\.0, 0\.0, 12\.0, 8\.0\] in .*1",
        ),
    ],
)
def test_faults_of_every_task_are_named(task, change, message):
    good = SOUND[task]
    with pytest.raises(ValueError, match=message):
        data.validate(Listed([good, good | change]), task=task, num_classes=10 if "valid" in change else 2)
    for key in change:
        with pytest.raises(ValueError, match=f"an example must hold '{key}' for {task}"):
            data.validate(Listed([good, {k: v for k, v in good.items() if k != key}]), task=task)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones((6, 4)), r"weight must have the image's size \[4, 6\]; got \[6, 4\] in 'listed\[1\]'"),
        (np.ones((4, 6), int), "weight must be floating point; got int64"),
        (np.full((4, 6), np.nan), "weight must be finite; got nan"),
        (np.linspace(2, -0.5, 24).reshape(4, 6), r"weight must not be negative; got -0\."),
    ],
)
def test_weights_of_pixels(weight, message):
    """They are optional, and may be 0."""
    good = SOUND["segmentation"] | {"weight": np.linspace(0, 3, 24, dtype=np.float32).reshape(4, 6)}
    data.validate(Listed([good]), task="segmentation", num_classes=2)
    with pytest.raises(ValueError, match=message):
        data.validate(Listed([good, good | {"weight": weight}]), task="segmentation", num_classes=2)


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
    with pytest.raises(ValueError, match=r"floats in \[0, 1\] or uint8 .*; got floats from 0 to 255"):
        data.validate(data.ArraySource(np.linspace(0, 255, 16, dtype=np.float32).reshape(4, 2, 2, 1), label))
    data.validate(data.ArraySource(np.linspace(-3, 3, 16, dtype=np.float32).reshape(4, 2, 2, 1), label))


def test_absurd_labels_are_refused_before_their_classes_are_made(tmp_path):
    image, label = np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 2, 2_000_000_000])
    np.savez(tmp_path / "x.npz", train_image=image, train_label=label, test_image=image, test_label=label % 2)
    with pytest.raises(ValueError, match=r"must be class indices below the number of labels, 4, .*; got 2000000000"):
        data.load(tmp_path / "x.npz", "train")


def test_an_example_is_a_copy():
    source = data.ArraySource(np.full((2, 2, 2, 1), 9, np.uint8), np.zeros(2, np.int64))
    source[0]["image"][:] = 1
    assert source.image.min() == 9
