"""SqueezeNet: the fire module in numpy, pools that round up, the authors' padded classifier, two libraries' names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.models import Fire, SqueezeNet, SqueezeNetBackbone
from flaxvision.weights.names.squeezenet import LAYOUTS, with_dots, with_slashes

TINY = {"stem_features": 2, "fires": (((1, 2),), ((1, 2),), ((2, 3),))}


def filled(module, x, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(0, 0.5, v.shape), v.dtype), shapes)


def images(height, width, channels=3, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, height, width, channels)), jnp.float32)


def test_fire_against_numpy():
    module, x = Fire(2, 3), images(4, 5)
    variables = filled(module, x)
    p = jax.tree.map(np.asarray, variables["params"])
    s = np.maximum(np.asarray(x) @ p["squeeze"]["kernel"][0, 0] + p["squeeze"]["bias"], 0)
    expected = np.zeros((2, 4, 5, 6))
    padded = np.pad(s, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i in range(4):
        for j in range(5):
            expected[:, i, j, :3] = s[:, i, j] @ p["expand1x1"]["kernel"][0, 0] + p["expand1x1"]["bias"]
            window = padded[:, i : i + 3, j : j + 3]
            expected[:, i, j, 3:] = np.tensordot(window, p["expand3x3"]["kernel"], 3) + p["expand3x3"]["bias"]
    np.testing.assert_allclose(module.apply(variables, x), np.maximum(expected, 0), rtol=1e-5, atol=1e-5)


def shapes(size, **fields):
    model = fv.create_model("squeezenet1_0", **fields)
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)


@pytest.mark.parametrize(("size", "extents"), [(21, (8, 4, 2, 1)), (224, (109, 54, 27, 13)), (227, (111, 55, 27, 13))])
def test_backbone_rounds_its_pools_up(size, extents):
    backbone = fv.create_backbone("squeezenet1_0")
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    stages = jax.eval_shape(backbone.apply, {"params": shapes(size)["params"]["backbone"]}, x)
    assert backbone.strides == {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16}
    assert tuple(stages[stage].shape[1] for stage in backbone.strides) == extents
    assert [stages[stage].shape[3] for stage in backbone.strides] == [96, 256, 512, 512]


def test_the_least_size():
    with pytest.raises(ValueError, match=r"window_shape must fit .* got \(3, 3\)\. .*image is too small"):
        shapes(20)


def test_the_padded_classifier_also_averages_the_border():
    """Zeros around a 1x1 convolution's input give a border of the biases' ReLUs."""
    x = images(64, 80)
    plain, padded = (SqueezeNet(SqueezeNetBackbone(**TINY), num_classes=4, classifier_padding=p) for p in (0, 1))
    variables = filled(plain, x)
    stages = jax.jit(plain.backbone.apply)({"params": variables["params"]["backbone"]}, x)
    h, w = stages["stage3"].shape[1:3]
    inner = np.asarray(jax.jit(plain.apply)(variables, x)) * h * w
    border = np.maximum(np.asarray(variables["params"]["head"]["bias"]), 0) * ((h + 2) * (w + 2) - h * w)
    expected = (inner + border) / ((h + 2) * (w + 2))
    np.testing.assert_allclose(jax.jit(padded.apply)(variables, x), expected, rtol=1e-5, atol=1e-6)
    assert border.max() > 0


def test_names():
    torchvision, compressed = LAYOUTS
    params = shapes(32)["params"]
    paths = [
        f"backbone/{fire}/{layer}"
        for fire in params["backbone"]
        if fire != "stem_conv"
        for layer in params["backbone"][fire]
    ]
    names = {torchvision.module(path) for path in (*paths, "backbone/stem_conv", "head")}
    layers = ("squeeze", "expand1x1", "expand3x3")
    fires = {f"features.{i}.{layer}" for i in (3, 4, 5, 7, 8, 9, 10, 12) for layer in layers}
    assert names == fires | {"features.0", "classifier.1"}
    names = {compressed.module(path) for path in (*paths, "backbone/stem_conv", "head")}
    layers = ("conv1x1_1", "conv1x1_2", "conv3x3_2")
    assert names == {f"fire{i}/{layer}" for i in range(2, 10) for layer in layers} | {"conv1", "conv_final"}
    assert compressed.module("backbone/fire5/expand3x3") == "fire5/conv3x3_2"
    assert compressed.fields == {"classifier_padding": 1}


def test_slashes_and_dots():
    tensors = {"fire2/conv1x1_1/weight": np.zeros(1), "conv1/bias": np.zeros(2)}
    assert set(with_dots(tensors)) == {"fire2/conv1x1_1.weight", "conv1.bias"}
    assert set(with_slashes(with_dots(tensors))) == set(tensors)
