"""Images on canvases, and batches of one canvas each."""

import numpy as np
import pytest

from flaxvision import data
from flaxvision.data.canvas import Canvases

SIZES = ((32, 48), (48, 32), (48, 48))


class Photos:
    """Images of many sizes; pixel values and one box tell which image it is."""

    name, classes, fingerprint = "photos", ("a", "b"), "photos"

    def __init__(self, length=23):
        rng = np.random.default_rng(0)
        self.sizes = rng.integers(20, 100, (length, 2))
        self.counts = np.arange(length) % 4

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index, /):
        height, width = self.sizes[index]
        count = self.counts[index]
        return {
            "image": np.full((height, width, 3), index, np.uint8),
            "boxes": np.tile(np.array([[1, 2, width - 3, height - 4]], np.float32), (count, 1)),
            "labels": np.zeros(count, np.int32),
            "valid": np.ones(count, bool),
        }


@pytest.mark.parametrize(
    ("options", "size", "canvas", "placed"),
    [
        ({}, (100, 200), 0, (24, 48)),  # letterbox: as large as the canvas allows
        ({}, (10, 10), 2, (48, 48)),
        ({"resize": False}, (30, 40), 0, (30, 40)),
        ({"resize": False}, (33, 40), 2, (33, 40)),
        ({"resize": False}, (96, 64), 1, (48, 32)),  # larger than every canvas
        ({"shorter": 24}, (100, 200), 0, (24, 48)),
        ({"shorter": 32, "longer": 48}, (100, 200), 0, (24, 48)),
        ({"shorter": 32, "longer": 48}, (100, 100), 0, (32, 32)),
        ({"longer": 40}, (100, 50), 1, (40, 20)),
        ({"shorter": 60}, (100, 100), 2, (48, 48)),
    ],
)
def test_the_canvas_and_the_size_of_an_image(options, size, canvas, placed):
    canvases = Canvases(SIZES, **options)
    assert canvases.choose(size) == canvas
    assert canvases.placement(size, canvas) == placed


def test_large_images_are_refused_on_request():
    canvases = Canvases(SIZES, resize=False, larger="refuse")
    assert canvases.choose((48, 48)) == 2
    with pytest.raises(ValueError, match=r"sizes must have a canvas for x of 49x20 pixels .*; got 32x48, 48x32, 48x48"):
        canvases.choose((49, 20), "x")
    with pytest.raises(ValueError, match=r"must have a canvas for photos\[\d+\] of"):
        data.on_canvases(Photos(), canvases)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ()}, "sizes must be one or more different canvases"),
        ({"sizes": ((8, 8), (8, 8))}, "sizes must be one or more different canvases"),
        ({"shorter": 8, "resize": False}, "shorter must be at least 1, or None with resize=False; got 8"),
        ({"longer": 0}, "longer must be at least 1"),
        ({"larger": "crop"}, "larger must be 'resize' or 'refuse'; got 'crop'"),
        ({"fill": 256}, "fill must be between 0 and 255; got 256"),
    ],
)
def test_canvases_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Canvases(**{"sizes": SIZES, **options})


def test_boxes_and_masks_move_along_and_come_back():
    source = data.ShapesSource("val", masks=True, length=12)
    placed = data.on_canvases(source, Canvases(((160, 160),)))
    for index in range(len(source)):
        old, new = source[index], placed[index]
        assert new["image"].shape == (160, 160, 3)
        assert new["masks"].shape == (6, 160, 160)
        count = len(old["boxes"])
        assert new["valid"].sum() == count
        assert new["boxes"].shape == (6, 4)
        height, width = new["size"]
        assert max(height, width) == 160
        back = new["boxes"][:count] / new["scale"][[1, 0, 1, 0]]
        np.testing.assert_allclose(back, old["boxes"], atol=1e-3)
        assert not new["image"][height:].any()
        assert not new["image"][:, width:].any()
        for box, mask in zip(new["boxes"][:count], new["masks"][:count], strict=True):
            y, x = np.nonzero(mask)
            np.testing.assert_allclose([x.min(), y.min(), x.max() + 1, y.max() + 1], box, atol=1.0)
    data.validate(placed, task="detection")


def test_max_objects():
    assert data.on_canvases(Photos(), 32)[0]["boxes"].shape == (3, 4)
    assert data.on_canvases(Photos(), 32, max_objects=5)[0]["valid"].shape == (5,)
    with pytest.raises(
        ValueError, match=r"max_objects must be at least 3, the number of objects in photos\[3\]; got 2"
    ):
        data.on_canvases(Photos(), 32, max_objects=2)[3]
    assert data.on_canvases(data.load("digits", "test"), 16)[0].keys() == {"image", "label", "size", "scale", "index"}


def shapes_of(batch):
    return {key: value.shape[1:] for key, value in batch.items()}


def test_evaluation_has_every_image_once_in_batches_of_one_shape():
    source = data.on_canvases(Photos(), SIZES)
    batches = data.eval_batches(source, 4)
    seen, found = [], set()
    for batch in batches:
        assert batch["image"].shape[0] == 4
        found.add(batch["image"].shape[1:3])
        seen += batch["index"][batch["mask"] > 0].tolist()
        for row in np.flatnonzero(batch["mask"]):
            assert batch["image"][row, 0, 0, 0] == batch["index"][row]
    assert sorted(seen) == list(range(23))
    assert found == set(SIZES)
    assert len(batches) == sum(-(-n // 4) for n in np.bincount(source.canvas))


def indices(source, steps, start=0, **options):
    batches = data.train_batches(source, 4, seed=3, **options)
    iterator = batches.from_step(start)
    with iterator:
        return [next(iterator) for _ in range(steps)]


def test_training_visits_the_canvases_in_proportion_and_resumes_at_any_step():
    source = data.on_canvases(Photos(), SIZES)
    steps = indices(source, 2 * 23)
    canvas = {size: k for k, size in enumerate(SIZES)}
    for batch in steps:
        on = {int(source.canvas[i]) for i in batch["index"]}
        assert on == {canvas[batch["image"].shape[1:3]]}
    # After N steps every image was seen as often as a batch has rows.
    for cycle in (steps[:23], steps[23:]):
        counts = np.bincount(np.concatenate([batch["index"] for batch in cycle]), minlength=23)
        assert counts.tolist() == [4] * 23
    resumed = indices(source, 5, start=17)
    for a, b in zip(steps[17:22], resumed, strict=True):
        np.testing.assert_array_equal(a["index"], b["index"])
    order = [batch["index"].tolist() for batch in steps]
    assert order != [batch["index"].tolist() for batch in indices(source, 46)][::-1]
    other = data.train_batches(source, 4, seed=4).from_step(0)
    with other:
        assert [next(other)["index"].tolist() for _ in range(10)] != order[:10]


@pytest.mark.parametrize("multiscale", [None, 3])
def test_training_batches_count_the_images_seen(multiscale):
    batches = data.train_batches(data.on_canvases(Photos(), SIZES, multiscale=multiscale), 4, seed=0)
    with batches.from_step(5) as iterator:
        for step in (5, 6):
            seen = next(iterator)["seen"]
            assert seen.dtype == np.int32
            assert seen.tolist() == [4 * step, 4 * step + 1, 4 * step + 2, 4 * step + 3]
    assert "seen" not in next(iter(data.eval_batches(batches.source, 4)))


@pytest.mark.parametrize("multiscale", [None, 3])
def test_any_number_of_processes_sees_the_same_batches(multiscale):
    source = data.on_canvases(Photos(), SIZES, multiscale=multiscale)
    whole = indices(source, 9)
    halves = [indices(source, 9, process_index=i, process_count=2) for i in range(2)]
    for step, batch in enumerate(whole):
        joined = np.concatenate([half[step]["index"] for half in halves])
        np.testing.assert_array_equal(batch["index"], joined)
        assert {half[step]["image"].shape[1:3] for half in halves} == {batch["image"].shape[1:3]}
    evaluation = [*data.eval_batches(source, 4)]
    halves = [[*data.eval_batches(source, 4, process_index=i, process_count=2)] for i in range(2)]
    for step, batch in enumerate(evaluation):
        for key in ("index", "mask"):
            np.testing.assert_array_equal(batch[key], np.concatenate([half[step][key] for half in halves]))


def test_multiscale_training_changes_the_canvas_of_all_images():
    source = data.on_canvases(Photos(), SIZES, multiscale=3)
    steps = indices(source, 60)
    sizes = [batch["image"].shape[1:3] for batch in steps]
    assert all(len(set(sizes[i : i + 3])) == 1 for i in range(0, 60, 3))
    assert set(sizes) == set(SIZES)
    # Image sequence: epochs of all images, whatever the canvas.
    seen = np.concatenate([batch["index"] for batch in steps])[: 23 * 10].reshape(10, 23)
    assert all(sorted(epoch) == list(range(23)) for epoch in seen.tolist())
    for batch in steps[:9]:
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        assert (batch["size"] <= np.array(batch["image"].shape[1:3])[None]).all()


def test_fingerprints_and_the_cache():
    prints = {
        data.on_canvases(Photos(), canvases, **options).fingerprint
        for canvases in (32, SIZES, Canvases(SIZES, fill=9))
        for options in ({}, {"max_objects": 7}, {"multiscale": 2})
    }
    assert len(prints) == 9
    plain, cached = (data.on_canvases(Photos(), SIZES, cache=cache) for cache in (False, True))
    for _ in range(2):
        for key, value in plain[5].items():
            np.testing.assert_array_equal(value, cached[5][key])
    with pytest.raises(ValueError, match="num_workers must be 0 for images on 3 canvases; got 1"):
        data.train_batches(plain, 4, seed=0, num_workers=1)
    with pytest.raises(ValueError, match="multiscale must be at least 1 or None; got 0"):
        data.on_canvases(Photos(), SIZES, multiscale=0)


def test_subsets_know_their_sizes():
    part = data.subset(Photos(), np.array([3, 7]), "part")
    source = data.on_canvases(part, SIZES)
    assert source.canvas.tolist() == data.on_canvases(Photos(), SIZES).canvas[[3, 7]].tolist()
    assert source[0]["boxes"].shape == (3, 4)
