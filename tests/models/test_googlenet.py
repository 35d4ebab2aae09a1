"""GoogLeNet as printed and as torchvision has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.layers import Conv, ConvNorm, local_response_norm, max_pool
from flaxvision.models.googlenet import InceptionModule

UNIT = functools.partial(ConvNorm, conv=Conv, norm=lambda name: lambda x: x)


def shapes_of(model, *image, **kwargs):
    x = jax.ShapeDtypeStruct((1, *image, 3), jnp.float32)
    return jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), x)


def filled(shapes, seed=0):
    """Made with numpy: compiling `init` costs more than all else here."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key == "var":
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype)
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def numpy_conv(x, params, relu=True):
    """Stride 1, as many zeros as keep the size."""
    kernel, bias = np.asarray(params["kernel"], np.float64), np.asarray(params["bias"], np.float64)
    kh, kw = kernel.shape[:2]
    n, h, w, _ = x.shape
    x = np.pad(x, [(0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)])
    out = np.zeros((n, h, w, kernel.shape[-1]))
    for i in range(h):
        for j in range(w):
            out[:, i, j] = np.tensordot(x[:, i : i + kh, j : j + kw], kernel, 3) + bias
    return np.maximum(out, 0)


@pytest.mark.parametrize("wide", [5, 3])
def test_the_inception_module_against_a_numpy_loop(wide):
    module = InceptionModule((2, 3, 4, 5, 6, 7), UNIT, wide_kernel=wide)
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), x))
    p = {name: leaves["conv"] for name, leaves in variables["params"].items()}
    assert p["branch5x5_2"]["kernel"].shape == (wide, wide, 5, 6)
    pooled = np.full(x.shape, -np.inf)
    for i, j in np.ndindex(5, 4):
        pooled[:, i, j] = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].max((1, 2))
    expected = [
        numpy_conv(x, p["branch1x1"]),
        numpy_conv(numpy_conv(x, p["branch3x3_1"]), p["branch3x3_2"]),
        numpy_conv(numpy_conv(x, p["branch5x5_1"]), p["branch5x5_2"]),
        numpy_conv(pooled, p["branch_pool"]),
    ]
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), np.concatenate(expected, -1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["googlenet", "googlenet_bn"])
def test_inputs_of_the_auxiliary_heads(name):
    shapes = shapes_of(fv.create_model(name, aux_heads=True), 65, 65)
    # The first head sees 4a's 512 channels, the second 4d's 528.
    kernels = [shapes["params"][head]["conv"]["conv"]["kernel"] for head in ("aux_head1", "aux_head2")]
    assert [kernel.shape[2] for kernel in kernels] == [512, 528]
    assert ("batch_stats" in shapes) == (name == "googlenet_bn")


def test_definitions():
    paper, ours = fv.create_model("googlenet"), fv.create_model("googlenet_bn")
    assert (paper.backbone.wide_kernel, paper.backbone.norm, paper.dropout_rate) == (5, False, 0.4)
    assert (ours.backbone.wide_kernel, ours.backbone.norm, ours.dropout_rate) == (3, True, 0.2)
    assert paper.aux_dropout_rate == ours.aux_dropout_rate == 0.7
    # torchvision's weights see its `transform_input`.
    assert fv.model_info("googlenet_bn").mean == fv.model_info("googlenet_bn").std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", ["googlenet", "googlenet_bn"])
def test_auxiliary_logits_are_sown_in_training_alone(name):
    model = fv.create_model(name, num_classes=7, aux_heads=True)
    variables = shapes_of(model, 96, 80)
    assert "aux_logits" not in variables
    x = jax.ShapeDtypeStruct((2, 96, 80, 3), jnp.float32)

    def apply(variables, x, train):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, x, train=train, rngs=rngs, mutable=["aux_logits", "batch_stats"])

    logits, sown = jax.eval_shape(functools.partial(apply, train=True), variables, x)
    assert logits.shape == (2, 7)
    assert [leaf.shape for leaf in jax.tree.leaves(sown["aux_logits"])] == [(2, 7)] * 2
    assert sorted(sown["aux_logits"]) == ["aux1", "aux2"]
    logits, sown = jax.eval_shape(functools.partial(apply, train=False), variables, x)
    assert logits.shape == (2, 7)
    assert "aux_logits" not in sown
    # Nor do those of an `init` in training mode stay among the variables, where the next would be added to them.
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    assert "aux_logits" not in jax.eval_shape(lambda x: model.init(keys, x, train=True), x)


def test_features_have_no_auxiliary_heads():
    shapes = shapes_of(fv.create_model("googlenet_bn", num_classes=0, aux_heads=True), 32, 32)
    assert list(shapes["params"]) == ["backbone"]


def test_the_papers_auxiliary_heads_want_maps_of_5x5():
    with pytest.raises(
        ValueError, match=r"at least 5x5 for .*, so images must be at least 65x65 pixels; got \(1, 4, 4, 512\)"
    ):
        shapes_of(fv.create_model("googlenet", aux_heads=True), 64, 64)
    shapes_of(fv.create_model("googlenet", aux_heads=True), 65, 65)


@pytest.mark.parametrize("name", ["googlenet", "googlenet_bn"])
def test_stages(name):
    image = jax.ShapeDtypeStruct((1, 96, 64, 3), jnp.float32)
    params = shapes_of(fv.create_model(name), 96, 64)
    backbone = fv.create_backbone(name)
    maps = {}

    def apply(variables, x):
        maps.update({key: value.shape for key, value in backbone.apply(variables, x).items()})

    jax.eval_shape(apply, {key: leaves["backbone"] for key, leaves in params.items()}, image)
    features = {"stem": 64, "stage1": 192, "stage2": 480, "inception4a": 512, "inception4d": 528, "stage3": 832}
    features["stage4"] = 1024
    assert list(maps) == list(backbone.strides) == list(features)
    for stage, stride in backbone.strides.items():
        assert maps[stage] == (1, 96 // stride, 64 // stride, features[stage])


def test_two_local_response_normalizations():
    model = fv.create_backbone("googlenet")
    variables = filled(shapes_of(model, 16, 16))
    x = jnp.asarray(np.random.default_rng(0).normal(0, 100, (1, 16, 16, 3)), jnp.float32)
    maps = jax.jit(model.apply)(variables, x)
    lrn = functools.partial(local_response_norm, size=5, alpha=2e-5, k=1.0)
    y = np.asarray(lrn(max_pool(maps["stem"], 3, 2, "SAME")), np.float64)
    for layer in ("conv2_1", "conv2_2"):
        y = numpy_conv(y, variables["params"][layer]["conv"])
    np.testing.assert_allclose(maps["stage1"], lrn(jnp.asarray(y, jnp.float32)), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(maps["stage1"] - y).max()) > 0.01 * float(jnp.abs(y).max())


def test_the_smallest_image_of_torchvisions():
    model = fv.create_model("googlenet_bn", num_classes=3)
    variables = filled(shapes_of(model, 15, 15))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 15, 15, 3)), jnp.float32)
    assert bool(jnp.all(jnp.isfinite(jax.jit(model.apply)(variables, x))))
