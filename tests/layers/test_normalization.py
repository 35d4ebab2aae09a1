"""Local response normalization against a loop and against torch's, TensorFlow's and the book's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from flaxvision.layers import local_response_norm


def loop(x, size, alpha, beta, k):
    out = np.zeros_like(x, np.float64)
    depth = x.shape[-1]
    for i in range(depth):
        energy = 0.0
        for j in range(i - size // 2, i + (size - 1) // 2 + 1):
            if 0 <= j < depth:
                energy = energy + x[..., j].astype(np.float64) ** 2
        out[..., i] = x[..., i] / (k + alpha * energy) ** beta
    return out


@pytest.mark.parametrize(("size", "beta"), [(1, 0.75), (2, 0.75), (5, 0.75), (4, 0.6), (15, 1.0)])
def test_against_a_loop(size, beta):
    x = 3 * np.random.default_rng(0).standard_normal((2, 3, 7)).astype(np.float32)
    got = local_response_norm(x, size=size, alpha=0.3, beta=beta, k=1.5)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loop(x, size, 0.3, beta, 1.5), rtol=2e-6)


def test_defaults_are_the_papers():
    x = 100 * np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    np.testing.assert_allclose(local_response_norm(x), loop(x, 5, 1e-4, 0.75, 2.0), rtol=2e-6)


# torch.nn.LocalResponseNorm(size, alpha=0.5, beta=0.75, k=1) on the channels 1, 2, ..., 6.
TORCH = {
    5: [0.5186107754707336, 0.7071067690849304, 0.7369469404220581, 0.7113117575645447, 0.9167830348, 1.1844365597],
    4: [0.6948002576828003, 0.9365489482879639, 0.9323974251747131, 0.8611597418785095, 0.7878465056, 1.0195406675],
    3: [0.6347006559371948, 0.8107201457023621, 0.7992518544197083, 0.7490872740745544, 0.6970675588, 0.9822195172],
    2: [0.8458969593048096, 1.0886621475219727, 1.0135135650634766, 0.905329167842865, 0.8139647841, 0.7413294315],
}


@pytest.mark.parametrize("size", TORCH)
def test_figures_of_torch(size):
    x = np.arange(1, 7, dtype=np.float32)
    got = local_response_norm(x, size=size, alpha=0.5 / size, beta=0.75, k=1)
    np.testing.assert_allclose(got, TORCH[size], rtol=2e-6)


def _radius(x, radius, bias, alpha, beta):
    """TensorFlow's rule: `sqr_sum[d] = sum(x[d - radius : d + radius + 1] ** 2)`."""
    energy = [sum(v * v for v in x[max(0, i - radius) : i + radius + 1]) for i in range(len(x))]
    return [v / (bias + alpha * e) ** beta for v, e in zip(x, energy, strict=True)]


def test_convention_of_tensorflow_and_the_book():
    x = [3.0, -1.0, 4.0, 1.0, -5.0]
    got = local_response_norm(jnp.array(x), size=2 * 2 + 1, alpha=0.2, beta=0.5, k=1)
    np.testing.assert_allclose(got, _radius(x, 2, 1, 0.2, 0.5), rtol=2e-6)
    # The book's r = 2 reaches one channel up and one down.
    got = local_response_norm(jnp.array(x), size=2 * (2 // 2) + 1, alpha=0.2, beta=0.75, k=1)
    np.testing.assert_allclose(got, _radius(x, 1, 1, 0.2, 0.75), rtol=2e-6)


@pytest.mark.parametrize(("size", "beta"), [(5, 0.75), (4, 0.6)])
def test_gradient_in_float64(size, beta):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7)))
        norm = jax.jit(lambda x: local_response_norm(x, size=size, alpha=0.4, beta=beta, k=1.2))
        assert norm(x).dtype == jnp.float64
        check_grads(norm, (x,), order=1, modes=("fwd", "rev"), eps=1e-4)


def test_bfloat16_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)), jnp.bfloat16)
    got = local_response_norm(x, size=5, alpha=0.5)
    expected = local_response_norm(x.astype(jnp.float32), size=5, alpha=0.5).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, expected)


def test_wrong_size():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        local_response_norm(jnp.ones((1, 3)), size=0)
