"""Boundary F against distance transforms, over batches and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from flaxvision import metrics as fm

RNG = np.random.default_rng(0)
K = 4
LABELS = np.kron(RNG.integers(0, 3, (8, 4, 5)), np.ones((1, 4, 4), int))
FOUND = np.roll(LABELS, 1, axis=1)
FOUND[RNG.random(LABELS.shape) < 0.05] = 3
LABELS[0, :5] = 255
LABELS[1] = 255  # nothing is known
LABELS[2] = 1  # a class that fills the image
FOUND[3] = 0
LABELS[4], FOUND[4] = 0, 0
LABELS[4, 3, 3], FOUND[4, 5, 6] = 1, 1  # one pixel each
LABELS[5], FOUND[5] = RNG.integers(0, 3, (2, 16, 20))
LABELS[6], FOUND[6] = 2, 2  # no boundary at all


def edge(labels, known, k):
    """Boundary pixels, one pixel after another."""
    out = np.zeros(labels.shape, bool)
    height, width = labels.shape
    for y, x in np.ndindex(*labels.shape):
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= v < height and 0 <= u < width
            if inside and known[y, x] and known[v, u] and labels[y, x] == k != labels[v, u]:
                out[y, x] = True
    return out


def near(pixels, radius):
    return ndimage.distance_transform_edt(~pixels) <= radius if pixels.any() else np.zeros_like(pixels)


def brute(radius):
    counts = np.zeros((8, K, 4), int)
    for n, k in np.ndindex(8, K):
        p, t = (edge(x[n], LABELS[n] < K, k) for x in (FOUND, LABELS))
        counts[n, k] = [(p & near(t, radius)).sum(), p.sum(), (t & near(p, radius)).sum(), t.sum()]
    return counts


def f_of(row):
    if row[1] + row[3] == 0:
        return np.nan
    precision, recall = row[0] / max(row[1], 1), row[2] / max(row[3], 1)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def of(found=FOUND, labels=LABELS, mask=None, index=None, tolerance=2.5):
    return fm.BoundaryMetrics.of(jnp.asarray(found), jnp.asarray(labels), K, mask, index, tolerance=tolerance)


@pytest.mark.parametrize(
    ("tolerance", "radius"), [(0, 0), (1, 1), (2.5, 2.5), (5**0.5, 5**0.5), (0.1, 0.1 * np.hypot(16, 20)), (99, 99)]
)
def test_counts_equal_a_distance_transform(tolerance, radius):
    got = jax.jit(lambda p, t: of(p, t, tolerance=tolerance))(FOUND, LABELS)
    np.testing.assert_array_equal(got.counts, brute(radius))


def test_figures():
    counts = brute(2.5)
    images = [[f for f in map(f_of, image) if not np.isnan(f)] for image in counts]
    assert [bool(x) for x in images] == [True, False, True, True, True, True, False, True]
    got = of().compute()
    assert got["boundary_f"] == pytest.approx(np.mean([np.mean(x) for x in images if x]), abs=1e-9)
    assert got["pooled_boundary_f"] == pytest.approx(np.mean([f_of(x) for x in counts.sum(0)]), abs=1e-9)
    assert of(LABELS).compute() == {"boundary_f": 1, "pooled_boundary_f": 1}
    assert of(mask=jnp.arange(8) == 2).compute()["boundary_f"] == 0  # the prediction alone has boundaries
    records = of(index=jnp.arange(8)).to_host()
    np.testing.assert_allclose(records.per_image("boundary_f")[5], np.mean(images[5]), rtol=0, atol=1e-9)
    low, high = records.bootstrap("boundary_f", resamples=50)
    assert low < got["boundary_f"] < high


def test_padding_batches_and_devices():
    """Under pmap and vmap, with padded rows, and merged on the device or the host, every pixel counts once."""
    want = of(mask=jnp.arange(8) < 7).compute()
    shard = lambda x: jnp.asarray(x).reshape(8, 1, *x.shape[1:])
    rows = tuple(map(shard, (FOUND, LABELS, np.arange(8) < 7, np.arange(8))))
    spread = jax.pmap(lambda *row: of(*row).all_reduce("data"), axis_name="data", out_axes=None)(*rows)
    assert spread.compute() == want
    mapped = jax.vmap(of)(*rows)
    np.testing.assert_array_equal(mapped.counts[:, 0], of().counts)
    first, second = (of(FOUND[i], LABELS[i]) for i in (slice(4), slice(4, 7)))
    assert first.merge(second).compute() == want
    assert second.to_host().merge(first.to_host()).compute() == pytest.approx(want, abs=1e-12)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"one shape \[N, H, W\]; got \(16, 20\) and \(8, 16, 20\)"):
        of(FOUND[0])
    with pytest.raises(ValueError, match="tolerance must be a finite number of at least 0; got -1"):
        of(tolerance=-1)
    with pytest.raises(ValueError, match="num_classes must be at least 1; got 0"):
        fm.BoundaryMetrics.of(jnp.asarray(FOUND), jnp.asarray(LABELS), 0)
