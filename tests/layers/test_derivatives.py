"""Every layer under every transformation, in float64, against plain lax that JAX differentiates by its own rules."""

import collections
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import export

from flaxvision import layers
from flaxvision.layers.lowering import cpu, rows
from flaxvision.models.lenet import PartialConv
from tests.layers.derivatives import drawn, exported, over_devices, plain_lax, transformed
from tests.models.smallest import QUICK

CONV = {
    "conv": layers.Conv(5, (3, 3)),
    "conv valid": layers.Conv(5, (3, 2), padding="VALID"),
    "conv strided": layers.Conv(5, (3, 3), 2),
    "conv atrous": layers.Conv(5, (3, 3), kernel_dilation=2),
    "conv pointwise": layers.Conv(5, (1, 1), 2),
    "conv grouped": layers.Conv(6, (3, 3), feature_group_count=2),
    "depthwise": layers.DepthwiseConv((3, 3), channel_multiplier=2),
    "depthwise strided": layers.DepthwiseConv((3, 3), 2, kernel_dilation=2),
    "separable": layers.SeparableConv(5, (3, 3)),
    "transposed": layers.ConvTranspose(5, (3, 3), (2, 2)),
    "partial conv": PartialConv(((0, 1), (1, 2, 3)), (3, 3)),
    "conv norm": layers.ConvNorm(5, (3, 3), norm=lambda name: layers.BatchNorm(name=name, use_running_average=True)),
}
POOLS = {
    "max pool": lambda x: layers.max_pool(x, 3, 2, "SAME"),
    "max pool apart": lambda x: layers.max_pool(x, 2),
    "avg pool": lambda x: layers.avg_pool(x, 3, 2, "SAME", count_include_pad=False),
    "l2 norm pool": lambda x: layers.l2_norm_pool(x, 2),
    "adaptive avg pool": lambda x: layers.adaptive_avg_pool(x, 3),
    "depthwise max pool": lambda x: layers.depthwise_max_pool(x, 2),
    "depthwise avg pool": lambda x: layers.depthwise_avg_pool(x, 2),
    "global avg pool": layers.global_avg_pool,
    "global max pool": layers.global_max_pool,
    "trainable avg pool": layers.TrainableAvgPool(),
    "local response norm": lambda x: layers.local_response_norm(x, size=3, alpha=0.3),
    "squeeze excite": layers.SqueezeExcite(reduction=2),
    "batch norm": layers.BatchNorm(use_running_average=True),
}
CASES = {name: (layer, (4, 6, 5, 4)) for name, layer in (CONV | POOLS).items()} | {
    "conv 1d": (layers.Conv(5, (3,), 2), (4, 9, 4)),
    "conv 3d": (layers.Conv(3, (3, 2, 3)), (2, 4, 3, 3, 2)),
    "max pool 3d": (lambda x: layers.max_pool(x, 2, 1), (2, 3, 3, 3, 2)),
    "primary capsules": (layers.PrimaryCapsules(2, 3, (3, 3), 1), (2, 4, 4, 2)),
    "routed capsules": (layers.RoutedCapsules(3, 2), (4, 5, 3)),
    "rbf": (layers.RBF(3), (4, 5)),
}


# The cases that are not slow.
DEFAULT = ("conv strided", "max pool", "trainable avg pool")


def function_of(layer, shape):
    """The layer as `f(params, x)`, its parameters and an input."""
    x = drawn(jax.ShapeDtypeStruct(shape, jnp.float32), 0, jnp.result_type(float))
    if not isinstance(layer, nn.Module):
        return (lambda params, x: layer(x)), {}, x
    variables = dict(jax.eval_shape(lambda x: layer.init(jax.random.key(0), x), x))
    params = drawn(variables.pop("params"), 3, jnp.result_type(float))
    others = jax.tree.map(lambda leaf: jnp.linspace(0.5, 1.5, leaf.size).reshape(leaf.shape), variables)
    return (lambda params, x: layer.apply({"params": params, **others}, x)), params, x


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Small inputs take the forms of large ones: kernel gradients by patches, and work cut into pieces."""
    monkeypatch.setattr(cpu, "SMALL_MAP", 0)
    monkeypatch.setattr(cpu, "PATCH_BYTES", 2048)
    monkeypatch.setattr(rows, "CACHED_BYTES", 512)
    jax.clear_caches()  # JAX does not see these numbers, and would keep the programs of others
    yield
    jax.clear_caches()


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.filterwarnings("ignore:Using reduced precision")  # of an exported max-pool, which is float64 here
@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_every_transformation(name, float64):
    function, params, x = function_of(*CASES[name])
    run = lambda params, x: transformed(function, params, x)
    got = jax.jit(run, compiler_options=QUICK)(params, x)
    devices, program = over_devices(function, params, x), exported(function, params, x)
    with plain_lax():
        want = jax.jit(lambda params, x: run(params, x), compiler_options=QUICK)(params, x)
        loss = lambda params, x: jnp.sum(jnp.sin(function(params, x)))

        def plain(params, x):
            forward = jax.jvp(loss, (params, x), drawn((params, x), 1))
            return forward, jax.jvp(lambda x: loss(params, x), (x,), (x,)), jax.grad(loss, (0, 1))(params, x)

        (value, tangent), of_x, gradients = jax.jit(plain, compiler_options=QUICK)(params, x)
    for key in want:
        chex.assert_trees_all_close(got[key], want[key], rtol=1e-9, atol=1e-9, custom_message=key)
    close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-9, atol=1e-9)
    close(devices, {"shard_map": (value, tangent, gradients), "pmap": (value, gradients)})
    close(program, {"export": (gradients, of_x)})


def test_batch_norm_in_training(float64):
    """Its statistics join the rows of a batch, so it is compared over one device only."""
    layer = layers.BatchNorm(use_running_average=False)
    function = lambda params, x: layer.apply({"params": params, **statistics}, x, mutable=["batch_stats"])[0]
    x = drawn(jax.ShapeDtypeStruct((4, 3, 2, 3), jnp.float64), 0)
    statistics = {"batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    params = {"scale": jnp.linspace(0.5, 2, 3), "bias": jnp.ones(3)}
    run = lambda params, x: transformed(function, params, x)
    got = jax.jit(run, compiler_options=QUICK)(params, x)
    with plain_lax():
        want = jax.jit(lambda params, x: run(params, x), compiler_options=QUICK)(params, x)
    chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)


PROGRAMS = {
    "forward": lambda loss: loss,
    "gradient": lambda loss: jax.grad(loss, (0, 1)),
    "tangent": lambda loss: lambda params, x: jax.jvp(lambda x: loss(params, x), (x,), (x,)),
}


def operations(program, params, x, platform):
    """The operations of a lowered program with their shapes and attributes, without the names of values."""
    text = export.export(jax.jit(program), platforms=[platform])(params, x).mlir_module()
    lines = (re.sub(r" loc\(.*", "", line).strip() for line in text.splitlines() if "stablehlo" in line)
    return collections.Counter(re.sub(r"%[\w#]+", "%", line) for line in lines)


# The first computes its routing again for the gradient, where JAX keeps intermediate results. The others have
# derivatives of their own, which need fewer sums.
OWN_DERIVATIVES = ("routed capsules", "batch norm", "conv norm")


@pytest.mark.parametrize("name", [name for name in CASES if name not in OWN_DERIVATIVES])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_run_plain_lax(name, platform):
    function, params, x = function_of(*CASES[name])
    loss = lambda params, x: jnp.sin(function(params, x)).sum()
    lowered = lambda: {key: operations(program(loss), params, x, platform) for key, program in PROGRAMS.items()}
    got = lowered()
    with plain_lax(exact_max=False):
        want = lowered()
    assert got == want


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_batch_norm_needs_fewer_sums_than_plain_lax(platform):
    layer = layers.BatchNorm(use_running_average=False)
    x = jnp.ones((4, 3, 2, 3))
    variables = layer.init(jax.random.key(0), x)
    loss = lambda variables, x: jnp.sin(layer.apply(variables, x, mutable=["batch_stats"])[0]).sum()
    lowered = lambda: operations(jax.grad(lambda v, x: loss(v, x), (0, 1)), variables, x, platform)
    kinds = lambda found: {re.search(r"stablehlo\.(\w+)", line)[1] for line in found}
    sums = lambda found: sum(count for line, count in found.items() if "stablehlo.reduce" in line)
    got = lowered()
    with plain_lax(exact_max=False):
        want = lowered()
    assert kinds(got) <= kinds(want)
    assert sums(got) < sums(want)
