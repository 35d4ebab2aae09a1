"""Boundary F against distances of every two boundary pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.metrics import BoundaryMetrics

K, SHAPE = 3, (17, 23)


def maps():
    """Random maps of blocks and of noise; an empty class, one that fills the image, single pixels, unknown pixels."""
    rng = np.random.default_rng(0)
    blocks = lambda: np.kron(rng.integers(0, K, (5, 6)), np.ones((4, 4), int))[: SHAPE[0], : SHAPE[1]]
    first = blocks()
    pairs = [
        (first, np.roll(first, 1, 0)),
        (blocks(), blocks()),
        (rng.integers(0, K, SHAPE), rng.integers(0, K, SHAPE)),
    ]
    full, point = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    point[5, 7] = 2
    pairs += [(full, full), (full, point), (point, np.roll(point, (2, 1), (0, 1)))]
    unknown = blocks()
    unknown[3:7, 10:], unknown[0, 0] = 255, 255
    pairs += [(blocks(), unknown), (unknown % K, unknown)]
    return [np.stack(part) for part in zip(*pairs, strict=True)]


FOUND, TRUTH = maps()


def by_distances(found, truth, radius):
    counts = np.zeros((K, 4))
    known = truth < K
    for k in range(K):
        places = []
        for one in (found, truth):
            inside = (one == k) & known
            other = np.pad((one != k) & known, 1)
            near = other[2:, 1:-1] | other[:-2, 1:-1] | other[1:-1, 2:] | other[1:-1, :-2]
            places.append(np.argwhere(inside & near))
        distance = np.sqrt(((places[0][:, None] - places[1][None]) ** 2).sum(-1))
        near = distance <= radius
        counts[k] = near.any(1).sum(), len(places[0]), near.any(0).sum(), len(places[1])
    return counts


def f_of(counts):
    values = []
    for a, n, b, m in counts:
        p, r = a / max(n, 1), b / max(m, 1)
        values.append(np.nan if n + m == 0 else 2 * p * r / (p + r) if p + r else 0.0)
    return np.array(values)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.5, 0.0075, 0.2])
def test_counts_are_those_of_the_distances(tolerance):
    radius = tolerance if tolerance >= 1 else tolerance * np.hypot(*SHAPE)
    metric = BoundaryMetrics.of(jnp.asarray(FOUND), jnp.asarray(TRUTH), K, tolerance=tolerance)
    wanted = np.stack([by_distances(a, b, radius) for a, b in zip(FOUND, TRUTH, strict=True)])
    np.testing.assert_array_equal(metric.counts, wanted)
    images = [np.nanmean(f_of(counts)) for counts in wanted if counts.any()]
    assert metric.compute()["boundary_f"] == pytest.approx(np.mean(images), abs=1e-12)
    assert metric.compute()["pooled_boundary_f"] == pytest.approx(np.nanmean(f_of(wanted.sum(0))), abs=1e-12)


def test_padding_devices_and_order():
    """One and eight devices give the same; padded rows do not count."""
    index, mask = jnp.arange(8), jnp.array([1, 1, 1, 1, 1, 1, 0, 0])
    whole = BoundaryMetrics.of(jnp.asarray(FOUND), jnp.asarray(TRUTH), K, mask, index, tolerance=1.0)

    def step(found, truth, mask, index):
        return BoundaryMetrics.of(found, truth, K, mask, index, tolerance=1.0).all_reduce("data")

    split = [jnp.asarray(x)[:, None] for x in (FOUND, TRUTH, mask, index)]
    gathered = jax.tree.map(lambda x: x[0], jax.pmap(step, "data")(*split))
    np.testing.assert_array_equal(gathered.counts, whole.counts)
    mapped = jax.jit(jax.vmap(lambda a, b, *row: BoundaryMetrics.of(a, b, K, *row, tolerance=1.0)))(*split)
    np.testing.assert_array_equal(mapped.counts[:, 0], whole.counts)
    records = whole.to_host()
    assert len(records) == 6
    parts = [
        BoundaryMetrics.of(
            jnp.asarray(FOUND[part]), jnp.asarray(TRUTH[part]), K, index=jnp.asarray(part), tolerance=1.0
        )
        for part in ([4, 5], [0, 3, 1, 2])
    ]
    merged = parts[0].to_host().merge(parts[1].to_host())
    assert merged.compute()["boundary_f"] == pytest.approx(records.compute()["boundary_f"], abs=1e-12)
    assert merged.bootstrap("boundary_f", resamples=50) == records.bootstrap("boundary_f", resamples=50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": jnp.zeros((1, 4, 5), int)}, r"must have one shape \[N, H, W\]; got \(1, 4, 4\) and \(1, 4, 5\)"),
        ({"num_classes": 0}, "num_classes must be at least 1; got 0"),
        ({"tolerance": -1.0}, "tolerance must be a finite number of at least 0; got -1.0"),
    ],
)
def test_wrong_arguments(change, message):
    sound = {"predictions": jnp.zeros((1, 4, 4), int), "labels": jnp.zeros((1, 4, 4), int), "num_classes": 2}
    with pytest.raises(ValueError, match=message):
        BoundaryMetrics.of(**{**sound, **change})
