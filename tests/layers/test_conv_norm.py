"""A convolution with its normalization, and chains of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxvision.layers import Conv, ConvNorm, conv_chain


def test_conv_norm_is_its_parts():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 3)), jnp.float32)
    norm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3)
    unit = ConvNorm(4, (1, 1), strides=2, padding="VALID", norm=norm)
    shapes = jax.eval_shape(unit.init, jax.random.key(0), x)
    v = jax.tree.map(lambda s: rng.uniform(0.5, 1.5, s.shape).astype(np.float32), shapes)
    p, stats = v["params"], v["batch_stats"]["bn"]
    assert set(p["conv"]) == {"kernel"}
    y = np.asarray(x)[:, ::2, ::2] @ p["conv"]["kernel"][0, 0]
    y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-3) * p["bn"]["scale"] + p["bn"]["bias"]
    np.testing.assert_allclose(unit.apply(v, x), np.maximum(y, 0), rtol=1e-5, atol=1e-5)


def test_a_chain_takes_strides_and_padding():
    unit = functools.partial(ConvNorm, conv=Conv, norm=lambda name: lambda x: x)

    class Chain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return conv_chain(unit, x, "c", (2, 3, 2), (3, (1, 5)), (4, 3, 2, "VALID"))

    out, variables = jax.eval_shape(
        Chain().init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((1, 9, 12, 1), jnp.float32)
    )
    assert out.shape == (1, 2, 2, 4)
    assert variables["params"]["c_2"]["conv"]["kernel"].shape == (1, 5, 2, 3)
