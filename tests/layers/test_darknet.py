"""darknet's layers against loops over its memory layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.layers.darknet import LocallyConnected, darknet_max_pool, reorg
from tests.models.darknet_loops import local_loop, max_pool_loop, reorg_loop


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("shape", "stride"), [((2, 4, 6, 8), 2), ((1, 26, 26, 64), 2), ((1, 6, 3, 9), 3)])
def test_reorg_against_a_loop(shape, stride):
    x = images(*shape)
    expected = np.stack([reorg_loop(image.transpose(2, 0, 1), stride).transpose(1, 2, 0) for image in x])
    assert reorg(jnp.asarray(x), stride).shape == expected.shape
    np.testing.assert_array_equal(reorg(jnp.asarray(x), stride), expected)


def test_reorg_is_not_space_to_depth():
    x = images(1, 4, 4, 4)
    n, h, w, c = x.shape
    plain = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c)
    ours = np.asarray(reorg(jnp.asarray(x)))
    assert ours.shape == plain.shape
    assert not any(np.array_equal(ours[..., 0], plain[..., i]) for i in range(4 * c))


@pytest.mark.parametrize("shape", [(1, 5, 4, 4), (1, 4, 4, 6)])
def test_reorg_needs_multiples(shape):
    with pytest.raises(ValueError, match=r"multiples of 2 and channels that are a multiple of 4; got"):
        reorg(jnp.zeros(shape))


@pytest.mark.parametrize("padding", [None, 0, 1])
@pytest.mark.parametrize(("size", "stride"), [(2, 2), (2, 1), (3, 1), (3, 2), (5, 1), (4, 3)])
def test_max_pool_against_a_loop(size, stride, padding):
    x = images(2, 7, 6, 3)
    expected = np.stack([max_pool_loop(image.transpose(2, 0, 1), size, stride, padding) for image in x])
    np.testing.assert_array_equal(
        darknet_max_pool(jnp.asarray(x), size, stride, padding), expected.transpose(0, 2, 3, 1)
    )


def test_a_window_of_two_with_stride_one_is_padded_at_the_end():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(darknet_max_pool(x, 2, 1)[0, :, :, 0], [[4, 5, 5], [4, 5, 5]])


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 1, 0)])
def test_local_against_a_loop(size, stride, padding):
    x = images(2, 5, 4, 3)
    layer = LocallyConnected(2, size, stride, padding)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.asarray(x))["params"]
    kernel, bias = images(*shapes["kernel"].shape, seed=1), images(*shapes["bias"].shape, seed=2)
    y = jax.jit(layer.apply)({"params": {"kernel": kernel, "bias": bias}}, x)
    theirs = kernel.transpose(0, 1, 5, 4, 2, 3)  # [H', W', F, C, size, size]
    expected = [local_loop(image.transpose(2, 0, 1), theirs, bias.transpose(2, 0, 1), stride, padding) for image in x]
    np.testing.assert_allclose(y, np.stack(expected).transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
