from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.models.mobilenet_v1 import BLOCKS, DepthwiseSeparable
from flaxvision.weights.names import mobilenet_v1 as names
from tests.models.smallest import filled

NORM = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3)


def shapes_of(module, size, channels=3):
    x = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), x)


def test_the_table_of_the_paper():
    """Kernels, two BatchNorm parameters per channel, and the linear layer."""
    rows = [row for stage in BLOCKS for row in stage]
    assert len(rows) == 13
    for width in (1.0, 0.5):
        into = int(32 * width)
        count = 27 * into + 2 * into
        for channels, _ in rows:
            out = int(channels * width)
            count += 9 * into + 2 * into + into * out + 2 * out
            into = out
        count += into * 1000 + 1000
        _, variables = shapes_of(fv.create_model("mobilenet_v1", width_multiplier=width), (32, 32))
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
        if width == 1.0:
            assert fv.model_info("mobilenet_v1").params == count


def test_stages():
    backbone = fv.create_backbone("mobilenet_v1")
    stages, _ = shapes_of(backbone, (64, 96))
    assert list(backbone.strides.values()) == [2, 4, 8, 16, 32]
    for stage, channels in zip(backbone.strides, (64, 128, 256, 512, 1024), strict=True):
        assert stages[stage].shape == (1, 64 // backbone.strides[stage], 96 // backbone.strides[stage], channels)


def test_one_unit_against_numpy():
    for strides, padding, strided in ((1, "SAME", None), (2, ((1, 1), (1, 1)), None), (2, "SAME", ((0, 1), (0, 1)))):
        unit = DepthwiseSeparable(4, strides=strides, padding=padding, strided_padding=strided, norm=NORM)
        x = np.random.default_rng(1).normal(size=(1, 5, 6, 3)).astype(np.float32)
        variables = jax.tree.map(np.asarray, filled(shapes_of(unit, (5, 6))[1]))
        p, s = variables["params"], variables["batch_stats"]

        def bn(y, name, p=p, s=s):
            y = (y - s[name]["mean"]) / np.sqrt(s[name]["var"] + 1e-3)
            return y * p[name]["scale"] + p[name]["bias"]

        low, height = (1, -(-5 // strides)) if strided is None else (0, 5 // strides)
        padded = np.pad(x, ((0, 0), (low, 1), (low, 1), (0, 0)))
        y = np.zeros((1, height, 6 // strides, 3))
        for i in range(y.shape[1]):
            for j in range(y.shape[2]):
                window = padded[:, strides * i : strides * i + 3, strides * j : strides * j + 3]
                y[:, i, j] = (window * p["depthwise_conv"]["kernel"][:, :, 0]).sum((1, 2))
        y = np.clip(bn(y, "depthwise_bn"), 0, 6)
        want = np.clip(bn(y @ p["pointwise_conv"]["kernel"][0, 0], "pointwise_bn"), 0, 6)
        np.testing.assert_allclose(unit.apply(variables, x), want, rtol=1e-4, atol=1e-5)


def test_initializers():
    """Keras counts 9 * C inputs and 9 outputs of a depthwise kernel; the sum, and so Glorot's bound, is the same."""
    unit = fv.models.MobileNetV1Backbone(blocks=(((64, 1),),))
    params = unit.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    for kernel, fans in (
        (params["stem_conv"]["kernel"], 9 * 3 + 9 * 32),
        (params["stem_block1"]["depthwise_conv"]["kernel"], 9 + 9 * 32),
        (params["stem_block1"]["pointwise_conv"]["kernel"], 32 + 64),
    ):
        bound = (6 / fans) ** 0.5
        assert 0.9 * bound < float(jnp.abs(kernel).max()) <= bound


@pytest.mark.parametrize(("source", "first", "middle", "last", "head"), [
    ("timm", "blocks.0.0.conv_dw", "blocks.3.5.conv_pw", "blocks.4.1.bn2", "classifier"),
    ("keras", "conv_dw_1", "conv_pw_11", "conv_pw_13_bn", "conv_preds"),
])  # fmt: skip
def test_names(source, first, middle, last, head):
    module = getattr(names, source)
    assert module("backbone/stem_block1/depthwise_conv") == first
    assert module("backbone/stage3_block6/pointwise_conv") == middle
    assert module("backbone/stage4_block2/pointwise_bn") == last
    assert module("head") == head
