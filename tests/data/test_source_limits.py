"""What sources import, refuse and keep as it is."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flaxvision import data


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys; import flaxvision.data; import flaxvision.data.sources, flaxvision.data.pipeline; "
        "print([m for m in ('tensorflow', 'torch', 'matplotlib', 'tensorflow_datasets', 'sklearn') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
    assert set(data.__all__) <= set(dir(data))
    assert all(getattr(data, name) for name in data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        data.nothing  # noqa: B018


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


@pytest.mark.parametrize("url", ["gs://bucket/photos", "s3://bucket/photos.npz", Path("gs://bucket/photos")])
def test_object_stores_are_refused(url):
    with pytest.raises(ValueError, match=r"name must be on a mounted file system, and not a URL; got '(gs|s3):/"):
        data.load(url, "train")
    for option in ("data_dir", "manual_dir"):
        with pytest.raises(ValueError, match=f"{option} must be on a mounted file system"):
            data.load("mnist", "train", **{option: url})


# targets of other tasks


def test_targets_that_are_no_classes_keep_their_values():
    image, targets = noise((4, 2, 2, 1)), np.array([[0.1, 1.5], [0.2, 0.5], [0.3, 2.5], [0.4, 3.5]], np.float32)
    source = data.ArraySource(image, targets)
    np.testing.assert_array_equal(source[1]["label"], targets[1])
    (batch,) = data.eval_batches(source, 4)
    np.testing.assert_array_equal(batch["label"], targets)
    classes = data.ArraySource(image, np.array([0, 1, 2, 3], np.uint8))
    assert classes[2]["label"].dtype == classes.gather(np.arange(2))["label"].dtype == np.int32


def test_a_mapped_source_refuses_to_leave_boxes_behind():
    class Boxed:
        name, classes, fingerprint = "boxed", ("a",), "0"

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"image": noise((4, 6, 3)), "boxes": np.zeros((1, 4))}

    darker = data.Mapped(Boxed(), lambda image: image // 2, "darker")
    assert darker[0]["image"].shape == (4, 6, 3)
    with pytest.raises(ValueError, match=r"images with boxes, which it would not move; got \[2, 3\] from 'halved'"):
        data.Mapped(Boxed(), lambda image: image[::2, ::2], "halved")[0]
