"""Instances of label maps against scikit-image on whole maps, and against loops."""

import numpy as np
import pytest
from scipy import ndimage

from flaxvision.metrics import InstanceRecords, label_components


def draw(seed, shape=(40, 50), count=9):
    """True instances, and a prediction that shifts, splits, merges and misses some of them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    truth, found = np.zeros(shape, int), np.zeros(shape, int)
    for k in range(1, count + 1):
        at, radius = rng.uniform(4, 36, 2), rng.uniform(3, 7)
        inside = (y - at[0]) ** 2 + (x - at[1]) ** 2 < radius**2
        truth[inside] = 3 * k
        fate = rng.uniform()
        shifted = np.roll(inside, rng.integers(-1, 2, 2), (0, 1))
        if fate < 0.5:
            found[shifted] = 100 - k
        elif fate < 0.7:
            found[shifted & (x < at[1])], found[shifted & (x >= at[1])] = 200 + k, 300 + k
        elif fate < 0.85:
            found[shifted] = 50
    return found, truth


CASES = {f"random {seed}": draw(seed) for seed in range(5)} | {
    "the truth": (draw(7)[1], draw(7)[1]),
    "nothing found": (np.zeros((40, 50), int), draw(8)[1]),
    "one for all": (np.ones((40, 50), int), draw(9)[1]),
    "every pixel by itself": (np.arange(1, 2001).reshape(40, 50), draw(9)[1]),
}


@pytest.mark.parametrize("name", CASES)
def test_rand_and_information_are_those_of_scikit_image(name):
    from skimage import metrics

    found, truth = CASES[name]
    figures = InstanceRecords.of(found, truth).compute()
    with np.errstate(invalid="ignore"):  # if all found instances are single pixels
        rand = metrics.adapted_rand_error(truth, found)
    ours = [figures[key] for key in ("rand_error", "rand_precision", "rand_recall")]
    np.testing.assert_allclose(ours, rand, rtol=0, atol=1e-9)
    split, merge = metrics.variation_of_information(truth, found)
    np.testing.assert_allclose([figures["vi_split"], figures["vi_merge"]], [split, merge], rtol=0, atol=1e-9)
    assert figures["vi"] == figures["vi_split"] + figures["vi_merge"]


def quality_by_a_loop(found, truth, unknown):
    """Kirillov et al. 2019, section 4, segment by segment."""
    total, hits, spare = 0.0, 0, 0
    for p in set(np.unique(found)) - {0}:
        matches = []
        for t in set(np.unique(truth[~unknown])) - {0}:
            a, b = (found == p) & ~unknown, (truth == t) & ~unknown
            iou = (a & b).sum() / (a | b).sum()
            matches += [iou] if iou > 0.5 else []
        total, hits = total + sum(matches), hits + len(matches)
        void = ((found == p) & unknown).sum()
        spare += not matches and void <= (found == p).sum() / 2
    missed = len(set(np.unique(truth[~unknown])) - {0}) - hits
    return total / (hits + spare / 2 + missed / 2), total / max(hits, 1), hits / (hits + spare / 2 + missed / 2)


def touching_by_a_loop(truth, found, gap):
    """Pairs by the distance of every two pixels, and the segment with most pixels of each."""
    places = {k: np.argwhere(truth == k) for k in np.unique(truth) if k}
    best = {}
    for k, place in places.items():
        ids, counts = np.unique(found[tuple(place.T)], return_counts=True)
        best[k] = ids[np.argmax(counts)]
    pairs = separated = 0
    for a in places:
        for b in places:
            if a < b:
                distance = np.abs(places[a][:, None] - places[b][None]).max(-1).min()
                if distance - 1 <= gap:
                    pairs += 1
                    separated += best[a] != 0 and best[b] != 0 and best[a] != best[b]
    return pairs, separated


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gap", [0, 3])
def test_matches_and_touching_pairs_are_those_of_loops(name, gap):
    found, truth = CASES[name]
    figures = InstanceRecords.of(found, truth, gap=gap).compute()
    wanted = quality_by_a_loop(found, truth, np.zeros(truth.shape, bool))
    np.testing.assert_allclose([figures["pq"], figures["sq"], figures["rq"]], wanted, rtol=0, atol=1e-9)
    assert (figures["touching"], figures["separated"]) == touching_by_a_loop(truth, found, gap)


def test_unknown_pixels():
    from skimage import metrics

    found, truth = draw(3)
    unknown = np.zeros(truth.shape, bool)
    unknown[:, 30:] = True
    figures = InstanceRecords.of(found, np.where(unknown, 255, truth), ignore=255).compute()
    wanted = quality_by_a_loop(found, truth, unknown)
    np.testing.assert_allclose([figures["pq"], figures["sq"], figures["rq"]], wanted, rtol=0, atol=1e-9)
    error = metrics.adapted_rand_error(truth[:, :30], found[:, :30])[0]
    assert figures["rand_error"] == pytest.approx(error, abs=1e-9)


def test_a_tie_goes_to_the_lower_id():
    truth = np.array([[1, 1, 2, 2]])
    apart = lambda found: InstanceRecords.of(np.array([found]), truth).compute()["separated"]
    assert apart([4, 9, 9, 9]) == 1  # 4 and 9 share one pixel each with 1
    assert apart([4, 9, 4, 4]) == 0
    assert apart([0, 9, 4, 4]) == 0  # the background is the lowest


@pytest.mark.parametrize(("void", "extra"), [(1, 1), (2, 1), (3, 0), (4, 0)])
def test_a_found_instance_that_is_mostly_unknown_is_no_false_positive(void, extra):
    """It is one with exactly half of its pixels unknown, and none with all of them unknown."""
    truth = np.array([[255] * void + [0] * (4 - void)])
    records = InstanceRecords.of(np.full((1, 4), 7), truth, ignore=255)
    assert records.counts[0, 5:9].tolist() == [0, 0, extra, 0]
    assert np.isnan(records.compute()["vi"]) == (void == 4)  # no pixel is known


def test_sets_of_images():
    """Figures are means over images or sums, whatever the order of the images."""
    images = [CASES[f"random {seed}"] for seed in range(5)]
    each = [InstanceRecords.of(*image, index=np.array([i])) for i, image in enumerate(images)]
    batch = InstanceRecords.of(*(np.stack(maps) for maps in zip(*images, strict=True)), index=np.arange(5))
    other = each[3].merge(each[0]).merge(each[4]).merge(each[1]).merge(each[2])
    for key, value in batch.compute().items():
        assert other.compute()[key] == pytest.approx(value, abs=1e-12)
    assert batch.compute()["rand_error"] == pytest.approx(np.mean([r.compute()["rand_error"] for r in each]))
    assert batch.compute()["touching"] == sum(r.compute()["touching"] for r in each)
    np.testing.assert_array_equal(batch.per_image("pq"), [r.compute()["pq"] for r in each])
    low, high = batch.bootstrap("pq", resamples=200)
    assert low < batch.compute()["pq"] < high
    assert other.bootstrap("pq", resamples=200) == (low, high)
    with pytest.raises(ValueError, match=r"figure must be one of rand_error, .*; got 'iou'"):
        batch.bootstrap("iou")


def test_an_image_without_instances():
    none = np.zeros((4, 5), int)
    figures = InstanceRecords.of(none, none).compute()
    assert np.isnan([figures["rand_error"], figures["pq"]]).all()
    assert (figures["vi"], figures["touching"]) == (0, 0)


def test_components():
    foreground = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]])
    np.testing.assert_array_equal(label_components(foreground), [[1, 1, 0, 0], [0, 0, 2, 0], [3, 0, 0, 4]])
    eight = label_components(foreground, connectivity=2, min_size=2)
    np.testing.assert_array_equal(eight > 0, [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    many = np.random.default_rng(0).uniform(size=(2, 30, 30)) < 0.5
    for got, image in zip(label_components(many), many, strict=True):
        np.testing.assert_array_equal(got, ndimage.label(image)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"found": np.zeros((2, 3), int)}, r"found and truth must have one shape .*; got \(2, 3\) and \(3, 3\)"),
        ({"found": np.zeros((3, 3))}, "found must have integers; got float64"),
        ({"truth": -np.ones((3, 3), int)}, "truth must have ids of at least 0; got -1"),
        ({"gap": -1}, "gap must be at least 0; got -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    sound = {"found": np.zeros((3, 3), int), "truth": np.ones((3, 3), int)}
    with pytest.raises(ValueError, match=message):
        InstanceRecords.of(**{**sound, **arguments})
