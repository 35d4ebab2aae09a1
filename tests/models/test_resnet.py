import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.models import (
    BasicBlock,
    Bottleneck,
    CifarResNet,
    CifarResNetBackbone,
    ResNet,
    ResNetBackbone,
    pad_shortcut,
)
from flaxvision.weights.names.resnet import (
    LAYOUTS,
    akamaster_name,
    fold_biases,
    keras_name,
    torchvision_name,
    zero_biases,
)

eval_norm = functools.partial(nn.BatchNorm, use_running_average=True)
TINY = {"stage_sizes": (1, 2, 1), "features": (4, 6, 8)}


def fill(shapes, seed=0):
    """Random variables of these shapes; variances stay positive."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(
            rng.uniform(0.5, 2, x.shape) if path[-1].key == "var" else rng.normal(0.2, 0.5, x.shape), x.dtype
        ),
        shapes,
    )


def variables_of(model, shape):
    return fill(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape))))


@functools.cache
def shapes_of(name):
    return jax.eval_shape(lambda: fv.create_model(name).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))["params"]


def paths_of(tree):
    return {"/".join(k.key for k in path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def numpy_conv(x, kernel, stride=1):
    kh, kw, _, features = kernel.shape
    x = np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    out = np.zeros((len(x), (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1, features))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            window = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
            out[:, i, j] = np.tensordot(window, kernel, 3)
    return out


def numpy_unit(variables, x, strides, shortcut, epsilon=1e-5):
    """Convolutions and BatchNorms by number, the step of each given, and what comes beside them."""
    v = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
    p, s = v["params"], v["batch_stats"]

    def norm(y, name):
        y = (y - s[name]["mean"]) / np.sqrt(s[name]["var"] + epsilon)
        return y * p[name]["scale"] + p[name]["bias"]

    y = x
    for i, stride in enumerate(strides, start=1):
        y = norm(numpy_conv(y, p[f"conv{i}"]["kernel"], stride), f"bn{i}")
        y = np.maximum(y, 0) if i < len(strides) else y
    if shortcut == "projection":
        x = norm(numpy_conv(x, p["shortcut_conv"]["kernel"], max(strides)), "shortcut_bn")
    elif shortcut == "pad":
        new = y.shape[-1] - x.shape[-1]
        wide = np.zeros(y.shape)
        wide[..., new // 2 : new // 2 + x.shape[-1]] = x[:, :: max(strides), :: max(strides)]
        x = wide
    return np.maximum(y + x, 0)


@pytest.mark.parametrize(
    ("unit", "strides", "shortcut"),
    [
        (BasicBlock(6, strides=2), (2, 1), "projection"),
        (BasicBlock(6, strides=2, projection=False), (2, 1), "pad"),
        (BasicBlock(3), (1, 1), "identity"),
        (Bottleneck(2, strides=2), (1, 2, 1), "projection"),
        (Bottleneck(2, strides=2, stride_in_1x1=True), (2, 1, 1), "projection"),
        (Bottleneck(2), (1, 1, 1), "projection"),
    ],
)
def test_units_against_numpy(unit, strides, shortcut):
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 3))
    unit = unit.clone(norm=eval_norm)
    variables = variables_of(unit, x.shape)
    expected = numpy_unit(variables, x, strides, shortcut)
    np.testing.assert_allclose(
        jax.jit(unit.apply)(variables, jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-4
    )
    assert ("shortcut_conv" in variables["params"]) == (shortcut == "projection")


def test_a_bottleneck_of_the_right_width_has_no_projection():
    assert "shortcut_conv" not in variables_of(Bottleneck(2, norm=eval_norm), (1, 4, 4, 8))["params"]


def test_pad_shortcut_puts_zeros_on_both_sides():
    x = jnp.arange(1.0, 19.0).reshape(1, 3, 3, 2)
    y = pad_shortcut(x, 5, 2)
    assert y.shape == (1, 2, 2, 5)
    np.testing.assert_array_equal(y[0, 1, 0], [0, 13, 14, 0, 0])
    with pytest.raises(ValueError, match="features must be at least the 2 channels of x; got 1"):
        pad_shortcut(x, 1)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_the_name_counts_the_layers(name):
    kernels = [path for path in paths_of(shapes_of(name)) if "conv" in path or path == "head"]
    assert len([path for path in kernels if "shortcut" not in path]) == int(name[6:])
    # Option B: a projection wherever the shape changes, which a basic first stage does not.
    assert len([path for path in kernels if "shortcut" in path]) == (3 if name in ("resnet18", "resnet34") else 4)


@pytest.mark.parametrize("name", [f"resnet{n}_cifar" for n in (20, 32, 44, 56, 110)])
def test_cifar_nets_count_their_layers_and_have_no_projection(name):
    kernels = [path for path in paths_of(shapes_of(name)) if "conv" in path or path == "head"]
    assert len(kernels) == int(name[6:].removesuffix("_cifar"))
    assert not any("shortcut" in path for path in kernels)
    assert fv.create_model(name).num_classes == 10
    assert fv.model_info(name).mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        (ResNetBackbone(**TINY), (64, 96)),
        (ResNetBackbone(bottleneck=False, **TINY), (32, 64)),
        (CifarResNetBackbone(), (8, 12)),
    ],
)
def test_stages_have_the_sizes_that_their_strides_say(backbone, size):
    stages = jax.eval_shape(
        lambda x: backbone.init_with_output(jax.random.key(0), x)[0], jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    )
    assert set(stages) == set(backbone.strides)
    assert list(backbone.strides.values()) == sorted(backbone.strides.values())
    for name, stage in stages.items():
        stride = backbone.strides[name]
        assert stage.shape[:3] == (2, size[0] // stride, size[1] // stride)
    width = backbone.features[-1] * (4 if getattr(backbone, "bottleneck", False) else 1)
    assert stages["stage3"].shape[-1] == width


@pytest.mark.parametrize(
    "model", [ResNet(ResNetBackbone(**TINY), 5), CifarResNet(CifarResNetBackbone((1, 1, 1), (4, 6, 8)))]
)
def test_a_classifier_is_its_backbone_a_mean_and_a_dense_layer(model):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 19, 26, 3)), jnp.float32)
    variables = variables_of(model, x.shape)
    trunk = {collection: v["backbone"] for collection, v in variables.items()}
    stages = jax.jit(model.backbone.apply)(trunk, x)
    head = variables["params"]["head"]
    pooled = np.asarray(stages["stage3"], np.float64).mean((1, 2))
    expected = pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    logits = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["resnet50", "resnet20_cifar"])
def test_create_backbone_takes_the_parameters_of_the_classifier(name):
    alone = jax.eval_shape(lambda: fv.create_backbone(name).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    assert alone["params"] == shapes_of(name)["backbone"]


def test_the_smallest_image_and_other_channels():
    for model in (fv.create_model("resnet18", num_classes=7), fv.create_model("resnet20_cifar", num_classes=7)):
        logits = jax.eval_shape(lambda m=model: m.init_with_output(jax.random.key(0), jnp.zeros((2, 1, 1, 5)))[0])
        assert logits.shape == (2, 7)


def test_a_trunk_against_numpy():
    """Stem, pool and first unit, with an epsilon that is felt."""
    backbone = ResNetBackbone(stage_sizes=(1,), features=(4,), epsilon=0.5)
    x = np.random.default_rng(0).normal(size=(1, 9, 10, 3))
    variables = variables_of(backbone, x.shape)
    p, s = (jax.tree.map(np.asarray, variables[c]) for c in ("params", "batch_stats"))
    y = (numpy_conv(x, p["stem_conv"]["kernel"], 2) - s["stem_bn"]["mean"]) / np.sqrt(s["stem_bn"]["var"] + 0.5)
    stem = np.maximum(y * p["stem_bn"]["scale"] + p["stem_bn"]["bias"], 0)
    padded = np.pad(stem, ((0, 0), (1, 1), (1, 1), (0, 0)))  # after a ReLU, zeros never win over a number
    pooled = np.asarray([[padded[0, i : i + 3, j : j + 3].max((0, 1)) for j in (0, 2, 4)] for i in (0, 2, 4)])[None]
    unit = {collection: v["stage1_block1"] for collection, v in variables.items()}
    stages = jax.jit(backbone.apply)(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(stages["stem"], stem, rtol=1e-4, atol=1e-4)
    expected = numpy_unit(unit, pooled, (1, 1, 1), "projection", epsilon=0.5)
    np.testing.assert_allclose(stages["stage1"], expected, rtol=1e-4, atol=1e-3)


def test_names_in_torchvision_and_keras():
    """Read off the libraries' own listings."""
    assert torchvision_name("backbone/stem_bn") == "bn1"
    assert torchvision_name("backbone/stage3_block6/bn3") == "layer3.5.bn3"
    assert torchvision_name("backbone/stage4_block1/shortcut_bn") == "layer4.0.downsample.1"
    assert torchvision_name("head") == "fc"
    assert keras_name("backbone/stem_conv") == "conv1_conv"
    assert keras_name("backbone/stage4_block2/conv3") == "conv5_block2_3_conv"
    assert keras_name("backbone/stage1_block1/shortcut_bn") == "conv2_block1_0_bn"
    assert keras_name("head") == "predictions"
    assert akamaster_name("head") == "linear"
    with pytest.raises(ValueError, match="must be a module of a ResNet; got 'backbone/stage1'"):
        torchvision_name("backbone/stage1")


def test_every_module_has_a_name_of_its_own():
    for layout in LAYOUTS:
        name = layout.models[-1]
        paths = paths_of(shapes_of(name))
        assert len({layout.module(path) for path in paths}) == len(paths)
        assert layout.first in paths


def test_keras_biases_fold_into_the_means():
    rng = np.random.default_rng(0)
    y, bias, mean, var = (rng.uniform(0.5, 2, 4) for _ in range(4))
    kernel = np.zeros((1, 1, 3, 4))
    given = {"a_1_conv/kernel": kernel, "a_1_conv/bias": bias, "a_1_bn/moving_mean": mean, "predictions/bias": bias}
    folded = fold_biases(given)
    assert set(folded) == set(given) - {"a_1_conv/bias"}
    expected = (y + bias - mean) / np.sqrt(var)
    np.testing.assert_allclose((y - folded["a_1_bn/moving_mean"]) / np.sqrt(var), expected, rtol=1e-12)
    np.testing.assert_array_equal(given["a_1_bn/moving_mean"], mean)
    again = fold_biases(zero_biases(folded))
    assert set(zero_biases(folded)) == set(given)
    for name, tensor in folded.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_keras_biases_that_do_not_fit_are_told():
    kernel = np.zeros((1, 1, 3, 4))
    with pytest.raises(ValueError, match=r"got none for a_1_conv/bias, b_2_conv/bias"):
        fold_biases({"a_1_conv/kernel": kernel, "b_2_conv/kernel": kernel})
    # Of another shape than the mean: left for the lookup to report.
    odd = {"a_1_conv/kernel": kernel, "a_1_conv/bias": np.zeros(1), "a_1_bn/moving_mean": np.zeros(4)}
    assert set(fold_biases(odd)) == set(odd)
