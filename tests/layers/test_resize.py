import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.layers import resize_bilinear


def by_loop(x, size, align_corners):
    """Interpolates every pixel by itself, in float64."""
    out = np.zeros((x.shape[0], *size, x.shape[3]))
    for i in range(size[0]):
        for j in range(size[1]):
            weights = []
            for place, old, new in ((i, x.shape[1], size[0]), (j, x.shape[2], size[1])):
                if align_corners:
                    at = place * (old - 1) / (new - 1) if new > 1 else 0.0
                else:
                    at = min(max((place + 0.5) * old / new - 0.5, 0.0), old - 1.0)
                low = min(int(at), old - 1)
                weights.append(((low, 1 - (at - low)), (min(low + 1, old - 1), at - low)))
            for row, a in weights[0]:
                for column, b in weights[1]:
                    out[:, i, j] += a * b * x[:, row, column]
    return out


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(12, 11), (3, 8), (6, 14), (1, 5), (7, 9)])
def test_every_pixel_by_itself(size, align_corners):
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype(np.float32)
    got = jax.jit(lambda x: resize_bilinear(x, size, align_corners=align_corners))(x)
    np.testing.assert_allclose(got, by_loop(x, size, align_corners), rtol=1e-5, atol=1e-5)


def test_the_weights_are_as_exact_as_the_input():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 1)))
        np.testing.assert_allclose(resize_bilinear(x, (7, 9)), by_loop(np.asarray(x), (7, 9), False), rtol=1e-12)


@pytest.mark.parametrize("align_corners", [False, True])
def test_one_pixel_fills_the_result(align_corners):
    x = jnp.full((1, 1, 1, 2), 3.0)
    np.testing.assert_allclose(resize_bilinear(x, (4, 5), align_corners=align_corners), np.full((1, 4, 5, 2), 3.0))


def test_the_size_of_the_input_changes_nothing():
    x = jnp.arange(12.0, dtype=jnp.bfloat16).reshape(1, 3, 4, 1)
    assert resize_bilinear(x, (3, 4)) is x


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x must have the shape \[N, H, W, C\]; got \(3, 4, 1\)"):
        resize_bilinear(jnp.zeros((3, 4, 1)), (2, 2))
    with pytest.raises(ValueError, match=r"size must be a height and a width of at least 1; got \(0, 2\)"):
        resize_bilinear(jnp.zeros((1, 3, 4, 1)), (0, 2))
