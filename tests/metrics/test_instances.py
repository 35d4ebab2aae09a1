"""Metrics of instances and panoptic quality against scikit-image, plain loops and torchmetrics."""

import itertools

import numpy as np
import pytest
from scipy import ndimage
from skimage import metrics as sk

from flaxvision import metrics as fm


def maps(seed, shape=(3, 17, 20)):
    """Blocks of instances, and a prediction that has shifted, merged and lost some."""
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.integers(0, 9, (shape[0], 6, 5)), np.ones((1, 3, 4), int))[:, : shape[1], : shape[2]]
    found = np.roll(truth, 1, axis=2) * (rng.random(shape) < 0.9) * 100
    found[found == 300] = 400
    return found, truth


def quality(iou, tp, fp, fn):
    size = tp + fp / 2 + fn / 2
    return (iou / size, iou / tp if tp else 0.0, tp / size) if size else (np.nan,) * 3


def loop(found, truth, known, keys_found, keys_truth):
    """Sum of IoU, TP, FP and FN of Kirillov et al., one pair of segments after another."""
    total, matched_found, matched_truth = 0.0, set(), set()
    for a, b in itertools.product(keys_found, keys_truth):
        p, t = found == a, (truth == b) & known
        union = ((p & known) | t).sum()
        if union and (p & t).sum() / union > 0.5:
            total += (p & t).sum() / union
            matched_found.add(a)
            matched_truth.add(b)
    extra = [
        a for a in keys_found if a not in matched_found and ((found == a) & ~known).sum() * 2 <= (found == a).sum()
    ]
    return np.array([total, len(matched_found), len(extra), len(keys_truth) - len(matched_truth)])


@pytest.mark.parametrize("ignore", [None, 8])
def test_instances_equal_scikit_image_and_loops(ignore):
    found, truth = maps(0)
    rows, counts = [], np.zeros(4)
    for p, t in zip(found, truth, strict=True):
        known = t != ignore
        rows.append([*sk.adapted_rand_error(t[known], p[known]), *sk.variation_of_information(t[known], p[known])])
        counts += loop(p, t, known, set(p.ravel()) - {0}, set(t[known]) - {0})
    got = fm.InstanceRecords.of(found, truth, ignore=ignore).compute()
    names = ("rand_error", "rand_precision", "rand_recall", "vi_split", "vi_merge")
    np.testing.assert_allclose([got[n] for n in names], np.mean(rows, 0), rtol=0, atol=1e-9)
    assert got["vi"] == got["vi_split"] + got["vi_merge"]
    assert 0 < counts[1] < counts[1] + counts[2]
    np.testing.assert_allclose([got[n] for n in ("pq", "sq", "rq")], quality(*counts), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_touching_pairs_equal_a_loop(gap):
    truth = maps(1)[1] * (np.random.default_rng(1).random((3, 17, 20)) < 0.4)
    want = 0
    for t in truth:
        near = {k: ndimage.binary_dilation(t == k, np.ones((2 * gap + 3,) * 2)) for k in set(t.ravel()) - {0}}
        want += sum((near[a] & (t == b)).any() for a, b in itertools.combinations(near, 2))
    got = fm.InstanceRecords.of(truth, truth, gap=gap).compute()
    assert got["touching"] == got["separated"] == want > 0


def test_what_is_told_apart():
    truth = np.array([[1, 1, 1, 0, 0, 2, 2, 2, 0, 0, 0, 3]])
    count = lambda found, **options: [
        fm.InstanceRecords.of(np.array([found]), truth, **options).compute()[n] for n in ("touching", "separated")
    ]
    assert count([9, 9, 9, 0, 0, 4, 4, 4, 0, 0, 0, 5]) == [1, 1]  # 2 and 3 have three pixels between them
    assert count([9, 9, 9, 0, 0, 4, 4, 4, 0, 0, 0, 5], gap=3) == [2, 2]
    assert count([9, 9, 9, 9, 9, 9, 9, 9, 0, 0, 0, 5]) == [1, 0]  # merged
    assert count([9, 9, 9, 0, 0, 4, 0, 0, 0, 0, 0, 5]) == [1, 0]  # most of 2 is background
    assert count([9, 9, 4, 0, 0, 9, 4, 4, 0, 0, 0, 5]) == [1, 1]  # by the largest overlap
    assert count([9, 9, 9, 0, 0, 4, 4, 4, 0, 0, 0, 5], ignore=2) == [0, 0]


def test_images_without_instances():
    zero, one = np.zeros((4, 5), int), np.ones((4, 5), int)
    got = fm.InstanceRecords.of(zero, zero).compute()
    assert np.isnan([got["rand_error"], got["pq"]]).all()
    assert got["vi"] == 0
    both = fm.InstanceRecords.of(np.stack([zero, one]), np.stack([zero, one])).compute()
    assert (both["rand_error"], both["pq"], both["vi"]) == (0, 1, 0)
    missed, extra = (fm.InstanceRecords.of(a, b).compute() for a, b in ((zero, one), (one, zero)))
    assert missed["pq"] == extra["pq"] == 0
    pixels = fm.InstanceRecords.of(np.arange(1, 5)[None], np.arange(1, 5)[None]).compute()
    assert np.isnan(pixels["rand_error"])  # no two pixels have one label
    assert pixels["pq"] == 1
    nothing = fm.InstanceRecords.of(zero, one, ignore=1).compute()
    assert np.isnan([nothing["rand_error"], nothing["vi"], nothing["pq"]]).all()


def test_images_in_any_order():
    found, truth = maps(2)
    of = lambda order: fm.InstanceRecords.of(found[order], truth[order], index=np.array(order))
    whole, parts = of([0, 1, 2]), of([2]).merge(of([1, 0]))
    for name, value in whole.compute().items():
        assert parts.compute()[name] == pytest.approx(value, abs=1e-12)
    assert parts.bootstrap("pq", resamples=20) == whole.bootstrap("pq", resamples=20)
    assert whole.per_image("pq")[1] == fm.InstanceRecords.of(found[1], truth[1]).compute()["pq"]
    low, high = whole.bootstrap("rand_error", resamples=50)
    assert low <= whole.compute()["rand_error"] <= high
    with pytest.raises(ValueError, match=r"figure must be one of rand_error, .*; got 'dice'"):
        whole.bootstrap("dice")


def test_label_components():
    image = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], bool)
    four = fm.label_components(image)
    assert four.tolist() == [[1, 0, 0, 2], [0, 3, 0, 2], [0, 0, 0, 0], [4, 4, 4, 0]]
    eight = fm.label_components(np.stack([image, ~image]), connectivity=2, min_size=3)
    assert eight[0].tolist() == [[0] * 4, [0] * 4, [0] * 4, [1, 1, 1, 0]]
    assert eight[1].max() == 1
    with pytest.raises(ValueError, match="connectivity must be 1 or 2; got 4"):
        fm.label_components(image, connectivity=4)


def panoptic(seed):
    rng = np.random.default_rng(seed)
    blocks = lambda high: np.kron(rng.integers(0, high, (4, 4, 4)), np.ones((1, 4, 4), int))
    truth = np.stack([blocks(4), blocks(3)], -1)
    found = np.where(rng.random((4, 16, 16, 1)) < 0.2, rng.integers(0, 3, truth.shape), np.roll(truth, 1, axis=1))
    return found, truth


@pytest.mark.parametrize("void", [False, True])
def test_panoptic_quality_equals_a_loop(void):
    found, truth = panoptic(0)
    if void:
        truth[np.random.default_rng(1).random(truth.shape[:3]) < 0.2, 0] = 255
        truth[0, :7, :, 0] = 255
        found[1, :2, :, 0] = 255
    counts = np.zeros((5, 4))
    for p, t in zip(found, truth, strict=True):
        ids = [np.where(np.isin(x[..., 0], [1, 2]), x[..., 1], 0) + 1000 * x[..., 0] for x in (p, t)]
        for k in range(5):
            keys = [{i for i in set(x.ravel()) if i // 1000 == k} for x in ids]
            counts[k] += loop(*ids, t[..., 0] != 255, *keys)
    records = fm.PanopticRecords.of(found, truth, 5, things=[1, 2])
    np.testing.assert_allclose(records.counts.sum(0), counts, rtol=0, atol=1e-9)
    rows = np.array([quality(*row) for row in counts])  # class 4 is not seen
    got = records.compute()
    for end, classes in (("", [0, 1, 2, 3]), ("_things", [1, 2]), ("_stuff", [0, 3])):
        want = rows[classes].mean(0)
        np.testing.assert_allclose([got[n + end] for n in ("pq", "sq", "rq")], want, rtol=0, atol=1e-9)
    table = records.per_class("abcde")
    np.testing.assert_allclose([[row[n] for n in ("pq", "sq", "rq")] for row in table], rows, rtol=0, atol=1e-9)
    halves = [fm.PanopticRecords.of(found[i], truth[i], 5, things=[1, 2]) for i in (slice(1), slice(1, 4))]
    assert halves[0].merge(halves[1]).compute() == got


@pytest.mark.reference
def test_panoptic_quality_equals_torchmetrics():
    torch = pytest.importorskip("torch")
    detection = pytest.importorskip("torchmetrics.detection")
    found, truth = panoptic(3)
    theirs = detection.PanopticQuality(
        things={1, 2}, stuffs={0, 3}, return_sq_and_rq=True, return_per_class=True, allow_unknown_preds_category=True
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # a ratio of integers has the default type
    try:
        want = theirs(torch.as_tensor(found), torch.as_tensor(truth)).numpy()
    finally:
        torch.set_default_dtype(default)
    table = fm.PanopticRecords.of(found, truth, 4, things=[1, 2]).per_class()
    order = sorted(range(4), key=[1, 2, 0, 3].index)  # theirs has the things first
    got = [[table[k][n] for n in ("pq", "sq", "rq")] for k in order]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_wrong_arguments():
    found, truth = maps(0)
    with pytest.raises(ValueError, match=r"one shape \[H, W\] or \[N, H, W\]; got \(17, 20\) and \(3, 17, 20\)"):
        fm.InstanceRecords.of(found[0], truth)
    with pytest.raises(ValueError, match="truth must have integers; got float64"):
        fm.InstanceRecords.of(found, truth * 1.0)
    with pytest.raises(ValueError, match="found must have ids of at least 0; got -1"):
        fm.InstanceRecords.of(found - 1, truth)
    with pytest.raises(ValueError, match=r"one position for each of 3 images; got shape \(2,\)"):
        fm.InstanceRecords.of(found, truth, index=np.arange(2))
    found, truth = panoptic(0)
    with pytest.raises(ValueError, match=r"truth must have classes from 0 to 2, or 255; got 3"):
        fm.PanopticRecords.of(np.minimum(found, 2), truth, 3, things=[1])
    with pytest.raises(ValueError, match=r"things must be classes from 0 to 3; got \[4\]"):
        fm.PanopticRecords.of(found, truth, 4, things=[4])
    with pytest.raises(ValueError, match=r"other must have the things \[1\] of 4 classes; got \[2\] of 4"):
        fm.PanopticRecords.of(found, truth, 4, things=[1]).merge(fm.PanopticRecords.of(found, truth, 4, things=[2]))
