from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.models.xception import XceptionBlock
from flaxvision.weights.names import xception as names

NORM = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3)


def shapes_of(module, size, channels=3):
    x = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), x)


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.uniform(0.3, 1.0, leaf.shape).astype(leaf.dtype), shapes)


def test_stages():
    backbone = fv.create_backbone("xception")
    stages, variables = shapes_of(backbone, (299, 331))
    assert list(backbone.strides.values()) == [2, 4, 8, 16, 32]
    # The first two convolutions are VALID: 299 comes to 147, from where every pool rounds up.
    want = [(147, 163, 64), (74, 82, 128), (37, 41, 256), (19, 21, 728), (10, 11, 2048)]
    assert [stages[stage].shape[1:] for stage in backbone.strides] == want
    _, whole = shapes_of(fv.create_model("xception"), (299, 299))
    assert variables["params"] == whole["params"]["backbone"]
    assert variables["batch_stats"] == whole["batch_stats"]["backbone"]
    separable = [
        path for path, _ in jax.tree_util.tree_leaves_with_path(whole["params"]) if path[-2].key == "depthwise"
    ]
    assert len(separable) == 34


@pytest.mark.parametrize("padding", ["SAME", ((1, 1), (1, 1))])
def test_the_smallest_image(padding):
    model = fv.create_model("xception", num_classes=0, pool_padding=padding)
    assert shapes_of(model, (7, 7), 1)[0].shape == (1, 2048)


@pytest.mark.parametrize(("size", "padding"), [((6, 7), "SAME"), ((6, 7), ((1, 1), (1, 1)))])
def test_one_block_against_numpy(size, padding):
    block = XceptionBlock((4, 5), strides=2, pool_padding=padding, norm=NORM)
    x = np.random.default_rng(1).normal(size=(1, *size, 3)).astype(np.float32)
    variables = random_like(shapes_of(block, size)[1])
    p, s = variables["params"], variables["batch_stats"]

    def bn(y, name):
        y = (y - s[name]["mean"]) / np.sqrt(s[name]["var"] + 1e-3)
        return y * p[name]["scale"] + p[name]["bias"]

    y = x
    for i in (1, 2):
        y = np.pad(np.maximum(y, 0), ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel, z = p[f"sepconv{i}"]["depthwise"]["kernel"][:, :, 0], np.zeros((1, *size, y.shape[-1]))
        for r in range(size[0]):
            for c in range(size[1]):
                z[:, r, c] = (y[:, r : r + 3, c : c + 3] * kernel).sum((1, 2))
        y = bn(z @ p[f"sepconv{i}"]["pointwise"]["kernel"][0, 0], f"bn{i}")
    # 3 at steps of 2: SAME pads only the end of an even extent.
    low = [0 if padding == "SAME" and n % 2 == 0 else 1 for n in size]
    y = np.pad(y, ((0, 0), (low[0], 2), (low[1], 2), (0, 0)), constant_values=-np.inf)
    pooled = np.stack([[y[0, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].max((0, 1)) for c in range(4)] for r in range(3)])
    want = pooled + bn(x[:, ::2, ::2] @ p["shortcut_conv"]["kernel"][0, 0], "shortcut_bn")
    np.testing.assert_allclose(block.apply(variables, x), want, rtol=1e-4, atol=1e-4)


def test_a_block_of_the_middle_flow_adds_its_input():
    block = XceptionBlock((3, 3, 3), norm=NORM)
    x = jnp.ones((1, 3, 3, 3))
    variables = jax.tree.map(jnp.zeros_like, random_like(shapes_of(block, (3, 3))[1]))
    np.testing.assert_array_equal(block.apply(variables, x), x)


@pytest.mark.parametrize(("source", "shortcut", "norm", "middle", "last"), [
    ("keras", "conv2d", "block2_sepconv2_bn", "block5_sepconv3/pointwise_kernel", "block14_sepconv2_bn"),
    ("timm", "block1.skip", "block1.rep.4", "block4.rep.7.pointwise", "bn4"),
])  # fmt: skip
def test_names(source, shortcut, norm, middle, last):
    module = getattr(names, source)
    assert module("backbone/stage1_block1/shortcut_conv") == shortcut
    assert module("backbone/stage1_block1/bn2") == norm
    assert module("backbone/stage3_block2/sepconv3/pointwise") == middle
    assert module("backbone/stage4_bn2") == last


def test_keras_separable_kernels_and_numbers():
    """A session that has built other networks numbers the shortcuts from somewhere else."""
    variables = random_like(shapes_of(fv.create_model("xception", num_classes=2), (64, 64))[1])
    tensors = fv.weights.export("xception", variables, source="keras", num_classes=2)
    assert tensors["block2_sepconv1/depthwise_kernel"].shape == (3, 3, 64, 1)
    assert {name for name in tensors if name.startswith("conv2d")} == {
        "conv2d/kernel", "conv2d_1/kernel", "conv2d_2/kernel", "conv2d_3/kernel"
    }  # fmt: skip

    def later(name):
        kind, _, leaf = name.partition("/")
        base, _, number = kind.rpartition("_") if kind[-1].isdigit() else (kind, "", "0")
        return f"{base}_{int(number) + 5}/{leaf}" if base in ("conv2d", "batch_normalization") else name

    back = fv.weights.convert("xception", {later(k): v for k, v in tensors.items()}, source="keras", num_classes=2)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, variables))
