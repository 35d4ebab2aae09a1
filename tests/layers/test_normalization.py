"""Batch normalization against Linen's and the paper's algorithm; response normalization against a loop and others."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

from flaxvision.layers import BatchNorm, Conv, local_response_norm


def loop(x, size, alpha, beta, k):
    out = np.zeros_like(x, np.float64)
    depth = x.shape[-1]
    for i in range(depth):
        energy = 0.0
        for j in range(i - size // 2, i + (size - 1) // 2 + 1):
            if 0 <= j < depth:
                energy = energy + x[..., j].astype(np.float64) ** 2
        out[..., i] = x[..., i] / (k + alpha * energy) ** beta
    return out


@pytest.mark.parametrize(("size", "beta"), [(1, 0.75), (2, 0.75), (5, 0.75), (4, 0.6), (15, 1.0)])
def test_against_a_loop(size, beta):
    x = 3 * np.random.default_rng(0).standard_normal((2, 3, 7)).astype(np.float32)
    got = local_response_norm(x, size=size, alpha=0.3, beta=beta, k=1.5)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loop(x, size, 0.3, beta, 1.5), rtol=2e-6)


def test_defaults_are_the_papers():
    x = 100 * np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    np.testing.assert_allclose(local_response_norm(x), loop(x, 5, 1e-4, 0.75, 2.0), rtol=2e-6)


# torch.nn.LocalResponseNorm(size, alpha=0.5, beta=0.75, k=1) on the channels 1, 2, ..., 6.
TORCH = {
    5: [0.5186107754707336, 0.7071067690849304, 0.7369469404220581, 0.7113117575645447, 0.9167830348, 1.1844365597],
    4: [0.6948002576828003, 0.9365489482879639, 0.9323974251747131, 0.8611597418785095, 0.7878465056, 1.0195406675],
    3: [0.6347006559371948, 0.8107201457023621, 0.7992518544197083, 0.7490872740745544, 0.6970675588, 0.9822195172],
    2: [0.8458969593048096, 1.0886621475219727, 1.0135135650634766, 0.905329167842865, 0.8139647841, 0.7413294315],
}


@pytest.mark.parametrize("size", TORCH)
def test_figures_of_torch(size):
    x = np.arange(1, 7, dtype=np.float32)
    got = local_response_norm(x, size=size, alpha=0.5 / size, beta=0.75, k=1)
    np.testing.assert_allclose(got, TORCH[size], rtol=2e-6)


def _radius(x, radius, bias, alpha, beta):
    """TensorFlow's rule: `sqr_sum[d] = sum(x[d - radius : d + radius + 1] ** 2)`."""
    energy = [sum(v * v for v in x[max(0, i - radius) : i + radius + 1]) for i in range(len(x))]
    return [v / (bias + alpha * e) ** beta for v, e in zip(x, energy, strict=True)]


def test_convention_of_tensorflow_and_the_book():
    x = [3.0, -1.0, 4.0, 1.0, -5.0]
    got = local_response_norm(jnp.array(x), size=2 * 2 + 1, alpha=0.2, beta=0.5, k=1)
    np.testing.assert_allclose(got, _radius(x, 2, 1, 0.2, 0.5), rtol=2e-6)
    # The book's r = 2 reaches one channel up and one down.
    got = local_response_norm(jnp.array(x), size=2 * (2 // 2) + 1, alpha=0.2, beta=0.75, k=1)
    np.testing.assert_allclose(got, _radius(x, 1, 1, 0.2, 0.75), rtol=2e-6)


@pytest.mark.parametrize(("size", "beta"), [(5, 0.75), (4, 0.6)])
def test_gradient_in_float64(size, beta):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7)))
        norm = jax.jit(lambda x: local_response_norm(x, size=size, alpha=0.4, beta=beta, k=1.2))
        assert norm(x).dtype == jnp.float64
        check_grads(norm, (x,), order=1, modes=("fwd", "rev"), eps=1e-4)


def test_bfloat16_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)), jnp.bfloat16)
    got = local_response_norm(x, size=5, alpha=0.5)
    expected = local_response_norm(x.astype(jnp.float32), size=5, alpha=0.5).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, expected)


def test_wrong_size():
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        local_response_norm(jnp.ones((1, 3)), size=0)


def batch(*shape, dtype=np.float32):
    """Channels whose means and deviations differ."""
    x = np.random.default_rng(0).standard_normal(shape)
    return (x * np.linspace(0.5, 2, shape[-1]) + np.linspace(-1, 3, shape[-1])).astype(dtype)


def drawn(norm, x):
    """Variables other than those that a layer starts with."""
    rng = np.random.default_rng(1)
    variables = norm.init(jax.random.key(0), x, use_running_average=True)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype), variables)


FORMS = {
    "images": ((4, 6, 5, 8), {}),
    "rows": ((64, 3), {"momentum": 0.9, "epsilon": 1e-3}),
    "volume": ((2, 3, 4, 5, 6), {"use_scale": False}),
    "no shift": ((4, 6, 5, 8), {"use_bias": False}),
    "neither": ((4, 6, 5, 8), {"use_bias": False, "use_scale": False}),
    "bfloat16": ((4, 6, 5, 8), {"dtype": jnp.bfloat16}),
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("form", FORMS)
def test_linens_batch_norm(form, train):
    """Outputs, statistics and gradients, by the same variables."""
    shape, fields = FORMS[form]
    x = jnp.asarray(batch(*shape), fields.get("dtype"))
    ours, theirs = BatchNorm(**fields), nn.BatchNorm(**fields)
    variables = drawn(ours, x)
    assert jax.tree.structure(variables) == jax.tree.structure(drawn(theirs, x))
    weights = np.random.default_rng(2).standard_normal(shape).astype(np.float32)

    def run(norm, variables, x):
        def loss(params, x):
            y, updates = norm.apply(
                {**variables, "params": params}, x, use_running_average=not train, mutable=["batch_stats"]
            )
            return (weights * jnp.sin(y.astype(jnp.float32))).sum(), (y, updates)

        gradients, (y, updates) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables.get("params", {}), x)
        return y, updates, gradients

    got, want = (jax.jit(partial(run, norm))(variables, x) for norm in (ours, theirs))
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(lambda leaf: leaf.dtype, want)
    # Rounding to bfloat16 can tip over on one side alone.
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if form == "bfloat16" else {"rtol": 2e-5, "atol": 2e-5}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b, **tolerance), got, want)


def test_the_papers_algorithm():
    """Ioffe and Szegedy 2015, algorithm 1, in float64."""
    with jax.enable_x64(True):
        x = batch(4, 6, 5, 8, dtype=np.float64)
        norm = BatchNorm(momentum=0.9, epsilon=1e-3)
        variables = drawn(norm, x)
        y, updates = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        scale, bias = (np.asarray(variables["params"][name]) for name in ("scale", "bias"))
        np.testing.assert_allclose(y, scale * (x - mean) / np.sqrt(var + 1e-3) + bias, rtol=1e-12, atol=1e-12)
        for name, value in (("mean", mean), ("var", var)):
            old = np.asarray(variables["batch_stats"][name], np.float64)
            np.testing.assert_allclose(updates["batch_stats"][name], 0.9 * old + 0.1 * value, rtol=1e-6)


def test_second_derivatives_of_batch_norm():
    """Forward over reverse, and reverse over reverse, against Linen's."""
    x = jnp.asarray(batch(3, 4, 5, 2))
    v = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape), jnp.float32)

    def products(cls):
        norm = cls(use_running_average=False)
        variables = norm.init(jax.random.key(0), x)
        grad = jax.grad(lambda x: jnp.sin(norm.apply(variables, x, mutable=["batch_stats"])[0]).sum())
        return jax.jvp(grad, (x,), (v,))[1], jax.grad(lambda x: (grad(x) * v).sum())(x)

    for got, want in zip(products(BatchNorm), products(nn.BatchNorm), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_statistics_over_devices():
    """Under `pmap` with an axis name, and under `jit` over a mesh, the statistics are the whole batch's."""
    devices = jax.device_count()
    assert devices > 1
    x = batch(2 * devices, 3, 3, 4)
    whole, alone = BatchNorm(use_running_average=False, axis_name="data"), BatchNorm(use_running_average=False)
    variables = alone.init(jax.random.key(0), x)
    want = alone.apply(variables, x, mutable=["batch_stats"])
    run = jax.pmap(partial(whole.apply, mutable=["batch_stats"]), axis_name="data", in_axes=(None, 0))
    y, updates = run(variables, x.reshape(devices, 2, *x.shape[1:]))
    np.testing.assert_allclose(y.reshape(x.shape), want[0], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[-1], b, rtol=1e-5, atol=1e-6), updates, want[1])

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    got = jax.jit(partial(alone.apply, mutable=["batch_stats"]))(variables, jax.device_put(x, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_gradients_under_shard_map():
    """Parameters are replicated, images are not: their gradients are summed over the devices."""
    spec = jax.sharding.PartitionSpec
    devices = jax.device_count()
    x = batch(devices, 13, 24, 16)

    class Net(nn.Module):
        axis_name: str | None = None

        @nn.compact
        def __call__(self, x):
            x = Conv(20, (3, 3), strides=2)(x)
            x = nn.relu(BatchNorm(use_running_average=False, axis_name=self.axis_name)(x))
            return Conv(8, (3, 3), feature_group_count=4)(x)

    variables = Net().init(jax.random.key(0), x)

    def loss(net, params, x):
        y, _ = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        total = jnp.sin(y).sum()
        return jax.lax.psum(total, net.axis_name) if net.axis_name else total

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    grad = jax.grad(partial(loss, Net("data")), argnums=(0, 1))
    split = {"in_specs": (spec(), spec("data")), "out_specs": (spec(), spec("data"))}
    got = jax.jit(jax.shard_map(grad, mesh=mesh, **split))(variables["params"], x)
    want = jax.jit(jax.grad(partial(loss, Net()), argnums=(0, 1)))(variables["params"], x)
    # The first bias stands before the normalization: its gradient is rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3), got, want)


@pytest.mark.parametrize("shape", [(1 << 20, 1), (1 << 17, 8), (99_991, 3)], ids=str)
def test_statistics_of_many_rows(shape):
    """The batch's mean and variance of a million numbers keep their digits."""
    x = 1 + np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    norm = BatchNorm(use_running_average=False, momentum=0.0)
    _, updates = jax.jit(lambda x: norm.init_with_output(jax.random.key(0), x))(x)
    _, updates = jax.jit(partial(norm.apply, mutable=["batch_stats"]))(updates, x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], wide.mean(0), rtol=3e-6)
    np.testing.assert_allclose(updates["batch_stats"]["var"], wide.var(0), rtol=2e-5)


def test_evaluation_has_a_forward_mode():
    x = jnp.asarray(batch(3, 4))
    variables = drawn(BatchNorm(), x)
    _, tangent = jax.jvp(partial(BatchNorm(use_running_average=True).apply, variables), (x,), (jnp.ones_like(x),))
    factor = variables["params"]["scale"] / jnp.sqrt(variables["batch_stats"]["var"] + 1e-5)
    np.testing.assert_allclose(tangent, jnp.broadcast_to(factor, x.shape), rtol=1e-6)


def test_fields_go_by_name():
    with pytest.raises(TypeError, match="positional"):
        BatchNorm(False, -1, 0.9)


def test_batch_norm_wants_to_know_which_statistics():
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm().init(jax.random.key(0), jnp.ones((2, 3)))


def test_batches_of_any_size_and_none():
    x = jnp.asarray(batch(6, 5, 4, 8))
    norm = BatchNorm()
    variables = drawn(norm, x)

    @jax.jit
    @jax.grad
    def run(x):
        y, _ = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        return jnp.sin(y).sum()

    shape = export.symbolic_shape("n, 5, 4, 8")
    exported = export.export(run, platforms=["cpu", "cuda"])(jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_allclose(exported.call(x), run(x), rtol=1e-5, atol=1e-5)
    assert run(x[:0]).shape == (0, 5, 4, 8)
