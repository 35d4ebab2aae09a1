"""Tests of the evaluation transforms against fixed numbers."""

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from flaxvision.data.preprocessing import Preprocessing

SIZES = [(500, 375), (375, 500), (333, 500), (256, 256), (224, 300), (1000, 241), (640, 427), (57, 91)]


def picture(width, height, seed=0):
    """Returns smooth colours with noise, which different resizing filters change differently."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    smooth = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * x * y), np.sin(5 * y - 4 * x)], -1) * 90 + 128
    return Image.fromarray(np.clip(smooth + rng.normal(scale=25, size=smooth.shape), 0, 255).astype(np.uint8))


def test_fixed_numbers():
    """A ramp that the antialiased filters of Pillow shrink."""
    ramp = np.tile((np.arange(16) * 16).astype(np.uint8)[None, :, None], (8, 1, 3))
    pixels = Preprocessing(4, 4, mean=(0,) * 3, std=(1,) * 3, divisor=1.0)(ramp)
    np.testing.assert_array_equal(pixels[0, :, 0], [72, 104, 136, 168])
    pixels = Preprocessing(4, 4, "bicubic", (0,) * 3, (1,) * 3, 1.0)(ramp)
    np.testing.assert_array_equal(pixels[2, :, 1], [72, 104, 136, 168])
    pixels = Preprocessing((2, 3), (4, 5), "nearest", (0,) * 3, (1,) * 3, 1.0)(ramp)
    np.testing.assert_array_equal(pixels[..., 2], [[64, 128, 176]] * 2)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_offsets(size):
    """The size is truncated and the offset rounded like torchvision's."""
    image = picture(*size)
    width, height = size
    if width <= height:
        resized = (256, int(256 * height / width))
    else:
        resized = (int(256 * width / height), 256)
    left, top = round((resized[0] - 224) / 2), round((resized[1] - 224) / 2)
    expected = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(np.asarray(Preprocessing().resized(image)), expected)


def test_a_picture_smaller_than_the_crop_gets_zeros_around():
    image = np.full((5, 3, 3), 200, np.uint8)
    pixels = Preprocessing(8, None, mean=(0,) * 3, std=(1,) * 3, divisor=1.0)(image)[..., 0]
    expected = np.zeros((8, 8))
    expected[1:6, 2:5] = 200
    np.testing.assert_array_equal(pixels, expected)


def test_every_kind_of_picture():
    image = picture(40, 30)
    transform = Preprocessing(16, 20)
    expected = transform(image)
    np.testing.assert_array_equal(transform(np.asarray(image)), expected)
    np.testing.assert_array_equal(transform(image.convert("RGBA")), expected)
    grey = image.convert("L")
    for other in (grey, np.asarray(grey), np.asarray(grey)[..., None], grey.convert("RGB")):
        np.testing.assert_array_equal(transform(other), transform(grey))
    assert Preprocessing(16, 20, mean=(0.1,), std=(0.3,), order="L")(image).shape == (16, 16, 1)
    assert transform(picture(40, 30).quantize(8)).shape == (16, 16, 3)


def test_what_is_no_picture():
    transform = Preprocessing()
    with pytest.raises(TypeError, match="must be a PIL image or a uint8 array; got an array of float32"):
        transform(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"must have the shape \[H, W, 3\], .*; got \[8, 8, 4\]"):
        transform(np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(ValueError, match="must have at least one pixel"):
        transform(np.zeros((0, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="interpolation must be one of nearest, bilinear, bicubic"):
        Preprocessing(interpolation="lanczos")
    with pytest.raises(ValueError, match="order must be RGB, BGR or L"):
        Preprocessing(order="GBR")


def test_data_knows_nothing_of_weights_and_models():
    """`weights` imports `data`, so the opposite import would be a circle."""
    for path in sorted(Path(fv.data.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            wrong = [name for name in names if name.startswith(("flaxvision.weights", "flaxvision.registry"))]
            assert not wrong, f"{path.name} imports {wrong}"
