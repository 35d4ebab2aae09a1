"""Pools against loops over every window, their gradients against plain lax, and figures from Keras and torch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from flaxvision import layers
from tests.conftest import AS_USERS


def _pads(spatial, window, strides, padding):
    if padding == "VALID":
        return [(0, 0)] * len(spatial)
    if padding == "SAME":
        total = [max((-(n // -s) - 1) * s + k - n, 0) for n, k, s in zip(spatial, window, strides, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return list(padding)


def loop(x, window, strides, padding, fold):
    """Applies `fold` to the real elements `[count, N, C]` of every window, one window at a time."""
    spatial = x.shape[1:-1]
    pads = _pads(spatial, window, strides, padding)
    extents = [(n + a + b - k) // s + 1 for n, k, s, (a, b) in zip(spatial, window, strides, pads, strict=True)]
    out = np.zeros((x.shape[0], *extents, x.shape[-1]))
    for place in itertools.product(*map(range, extents)):
        elements = []
        for offset in itertools.product(*map(range, window)):
            at = [p * s + o - a for p, s, o, (a, _) in zip(place, strides, offset, pads, strict=True)]
            if all(0 <= i < n for i, n in zip(at, spatial, strict=True)):
                elements.append(x[(slice(None), *at)])
        out[(slice(None), *place)] = fold(np.array(elements).reshape(len(elements), x.shape[0], x.shape[-1]))
    return out


CASES = [
    ((2, 11, 3), (3,), (2,), "SAME"),
    ((2, 7, 3), (2,), (2,), ((3, 0),)),  # the first window is nothing but padding
    ((2, 6, 9, 3), (2, 2), (2, 2), "VALID"),
    ((2, 7, 9, 3), (2, 2), (2, 2), "SAME"),
    ((2, 7, 10, 3), (3, 3), (2, 2), "SAME"),
    ((2, 7, 10, 3), (3, 3), (2, 2), "VALID"),
    ((2, 5, 6, 3), (3, 3), (1, 1), "SAME"),
    ((2, 5, 9, 3), (1, 4), (2, 3), ((0, 0), (2, 1))),
    ((1, 9, 9, 2), (5, 5), (1, 1), "SAME"),
    ((1, 9, 8, 2), (4, 4), (4, 4), "VALID"),
    ((1, 4, 5, 6, 2), (2, 2, 2), (2, 2, 2), "VALID"),
    ((1, 4, 5, 6, 2), (3, 2, 3), (2, 1, 2), "SAME"),
]
IDS = [f"{len(s) - 2}d-{'x'.join(map(str, w))}-{'x'.join(map(str, t))}-{p}" for s, w, t, p in CASES]


@pytest.fixture(params=["ties", "spread"])
def values(request):
    """Small integers, so that windows hold their maximum more than once, or all values different."""

    def draw(shape):
        rng = np.random.default_rng(0)
        if request.param == "ties":
            return rng.integers(-2, 2, shape).astype(np.float32)
        return rng.standard_normal(shape).astype(np.float32)

    return draw


def _reduce_window(x, init, fold, window, strides, padding):
    pads = ((0, 0), *_pads(x.shape[1:-1], window, strides, padding), (0, 0))
    return lax.reduce_window(x, init, fold, (1, *window, 1), (1, *strides, 1), pads)


@pytest.mark.parametrize(("shape", "window", "strides", "padding"), CASES, ids=IDS)
def test_max_pool(shape, window, strides, padding, values):
    x = values(shape)
    expected = loop(x, window, strides, padding, lambda e: e.max(0, initial=-np.inf))
    # Small integers add up exactly in any order.
    g = np.random.default_rng(1).integers(1, 9, expected.shape).astype(np.float32)

    @jax.jit
    def pools(x):
        got, pull = jax.vjp(lambda x: layers.max_pool(x, window, strides, padding), x)
        _, pull_plain = jax.vjp(lambda x: _reduce_window(x, -jnp.inf, lax.max, window, strides, padding), x)
        return got, pull(g)[0], pull_plain(g)[0]

    got, gradient, plain = pools(x)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(gradient, plain)


@pytest.mark.parametrize(("shape", "window", "strides", "padding"), CASES, ids=IDS)
def test_avg_and_l2_norm_pool(shape, window, strides, padding):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    size = np.prod(window)
    padded = loop(x, window, strides, padding, lambda e: e.sum(0) / size)
    real = loop(x, window, strides, padding, lambda e: e.mean(0) if len(e) else 0)
    norm = loop(x, window, strides, padding, lambda e: np.sqrt((e**2).sum(0)))
    g = rng.standard_normal(padded.shape).astype(np.float32)

    @jax.jit
    def pools(x):
        got, pull = jax.vjp(lambda x: layers.avg_pool(x, window, strides, padding), x)
        _, pull_plain = jax.vjp(lambda x: _reduce_window(x, 0.0, lax.add, window, strides, padding) / size, x)
        without = layers.avg_pool(x, window, strides, padding, count_include_pad=False)
        return got, without, layers.l2_norm_pool(x, window, strides, padding), pull(g)[0], pull_plain(g)[0]

    *got, gradient, plain = pools(x)
    for value, expected in zip([*got, gradient], [padded, real, norm, plain], strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_gradients_in_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.permutation(84).reshape(1, 6, 7, 2) / 10)
        pools = [
            lambda x: layers.max_pool(x, 3, 2, "SAME"),
            lambda x: layers.max_pool(x, 2),
            lambda x: layers.avg_pool(x, 3, 2, "SAME", count_include_pad=False),
            lambda x: layers.l2_norm_pool(x, (3, 2), (2, 1)),
            lambda x: layers.adaptive_avg_pool(x, (4, 3)),
            lambda x: layers.depthwise_max_pool(x, 2),
            lambda x: layers.depthwise_avg_pool(x, 2),
            layers.global_avg_pool,
            layers.global_max_pool,
        ]
        for pool in pools:
            assert pool(x).dtype == jnp.float64
            check_grads(jax.jit(pool), (x,), order=1, modes=("fwd", "rev"), eps=1e-3)


def test_nan_and_infinity():
    for at in range(3):
        x = np.arange(12, dtype=np.float32).reshape(1, 12, 1)
        x[0, 6 + at] = np.nan
        pooled = np.asarray(layers.max_pool(x, 3)).ravel()
        np.testing.assert_array_equal(pooled, [2, 5, np.nan, 11])
        pooled = np.asarray(layers.depthwise_max_pool(x.reshape(1, 12), 3)).ravel()
        np.testing.assert_array_equal(pooled, [2, 5, np.nan, 11])
    x = jnp.array([[-jnp.inf, -jnp.inf, 1, jnp.inf]])[..., None]
    np.testing.assert_array_equal(layers.max_pool(x, 2).ravel(), [-np.inf, np.inf])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8])
def test_dtypes(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 200, (2, 5, 7, 4)), dtype)
    reference = np.asarray(x, np.float32)
    got = layers.max_pool(x, 3, 2, "SAME")
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(jnp.float32), layers.max_pool(reference, 3, 2, "SAME"))
    result = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
    for pool in (
        lambda x: layers.avg_pool(x, 3, 2, "SAME", count_include_pad=False),
        lambda x: layers.l2_norm_pool(x, 2),
        lambda x: layers.adaptive_avg_pool(x, 3),
        lambda x: layers.depthwise_avg_pool(x, 2),
        layers.global_avg_pool,
    ):
        got = pool(x)
        assert got.dtype == result
        # Rounded once, at the end.
        np.testing.assert_array_equal(got, pool(reference).astype(result))


def test_numpy_float64_becomes_float32():
    x = np.ones((1, 4, 4, 2))
    for pool in (layers.max_pool, layers.avg_pool, layers.l2_norm_pool, layers.adaptive_avg_pool):
        assert pool(x, 2).dtype == jnp.float32
    for pool in (layers.global_avg_pool, layers.global_max_pool):
        assert pool(x).dtype == jnp.float32


def test_average_of_a_constant_is_exact():
    x = np.full((1, 7, 8, 2), 0.75, np.float32)
    got = layers.avg_pool(x, 3, 1, "SAME", count_include_pad=False)
    np.testing.assert_array_equal(got, x)


def test_strides_default_to_the_window():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(layers.max_pool(x, 2)[0, :, :, 0], [[5, 7], [13, 15]])
    np.testing.assert_array_equal(layers.avg_pool(x, 2)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])


# From torch.nn.functional.{max,avg}_pool1d(ceil_mode=True) on 1, 2, ..., n: n, window, stride, padding, maxima,
# averages that count the padding, averages that do not.
TORCH_CEIL = [
    (6, 3, 2, 0, [3, 5, 6], [2, 4, 5.5], [2, 4, 5.5]),
    (7, 3, 2, 1, [2, 4, 6, 7], [1, 3, 5, 13 / 3], [1.5, 3, 5, 6.5]),
    (5, 2, 2, 1, [1, 3, 5], [0.5, 2.5, 4.5], [1, 2.5, 4.5]),
    (6, 2, 2, 1, [1, 3, 5, 6], [0.5, 2.5, 4.5, 3], [1, 2.5, 4.5, 6]),
    (6, 3, 3, 1, [2, 5, 6], [1, 4, 3], [1.5, 4, 6]),
    (5, 2, 3, 0, [2, 5], [1.5, 4.5], [1.5, 4.5]),
    (4, 1, 3, 0, [1, 4], [1, 4], [1, 4]),
    (2, 3, 2, 0, [2], [1.5], [1.5]),
    (1, 2, 2, 0, [1], [1], [1]),
    (1, 3, 2, 1, [1], [1 / 3], [1]),
]


@pytest.mark.parametrize(("n", "window", "stride", "pad", "largest", "padded", "real"), TORCH_CEIL)
def test_ceil_mode_as_torch(n, window, stride, pad, largest, padded, real):
    x = np.arange(1, n + 1, dtype=np.float32).reshape(1, n, 1)
    args = (x, window, stride, [(pad, pad)])
    np.testing.assert_array_equal(layers.max_pool(*args, ceil_mode=True).ravel(), largest)
    np.testing.assert_allclose(layers.avg_pool(*args, ceil_mode=True).ravel(), padded, rtol=1e-6)
    got = layers.avg_pool(*args, ceil_mode=True, count_include_pad=False)
    np.testing.assert_allclose(got.ravel(), real, rtol=1e-6)


def test_figures_of_keras():
    """Keras' MaxPooling2D and AveragePooling2D(3, 2, "same") on a 5x4 map of (7 i) mod 11."""
    x = (np.arange(20) * 7 % 11).astype(np.float32).reshape(1, 5, 4, 1)
    np.testing.assert_array_equal(layers.max_pool(x, 3, 2, "SAME")[0, :, :, 0], [[9, 10], [10, 10], [10, 10]])
    got = layers.avg_pool(x, 3, 2, "SAME", count_include_pad=False)[0, :, :, 0]
    np.testing.assert_allclose(got, [[4.5, 6.75], [50 / 9, 17 / 3], [6, 5.5]], rtol=1e-6)


def test_l2_norm_pool_gradient_at_zero():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(3.0)
    gradient = jax.grad(lambda x: layers.l2_norm_pool(x, 2).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x).at[0, 0, 0, 0].set(1.0))


@pytest.mark.parametrize("output_size", [1, 3, 5, (6, 2), (14, 9)])
def test_adaptive_avg_pool(output_size):
    x = np.random.default_rng(0).standard_normal((2, 6, 9, 3)).astype(np.float32)
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    expected = np.zeros((2, rows, columns, 3))
    for i, j in itertools.product(range(rows), range(columns)):
        top, bottom = int(np.floor(i * 6 / rows)), int(np.ceil((i + 1) * 6 / rows))
        left, right = int(np.floor(j * 9 / columns)), int(np.ceil((j + 1) * 9 / columns))
        expected[:, i, j] = x[:, top:bottom, left:right].mean((1, 2))
    np.testing.assert_allclose(layers.adaptive_avg_pool(x, output_size), expected, rtol=1e-5, atol=1e-6)


def test_adaptive_avg_pool_keeps_bins_apart():
    x = np.ones((1, 5, 1), np.float32)
    x[0, 0] = np.inf
    np.testing.assert_allclose(layers.adaptive_avg_pool(x, 3).ravel(), [np.inf, 1, 1])


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 4, 5, 3), (2, 3, 4, 5, 3)])
def test_global_pools(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rows = x.reshape(2, -1, 3)
    np.testing.assert_allclose(layers.global_avg_pool(x), [r.mean(0) for r in rows], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layers.global_max_pool(jnp.asarray(x)), [r.max(0) for r in rows])


def test_depthwise_pools():
    x = np.random.default_rng(0).integers(-2, 2, (2, 3, 4, 6)).astype(np.float32)
    largest = [[max(v[0:3]), max(v[3:6])] for v in x.reshape(-1, 6)]
    mean = [[sum(v[0:3]) / 3, sum(v[3:6]) / 3] for v in x.reshape(-1, 6)]
    got, pull = jax.vjp(lambda x: layers.depthwise_max_pool(x, 3), x)
    np.testing.assert_array_equal(got.reshape(-1, 2), largest)
    np.testing.assert_allclose(layers.depthwise_avg_pool(x, 3).reshape(-1, 2), mean, rtol=1e-6)
    g = np.random.default_rng(1).integers(1, 9, got.shape).astype(np.float32)
    window = (1, 1, 1, 3)
    _, pull_plain = jax.vjp(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID"), x)
    np.testing.assert_array_equal(pull(g)[0], pull_plain(g)[0])
    for pool in (layers.depthwise_max_pool, layers.depthwise_avg_pool):
        with pytest.raises(ValueError, match="window must divide the 6 channels of x; got 4"):
            pool(x, 4)


def test_trainable_avg_pool():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 7, 5)), jnp.float32)
    layer = layers.TrainableAvgPool()
    variables = layer.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"coefficient": (5,), "bias": (5,)}}
    np.testing.assert_allclose(layer.apply(variables, x), layers.avg_pool(x, 2), rtol=1e-5, atol=1e-6)
    coefficient, bias = np.arange(1, 6, dtype=np.float32), np.arange(5, dtype=np.float32) - 2
    got = layer.apply({"params": {"coefficient": coefficient, "bias": bias}}, x)
    summed = loop(np.asarray(x), (2, 2), (2, 2), "VALID", lambda e: e.sum(0))
    np.testing.assert_allclose(got, summed * coefficient + bias, rtol=1e-5, atol=1e-5)
    narrow = layers.TrainableAvgPool(dtype=jnp.bfloat16)
    assert narrow.apply(variables, x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: layers.max_pool(x, (2, 2, 2)),
            r"window_shape must be a positive integer or 2 of them; got \(2, 2, 2\)",
        ),
        (lambda x: layers.max_pool(x, 0), "window_shape must be a positive integer or 2 of them; got 0"),
        (lambda x: layers.max_pool(x, 2, (1, -1)), r"strides must be a positive integer or 2 of them; got \(1, -1\)"),
        (lambda x: layers.avg_pool(x, 2, padding="same"), "padding must be .* got 'same'"),
        (
            lambda x: layers.avg_pool(x, 2, padding=[(0, 1)]),
            r"padding must be 2 \(low, high\) pairs, .* got \[\(0, 1\)\]",
        ),
        (lambda x: layers.avg_pool(x, 2, padding=[(0, 1), (-1, 0)]), "padding must be 2 .* none negative"),
        (lambda x: layers.l2_norm_pool(x, 5), r"window_shape must fit into the size \(4, 6\) of x .*; got \(5, 5\)"),
        (lambda x: layers.global_avg_pool(x[0, 0]), r"x must be \[N, \*spatial, C\] .* got the shape \(6, 3\)"),
        (lambda x: layers.adaptive_avg_pool(x, 0), "output_size must be a positive integer or 2 of them; got 0"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros((1, 4, 6, 3), np.float32))


def test_lowers_for_every_platform():
    def train(x):
        return jax.grad(lambda x: (layers.max_pool(x, 3, 2, "SAME") ** 2).sum() + layers.avg_pool(x, 2).sum())(x)

    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    exported = jax.export.export(jax.jit(train), platforms=["cpu", "cuda", "tpu"])(x)
    # Each platform has its own form.
    assert "select_and_scatter" in exported.mlir_module()
    assert "select_and_scatter" not in jax.jit(train).lower(x).as_text()
    x = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    np.testing.assert_allclose(exported.call(x), train(x), rtol=1e-6)


def test_under_vmap_and_outside_jit_alike():
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 6, 2)).astype(np.float32)
    got = jax.vmap(lambda x: layers.max_pool(x, 3, 2, "SAME"))(x)
    np.testing.assert_array_equal(got, np.stack([layers.max_pool(v, 3, 2, "SAME") for v in x]))


def test_whole_numbers_in_any_form_and_nothing_else():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6, 2)), jnp.float32)
    want = layers.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    np.testing.assert_array_equal(layers.max_pool(x, 3, np.int64(2), 1), want)
    with pytest.raises(ValueError, match=r"strides must be an integer or 2 of them; got 2\.0"):
        layers.max_pool(x, 2, 2.0)


@pytest.mark.parametrize(
    "pool", [layers.global_avg_pool, lambda x: layers.adaptive_avg_pool(x, 2)], ids=["global", "adaptive"]
)
def test_bfloat16_means_after_two_relus(pool):
    """jaxlib 0.11.2 to 0.12.0.1 give NaN on a CPU where they fuse all of this."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 32)), jnp.bfloat16)
    form = lambda x: pool(jax.nn.relu(jax.nn.relu(x) + x))
    with jax.disable_jit():
        expected = form(x)
    got = jax.jit(form, compiler_options=AS_USERS)(x)
    np.testing.assert_array_equal(got.astype(jnp.float32), expected.astype(jnp.float32))
