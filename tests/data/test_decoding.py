"""Decoding of image files."""

import numpy as np
import pytest
from PIL import Image

from flaxvision.data.decode import decode_image


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    assert (decode_image(tmp_path / "deep.png", channels=1) == 0x80).all()


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
        for orient in (True, False):
            found = decode_image(tmp_path / "picture.tif", channels=channels, orient=orient)
            np.testing.assert_array_equal(found, 255)
            assert found.shape == (6, 6, channels)
