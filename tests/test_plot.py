"""Every picture is written, shows its data, and leaves matplotlib's global state alone."""

import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from flaxvision import plot

GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.integers(0, 256, (5, 8, 6), dtype=np.uint8)
RECORDS = [
    {"step": step, "split": split, "loss": 2.0 / step + offset, "accuracy": 1 - 1 / step}
    for split, offset in (("train", 0.0), ("validation", 0.1))
    for step in (30, 10, 20)
]


def picture(path):
    """The pixels of a PNG that is not blank."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 100
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    return pixels


def texts(figure):
    return [t.get_text() for t in figure.findobj(Text)]


@pytest.mark.parametrize(
    "images",
    [GREY, np.repeat(GREY[..., None], 3, -1), GREY[..., None] / 255.0],
    ids=["HW", "HW3", "float HW1"],
)
def test_image_grid(images, tmp_path):
    path = tmp_path / "new" / "grid.png"
    figure = plot.image_grid(images, [0, 1, 1, 0, 1], ["cat", "dog"], columns=3, path=path)
    picture(path)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["cat", "dog", "dog", "cat", "dog"]
    assert len(figure.axes) == 6  # two rows of three
    for axes, image in zip(shown, GREY, strict=True):
        drawn = np.asarray(axes.images[0].get_array())
        np.testing.assert_allclose(drawn if drawn.ndim == 2 else drawn[..., 1], image / 255, atol=1e-6)


def test_image_grid_shows_texts_numpy_labels_and_shortens():
    figure = plot.image_grid(GREY, np.asarray([3, 1, 4, 1, 5]))
    assert figure.axes[0].get_title() == "3"
    figure = plot.image_grid(GREY, ["x" * 60] * 5)
    assert figure.axes[0].get_title().endswith("…")


def test_image_grid_errors():
    with pytest.raises(ValueError, match="labels must have one entry for each of the 5 images; got 2"):
        plot.image_grid(GREY, [0, 1])
    with pytest.raises(ValueError, match=r"images must be one or more .*; got shape \(5, 8, 6, 2\)"):
        plot.image_grid(np.zeros((5, 8, 6, 2)))
    with pytest.raises(ValueError, match="images must be one or more"):
        plot.image_grid(GREY[:0])
    with pytest.raises(ValueError, match="columns must be at least 1; got 0"):
        plot.image_grid(GREY, columns=0)
    with pytest.raises(ValueError, match="labels must be indices of the 2 classes; got 7"):
        plot.image_grid(GREY[:1], [7], ["cat", "dog"])


def test_feature_maps(tmp_path):
    maps = [GREY[0].astype(np.float32) - 100, GENERATOR.normal(size=(30, 40))]
    figure = plot.feature_maps(maps, ["vertical", "pooled"], tmp_path / "maps.png", columns=2)
    picture(tmp_path / "maps.png")
    assert [axes.get_title() for axes in figure.axes] == ["vertical", "pooled"]
    assert figure.axes[0].images[0].get_clim() == (maps[0].min(), maps[0].max())
    with pytest.raises(ValueError, match="titles must have one entry for each of the 2 maps; got 1"):
        plot.feature_maps(maps, ["vertical"])
    with pytest.raises(ValueError, match=r"maps must be one or more arrays \[H, W\]; got shapes \[\(8, 6, 1\)\]"):
        plot.feature_maps([GREY[0][..., None]])


def test_curves(tmp_path):
    figure = plot.curves(RECORDS, tmp_path / "curves.png", steps_per_epoch=10)
    picture(tmp_path / "curves.png")
    loss, accuracy = figure.axes
    assert [line.get_label() for line in loss.lines] == ["train", "validation"]
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[10, 0.2], [20, 0.1], [30, 2 / 30]])
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), [90, 95, 100 * 29 / 30])
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy (%)")
    assert "epoch" in texts(figure)


def test_curves_of_one_point_without_accuracy(tmp_path):
    records = [
        {"step": 1, "split": "train", "loss": 2.3},
        {"note": "resumed"},
        {"step": 2, "split": "train", "loss": math.nan},
    ]
    figure = plot.curves(records, tmp_path / "one.png")
    picture(tmp_path / "one.png")
    (axes,) = figure.axes
    assert axes.lines[0].get_marker() == "o"  # a line of one point shows nothing else
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 2.3]])


def test_curves_are_named_by_the_metrics_of_the_records(tmp_path):
    records = [
        {"step": 1, "split": "train", "box_loss": 1.0, "loss": 2.0, "learning_rate": 0.1, "images_per_second": 9.0},
        {"step": 2, "split": "validation", "seg_mean_iou": 0.5, "ap": 0.25, "loss": 1.5},
    ]
    figure = plot.curves(records, tmp_path / "curves.png")
    picture(tmp_path / "curves.png")
    assert [axes.get_ylabel() for axes in figure.axes if axes.lines] == ["loss", "box_loss", "seg_mean_iou", "ap"]
    (axes,) = plot.curves(records, metrics=["ap", "none"]).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[2, 0.25]])
    with pytest.raises(ValueError, match="`split` and one of recall; got no such record among 2"):
        plot.curves(records, metrics=["recall"])


def test_curves_errors():
    with pytest.raises(ValueError, match="records must hold `step`, `split` and a metric; got no such record among 1"):
        plot.curves([{"step": 1, "split": "train"}])
    with pytest.raises(ValueError, match="steps_per_epoch must be positive; got 0"):
        plot.curves(RECORDS, steps_per_epoch=0)


def test_lr_range(tmp_path):
    rates = np.geomspace(1e-4, 10, 60)
    losses = np.where(rates < 1, 2 - rates, 100 * rates)
    losses[-2:] = (np.inf, np.nan)
    figure = plot.lr_range(rates, losses, 0.3, tmp_path / "lr.png")
    picture(tmp_path / "lr.png")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    positions = {line.get_label(): line.get_xdata()[0] for line in axes.lines}
    assert positions["chosen: 0.3"] == 0.3
    assert positions["diverges at 0.9"] == pytest.approx(0.9)
    assert axes.get_ylim()[1] < 4  # the divergence does not flatten what comes before
    smooth = next(line for line in axes.lines if line.get_label() == "smoothed")
    assert np.isfinite(smooth.get_ydata()).all()
    assert len(smooth.get_ydata()) == 58
    assert "diverges at 0.5" in texts(plot.lr_range(rates, losses, 0.3, diverged=0.5))
    with pytest.raises(ValueError, match="learning_rates and losses must have the same length"):
        plot.lr_range(rates, losses[1:], 0.3)
    with pytest.raises(ValueError, match="learning_rates must be positive; got 0"):
        plot.lr_range([0.0, 1.0], [1.0, 1.0], 0.3)


def test_decision_boundary(tmp_path):
    features = GENERATOR.normal(size=(30, 2))
    labels = (features.sum(1) > 0).astype(int)
    calls = []

    def predict(samples):
        calls.append(samples)
        return (samples.sum(1) > 0).astype(int)

    names = ("petal length (cm)", "petal width (cm)")
    figure = plot.decision_boundary(predict, features, labels, names, ["setosa", "other"], tmp_path / "boundary.png")
    pixels = picture(tmp_path / "boundary.png")
    assert len(calls) == 1
    assert calls[0].dtype == np.float32
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == names
    assert {"setosa", "other"} <= set(texts(figure))
    blue, orange = ((np.abs(pixels.astype(int) - c).max(-1) < 8).sum() for c in ((199, 221, 237), (255, 223, 195)))
    assert min(blue, orange) > 0.1 * pixels.shape[0] * pixels.shape[1]  # both regions are there
    plot.decision_boundary(lambda samples: np.zeros(len(samples)), features, labels)  # one region only
    with pytest.raises(ValueError, match=r"features must be \[N, 2\]; got shape \(30, 1\)"):
        plot.decision_boundary(predict, features[:, :1], labels)
    with pytest.raises(ValueError, match=r"labels must have shape \(30,\)"):
        plot.decision_boundary(predict, features, labels[1:])
    with pytest.raises(ValueError, match="class_names must have at least 2 entries; got 1"):
        plot.decision_boundary(predict, features, labels, class_names=["setosa"])
    with pytest.raises(ValueError, match="predict must return one class for each of the 160000 samples"):
        plot.decision_boundary(lambda samples: np.zeros((len(samples), 2)), features, labels)


def test_confusion_matrix(tmp_path):
    figure = plot.confusion_matrix([[8, 2], [0, 0]], ["cat", "dog"], tmp_path / "confusion.png")
    picture(tmp_path / "confusion.png")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[80, 20], [0, 0]])
    assert {t.get_text(): t.get_position() for t in axes.texts} == {"8": (0, 0), "2": (1, 0)}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    many = plot.confusion_matrix(np.eye(100, dtype=int))
    assert not many.axes[0].texts
    assert len(many.axes[0].get_xticks()) <= 40
    with pytest.raises(ValueError, match=r"counts must be \[K, K\]; got shape \(2, 3\)"):
        plot.confusion_matrix(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="classes must have 2 names; got 1"):
        plot.confusion_matrix(np.eye(2), ["cat"])


def test_failed_save_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    plot.image_grid(GREY, path=path)
    before = path.read_bytes()

    def half(self, target, **kwargs):
        target.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plot.image_grid(GREY, path=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_matplotlib_is_imported_late_and_pyplot_never():
    code = (
        "import sys; from flaxvision import plot; assert 'matplotlib' not in sys.modules; import numpy as np;"
        "plot.confusion_matrix(np.eye(2)); plot.image_grid(np.zeros((1, 4, 4)));"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
