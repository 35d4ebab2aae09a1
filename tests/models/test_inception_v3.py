"""Inception-v3: its stages, its auxiliary head, its names elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.weights.names.inception_v3 import LAYOUTS


def shapes_of(name, *image, **fields):
    x = jax.ShapeDtypeStruct((1, *image, 3), jnp.float32)
    return jax.eval_shape(fv.create_model(name, **fields).init, jax.random.key(0), x)


def test_stages():
    backbone = fv.create_backbone("inception_v3")
    image = jax.ShapeDtypeStruct((1, 107, 139, 3), jnp.float32)
    stages = jax.eval_shape(backbone.init_with_output, jax.random.key(0), image)[0]
    assert backbone.strides == {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}
    extents = np.asarray(image.shape[1:3])
    for (stage, stride), width in zip(backbone.strides.items(), (64, 192, 288, 768, 2048), strict=True):
        # Nothing is padded at stride 2, nor are two of the convolutions at stride 1.
        extents = (extents - 1) // 2 - (2 if stride < 8 else 0)
        assert stages[stage].shape == (1, *extents, width)


def test_the_smallest_image():
    with pytest.raises(ValueError, match="images must be at least 75x75 pixels; got 74x90"):
        shapes_of("inception_v3", 74, 90)


def test_the_auxiliary_head():
    model = fv.create_model("inception_v3", num_classes=5, aux_heads=True)
    variables = shapes_of("inception_v3", 299, 299, num_classes=5, aux_heads=True)
    assert "aux_logits" not in variables

    def apply(variables, x, train):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, x, train=train, rngs=rngs, mutable=["batch_stats", "aux_logits"])

    image = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    logits, sown = jax.eval_shape(functools.partial(apply, train=True), variables, image)
    assert logits.shape == (2, 5)
    assert [leaf.shape for leaf in jax.tree.leaves(sown["aux_logits"])] == [(2, 5)]
    small = jax.ShapeDtypeStruct((2, 298, 299, 3), jnp.float32)
    _, sown = jax.eval_shape(functools.partial(apply, train=False), variables, small)
    assert "aux_logits" not in sown
    with pytest.raises(ValueError, match=r"at least 17x17 for .*, so images must be at least 299x299 .*; got 16x17"):
        jax.eval_shape(functools.partial(apply, train=True), variables, small)


def test_squeeze_and_excitation_follows_every_module():
    params = shapes_of("se_inception_v3", 75, 75)["params"]["backbone"]
    modules = {key for key in params if key.startswith("mixed") and not key.endswith("_se")}
    assert {f"{key}_se" for key in modules} == {key for key in params if key.endswith("_se")}


# Read off the libraries' state dicts and summaries.
TIMM = {
    "backbone/conv4a/bn": "Conv2d_4a_3x3.bn",
    "backbone/mixed5b/branch3x3dbl_3/conv": "Mixed_5b.branch3x3dbl_3.conv",
    "backbone/mixed7c/branch3x3dbl_3b/bn": "Mixed_7c.branch3x3dbl_3b.bn",
    "aux_head1/conv2/bn": "AuxLogits.conv1.bn",
    "head": "fc",
}


KERAS = {
    "backbone/conv1a/conv": "conv2d",
    "backbone/mixed5b/branch_pool/bn": "batch_normalization_11",
    "backbone/mixed7c/branch_pool/conv": "conv2d_93",
    "head": "predictions",
}


@pytest.mark.parametrize(("source", "names"), [("timm", TIMM), ("keras", KERAS)])
def test_names_elsewhere(source, names):
    (layout,) = (layout for layout in LAYOUTS if layout.source == source)
    assert {ours: layout.module(ours) for ours in names} == names
