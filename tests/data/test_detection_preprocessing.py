"""The evaluation transform of detectors; `tests/parity/test_detection.py` compares it with torchvision's."""

import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from flaxvision.data import DetectionPreprocessing


@pytest.mark.parametrize(
    ("image", "want"),
    [((480, 640), (800, 1066)), ((640, 480), (1066, 800)), ((300, 900), (444, 1333)), ((800, 800), (800, 800))],
)
def test_sizes(image, want):
    transform = fv.weights.preprocessing_for("faster_rcnn_resnet50_fpn")
    assert transform == DetectionPreprocessing()
    assert transform.size(*image) == want


def test_the_arithmetic():
    """Twice the size: interpolated between the centers of the pixels, and constant beyond the outer ones."""
    transform = DetectionPreprocessing(min_size=4, max_size=8, multiple=8, mean=(0.5, 0, 0), std=(0.5, 1, 1))
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, 2:, 0] = 255
    canvas, size = transform(Image.fromarray(pixels))
    assert (canvas.shape, canvas.dtype, size) == ((8, 8, 3), np.float32, (4, 8))
    np.testing.assert_allclose(canvas[:4, :, 0], np.tile([-1, -1, -1, -0.5, 0.5, 1, 1, 1], (4, 1)), atol=1e-6)
    np.testing.assert_array_equal(canvas[4:], 0)
    np.testing.assert_array_equal(canvas[..., 1:], 0)
    whole, size = DetectionPreprocessing(min_size=2, max_size=4, multiple=1, mean=(0,) * 3, std=(1,) * 3)(pixels)
    assert size == (2, 4)
    np.testing.assert_allclose(whole, pixels / 255, rtol=1e-6)


def test_bad_fields():
    with pytest.raises(ValueError, match="min_size must be from 1 to max_size, 5; got 6"):
        DetectionPreprocessing(min_size=6, max_size=5)
    with pytest.raises(ValueError, match="multiple must be at least 1; got 0"):
        DetectionPreprocessing(multiple=0)
