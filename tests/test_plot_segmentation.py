"""Pictures of segmenters."""

import numpy as np
import pytest

from flaxvision import plot
from flaxvision.plot.segmentation import colour_of, coloured

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (12, 16, 3), np.uint8), RNG.integers(0, 256, (10, 9), np.uint8)]
TRUTH = [RNG.integers(0, 3, (12, 16)), RNG.integers(0, 3, (10, 9))]
TRUTH[0][0] = 255


def test_overlays_beside_the_truth(tmp_path):
    found = [np.where(TRUTH[0] == 2, 1, TRUTH[0]), TRUTH[1]]
    figure = plot.overlays(IMAGES, found, TRUTH, ("sky", "road", "car"), columns=1, path=tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert len(figure.axes) == 6
    wrong = (found[0] != TRUTH[0])[1:].mean()
    assert figure.axes[2].get_title() == f"wrong: {wrong:.1%}"
    assert figure.axes[5].get_title() == "wrong: 0.0%"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sky", "road", "car"]
    alone = plot.overlays(IMAGES, found, classes=("sky", "road", "car"), background=0, titles=("a", "b"))
    assert [axes.get_title() for axes in alone.axes] == ["a", "b"]
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["road", "car"]


def test_colours_are_blended():
    image = np.full((2, 2, 3), 0.5, np.float32)
    image[0, 1] = (0.2, 0.4, 0.9)  # of the same brightness
    out = coloured(image, np.array([[0, 1], [255, 2]]), background=0, opacity=0.5)
    np.testing.assert_allclose(out[0, 0], 0.5)
    np.testing.assert_allclose(out[1, 0], 0.5)
    np.testing.assert_allclose(out[0, 1], (0.25 + 64 / 255, 0.25, 0.25), atol=1e-6)
    # The published colour map of VOC: aeroplane, person, tvmonitor.
    assert [tuple(round(255 * c) for c in colour_of(k)) for k in (1, 15, 20)] == [
        (128, 0, 0),
        (192, 128, 128),
        (0, 64, 128),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [], "labels": []}, "images must hold at least one image; got none"),
        ({"labels": TRUTH[:1]}, "labels must have one entry for each of the 2 images; got 1"),
        ({"labels": TRUTH[::-1]}, r"labels must have the size of the image, \(12, 16\); got \(10, 9\)"),
        ({"classes": ("sky", "road")}, "labels must be indices of the 2 classes; got 2"),
        ({"columns": 0}, "columns must be at least 1; got 0"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        plot.overlays(**{"images": IMAGES, "labels": TRUTH, **change})
