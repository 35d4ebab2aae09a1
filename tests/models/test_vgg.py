"""VGG: table 1, the dense evaluation of section 3.2, where BatchNorm lies, the libraries' numbering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.layers import conv, max_pool
from flaxvision.models import VGG, VGGBackbone
from flaxvision.weights.names.vgg import LAYOUTS, flat_windows, square_windows

TINY = {"stage_sizes": (1, 1, 1, 1, 1), "features": (2, 2, 3, 3, 3)}


def tiny(dense_evaluation=False, **fields):
    return VGG(VGGBackbone(**TINY, **fields), num_classes=4, hidden_features=5, dense_evaluation=dense_evaluation)


@functools.cache
def shapes(name, size=32, **fields):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: fv.create_model(name, **fields).init(jax.random.key(0), x), x)


def filled(model, x, seed=0):
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        return jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)

    tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    return jax.tree_util.tree_map_with_path(fill, tree)


def images(height, width, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, height, width, 3)), jnp.float32)


@pytest.mark.parametrize(("name", "layers"), [("vgg11", 11), ("vgg13", 13), ("vgg16", 16), ("vgg19", 19)])
def test_the_name_counts_the_layers_with_weights(name, layers):
    params = shapes(name)["params"]
    assert len(params["backbone"]) + len({"fc6", "fc7", "head"} & set(params)) == layers
    norms = [k for k in shapes(f"{name}_bn")["params"]["backbone"] if "_bn" in k]
    assert len(norms) == layers - 3


def test_any_size_has_the_same_parameters():
    assert shapes("vgg11", 32) == shapes("vgg11", 224) == shapes("vgg11", 256, dense_evaluation=True)
    assert shapes("vgg16_dli", 32) == shapes("vgg16_dli", 224)


def test_the_least_size():
    with pytest.raises(ValueError, match=r"window_shape must fit .* got \(2, 2\)\. .*image is too small"):
        shapes("vgg11", 31)


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn", "vgg16_dli"])
def test_backbone(name):
    variables = shapes(name)
    trunk = {collection: tree["backbone"] for collection, tree in variables.items()}
    backbone = fv.create_backbone(name)
    stages = jax.eval_shape(backbone.apply, trunk, jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32))
    assert list(stages) == list(backbone.strides)
    for stage, features in zip(stages, (64, 128, 256, 512, 512), strict=True):
        stride = backbone.strides[stage]
        assert stages[stage].shape == (2, 64 // stride, 96 // stride, features)
    assert stride == 16


def test_dense_evaluation_is_the_mean_over_windows():
    """Maps of 8x9 have six windows of 7x7; the mean of their logits is the logits of the mean."""
    model, x = tiny(dense_evaluation=True), images(256, 288)
    variables = filled(model, x)
    backbone = VGGBackbone(**TINY)
    stages = jax.jit(backbone.apply)({"params": variables["params"]["backbone"]}, x)
    maps = np.asarray(max_pool(stages["stage5"], 2))
    assert maps.shape[1:3] == (8, 9)
    logits = []
    for i in range(2):
        for j in range(3):
            y = maps[:, i : i + 7, j : j + 7].reshape(2, -1)
            for name in ("fc6", "fc7", "head"):
                p = jax.tree.map(np.asarray, variables["params"][name])
                y = y @ p["kernel"] + p["bias"]
                y = y if name == "head" else np.maximum(y, 0)
            logits.append(y)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), np.mean(logits, 0), rtol=1e-4, atol=1e-4)
    averaged = jax.jit(tiny().apply)(variables, x)
    assert float(jnp.abs(averaged - np.mean(logits, 0)).max()) > 1e-2


def test_dense_evaluation_of_a_small_image_is_the_average():
    x = images(40, 64)
    variables = filled(tiny(), x)
    one, other = (jax.jit(tiny(dense).apply)(variables, x) for dense in (False, True))
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("norm", ["conv", "pool"])
def test_where_batch_norm_lies(norm):
    """torchvision: between a convolution and its ReLU. The book: after each pool."""
    model, x = tiny(norm=norm, epsilon=0.01), images(32, 36)
    variables = filled(model, x)
    params, stats = (variables[k]["backbone"] for k in ("params", "batch_stats"))
    assert ("pool5_bn" in variables["params"]) == (norm == "pool")

    def normalized(x, name):
        p, s = params[name], stats[name]
        row = {k: v.reshape(1, 1, 1, -1) for k, v in {**p, **s}.items()}
        return (x - row["mean"]) / jnp.sqrt(row["var"] + 0.01) * row["scale"] + row["bias"]

    def stage(x, number):
        p = params[f"stage{number}_conv1"]
        y = conv(x, p["kernel"], 1, 1) + p["bias"].reshape(1, 1, 1, -1)
        return jax.nn.relu(normalized(y, f"stage{number}_bn1") if norm == "conv" else y)

    one = max_pool(stage(x, 1), 2)
    two = stage(normalized(one, "pool1_bn") if norm == "pool" else one, 2)
    stages = jax.jit(model.backbone.apply)({"params": params, "batch_stats": stats}, x)
    np.testing.assert_allclose(stages["stage2"], two, rtol=1e-4, atol=1e-5)


def test_another_norm_is_refused():
    with pytest.raises(ValueError, match="norm must be None, 'conv' or 'pool'; got 'batch'"):
        shapes("vgg11", norm="batch")


def layout(source, name):
    return next(entry for entry in LAYOUTS if entry.source == source and name in entry.models)


def test_names():
    def convolutions(source, name, kind="conv"):
        modules = shapes(name)["params"]["backbone"]
        return [layout(source, name).module(f"backbone/{m}") for m in sorted(modules) if kind in m]

    numbered = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # torchvision's configuration D
    for source in ("torchvision", "timm"):
        assert convolutions(source, "vgg16") == [f"features.{i}" for i in numbered]
        assert convolutions(source, "vgg11_bn") == [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)]
        assert convolutions(source, "vgg11_bn", "bn") == [f"features.{i}" for i in (1, 5, 9, 12, 16, 19, 23, 26)]
    assert convolutions("keras", "vgg19")[-1] == "block5_conv4"
    dense = [layout("keras", "vgg16").module(m) for m in ("fc6", "fc7", "head")]
    assert dense == ["fc1", "fc2", "predictions"]
    with pytest.raises(ValueError, match="must be a module of a VGG; got 'backbone/conv1'"):
        layout("torchvision", "vgg16").module("backbone/conv1")


def test_timms_first_dense_layer_is_a_convolution():
    kernel = np.arange(3 * 2 * 49, dtype=np.float32).reshape(3, 2, 7, 7)
    tensors = {"pre_logits.fc1.weight": kernel, "head.fc.bias": np.zeros(2)}
    flat = flat_windows(tensors)
    assert flat["pre_logits.fc1.weight"].shape == (3, 98)
    np.testing.assert_array_equal(square_windows(flat)["pre_logits.fc1.weight"], kernel)
    assert set(flat) == set(tensors)
