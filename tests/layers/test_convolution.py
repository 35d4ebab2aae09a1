"""Convolutions against a numpy loop, against plain lax, and lowered for platforms that are not here."""

from functools import partial
from itertools import product

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from flaxvision.layers import convolution, lowering
from flaxvision.layers.convolution import Conv, ConvTranspose, DepthwiseConv, SeparableConv, conv, conv_transpose
from flaxvision.layers.lowering import dimension_numbers_of
from flaxvision.layers.lowering.convolution import Convolution
from flaxvision.layers.lowering.primitive import call
from flaxvision.layers.lowering.window import Window, lax_conv


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def loop(x, kernel, strides, pads, dilation, groups=1):
    """Cross-correlation, one output position and one group at a time, in float64."""
    x = np.pad(x.astype(np.float64), [(0, 0), *((max(a, 0), max(b, 0)) for a, b in pads), (0, 0)])
    crops = [slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in zip(x.shape[1:], pads, strict=False)]
    x = x[(slice(None), *crops)]
    kernel = kernel.astype(np.float64)
    window, (inside, features) = kernel.shape[:-2], kernel.shape[-2:]
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    out = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
    y = np.zeros((len(x), *out, features))
    each = features // groups
    for place in product(*map(range, out)):
        spans = [slice(p * s, p * s + r, d) for p, s, r, d in zip(place, strides, reach, dilation, strict=True)]
        seen = x[(slice(None), *spans)]
        for g in range(groups):
            part = seen[..., g * inside : (g + 1) * inside].reshape(len(x), -1)
            filters = kernel[..., g * each : (g + 1) * each].reshape(-1, each)
            y[(slice(None), *place, slice(g * each, (g + 1) * each))] = part @ filters
    return y


def same(size, window, stride):
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def close(actual, desired, tolerance=1e-5):
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    assert np.abs(actual - desired).max() <= tolerance * np.abs(desired).max()


CASES = {
    # name: x, kernel, stride, padding, dilation, groups
    "1d": ((3, 90, 16), (4, 16, 6), 2, "SAME", 1, 1),
    "2d": ((3, 9, 8, 4), (3, 3, 4, 6), 1, "SAME", 1, 1),
    "2d valid": ((5, 12, 11, 16), (3, 2, 16, 6), 1, "VALID", 1, 1),
    "2d valid stride": ((3, 9, 8, 3), (3, 2, 3, 32), 2, "VALID", 1, 1),
    "one channel": ((2, 7, 8, 1), (3, 3, 1, 32), 1, "SAME", 1, 1),
    "3d": ((2, 6, 5, 4, 2), (3, 2, 3, 2, 32), 1, "SAME", 1, 1),
    "explicit": ((9, 9, 12, 5), (3, 3, 5, 32), 2, ((2, 0), (-1, 3)), 1, 1),
    "atrous": ((2, 15, 11, 16), (3, 3, 16, 4), 1, "SAME", 2, 1),
    "pointwise": ((3, 9, 8, 4), (1, 1, 4, 6), 1, "SAME", 1, 1),
    "pointwise stride": ((3, 9, 8, 4), (1, 1, 4, 6), 2, ((1, 0), (0, 1)), 1, 1),
    "one pixel of many": ((1, 3, 3, 7), (3, 3, 7, 2), 1, "VALID", 1, 1),
    "grouped": ((3, 7, 8, 12), (3, 3, 3, 8), 1, "SAME", 1, 4),
    "grouped wide": ((2, 5, 5, 128), (3, 3, 64, 6), 2, "SAME", 1, 2),
    "depthwise": ((3, 9, 8, 6), (3, 3, 1, 6), 1, "SAME", 1, 6),
    "depthwise multiplier": ((3, 9, 8, 4), (3, 3, 1, 12), 2, "VALID", 1, 4),
    "depthwise atrous": ((2, 9, 8, 4), (3, 2, 1, 8), 1, ((1, 2), (3, 0)), 2, 4),
    "depthwise 1d": ((2, 9, 4), (5, 1, 4), 1, "SAME", 1, 4),
}


@pytest.fixture(params=CASES)
def case(request):
    x, kernel, stride, padding, dilation, groups = CASES[request.param]
    return normal(*x), normal(*kernel, seed=1), stride, padding, dilation, groups


def plain(x, kernel, stride, padding, dilation, groups):
    rank = x.ndim - 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * rank,
        padding,
        rhs_dilation=(dilation,) * rank,
        dimension_numbers=dimension_numbers_of(rank),
        feature_group_count=groups,
    )


def ours(x, kernel, stride, padding, dilation, groups):
    return conv(x, kernel, stride, padding, kernel_dilation=dilation, feature_group_count=groups)


def gradients(fn, *operands, seed=2):
    y, pull = jax.vjp(fn, *operands)
    return y, *pull(jnp.asarray(normal(*y.shape, seed=seed), y.dtype))


def lowered(fn, *operands):
    """The value and the gradients of a function as one program."""
    return jax.jit(lambda *operands: gradients(fn, *operands)).lower(*operands)


def compiled(fn, *operands):
    return lowered(fn, *operands).compile()(*operands)


def test_the_numpy_loop_and_gradients_of_plain_lax(case):
    x, kernel, stride, padding, dilation, groups = case
    rank, window = x.ndim - 2, kernel.shape[:-2]
    pads = padding
    if isinstance(padding, str):
        reach = [(k - 1) * dilation + 1 for k in window]
        sizes = zip(x.shape[1:-1], reach, strict=True)
        pads = [same(n, r, stride) if padding == "SAME" else (0, 0) for n, r in sizes]
    mine, theirs = (compiled(lambda x, k, f=f: f(x, k, *case[2:]), x, kernel) for f in (ours, plain))
    close(mine[0], loop(x, kernel, (stride,) * rank, pads, (dilation,) * rank, groups))
    jax.tree.map(close, mine, theirs)


@pytest.mark.parametrize("name", ["2d valid", "explicit", "pointwise stride", "grouped", "depthwise multiplier"])
def test_float64(name):
    x, kernel, *how = CASES[name]
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(normal(*x, dtype=np.float64)), jnp.asarray(normal(*kernel, seed=1, dtype=np.float64))
        mine, theirs = (compiled(lambda x, k, f=f: f(x, k, *how), x, kernel) for f in (ours, plain))
        assert mine[0].dtype == jnp.float64
        jax.tree.map(partial(close, tolerance=1e-12), mine, theirs)


@pytest.mark.parametrize(
    ("x", "window", "strides", "padding"),
    [
        ((8, 3, 7, 64), (3, 5), (3, 1), ((1, 1), (2, 2))),
        ((8, 3, 4, 68), (3, 4), (4, 2), ((2, 0), (2, 2))),
        ((2, 1, 1, 64), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ],
)
def test_strides_over_maps_of_one_position(x, window, strides, padding):
    """More padding than the first phases of the gradient need: XLA aborts where a map is cropped to nothing."""
    x, kernel = normal(*x), normal(*window, x[-1], 64, seed=1)
    w = Window(strides, padding, (1, 1), (1, 1))
    mine = compiled(lambda x, k: call(Convolution(w), x, k), x, kernel)
    jax.tree.map(close, mine, compiled(lambda x, k: lax_conv(x, k, w), x, kernel))


@pytest.mark.parametrize("layer", [Conv(8, (1, 1)), Conv(8, (3, 3), 2), DepthwiseConv((3, 3))], ids=str)
def test_export_of_any_batch(layer):
    x = normal(3, 9, 8, 4)
    variables = layer.init(jax.random.key(0), x)
    shape = export.symbolic_shape("n, 9, 8, 4")
    forward = jax.jit(lambda x: jax.value_and_grad(lambda x: jnp.sin(layer.apply(variables, x)).sum())(x))
    exported = export.export(forward, platforms=["cpu", "cuda"])(jax.ShapeDtypeStruct(shape, jnp.float32))
    jax.tree.map(close, exported.call(x), forward(x))


@pytest.mark.parametrize(
    ("window", "strides", "padding", "transpose_kernel"),
    [
        ((3, 3), (2, 2), "SAME", True),
        ((4, 2), (2, 3), "SAME", False),
        ((4, 4), (2, 2), "VALID", True),
        ((1, 5), (3, 1), "VALID", False),
        ((3, 2), (2, 1), "CIRCULAR", True),
        ((2, 3), (1, 2), "CIRCULAR", False),
        ((3, 3), (2, 2), ((2, 1), (0, 3)), False),
    ],
)
def test_transposed_agrees_with_linen(window, strides, padding, transpose_kernel):
    x = normal(2, 4, 5, 3)
    fields = {"strides": strides, "padding": padding, "transpose_kernel": transpose_kernel}
    theirs, mine = (cls(4, window, **fields) for cls in (nn.ConvTranspose, ConvTranspose))
    variables = theirs.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, mine.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, variables)
    results = [
        jax.jit(lambda v, x, m=m: gradients(lambda v, x: m.apply(v, x), v, x))(variables, x) for m in (mine, theirs)
    ]
    jax.tree.map(close, *results)


@pytest.mark.parametrize("stride", [2, 3])
def test_transposed_is_the_gradient_of_conv(stride):
    """The definition of Keras' layer, against the numpy loop's Jacobian."""
    x, kernel = normal(1, 5, 4, 2), normal(3, 3, 3, 2, seed=1)
    wide = (1, 5 * stride, 4 * stride, 3)
    pads = [same(n, 3, stride) for n in wide[1:3]]
    basis = np.eye(np.prod(wide)).reshape(-1, *wide[1:])
    jacobian = loop(basis, kernel, (stride, stride), pads, (1, 1))
    expected = jacobian.reshape(len(basis), -1) @ x.reshape(-1)
    close(conv_transpose(x, kernel, stride, transpose_kernel=True), expected.reshape(wide))


@pytest.mark.parametrize("size", [(9,), (3, 4, 3)])
def test_transposed_in_other_ranks(size):
    x, kernel = normal(2, *size, 2), normal(*(3,) * len(size), 2, 3, seed=1)
    mine = compiled(lambda x, k: conv_transpose(x, k, 2), x, kernel)
    numbers = dimension_numbers_of(len(size))
    theirs = compiled(
        lambda x, k: lax.conv_transpose(x, k, (2,) * len(size), "SAME", dimension_numbers=numbers), x, kernel
    )
    jax.tree.map(close, mine, theirs)


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", 2, (1, (0, 2))], ids=str)
def test_paddings_and_parameters_of_linen(padding):
    x = normal(2, 3, 9, 8, 4)  # two batch dimensions
    theirs, mine = (cls(6, (3, 2), 2, padding, kernel_dilation=2) for cls in (nn.Conv, Conv))
    y, variables = theirs.init_with_output(jax.random.key(0), x)
    own, own_variables = mine.init_with_output(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, own_variables, variables)
    close(own, y)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    flat = conv(x.reshape(6, 9, 8, 4), kernel, 2, padding, kernel_dilation=2) + bias.reshape(1, 1, 1, 6)
    close(flat.reshape(y.shape), y)


def test_causal_padding():
    x, kernel = normal(2, 9, 3), normal(3, 3, 4, seed=1)
    close(conv(x, kernel, padding="CAUSAL", kernel_dilation=2), loop(x, kernel, (1,), [(4, 0)], (2,)))
    with pytest.raises(ValueError, match="one spatial dimension"):
        conv(normal(1, 4, 4, 1), normal(3, 3, 1, 1), padding="CAUSAL")


def test_depthwise_module():
    x = normal(2, 7, 6, 3)
    layer = DepthwiseConv((3, 3), channel_multiplier=2)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"kernel": (3, 3, 1, 6), "bias": (6,)}
    close(y, nn.Conv(6, (3, 3), feature_group_count=3).apply(variables, x))
    # filter m of channel c is feature 2 c + m
    kernel = np.asarray(variables["params"]["kernel"])
    close(y[..., 3:4], loop(x[..., 1:2], kernel[..., 3:4], (1, 1), [(1, 1)] * 2, (1, 1)))


def test_separable_module():
    x = normal(2, 7, 6, 3)
    layer = SeparableConv(5, (3, 3), strides=2, channel_multiplier=2)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    params = variables["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "depthwise": {"kernel": (3, 3, 1, 6)},
        "pointwise": {"kernel": (1, 1, 6, 5), "bias": (5,)},
    }
    depthwise, pointwise = np.asarray(params["depthwise"]["kernel"]), np.asarray(params["pointwise"]["kernel"])
    between = loop(x, depthwise, (2, 2), [same(7, 3, 2), same(6, 3, 2)], (1, 1), 3)
    expected = loop(between, pointwise, (1, 1), [(0, 0)] * 2, (1, 1))
    close(y, expected)
    close(convolution.separable_conv(x, depthwise, pointwise, 2), expected)


MODULES = {
    "conv": Conv(4, (3, 3), padding="VALID"),
    "strided": Conv(4, (3, 3), 2),
    "pointwise": Conv(4, (1, 1)),
    "grouped": Conv(8, (3, 3), feature_group_count=2),
    "transposed": ConvTranspose(4, (3, 3), (2, 2)),
    "separable": SeparableConv(4, (3, 3), channel_multiplier=2),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_lowers_for_every_platform(name, dtype):
    layer = MODULES[name].clone(dtype=dtype)
    x = jnp.zeros((2, 8, 8, 4), dtype)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    loss = lambda v, x: layer.apply(v, x).astype(jnp.float32).sum()
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    exported = export.export(step, platforms=["cpu", "cuda", "tpu"])(variables, x)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    for platform in ("cuda", "tpu"):
        text = str(export.export(step, platforms=[platform])(variables, x).mlir_module())
        assert "stablehlo.convolution" in text
        assert "stablehlo.while" not in text  # nothing of the CPU's forms


@pytest.mark.parametrize("name", ["conv", "pointwise", "grouped", "transposed", "separable"])
def test_bfloat16(name):
    layer = MODULES[name]
    x = jnp.asarray(normal(2, 5, 4, 4))
    variables = layer.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    half = layer.clone(dtype=jnp.bfloat16)
    y = half.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    close(y, layer.apply(variables, x), 2e-2)
    grads = jax.grad(lambda v: half.apply(v, x).astype(jnp.float32).sum())(variables)
    full = jax.grad(lambda v: layer.apply(v, x).sum())(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    jax.tree.map(partial(close, tolerance=5e-2), grads, full)


@pytest.mark.parametrize("name", ["2d valid", "pointwise", "grouped", "depthwise multiplier"])
def test_vmap_and_scan(name):
    x, kernel, *how = CASES[name]
    x, kernel = normal(3, *x), normal(3, *kernel, seed=1)
    grad = jax.grad(lambda k, x: jnp.sin(ours(x, k, *how)).sum())
    expected = [jax.grad(lambda k, x=x: jnp.sin(plain(x, k, *how)).sum())(k) for x, k in zip(x, kernel, strict=True)]
    close(jax.jit(jax.vmap(grad))(kernel, x), np.stack(expected))
    close(jax.jit(lambda k, x: lax.map(lambda kx: grad(*kx), (k, x)))(kernel, x), np.stack(expected))


@pytest.mark.parametrize("name", ["2d valid", "2d valid stride", "depthwise"])
def test_hessian_vector_product(name):
    x, kernel, *how = CASES[name]
    x, kernel, v = normal(*x), normal(*kernel, seed=1), normal(*kernel, seed=3)

    def product(form):
        grad = jax.grad(lambda k: jnp.sin(form(x, k, *how)).sum())
        return jax.jit(lambda k, v: jax.jvp(grad, (k,), (v,))[1])(kernel, v)

    close(product(ours), product(plain))


def test_what_is_not_ours_goes_to_lax():
    x, kernel = normal(2, 3, 6, 6), normal(4, 3, 3, 3, seed=1)  # channels first, lax's default
    close(lowering.conv_general_dilated(x, kernel, (1, 1), "SAME"), lax.conv_general_dilated(x, kernel, (1, 1), "SAME"))
    whole = conv(jnp.ones((1, 4, 4, 1), jnp.int32), jnp.ones((3, 3, 1, 1), jnp.int32))
    assert whole.dtype == jnp.int32
    assert whole[0, 1, 1, 0] == 9
    assert conv(jnp.ones((0, 4, 4, 1)), jnp.ones((3, 3, 1, 2))).shape == (0, 4, 4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (4, 4, 3)}, r"same rank.*\(4, 4, 3\)"),
        ({"kernel": (3, 3, 4, 6)}, r"kernel must have 3 / 1 .* got the shape \(3, 3, 4, 6\)"),
        ({"strides": (1, 2, 3)}, r"strides must be .* got \(1, 2, 3\)"),
        ({"strides": 0}, "strides must be .* got 0"),
        ({"kernel_dilation": -1}, "kernel_dilation must be .* got -1"),
        ({"feature_group_count": 2}, "feature_group_count must divide the 3 channels of x .* got 2"),
        ({"padding": "HALF"}, "padding must be .* got 'HALF'"),
        ({"padding": (1, 2, 3)}, "Invalid padding"),
    ],
)
def test_errors_name_the_argument(change, message):
    fields = {"x": (1, 4, 4, 3), "kernel": (3, 3, 3, 6)} | change
    x, kernel = jnp.zeros(fields.pop("x")), jnp.zeros(fields.pop("kernel"))
    with pytest.raises(ValueError, match=message):
        conv(x, kernel, **fields)


def test_errors_of_the_transposed():
    with pytest.raises(ValueError, match="kernel must have the 3 input channels of x; got 4"):
        conv_transpose(jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 4, 6)))
    with pytest.raises(ValueError, match=r"padding must be .* got 'CAUSAL'"):
        conv_transpose(jnp.zeros((1, 4, 3)), jnp.zeros((3, 3, 6)), padding="CAUSAL")
    with pytest.raises(ValueError, match="mask must have the kernel's shape"):
        ConvTranspose(2, (3,), mask=jnp.ones((3, 1))).init(jax.random.key(0), jnp.zeros((1, 4, 3)))


def test_strides_of_numpy_integers():
    x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 4))
    np.testing.assert_array_equal(conv(x, kernel, np.int64(2)), conv(x, kernel, 2))


def test_a_nan_stays_within_its_block_of_groups():
    """The CPU form computes several groups together: a NaN reaches those, as its docstring says, and no other."""
    x = jnp.ones((1, 4, 4, 128)).at[0, 0, 0, 0].set(jnp.nan)
    y = conv(x, jnp.ones((3, 3, 4, 128)), feature_group_count=32)
    bad = np.flatnonzero(np.isnan(np.asarray(y)).any((0, 1, 2)))
    assert 0 < len(bad) <= 32
    assert bad.max() < 32
