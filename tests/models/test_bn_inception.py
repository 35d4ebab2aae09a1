"""Inception with BatchNorm: its stages, its biases, its names elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np

import flaxvision as fv
from flaxvision.weights.names.bn_inception import LAYOUTS


def shapes_of(name, *image, **fields):
    x = jax.ShapeDtypeStruct((1, *image, 3), jnp.float32)
    return jax.eval_shape(fv.create_model(name, **fields).init, jax.random.key(0), x)


def test_stages():
    backbone = fv.create_backbone("bn_inception")
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    stages = jax.eval_shape(backbone.init_with_output, jax.random.key(0), image)[0]
    assert backbone.strides == {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}
    extents = np.asarray(image.shape[1:3])
    for (stage, stride), width in zip(backbone.strides.items(), (64, 192, 320, 608, 1024), strict=True):
        extents = np.asarray(image.shape[1:3]) // stride
        assert stages[stage].shape == (1, *extents, width)


def test_any_extent_at_stride_2():
    """Caffe's pools and convolutions disagree about odd maps."""
    assert shapes_of("bn_inception", 299, 37)["params"]["head"]["kernel"].shape == (1024, 1000)


def test_biases_and_squeeze_and_excitation():
    """The published Inception with BatchNorm has all biases; the SENet authors' has none, and a block per module."""
    for name, expected in (("bn_inception", True), ("se_bn_inception", False)):
        params = shapes_of(name, 64, 96)["params"]["backbone"]
        assert ("bias" in params["conv1"]["conv"]) == expected
        assert ("bias" in params["inception4c"]["branch3x3dbl_2"]["conv"]) == expected
        assert fv.create_backbone(name).epsilon == 1e-5
        blocks = {key for key in params if key.endswith("_se")}
        modules = {key for key in params if key.startswith("inception")} - blocks
        assert blocks == (set() if expected else {f"{key}_se" for key in modules})
    assert params["inception3b_se"]["reduce"]["kernel"].shape == (320, 20)


def test_names_in_pytorchcv():
    module = LAYOUTS[0].module
    assert module("backbone/conv2_2/bn") == "features.init_block.conv2.conv2.bn"
    assert module("backbone/inception3a/branch_pool/conv") == "features.stage1.unit1.branches.branch4.conv.conv"
    assert module("backbone/inception3c/branch3x3dbl_3/conv") == "features.stage2.unit1.branches.branch2.conv3.conv"
    assert module("backbone/inception5b/branch1x1/bn") == "features.stage3.unit3.branches.branch1.bn"
