"""Instances of label maps as objects with boxes and masks."""

import numpy as np
import pytest
from PIL import Image

from flaxvision import data


def folder(root, maps):
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for name, numbers in maps.items():
        Image.fromarray((20 * numbers).astype(np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(numbers).save(root / "masks" / f"{name}.png")
    return root


def test_the_shapes_are_found_in_their_maps():
    """The maps of the drawn shapes give the boxes, labels and masks of the drawn shapes."""
    drawn = data.ShapesSource("val", masks=True, length=30)
    found = data.InstanceSource(data.ShapesMaps("val", instances=True), masks=True)
    assert found.classes == drawn.classes
    for i in range(30):
        ours, theirs = found[i], drawn[i]
        height, width = theirs["image"].shape[:2]
        for key in ("boxes", "labels", "valid", "crowd", "difficult"):
            np.testing.assert_array_equal(ours[key], theirs[key])
            assert ours[key].dtype == theirs[key].dtype
        np.testing.assert_array_equal(ours["masks"][:, :height, :width], theirs["masks"])
        assert found.counts[i] == len(theirs["boxes"])
    np.testing.assert_array_equal(found.sizes, np.full((len(found), 2), 96))


def test_a_folder_of_instance_maps(tmp_path):
    numbers = np.zeros((9, 12), np.uint8)
    numbers[1:4, 2:7], numbers[3:8, 8], numbers[8, 0] = 200, 3, 7
    root = folder(tmp_path, {"a": numbers, "b": np.zeros((5, 6), np.uint8)})
    source = data.load_detection("instances", "all", data_dir=root, classes=["cell"], masks=True)
    assert (len(source), source.classes) == (2, ("cell",))
    example = source[0]
    assert (example["image"].shape, example["image"].dtype) == ((9, 12, 3), np.uint8)
    np.testing.assert_array_equal(example["boxes"], [[8, 3, 9, 8], [0, 8, 1, 9], [2, 1, 7, 4]])  # by their numbers
    np.testing.assert_array_equal(example["labels"], [0, 0, 0])
    np.testing.assert_array_equal(example["masks"], [numbers == 3, numbers == 7, numbers == 200])
    empty = source[1]
    assert (empty["boxes"].shape, empty["masks"].shape) == ((0, 4), (0, 5, 6))
    np.testing.assert_array_equal(source.sizes, [[9, 12], [5, 6]])
    np.testing.assert_array_equal(source.counts, [3, 0])
    data.validate(source, task="detection", num_classes=1)
    plain = data.load_detection("instances", "all", data_dir=root)
    assert "masks" not in plain[0]
    assert plain.classes == ("object",)
    assert plain.fingerprint != source.fingerprint
    placed = data.on_canvases(source, 24)
    assert placed[1]["masks"].shape == (3, 24, 24)


def test_what_is_refused(tmp_path):
    root = folder(tmp_path, {"a": np.eye(4, dtype=np.uint8)})
    with pytest.raises(ValueError, match=r"classes must be one name for 'instances'.*got \['a', 'b'\]"):
        data.load_detection("instances", "all", data_dir=root, classes=["a", "b"])
    with pytest.raises(ValueError, match="data_dir must be the folder of the data set for 'instances'; got None"):
        data.load_detection("instances", "all")


class Maps:
    name, classes = "maps", ("background", "a", "b")

    def __init__(self, label):
        self.label = np.asarray(label, np.int32)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        numbers = np.array([[0, 4], [4, 0]], np.int32)
        return {"image": np.zeros((2, 2, 3), np.uint8), "label": self.label, "instances": numbers}


@pytest.mark.parametrize("label", [[[0, 1], [2, 0]], [[0, 0], [0, 0]], [[0, 255], [255, 0]]])
def test_an_instance_without_one_class(label):
    with pytest.raises(ValueError, match=r"instance 4 of maps\[0\] must have one class above 0"):
        data.InstanceSource(Maps(label))[0]
