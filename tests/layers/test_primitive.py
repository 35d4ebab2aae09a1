"""The primitive behind all platform-specific arithmetic: what it promises beyond derivatives."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import flaxvision
from flaxvision import layers
from flaxvision.layers.lowering import channel_sum, max_windows
from flaxvision.layers.lowering.pooling import MaxWindows, SumWindows
from flaxvision.layers.lowering.primitive import call, form_p


@pytest.mark.parametrize(
    ("modules", "files"),
    [
        (r"jax\.(interpreters|extend)", ["layers/lowering/primitive.py"]),
        (r"jax\._src", ["processes/__init__.py", "processes/exchange.py", "train/reproducibility.py"]),
    ],
)
def test_few_files_import_semi_private_modules(modules, files):
    folder = Path(flaxvision.__file__).parent
    importing = [str(p.relative_to(folder)) for p in folder.rglob("*.py") if re.search(modules, p.read_text())]
    assert sorted(importing) == files


def test_no_hand_written_derivative_hides_one():
    folder = Path(flaxvision.__file__).parent
    assert not [p for p in folder.rglob("*.py") if re.search(r"custom_(vjp|jvp|gradient)", p.read_text())]


def test_calls_of_equal_shape_are_lowered_once():
    layer = layers.Conv(4, (3, 3))
    x = jnp.ones((2, 6, 6, 4))
    variables = layer.init(jax.random.key(0), x)
    twice = jax.jit(lambda x: layer.apply(variables, layer.apply(variables, x)))
    program = twice.lower(x).as_text()
    assert len(re.findall(r"stablehlo\.convolution", program)) == 1
    assert len(re.findall(r"func\.func private", program)) == 1


def test_a_form_that_is_not_linear_has_no_transpose():
    with pytest.raises(TypeError, match=r"form must be linear in its operands \(0,\) to be transposed; got MaxWindows"):
        MaxWindows((2,), (2,), ((0, 0),)).transpose([], [], (0,))


def test_without_jit_and_from_numpy():
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 2)).astype(np.float32)
    with jax.disable_jit():
        slow = max_windows(jnp.asarray(x), (2, 2), (2, 2), ((0, 0), (0, 0)))
    np.testing.assert_array_equal(slow, x.reshape(1, 2, 2, 2, 2, 2).max((2, 4)))
    assert call(SumWindows((2, 2), (2, 2), ((0, 0), (0, 0))), x).shape == (1, 2, 2, 2)


def test_a_policy_that_saves_convolutions():
    layer = layers.Conv(4, (3, 3))
    x = jnp.ones((1, 5, 5, 4))
    variables = layer.init(jax.random.key(0), x)

    def count(policy):
        loss = lambda x: jnp.sum(jnp.sin(layer.apply(variables, jnp.sin(layer.apply(variables, x)))))
        return str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(x)).count("flaxvision_form")

    dots = jax.checkpoint_policies.dots_saveable
    both = jax.checkpoint_policies.save_from_both_policies(dots, layers.convolutions_saveable)
    assert (count(dots), count(both)) == (6, 4)  # two forward, two backward, and two that are computed again


@pytest.mark.parametrize("axes", [((0, None), 0), ((None, 3), 1), ((2, 1), 2)])
def test_vmap_of_any_axes(axes):
    (in_axes, out_axis) = axes
    x, kernel = (
        jnp.ones((3, 3, 3, 3, 3)[: 4 + (in_axes[0] is not None)]),
        jnp.ones((3, 3, 3, 3, 3)[: 4 + (in_axes[1] is not None)]),
    )
    x = x * jnp.arange(x.size).reshape(x.shape)
    kernel = kernel * jnp.cos(jnp.arange(kernel.size)).reshape(kernel.shape)
    got = jax.vmap(layers.conv, in_axes, out_axis)(x, kernel)
    take = lambda a, axis, i: a if axis is None else jnp.take(a, i, axis)
    want = jnp.stack([layers.conv(take(x, in_axes[0], i), take(kernel, in_axes[1], i)) for i in range(3)], out_axis)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_policies_of_checkpoint():
    layer = layers.Conv(3, (3, 3))
    x = jnp.ones((1, 5, 5, 3))
    variables = layer.init(jax.random.key(0), x)
    loss = lambda v: jnp.sin(layer.apply(v, layer.apply(v, x))).sum()
    want = jax.grad(loss)(variables)
    for policy in (
        jax.checkpoint_policies.everything_saveable,
        jax.checkpoint_policies.nothing_saveable,
        jax.checkpoint_policies.dots_saveable,
        lambda primitive, *_, **__: primitive is form_p,
    ):
        got = jax.jit(jax.grad(jax.checkpoint(loss, policy=policy)))(variables)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_explicit_meshes():
    """Shardings are part of the types there. lax has no gradient of a convolution on such a mesh."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4], axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(576.0).reshape(4, 6, 6, 4), PartitionSpec("a"))
        for pool in (layers.max_pool, layers.avg_pool):
            y = jax.jit(lambda x, pool=pool: pool(x, 2))(x)
            assert jax.typeof(y).sharding.spec == PartitionSpec("a", None, None, None)
            gradient = jax.jit(jax.grad(lambda x, pool=pool: pool(x, 2).sum()))(x)
            np.testing.assert_allclose(gradient.sum(), y.size)
        assert jax.typeof(layers.conv(x, jnp.ones((3, 3, 4, 2)))).sharding.spec[0] == "a"


def test_a_nan_is_found_and_an_infinite_padding_is_none():
    x = np.full((1, 4, 4, 2), np.nan, np.float32)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.jit(lambda x: layers.max_pool(x, 2))(x)
    with jax.debug_infs(True):
        assert jax.jit(lambda x: layers.max_pool(x, 3, 2, "SAME"))(np.ones((1, 4, 4, 2), np.float32)).sum() == 8


@pytest.mark.parametrize("layer", [layers.Conv(4, (3, 3)), layers.RoutedCapsules(3, 2)], ids=["conv", "capsules"])
def test_the_precision_is_that_of_the_trace(layer):
    """A program may be lowered after the context in which it was traced."""
    x = jnp.ones((2, 5, 5, 4) if isinstance(layer, layers.Conv) else (2, 5, 3))
    variables = layer.init(jax.random.key(0), x)
    grad = jax.grad(lambda x: layer.apply(variables, x).sum())
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(grad).trace(x)
    with jax.default_matmul_precision("default"):
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", text)
    assert products
    assert all("HIGHEST" in line and "DEFAULT" not in line for line in products)


def test_a_tie_gives_the_same_derivative_in_both_modes():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (1, 6, 6, 1)), jnp.float32)
    for pool in (lambda x: layers.max_pool(x, 2), lambda x: layers.max_pool(x, 3, 2, "SAME")):
        np.testing.assert_array_equal(jax.jacfwd(pool)(x), jax.jacrev(pool)(x))


def test_sums_of_integers():
    np.testing.assert_array_equal(channel_sum(jnp.arange(6).reshape(3, 2)), [6, 9])


def test_a_program_does_not_remember_the_mesh_of_another_one():
    """The same shapes under `pmap` first, and then under `jit` over a mesh."""
    x, y = jnp.ones((8, 3, 2, 5)), jnp.ones(5)
    jax.pmap(lambda x: channel_sum(x), "data", devices=jax.devices()[:1])(x[None])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
    y = jax.device_put(y, jax.sharding.NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_array_equal(jax.jit(lambda x, y: channel_sum(x) + y)(x, y), np.full(5, 49))
