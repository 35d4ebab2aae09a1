"""The crops of the worker threads, measured on images with coordinates as pixel values."""

import numpy as np
import pytest
from PIL import Image

from flaxvision.data.cropping import random_resized_crop, random_scaled_crop


def ramp(height, width):
    """Red is the row and green the column, as shares of 200."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([200 * y / (height - 1), 200 * x / (width - 1), 0 * y], -1)
    return np.round(image).astype(np.uint8)


def extent(crop, height, width):
    """Height and width in pixels of the part that a crop of a ramp shows."""
    size = crop.shape[0]
    span = [(float(crop[-1, :, 0].mean()) - float(crop[0, :, 0].mean())) / 200 * (height - 1)]
    span.append((float(crop[:, -1, 1].mean()) - float(crop[:, 0, 1].mean())) / 200 * (width - 1))
    return [s * size / (size - 1) for s in span]


@pytest.mark.parametrize(("area", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.5), (1.0, 1.0))])
def test_resized_crops_keep_to_area_and_ratio(area, ratio):
    image, shares, ratios = ramp(180, 240), [], []
    for seed in range(60):
        crop = random_resized_crop(image, np.random.default_rng(seed), size=32, area=area, ratio=ratio)
        assert crop.shape == (32, 32, 3)
        assert crop.dtype == np.uint8
        h, w = extent(crop, 180, 240)
        shares.append(h * w / (180 * 240))
        ratios.append(w / h)
    assert area[0] - 0.02 < min(shares) <= max(shares) < area[1] + 0.03
    assert ratio[0] - 0.08 < min(ratios) <= max(ratios) < ratio[1] + 0.08
    if area[0] < area[1]:
        assert max(shares) > 0.8
        assert min(shares) < 0.2
        assert min(ratios) < 0.85
        assert max(ratios) > 1.2


def test_a_crop_is_pillows_resize_of_the_part():
    image = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
    crop = random_resized_crop(image, np.random.default_rng(1), size=24, area=(2.0, 2.0))  # no draw fits
    part = image[:, 18:71]  # the largest of width by height 4/3 in the middle
    expected = np.asarray(Image.fromarray(part).resize((24, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(crop[:, 2:-2], expected[:, 2:-2])  # at the border Pillow looks beyond the box


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60)])
@pytest.mark.parametrize("shorter", [(48, 48), (40, 90)])
def test_scaled_crops_are_cut_from_the_resized_whole(height, width, shorter):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    for seed in range(4):
        crop = random_scaled_crop(image, np.random.default_rng(seed), size=32, shorter=shorter)
        rng = np.random.default_rng(seed)
        goal = int(rng.integers(shorter[0], shorter[1] + 1))
        h, w = height * goal // 60, width * goal // 60
        top, left = int(rng.integers(0, h - 31)), int(rng.integers(0, w - 31))
        whole = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
        difference = np.abs(crop.astype(int) - whole[top : top + 32, left : left + 32])
        assert difference.max() <= 1  # Pillow rounds after each axis, and takes the axes in an order of its own


def test_grey_pictures_and_one_generator_one_crop():
    image = ramp(50, 70)[..., :1]
    for crop in (random_resized_crop, lambda i, r, size: random_scaled_crop(i, r, size=size, shorter=(40, 50))):
        first, again, other = (crop(image, np.random.default_rng(s), size=20) for s in (3, 3, 4))
        assert first.shape == (20, 20, 1)
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


@pytest.mark.parametrize("options", [{"size": 33}, {"size": 0}, {"size": 16, "shorter": (32, 20)}])
def test_bounds_in_disorder_are_refused(options):
    with pytest.raises(ValueError, match=r"must satisfy 1 <= size <= shorter\[0\] <= shorter\[1\]; got "):
        random_scaled_crop(ramp(40, 40), np.random.default_rng(0), **{"shorter": (32, 32)} | options)
