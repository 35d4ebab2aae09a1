from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.models.mobilenet_v2 import BLOCKS, InvertedResidual, rounded
from flaxvision.weights.names import mobilenet_v2 as names

NORM = partial(nn.BatchNorm, use_running_average=True)


def shapes_of(module, size, channels=3):
    x = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), x)


def filled(shapes, seed=0):
    """Random variables, the statistics of BatchNorm too."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        if name in ("var", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        deviation = 0.3 if name in ("mean", "bias") else max(1, np.prod(leaf.shape[:-1])) ** -0.5
        return rng.normal(0, deviation, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def test_the_table_of_the_paper():
    assert sum(repetitions for rows in BLOCKS for *_, repetitions, _ in rows) == 17
    assert [rounded(c) for c in (1, 12, 24 * 0.35, 32 * 0.75, 1280 * 1.4)] == [8, 16, 8, 24, 1792]


def test_stages():
    backbone = fv.create_backbone("mobilenet_v2")
    stages, variables = shapes_of(backbone, (64, 96))
    assert list(backbone.strides.values()) == [2, 4, 8, 16, 32]
    for stage, channels in zip(backbone.strides, (16, 24, 32, 96, 1280), strict=True):
        assert stages[stage].shape == (1, 64 // backbone.strides[stage], 96 // backbone.strides[stage], channels)
    _, whole = shapes_of(fv.create_model("mobilenet_v2"), (64, 96))
    assert variables["params"] == whole["params"]["backbone"]
    assert variables["batch_stats"] == whole["batch_stats"]["backbone"]


def test_any_size_and_width():
    for padding in ("SAME", ((1, 1), (1, 1))):
        model = fv.create_model("mobilenet_v2", num_classes=0, padding=padding, width_multiplier=1.4)
        assert shapes_of(model, (1, 1), 5)[0].shape == (1, 1792)


def test_one_block_against_numpy():
    for strides in (1, 2):
        block = InvertedResidual(3, expansion=2, strides=strides, norm=NORM)
        x = np.random.default_rng(1).normal(size=(1, 5, 4, 3)).astype(np.float32)
        variables = filled(shapes_of(block, (5, 4))[1])
        p, s = variables["params"], variables["batch_stats"]

        def bn(y, name, p=p, s=s):
            y = (y - s[name]["mean"]) / np.sqrt(s[name]["var"] + 1e-5)
            return y * p[name]["scale"] + p[name]["bias"]

        y = np.clip(bn(x @ p["expand_conv"]["kernel"][0, 0], "expand_bn"), 0, 6)
        padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = p["depthwise_conv"]["kernel"]
        z = np.zeros((1, -(-5 // strides), -(-4 // strides), 6))
        for i in range(z.shape[1]):
            for j in range(z.shape[2]):
                window = padded[:, strides * i : strides * i + 3, strides * j : strides * j + 3]
                z[:, i, j] = (window * kernel[:, :, 0]).sum((1, 2))
        z = np.clip(bn(z, "depthwise_bn"), 0, 6)
        want = bn(z @ p["project_conv"]["kernel"][0, 0], "project_bn") + (x if strides == 1 else 0)
        np.testing.assert_allclose(block.apply(variables, x), want, rtol=1e-4, atol=1e-5)


def test_padding_differs_where_the_step_is_two():
    """TensorFlow's zero comes at the end of an even map; on an odd one both definitions agree."""
    ours = InvertedResidual(3, expansion=1, strides=2, norm=NORM)
    theirs = InvertedResidual(3, expansion=1, strides=2, padding="SAME", norm=NORM)
    variables = filled(shapes_of(ours, (6, 6))[1])
    x = np.random.default_rng(0).normal(size=(1, 7, 7, 3)).astype(np.float32)
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-5, atol=1e-6)
    even = x[:, :6, :6]
    assert float(jnp.abs(ours.apply(variables, even) - theirs.apply(variables, even)).max()) > 0.01


@pytest.mark.parametrize(("source", "first", "expand", "projection", "last"), [
    ("torchvision", "features.1.conv.0.0", "features.3.conv.0.1", "features.17.conv.2", "features.18.1"),
    ("timm", "blocks.0.0.conv_dw", "blocks.1.1.bn1", "blocks.6.0.conv_pwl", "bn2"),
    ("keras", "expanded_conv_depthwise", "block_2_expand_BN", "block_16_project", "Conv_1_bn"),
    ("coral", "block01/depthwise", "block03/expand_bn", "block17/project", "head_bn"),
])  # fmt: skip
def test_names(source, first, expand, projection, last):
    module = getattr(names, source)
    assert module("backbone/stem_block1/depthwise_conv") == first
    assert module("backbone/stage1_block2/expand_bn") == expand
    assert module("backbone/stage4_block4/project_conv") == projection
    assert module("backbone/stage4_bn") == last


def test_eight_bits_and_back():
    fields = fv.weights.fields("mobilenet_v2", "coral")
    model = fv.create_model("mobilenet_v2", **fields)
    assert (model.num_classes, model.backbone.padding, model.backbone.epsilon) == (1001, "SAME", 1e-3)
    variables = filled(shapes_of(model, (32, 32))[1])
    tensors = fv.weights.export("mobilenet_v2", variables, source="coral", **fields)
    assert len(tensors) == 3 * 53
    assert tensors["block04/depthwise/kernel_q"].shape == (3, 3, 1, 144)
    assert tensors["block04/depthwise/kernel_q"].dtype == np.int8
    back = fv.weights.convert("mobilenet_v2", tensors, source="coral", **fields)

    def folded(v, conv, bn):
        p, s = (v[c]["backbone"]["stage2_block1"] for c in ("params", "batch_stats"))
        factor = p[bn]["scale"] / np.sqrt(s[bn]["var"] + 1e-3)
        return p[conv]["kernel"] * factor, p[bn]["bias"] - s[bn]["mean"] * factor

    for layer in ("expand", "depthwise", "project"):
        (kernel, bias), (coarse, same) = (folded(v, f"{layer}_conv", f"{layer}_bn") for v in (variables, back))
        step = np.abs(kernel).max((0, 1, 2)) / 127
        assert (np.abs(kernel - coarse) <= 0.501 * step).all()
        np.testing.assert_allclose(same, bias, rtol=1e-5, atol=1e-6)
    again = fv.weights.export("mobilenet_v2", back, source="coral", **fields)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(again[name], tensor, rtol=1e-5, atol=1e-6)
    del tensors["stem/scale"]
    with pytest.raises(ValueError, match="stem/scale"):
        fv.weights.convert("mobilenet_v2", tensors, source="coral", **fields)
