"""Operations on the colours of images."""

import colorsys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.data import augment
from flaxvision.data.colour import IMAGENET_EIGENVECTORS

SMALL = np.random.default_rng(0).random((9, 12, 3), dtype=np.float32)
ADJUST_HUE, ADJUST_SATURATION = jax.jit(augment.adjust_hue), jax.jit(augment.adjust_saturation)


def of_image(op):
    """The op as a function of the image alone."""
    return lambda key, image: op(key, {"image": jnp.asarray(image)})["image"]


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def test_brightness_contrast_and_clipping():
    image = SMALL.astype(np.float64)
    brighter = augment.adjust_brightness(jnp.asarray(SMALL), 0.3)
    np.testing.assert_allclose(brighter, np.minimum(image + 0.3, 1), atol=1e-6)
    mean = image.mean((0, 1), keepdims=True)
    contrast = augment.adjust_contrast(jnp.asarray(SMALL), 1.5)
    np.testing.assert_allclose(contrast, np.clip(mean + 1.5 * (image - mean), 0, 1), atol=1e-6)
    grey = augment.adjust_contrast(jnp.asarray(SMALL[..., :1]), 0.0)
    np.testing.assert_allclose(grey, np.full((9, 12, 1), mean[0, 0, 0]), atol=1e-6)


@pytest.mark.parametrize(("hue", "saturation"), [(0.1, 1.0), (-0.4, 1.0), (0.0, 0.3), (0.0, 2.5)])
def test_hue_and_saturation_equal_colorsys(hue, saturation):
    image = np.concatenate([SMALL, np.eye(3, dtype=np.float32)[None].repeat(4, 1)])  # pure red, green and blue too
    image[0, 0] = image[0, 1] = 0.4
    image[0, 2] = 0
    expected = np.empty_like(image)
    for index in np.ndindex(*image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*image[index].tolist())
        expected[index] = colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v)
    if hue:
        out = ADJUST_HUE(image, hue)
    else:
        out = ADJUST_SATURATION(image, saturation)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_lighting_moves_along_the_eigenvectors():
    image = 0.25 + 0.5 * SMALL
    shift = np.asarray(augment.add_lighting(jnp.asarray(image), (1.0, -2.0, 3.0)))[0, 0] - image[0, 0]
    eigenvectors = np.asarray(IMAGENET_EIGENVECTORS)
    np.testing.assert_allclose(eigenvectors.T @ eigenvectors, np.eye(3), atol=2e-3)  # published with four digits
    np.testing.assert_allclose(eigenvectors.T @ shift, [0.2175, -2 * 0.0188, 3 * 0.0045], atol=1e-3)
    many = jax.jit(jax.vmap(of_image(partial(augment.random_lighting, std=0.1)), in_axes=(0, None)))(keys(2000), image)
    shifts = np.asarray(many)[:, 2, 2] - image[2, 2]
    np.testing.assert_allclose((shifts @ eigenvectors).std(0), [0.02175, 0.00188, 0.00045], rtol=0.08)


@pytest.mark.parametrize(
    ("op", "read"),
    [
        (partial(augment.random_brightness, max_delta=0.2), lambda pixel: pixel[:, 0] - 0.3),
        (partial(augment.random_contrast, strength=0.2), lambda pixel: (0.5 - pixel[:, 0]) / 0.2 - 1),
        (partial(augment.random_saturation, strength=0.2), lambda pixel: 2 * (1 - pixel[:, 0] / pixel[:, 2]) - 1),
        (partial(augment.random_hue, max_delta=0.2), lambda pixel: hue_of(pixel) - 7 / 12),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_colour_strengths_are_uniform(op, read):
    """Each strength is read back from one pixel; contrast from its distance to the mean of 0.5."""
    pixel = np.asarray([0.3, 0.45, 0.6], np.float32)  # hue 7/12, saturation 1/2
    image = np.stack([pixel, [0.7, 0.55, 0.4]]).reshape(1, 2, 3).astype(np.float32)
    out = np.asarray(jax.jit(jax.vmap(of_image(op), in_axes=(0, None)))(keys(2000), image))
    drawn = read(out[:, 0, 0])
    assert -0.2001 < drawn.min() < -0.19
    assert 0.19 < drawn.max() < 0.2001
    np.testing.assert_allclose(np.quantile(drawn, (0.25, 0.5, 0.75)), (-0.1, 0, 0.1), atol=0.02)


def hue_of(pixels):
    return np.asarray([colorsys.rgb_to_hsv(*pixel.tolist())[0] for pixel in pixels])


def test_colour_ops_refuse_grey_images_and_ops_refuse_batches():
    for op in (ADJUST_HUE, ADJUST_SATURATION):
        with pytest.raises(ValueError, match=r"image must have 3 channels .*; got 1 channels"):
            op(jnp.ones((4, 4, 1)), 0.1)
    with pytest.raises(ValueError, match=r"float32\[2, 4, 4, 3\]"):
        augment.rotate(jnp.ones((2, 4, 4, 3)), 3.0)
    with pytest.raises(ValueError, match="uint8"):
        augment.translate(jnp.ones((4, 4, 3), jnp.uint8), 1, 1)
    with pytest.raises(ValueError, match="max_degrees must be at least 0; got -1"):
        augment.random_rotation(keys(1)[0], {"image": jnp.asarray(SMALL)}, max_degrees=-1)
    with pytest.raises(ValueError, match="fill must be a number or one for each of the 3 channels"):
        augment.rotate(jnp.asarray(SMALL), 3.0, fill=(0.1, 0.2))
