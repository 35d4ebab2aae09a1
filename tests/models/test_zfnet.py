"""ZFNet: the map sizes of the paper's figure 3, and where the normalization lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.layers import conv, local_response_norm, max_pool
from flaxvision.models import ZFNet
from flaxvision.models.zfnet import ZFNetBackbone
from flaxvision.weights.names.zfnet import LAYOUTS


def variables_at(size):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return x, jax.eval_shape(lambda x: fv.create_model("zfnet").init(jax.random.key(0), x), x)


@pytest.mark.parametrize(("size", "first"), [(224, 110), (225, 111)])
def test_the_maps_of_figure_3(size, first):
    x, variables = variables_at(size)
    backbone = fv.create_backbone("zfnet")
    stages = jax.eval_shape(backbone.apply, {"params": variables["params"]["backbone"]}, x)
    assert [s.shape[1:] for s in stages.values()] == [(first, first, 96), (26, 26, 256), (13, 13, 256)]
    assert backbone.strides == {"stage1": 2, "stage2": 8, "stage3": 16}
    assert variables["params"]["fc6"]["kernel"].shape == (6 * 6 * 256, 4096)


def test_the_least_size():
    for size in (47, 63):
        _, variables = variables_at(size)
        assert variables["params"]["fc6"]["kernel"].shape == (256, 4096)
    with pytest.raises(ValueError, match=r"window_shape must fit .* got \(3, 3\)\. .*image is too small"):
        variables_at(46)


@pytest.mark.parametrize("first", [False, True])
def test_the_order_of_pool_and_normalization(first):
    """The paper pools, then normalizes; pytorchcv the other way round."""
    backbone = ZFNetBackbone(features=(6, 5, 4, 4, 4), lrn_first=first)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0, 30, (2, 63, 70, 3)), jnp.float32)
    shapes = jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x), x)
    variables = jax.tree.map(lambda v: jnp.asarray(rng.normal(0, 0.2, v.shape), v.dtype), shapes)
    stages = jax.jit(backbone.apply)(variables, x)

    def layer(x, name, stride, pad):
        p = variables["params"][name]
        return jax.nn.relu(conv(x, p["kernel"], stride, pad) + p["bias"].reshape(1, 1, 1, -1))

    one = layer(x, "conv1", 2, 1)
    one = local_response_norm(one) if first else one
    pooled = max_pool(one, 3, 2, ceil_mode=True)
    two = layer(pooled if first else local_response_norm(pooled), "conv2", 2, 0)
    two = local_response_norm(two) if first else two
    np.testing.assert_allclose(stages["stage1"], one, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stages["stage2"], two, rtol=1e-4, atol=1e-5)


def test_without_normalization():
    x = jax.ShapeDtypeStruct((2, 63, 63, 1), jnp.float32)
    model = ZFNet(ZFNetBackbone(features=(2, 2, 2, 2, 2), lrn=None), hidden_features=3, num_classes=0)
    features, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), x)
    assert features.shape == (2, 3)


def test_names():
    _, variables = variables_at(224)
    paths = [f"backbone/{name}" for name in variables["params"]["backbone"]]
    names = {LAYOUTS[0].module(path) for path in (*paths, "fc6", "fc7", "head")}
    convolutions = ("stage1.unit1", "stage2.unit1", "stage3.unit1", "stage3.unit2", "stage3.unit3")
    assert names == {f"features.{c}.conv" for c in convolutions} | {"output.fc1.fc", "output.fc2.fc", "output.fc3"}
