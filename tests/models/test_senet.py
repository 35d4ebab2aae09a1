import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.layers import SqueezeExcite
from flaxvision.models import SEBasicBlock, SEBottleneck, SENet, SENetBackbone
from flaxvision.weights.names.senet import LAYOUTS, timm_name

eval_norm = functools.partial(nn.BatchNorm, use_running_average=True)
TINY = {"stage_sizes": (1, 2, 1), "features": (4, 6, 8), "reduction": 4}
WIDE = {"stem_features": (3, 4, 5), "widths": (2, 4), "groups": 2, "stride_in_1x1": False, "shortcut_size": 3}


def variables_of(model, shape):
    """Random variables; variances stay positive."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape)))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(
            rng.uniform(0.5, 2, x.shape) if path[-1].key == "var" else rng.normal(0.2, 0.5, x.shape), x.dtype
        ),
        shapes,
    )


@functools.cache
def shapes_of(name):
    return jax.eval_shape(lambda: fv.create_model(name).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))["params"]


def paths_of(tree):
    return {"/".join(k.key for k in path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def numpy_conv(x, kernel, stride=1):
    """A convolution padded by half its window, in as many groups as the kernel's shape says."""
    kh, kw, depth, features = kernel.shape
    groups = x.shape[-1] // depth
    x = np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    out = np.zeros((len(x), (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1, features))
    width = features // groups
    for g in range(groups):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                window = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw, g * depth : (g + 1) * depth]
                mine = slice(g * width, (g + 1) * width)
                out[:, i, j, mine] = np.tensordot(window, kernel[..., mine], 3)
    return out


def numpy_unit(variables, x, strides):
    """Convolutions and BatchNorms by number, the step of each given; the SE block; the shortcut."""
    v = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
    p, s = v["params"], v["batch_stats"]

    def norm(y, name):
        y = (y - s[name]["mean"]) / np.sqrt(s[name]["var"] + 1e-5)
        return y * p[name]["scale"] + p[name]["bias"]

    y = x
    for i, stride in enumerate(strides, start=1):
        y = norm(numpy_conv(y, p[f"conv{i}"]["kernel"], stride), f"bn{i}")
        # A basic block has a ReLU before the SE block too.
        y = np.maximum(y, 0) if i < 3 else y
    hidden = np.maximum(y.mean((1, 2)) @ p["se"]["reduce"]["kernel"] + p["se"]["reduce"]["bias"], 0)
    gate = 1 / (1 + np.exp(-(hidden @ p["se"]["expand"]["kernel"] + p["se"]["expand"]["bias"])))
    if "shortcut_conv" in p:
        x = norm(numpy_conv(x, p["shortcut_conv"]["kernel"], max(strides)), "shortcut_bn")
    return np.maximum(y * gate[:, None, None] + x, 0)


@pytest.mark.parametrize(
    ("unit", "strides"),
    [
        (SEBasicBlock(8, strides=2), (2, 1)),
        (SEBasicBlock(4), (1, 1)),
        (SEBottleneck(2, strides=2), (2, 1, 1)),
        (SEBottleneck(1), (1, 1, 1)),
        (SEBottleneck(2, 2, widths=(2, 4), groups=2, stride_in_1x1=False, shortcut_size=3), (1, 2, 1)),
    ],
)
def test_units_against_numpy(unit, strides):
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 4))
    unit = unit.clone(norm=eval_norm, se=functools.partial(SqueezeExcite, reduction=2))
    variables = variables_of(unit, x.shape)
    expected = numpy_unit(variables, x, strides)
    np.testing.assert_allclose(
        jax.jit(unit.apply)(variables, jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-4
    )


def test_senet154_as_the_paper_describes_it():
    p = shapes_of("senet154")["backbone"]
    assert [p[f"stem_conv{i}"]["kernel"].shape for i in (1, 2, 3)] == [(3, 3, 3, 64), (3, 3, 64, 64), (3, 3, 64, 128)]
    unit = p["stage2_block1"]
    assert unit["conv1"]["kernel"].shape == (1, 1, 256, 256)
    assert unit["conv2"]["kernel"].shape == (3, 3, 4, 512)  # 64 groups of 4 channels
    assert unit["conv3"]["kernel"].shape == (1, 1, 512, 512)
    assert unit["shortcut_conv"]["kernel"].shape == (3, 3, 256, 512)
    assert unit["se"]["reduce"]["kernel"].shape == (512, 32)
    assert p["stage1_block1"]["shortcut_conv"]["kernel"].shape == (1, 1, 128, 256)
    assert shapes_of("se_resnet50")["backbone"]["stem_conv1"]["kernel"].shape == (7, 7, 3, 64)


@pytest.mark.parametrize(
    "name", ["se_resnet18", "se_resnet34", "se_resnet50", "se_resnet101", "se_resnet152", "senet154"]
)
def test_one_se_block_per_unit_and_names_of_their_own(name):
    paths = paths_of(shapes_of(name))
    units = {path.split("/")[1] for path in paths if "_block" in path}
    assert len(units) == sum(fv.create_backbone(name).stage_sizes)
    assert {path.split("/")[1] for path in paths if path.endswith("se/reduce")} == units
    layout = next(layout for layout in LAYOUTS if name in layout.models)
    assert len({layout.module(path) for path in paths}) == len(paths)
    assert layout.first in paths


def test_names_in_timm():
    """Read off timm's own listings."""
    assert timm_name("backbone/stem_conv3") == "layer0.conv3"
    assert timm_name("backbone/stem_bn1") == "layer0.bn1"
    assert timm_name("backbone/stage3_block2/se/expand") == "layer3.1.se_module.fc2"
    assert timm_name("backbone/stage2_block1/shortcut_bn") == "layer2.0.downsample.1"
    assert timm_name("backbone/stage1_block3/bn3") == "layer1.2.bn3"
    assert timm_name("head") == "last_linear"
    with pytest.raises(ValueError, match="must be a module of an SE-ResNet; got 'backbone'"):
        timm_name("backbone")


@pytest.mark.parametrize(
    "backbone", [SENetBackbone(**TINY), SENetBackbone(**TINY, **WIDE), SENetBackbone(bottleneck=False, **TINY)]
)
def test_stages_have_the_sizes_that_their_strides_say(backbone):
    x = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    stages = jax.eval_shape(lambda x: backbone.init_with_output(jax.random.key(0), x)[0], x)
    assert list(backbone.strides) == ["stem", "stage1", "stage2", "stage3"]
    assert set(stages) == set(backbone.strides)
    for name, stage in stages.items():
        assert stage.shape[1:3] == (64 // backbone.strides[name], 96 // backbone.strides[name])


@pytest.mark.parametrize(("extent", "pooled"), [(3, 1), (5, 1), (8, 2), (10, 2), (31, 8), (33, 8), (35, 9)])
def test_the_pool_rounds_up_and_does_not_pad(extent, pooled):
    """By torch's rule: half of the stem's rows, the last window hanging over where they are even."""
    backbone = SENetBackbone(**TINY)
    x = jax.ShapeDtypeStruct((1, extent, extent, 3), jnp.float32)
    stages = jax.eval_shape(lambda x: backbone.init_with_output(jax.random.key(0), x)[0], x)
    assert stages["stem"].shape[1] == -(-extent // 2)
    assert stages["stage1"].shape[1] == pooled


def test_a_classifier_is_its_backbone_a_mean_and_a_dense_layer():
    model = SENet(SENetBackbone(**TINY, **WIDE), num_classes=5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 19, 26, 3)), jnp.float32)
    variables = variables_of(model, x.shape)
    trunk = {collection: v["backbone"] for collection, v in variables.items()}
    stages = jax.jit(model.backbone.apply)(trunk, x)
    head = variables["params"]["head"]
    pooled = np.asarray(stages["stage3"], np.float64).mean((1, 2))
    expected = pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, x), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )


def test_create_backbone_takes_the_parameters_of_the_classifier():
    alone = jax.eval_shape(lambda: fv.create_backbone("se_resnet18").init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    assert alone["params"] == shapes_of("se_resnet18")["backbone"]


def test_features_are_dropped_in_training_only():
    model = SENet(SENetBackbone(stage_sizes=(1,), features=(32,), bottleneck=False), num_classes=32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5, 5, 3)), jnp.float32)
    variables = variables_of(model, x.shape)
    variables["params"]["head"] = {"kernel": jnp.eye(32), "bias": jnp.zeros(32)}  # shows what it sees

    @functools.partial(jax.jit, static_argnums=0)
    def run(rate):
        net = model.clone(dropout_rate=rate)
        rngs = {"dropout": jax.random.key(0)}
        return net.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)[0], net.apply(variables, x)

    (whole, eval_whole), (dropped, eval_dropped) = (map(np.asarray, run(rate)) for rate in (0.0, model.dropout_rate))
    np.testing.assert_array_equal(eval_whole, eval_dropped)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.8, rtol=1e-5)
    assert 0.1 < 1 - kept[whole != 0].mean() < 0.3
    features = model.clone(num_classes=0)
    variables["params"].pop("head")
    jax.eval_shape(
        lambda v: features.apply(v, x, train=True, mutable=["batch_stats"]), variables
    )  # wants no dropout key
