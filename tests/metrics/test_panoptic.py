"""Panoptic quality against a loop over segments, and against torchmetrics."""

import numpy as np
import pytest

from flaxvision.metrics import PanopticRecords
from parity import libraries

K, THINGS = 4, (1, 3)


def draw(seed, shape=(30, 36)):
    """Blocks of random classes and instances, and a prediction that differs in some of them."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.repeat(np.arange(n // 6), 6) for n in shape)
    kind, number = rng.integers(0, K, (5, 6)), rng.integers(0, 4, (5, 6))
    truth = np.stack([kind[rows][:, columns], number[rows][:, columns]], -1)
    changed = rng.uniform(size=(5, 6)) < 0.3
    kind, number = np.where(changed, rng.integers(0, K, (5, 6)), kind), np.where(changed, 7, number)
    found = np.stack([kind[rows][:, columns], number[rows][:, columns]], -1)
    found = np.roll(found, rng.integers(-1, 2, 2), (0, 1))
    truth[:, 20:26][rng.uniform(size=(30, 6)) < 0.5] = 255
    found[rng.uniform(size=shape) < 0.05] = 255
    return found, truth


def segments(maps):
    """The pixels of every segment, by class and instance; stuff has one segment of each class."""
    kinds = {(int(k), int(i) if k in THINGS else 0) for k, i in maps.reshape(-1, 2) if k != 255}
    return {
        (k, i): (maps[..., 0] == k) & ((maps[..., 1] == i) if k in THINGS else np.ones(maps.shape[:2], bool))
        for k, i in kinds
    }


def by_a_loop(pairs):
    counts = np.zeros((K, 4))
    for found, truth in pairs:
        void = truth[..., 0] == 255
        mine, theirs = segments(found), segments(truth)
        hit = set()
        for (k, _), p in mine.items():
            best = 0.0
            for (other, j), t in theirs.items():
                iou = (p & t).sum() / ((p & ~void) | t).sum()
                if other == k and iou > 0.5:
                    best = iou
                    hit.add((other, j))
            if best:
                counts[k] += (best, 1, 0, 0)
            elif (p & void).sum() <= p.sum() / 2:
                counts[k, 2] += 1
        for k, j in theirs:
            counts[k, 3] += (k, j) not in hit
    return counts


def test_it_is_a_loop_over_segments():
    pairs = [draw(seed) for seed in range(6)]
    records = PanopticRecords.of(*(np.stack(maps) for maps in zip(*pairs, strict=True)), K, things=THINGS)
    counts = by_a_loop(pairs)
    np.testing.assert_allclose(records.counts.sum(0), counts, rtol=0, atol=1e-9)
    sizes = counts[:, 1] + counts[:, 2:].sum(1) / 2
    figures = records.compute()
    assert figures["pq"] == pytest.approx((counts[:, 0] / sizes).mean(), abs=1e-9)
    assert figures["sq"] == pytest.approx((counts[:, 0] / counts[:, 1]).mean(), abs=1e-9)
    assert figures["rq_things"] == pytest.approx((counts[:, 1] / sizes)[[1, 3]].mean(), abs=1e-9)
    assert figures["pq_stuff"] == pytest.approx((counts[:, 0] / sizes)[[0, 2]].mean(), abs=1e-9)
    table = records.per_class(("sky", "car", "road", "person"))
    assert [row["name"] for row in table] == ["sky", "car", "road", "person"]
    assert table[1]["segments"] == counts[1, 1] + counts[1, 3]
    parts = [PanopticRecords.of(*pair, K, things=THINGS) for pair in pairs]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    np.testing.assert_allclose(merged.counts, records.counts[:3])
    low, high = records.bootstrap("pq", resamples=100)
    assert low < figures["pq"] < high


def test_unseen_classes_do_not_count():
    maps = np.zeros((4, 4, 2), int)
    figures = PanopticRecords.of(maps, maps, K, things=THINGS).compute()
    assert (figures["pq"], figures["pq_stuff"]) == (1, 1)
    assert np.isnan(figures["pq_things"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"found": np.zeros((4, 4), int)}, r"found and truth must have one shape \[H, W, 2\]"),
        ({"found": np.full((4, 4, 2), 4)}, "found must have classes from 0 to 3, or 255; got 4"),
        ({"truth": np.zeros((4, 4, 2))}, "truth must have integers; got float64"),
        ({"things": [4]}, r"things must be classes from 0 to 3; got \[4\]"),
    ],
)
def test_wrong_arguments(change, message):
    maps = {"found": np.zeros((4, 4, 2), int), "truth": np.zeros((4, 4, 2), int), "things": THINGS}
    with pytest.raises(ValueError, match=message):
        PanopticRecords.of(**{**maps, **change}, num_classes=K)


@pytest.mark.reference
def test_against_torchmetrics():
    """Without void pixels, for which torchmetrics has another rule."""
    import torch

    libraries._import_torchvision()  # torchmetrics imports it
    from torchmetrics.detection import PanopticQuality

    pairs = [[np.where(maps == 255, 0, maps) for maps in draw(seed)] for seed in range(4)]
    theirs = PanopticQuality(things=set(THINGS), stuffs=set(range(K)) - set(THINGS), return_sq_and_rq=True)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # theirs divides integers, which gives the default type
    try:
        for found, truth in pairs:
            theirs.update(torch.from_numpy(found[None]), torch.from_numpy(truth[None]))
        wanted = theirs.compute().tolist()
    finally:
        torch.set_default_dtype(default)
    figures = PanopticRecords.of(*(np.stack(maps) for maps in zip(*pairs, strict=True)), K, things=THINGS).compute()
    np.testing.assert_allclose([figures["pq"], figures["sq"], figures["rq"]], wanted, rtol=0, atol=1e-9)
