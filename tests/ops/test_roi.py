from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision import ops
from flaxvision.layers.lowering import gather
from flaxvision.ops import roi
from parity import operators
from tests.conftest import AS_USERS
from tests.layers.derivatives import plain_lax
from tests.ops import loops


def case_of(options, seed=0):
    case = operators.roi_case(seed, options["spatial_scale"])
    return case["features"], case["rois"]


def with_gradient(function, features, rois):
    weights = operators.cotangent(jax.eval_shape(function, features, rois).shape)

    @jax.jit
    def run(features, rois):
        value, back = jax.vjp(lambda f: function(f, rois), features)
        return value, back(weights)[0]

    return *run(features, rois), weights


@pytest.mark.parametrize("options", operators.ROI_ALIGN[1:6], ids=str)
def test_roi_align_is_a_loop(options):
    features, rois = case_of(options)
    value, gradient, cotangent = with_gradient(partial(ops.roi_align, **options), features, rois)
    expected = [loops.roi_align(features, box, **options) for box in rois]
    np.testing.assert_allclose(value, [v for v, _ in expected], atol=1e-5)
    back = sum(np.einsum("ijvu,ijc->vuc", w, g) for (_, w), g in zip(expected, cotangent, strict=True))
    np.testing.assert_allclose(gradient, back, atol=1e-5)


def test_roi_align_on_other_platforms():
    """The gradient has a form of its own on a CPU; the others run plain lax."""
    features, rois = case_of(operators.ROI_ALIGN[1])
    function = partial(ops.roi_align, **operators.ROI_ALIGN[1])
    value, gradient, _ = with_gradient(function, features, rois)
    with plain_lax():
        plain, back, _ = with_gradient(lambda *given: function(*given), features, rois)
    np.testing.assert_allclose(value, plain, atol=1e-6)
    np.testing.assert_allclose(gradient, back, atol=1e-5)
    assert float(jnp.abs(back).max()) > 0
    # The scatters of the gradient there.
    rng = np.random.default_rng(0)
    x, weights, indices = rng.normal(size=(12, 5)), rng.normal(size=(12, 4)), rng.integers(0, 7, (12, 4))
    form, operands = gather.SpreadRows(7), [jnp.asarray(a, jnp.float32) for a in (x, weights)]
    wanted = np.zeros((7, 5))
    np.add.at(wanted, indices, weights[:, :, None] * x[:, None])
    for run in (form.plain, form.cpu):
        np.testing.assert_allclose(jax.jit(run)(*operands, indices), wanted, atol=1e-5)


@pytest.mark.parametrize("options", operators.ROI_POOL, ids=str)
def test_roi_max_pool_is_a_loop(options):
    features, rois = case_of(options, seed=1)  # whole numbers: many ties
    value, gradient, cotangent = with_gradient(partial(ops.roi_max_pool, **options), features, rois)
    back = np.zeros_like(features)
    for box, found, g in zip(rois, value, cotangent, strict=True):
        expected, places = loops.roi_max_pool(features, box, **options)
        np.testing.assert_array_equal(found, expected)
        for at, (y, x) in places.items():
            back[y, x, at[2]] += g[at]
    np.testing.assert_allclose(gradient, back, atol=1e-5)


def test_levels_of_a_pyramid():
    """A constant map per level tells which level a roi is taken from (Lin et al. 2017, equation 1)."""
    strides = (4, 8, 16, 32)
    features = [jnp.full((512 // s, 512 // s, 1), float(i)) for i, s in enumerate(strides)]
    sides = np.array([1, 55, 111.9, 112, 113, 223.9, 224, 447, 448, 500, 0, -3], np.float32)
    rois = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    level = ops.multiscale_roi_align(features, strides, rois, 1)[:, 0, 0, 0]
    assert level.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 0, 0]


def test_a_pyramid_is_its_levels():
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((h, w, 4)).astype(np.float32) for h, w in ((16, 20), (8, 10), (4, 5))]
    rois = operators.boxes(rng, 40, extent=70, inverted=False)
    run = partial(
        ops.multiscale_roi_align, strides=(4, 8, 16), output_size=(3, 2), canonical_size=10, canonical_level=3
    )
    found, *_ = with_gradient(lambda f, r: run(f, rois=r), features, rois)
    level = np.clip(np.floor(3 + np.log2(np.sqrt(np.maximum(ops.box_area(rois), 1e-9)) / 10) + 1e-6), 2, 4) - 2
    assert set(level) == {0, 1, 2}
    for i in range(3):
        one = ops.roi_align(features[i], rois, (3, 2), spatial_scale=1 / (4 << i))
        np.testing.assert_allclose(found[level == i], one[level == i], atol=1e-6)


def test_samples_are_rounded_as_in_numpy():
    """One rounding decides at the limits of the features and of the bins."""
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 100, 1000).astype(np.float32)
    end = start + rng.uniform(1, 60, 1000).astype(np.float32)
    step = (end - start) / np.float32(7)
    points = start[:, None] + np.arange(7, dtype=np.float32)[None] * step[:, None]
    points = (
        points[:, :, None] + ((np.arange(3) + 0.5).astype(np.float32)[None] * step[:, None] / np.float32(3))[:, None]
    )
    low = np.floor(points)
    weights = np.stack([1 - (points - low), points - low], axis=-1).reshape(1000, 7, 6)
    run = jax.jit(roi._samples, static_argnums=(2, 3, 5), compiler_options=AS_USERS)
    pixels, found = run(start, end, 7, 3, np.full(1000, 500), False)
    np.testing.assert_array_equal(found, weights)
    np.testing.assert_array_equal(pixels[:, :, ::2], low)
    lengths = np.arange(1, 401, dtype=np.float32)
    counts = range(1, 15)
    bins = jax.jit(lambda start, end: [roi._bins(start, end, n, 10**6) for n in counts], compiler_options=AS_USERS)
    for count, (first, last) in zip(counts, bins(0 * lengths, lengths - 1), strict=True):
        step = lengths / np.float32(count)
        edges = np.arange(count + 1, dtype=np.float32)[None] * step[:, None]
        np.testing.assert_array_equal(first, np.floor(edges[:, :-1]))
        np.testing.assert_array_equal(last, np.ceil(edges[:, 1:]))


def test_odd_rois_are_finite():
    features = np.random.default_rng(0).standard_normal((5, 6, 2)).astype(np.float32)
    rois = np.array(
        [[0, 0, 0, 0], [np.nan] * 4, [-np.inf, 0, np.inf, 3], [5, 4, 1, 2], [-90, -90, -80, -80]], np.float32
    )
    functions = (
        partial(ops.roi_align, output_size=2),
        partial(ops.roi_align, output_size=2, aligned=True),
        partial(ops.roi_max_pool, output_size=2),
        lambda f, r: ops.multiscale_roi_align([f], [4], r, 2),
    )

    @jax.jit
    def run(features, rois):
        results = []
        for function in functions:
            value, back = jax.vjp(function, features, rois)
            results.append((value, *back(jnp.ones_like(value))))
        return results

    for value, of_features, of_rois in run(features, rois):
        assert np.isfinite(value).all()
        assert np.isfinite(of_features).all()
        assert not value[-1].any()  # far outside
        assert not of_rois.any()


def test_batches_dtypes_and_second_derivatives():
    options = operators.ROI_ALIGN[0]
    cases = [case_of(options, seed) for seed in range(3)]
    features, rois = (np.stack(part) for part in zip(*cases, strict=True))
    run = partial(ops.roi_align, **options)
    loss = lambda f, r: jnp.sum(jnp.sin(run(f, r)))
    f, r = cases[0]

    @jax.jit
    def derivatives(features, rois):
        tangent = jax.jvp(lambda f: run(f, r), (f,), (cases[1][0],))[1]
        twice = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x, r) ** 2))(f)
        return jax.vmap(jax.grad(loss))(features, rois), tangent, twice

    found, tangent, twice = derivatives(features, rois)
    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(found, [gradient(f, r) for f, r in cases], atol=1e-5)
    np.testing.assert_allclose(tangent, run(cases[1][0], r), atol=1e-6)
    assert np.isfinite(twice).all()
    assert twice.any()
    half = run(jnp.asarray(f, jnp.bfloat16), r)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), run(f, r), atol=0.05)


def test_errors():
    features, rois = np.zeros((4, 5, 2), np.float32), np.zeros((3, 4))
    with pytest.raises(ValueError, match=r"sampling_ratio must be at least 1 \(.*\); got 0"):
        ops.roi_align(features, rois, 7, sampling_ratio=0)
    with pytest.raises(ValueError, match=r"output_size must be at least 1; got \(7, 0\)"):
        ops.roi_max_pool(features, rois, (7, 0))
    with pytest.raises(ValueError, match=r"rois must be \[R, 4\]; got \(3, 5\)"):
        ops.roi_align(features, np.zeros((3, 5)), 7)
    with pytest.raises(ValueError, match=r"features must be floats \[H, W, C\]; got float32 \(1, 4, 5, 2\)"):
        ops.roi_align(features[None], rois, 7)
    with pytest.raises(ValueError, match=r"strides must be 2 powers of two, .*; got \[4, 16\]"):
        ops.multiscale_roi_align([features] * 2, [4, 16], rois, 7)
    with pytest.raises(ValueError, match="features must be one or more arrays with one C and dtype"):
        ops.multiscale_roi_align([features, features[..., :1]], [4, 8], rois, 7)
