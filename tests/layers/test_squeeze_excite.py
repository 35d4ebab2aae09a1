import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.layers import SqueezeExcite


def test_the_block_against_a_loop():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    block = SqueezeExcite(reduction=4)
    variables = block.init(jax.random.key(0), x)
    p = jax.tree.map(lambda v: rng.normal(size=v.shape).astype(np.float32), variables["params"])
    assert {k: v.shape for k, v in p["reduce"].items()} == {"kernel": (8, 2), "bias": (2,)}
    want = np.empty_like(x)
    for n in range(2):
        z = [x[n, :, :, c].sum() / 15 for c in range(8)]
        hidden = [
            max(0, sum(z[c] * p["reduce"]["kernel"][c, j] for c in range(8)) + p["reduce"]["bias"][j]) for j in range(2)
        ]
        for c in range(8):
            s = sum(hidden[j] * p["expand"]["kernel"][j, c] for j in range(2)) + p["expand"]["bias"][c]
            want[n, :, :, c] = x[n, :, :, c] / (1 + np.exp(-s))
    np.testing.assert_allclose(block.apply({"params": p}, x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", [0, 9])
def test_a_reduction_needs_a_hidden_unit(reduction):
    with pytest.raises(ValueError, match=f"between 1 and the 8 channels; got {reduction}"):
        SqueezeExcite(reduction=reduction).init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))
