"""Inception-v4 and Inception-ResNet-v2: their stages, their names elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.weights.names.inception_v4 import LAYOUTS


def shapes_of(name, *image, **fields):
    x = jax.ShapeDtypeStruct((1, *image, 3), jnp.float32)
    return jax.eval_shape(fv.create_model(name, **fields).init, jax.random.key(0), x)


WIDTHS = {"inception_v4": (64, 192, 384, 1024, 1536), "inception_resnet_v2": (64, 192, 320, 1088, 1536)}


@pytest.mark.parametrize("name", WIDTHS)
def test_stages(name):
    backbone = fv.create_backbone(name, stage_sizes=(1, 1, 1))
    image = jax.ShapeDtypeStruct((1, 107, 139, 3), jnp.float32)
    stages = jax.eval_shape(backbone.init_with_output, jax.random.key(0), image)[0]
    assert backbone.strides == {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}
    extents = np.asarray(image.shape[1:3])
    for (stage, stride), width in zip(backbone.strides.items(), WIDTHS[name], strict=True):
        # Nothing is padded at stride 2, nor are two of the convolutions at stride 1.
        extents = (extents - 1) // 2 - (2 if stride < 8 else 0)
        assert stages[stage].shape == (1, *extents, width)


@pytest.mark.parametrize("name", WIDTHS)
def test_the_smallest_image(name):
    with pytest.raises(ValueError, match="images must be at least 75x75 pixels; got 74x90"):
        shapes_of(name, 74, 90)


def test_repetitions():
    """Figures 9 and 15, and the authors' release."""
    assert fv.create_backbone("inception_v4").stage_sizes == (4, 7, 3)
    assert fv.create_backbone("inception_resnet_v2").stage_sizes == (10, 20, 10)
    params = shapes_of("inception_v4", 75, 75, stage_sizes=(2, 3, 1))["params"]["backbone"]
    modules = {key for key in params if key.startswith(("mixed5", "mixed6", "mixed7"))}
    assert modules == {f"mixed{m}" for m in ("5a", "5b", "5c", "6a", "6b", "6c", "6d", "7a", "7b")}


def test_where_squeeze_and_excitation_lies():
    """After the modules, and within the residual units."""
    params = shapes_of("se_inception_resnet_v2", 75, 75, stage_sizes=(2, 1, 2))["params"]["backbone"]
    assert {key for key in params if key.endswith("_se")} == {"mixed5b_se", "mixed6a_se", "mixed7a_se"}
    units = {key for key in params if key.startswith("block")}
    assert units == {"block35_1", "block35_2", "block17_1", "block8_1", "block8_2"}
    assert all("se" in params[key] for key in units)


# Read off the libraries' state dicts and summaries.
NAMES = {
    ("timm", "inception_v4"): {
        "backbone/conv2b/conv": "features.2.conv",
        "backbone/mixed3a/bn": "features.3.conv.bn",
        "backbone/mixed4a_branch7x7x3_4/conv": "features.4.branch1.3.conv",
        "backbone/mixed5e/branch_pool/conv": "features.9.branch3.1.conv",
        "backbone/mixed6a/branch3x3/conv": "features.10.branch0.conv",
        "backbone/mixed6h/branch7x7dbl_5/bn": "features.17.branch2.4.bn",
        "backbone/mixed7a/branch7x7x3_1/conv": "features.18.branch1.0.conv",
        "backbone/mixed7d/branch3x3dbl_4b/conv": "features.21.branch2_3b.conv",
        "backbone/mixed7b/branch_pool/conv": "features.19.branch3.1.conv",
        "head": "last_linear",
    },
    ("timm", "inception_resnet_v2"): {
        "backbone/conv7b/bn": "conv2d_7b.bn",
        "backbone/mixed5b/branch5x5_2/conv": "mixed_5b.branch1.1.conv",
        "backbone/block35_10/branch3x3dbl_3/conv": "repeat.9.branch2.2.conv",
        "backbone/block17_1/up": "repeat_1.0.conv2d",
        "backbone/mixed7a/branch3x3dbl_3/bn": "mixed_7a.branch2.2.bn",
        "backbone/block8_9/branch1x1/conv": "repeat_2.8.branch0.conv",
        "backbone/block8_10/branch3x3_3/conv": "block8.branch1.2.conv",
        "head": "classif",
    },
    ("keras", "inception_resnet_v2"): {
        "backbone/mixed5b/branch1x1/conv": "conv2d_5",
        "backbone/block8_10/branch3x3_3/bn": "batch_normalization_202",
        "backbone/block17_20/up": "block17_20_conv",
        "backbone/conv7b/conv": "conv_7b",
    },
}


@pytest.mark.parametrize(("source", "name"), NAMES)
def test_names_elsewhere(source, name):
    (layout,) = (layout for layout in LAYOUTS if layout.source == source and name in layout.models)
    assert {ours: layout.module(ours) for ours in NAMES[source, name]} == NAMES[source, name]
