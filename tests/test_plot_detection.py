"""Pictures of detectors."""

import numpy as np
import pytest

from flaxvision import data, plot
from flaxvision.metrics.average_precision import KINDS


def example():
    source = data.ShapesSource("val")
    images = [source[i]["image"] for i in range(3)]
    truth = [{**source[i], "difficult": np.arange(len(source[i]["labels"])) == 0} for i in range(3)]
    found = [
        {"boxes": t["boxes"] + 1, "labels": t["labels"], "scores": np.linspace(0.3, 1, len(t["labels"]))} for t in truth
    ]
    return images, found, truth


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_detections_beside_the_truth(tmp_path):
    images, found, truth = example()
    figure = plot.detections(images, found, truth, data.ShapesSource.classes, path=tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert len(figure.axes) == 8  # two pairs in a row
    names = {text.split()[0] for text in texts(figure)}
    assert names <= set(data.ShapesSource.classes)
    assert sum(" " in text for text in texts(figure)) == sum(len(t["labels"]) for t in truth)
    for i, axes in ((0, figure.axes[1]), (1, figure.axes[3])):
        drawn = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in axes.patches]
        expected = [(b[0] - 0.5, b[1] - 0.5, b[2] - b[0], b[3] - b[1]) for b in truth[i]["boxes"]]
        np.testing.assert_allclose(np.reshape(drawn, (-1, 4)), np.reshape(expected, (-1, 4)))
    dashed = [p.get_linestyle() for p in figure.axes[1].patches]
    assert dashed.count("--") == min(1, len(truth[0]["labels"]))


def test_detections_alone_and_without_names():
    images, found, _ = example()
    figure = plot.detections(images[:1], [{**found[0], "labels": found[0]["labels"] + 30}])
    assert len(figure.axes) == 1
    assert all(text.split()[0].isdigit() for text in texts(figure))
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    assert not plot.detections(images[:1], [empty]).axes[0].patches


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "images must hold at least one image; got none"),
        ({"found": []}, "found must have one entry for each of the 3 images; got 0"),
        ({"truth": [{}]}, "truth must have one entry for each of the 3 images; got 1"),
        ({"columns": 0}, "columns must be at least 1; got 0"),
        ({"classes": []}, "labels must be indices of the 0 classes; got"),
    ],
)
def test_what_cannot_be_drawn(change, message):
    images, found, truth = example()
    arguments = {"images": images, "found": found, "truth": truth, **change}
    if change == {"images": []}:
        arguments |= {"found": [], "truth": []}
    with pytest.raises(ValueError, match=message):
        plot.detections(**arguments)


def test_precision_recall(tmp_path):
    curves = [(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3])), None, (np.zeros(0), np.zeros(0))]
    figure = plot.precision_recall(curves, ["cat", "dog", "cow"], path=tmp_path / "b.png")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["cat (0.833)", "cow (0.000)"]
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [0, 0.5, 0.5, 1, 1]
    assert line.get_ydata()[-1] == 0
    with pytest.raises(ValueError, match="curves must have a class with objects; got 1 without objects"):
        plot.precision_recall([None])
    with pytest.raises(ValueError, match="classes must have 3 names; got 1"):
        plot.precision_recall(curves, ["cat"])


def test_false_positives(tmp_path):
    counts = {kind: np.array([k + 1, 0]) for k, kind in enumerate(KINDS)}
    figure = plot.false_positives(counts, ["cat", "dog"], path=tmp_path / "c.png")
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    np.testing.assert_allclose(widths[::2], 100 * np.arange(1, 6) / 15)
    assert widths[1::2] == [0] * 5
    with pytest.raises(ValueError, match="counts must have at least one kind; got none"):
        plot.false_positives({})
    with pytest.raises(ValueError, match="classes must have 2 names; got 1"):
        plot.false_positives(counts, ["cat"])
