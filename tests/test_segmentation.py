"""`segment`: whole images, tiles, and averages over scales and mirror images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.segmentation import _window
from tests.models.smallest import filled

SAME = {"features": (4, 8), "decoder_features": (4,)}
VALID = {"features": (4, 8, 8)}


def made(name, shape, **fields):
    model = fv.create_model(name, **fields)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    side = (1, 44, 44, shape[3]) if name == "unet" else (1, 32, 32, shape[3])
    return model, filled(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(side))), x


def segmented(model, variables, x, **options):
    return np.asarray(jax.jit(functools.partial(fv.segment, model, **options))(variables, x))


def test_labels_are_the_classes_of_the_logits():
    model, variables, x = made("unet_same", (2, 21, 30, 1), **SAME, num_classes=3)
    labels = segmented(model, variables, x)
    logits = jax.jit(model.apply)(variables, x)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, logits.argmax(-1))
    assert len(np.unique(labels)) > 1
    found = segmented(model, variables, x, probabilities=True)
    np.testing.assert_allclose(found, jax.nn.softmax(logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [-3, 0, 4, 17])
@pytest.mark.parametrize("full", [1, 2, 5])
def test_windows_mirror_the_image(start, full):
    row = np.arange(full)
    around = np.pad(row, 40, mode="reflect") if full > 1 else np.zeros(81, int)
    image = jnp.broadcast_to(jnp.arange(full)[None, :, None, None], (1, full, 2, 1))
    got = _window(image, (start, 0), (9, 2))[0, :, 0, 0]
    np.testing.assert_array_equal(got, around[40 + start : 49 + start])


def test_the_paper_unet_covers_the_image_by_mirroring():
    """The same as padding by `np.pad` to a size that the network takes."""
    model, variables, x = made("unet", (1, 37, 50, 1), **VALID)
    got = segmented(model, variables, x, probabilities=True)
    assert got.shape == (1, 37, 50, 2)
    sides = [model.input_extent(extent) for extent in (37, 50)]
    pads = [(model.margin, side - extent - model.margin) for side, extent in zip(sides, (37, 50), strict=True)]
    padded = np.pad(np.asarray(x), [(0, 0), *pads, (0, 0)], mode="reflect")
    want = jax.nn.softmax(jax.jit(model.apply)(variables, padded))[:, :37, :50]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 128, 96, 1), (2, 61, 150, 1), (1, 20, 40, 1)])
def test_tiles_of_the_paper_unet_equal_the_whole(shape):
    model, variables, x = made("unet", shape, **VALID)
    whole = segmented(model, variables, x, probabilities=True)
    tiled = segmented(model, variables, x, probabilities=True, tile=84)
    np.testing.assert_allclose(tiled, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "tile"), [((1, 128, 96, 1), 64), ((2, 64, 64, 1), 48), ((1, 40, 24, 1), 64)])
def test_tiles_of_a_padded_network_equal_the_whole(shape, tile):
    """The radius of the receptive field of two stages is 2 + 4 + 2 pixels and the windows of pool and upsampling."""
    model, variables, x = made("unet_same", shape, **SAME)
    whole = segmented(model, variables, x, probabilities=True)
    tiled = segmented(model, variables, x, probabilities=True, tile=tile, overlap=32)
    np.testing.assert_allclose(tiled, whole, rtol=1e-4, atol=1e-5)
    near = segmented(model, variables, x, probabilities=True, tile=tile)
    assert (np.abs(near - whole).max() > 1e-3) == (tile < max(shape[1:3]))


def test_tiles_of_any_size_cover_the_image():
    model, variables, x = made("unet_same", (1, 61, 75, 1), **SAME)
    labels = segmented(model, variables, x, tile=32, overlap=8)
    agree = (labels == segmented(model, variables, x)).mean()
    assert labels.shape == (1, 61, 75)
    assert 0.95 < agree <= 1


def test_the_average_over_scales_and_mirror_images():
    model, variables, x = made("unet_same", (1, 16, 24, 1), **SAME, num_classes=3)
    got = segmented(model, variables, x, scales=(1.0, 1.5), flip=True, probabilities=True)

    @jax.jit
    def average(x):
        apply = lambda x: jax.nn.softmax(model.apply(variables, x))
        small = lambda y: fv.layers.resize_bilinear(y, (16, 24))
        large = fv.layers.resize_bilinear(x, (24, 36))
        ways = [apply(x), apply(x[:, :, ::-1])[:, :, ::-1], small(apply(large))]
        return sum([*ways, small(apply(large[:, :, ::-1])[:, :, ::-1])]) / 4

    np.testing.assert_allclose(got, average(x), rtol=1e-4, atol=1e-5)
    assert np.abs(got - segmented(model, variables, x, probabilities=True)).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 32, "overlap": 7}, "overlap must be an even number from 0 to below 32; got 7"),
        ({"tile": 32, "overlap": 32}, "overlap must be .*; got 32"),
        ({"overlap": 8}, "overlap must be 0 without tile; got 8"),
        ({"scales": ()}, r"scales must be one or more positive factors; got \(\)"),
        ({"scales": (0.0,)}, r"scales must be .*; got \(0.0,\)"),
    ],
)
def test_wrong_options(options, message):
    model, variables, x = made("unet_same", (1, 32, 32, 1), **SAME)
    with pytest.raises(ValueError, match=message):
        fv.segment(model, variables, x, **options)


def test_wrong_tiles_of_the_paper_unet():
    model, variables, x = made("unet", (1, 64, 64, 1), **VALID)
    with pytest.raises(ValueError, match="tile must be a size that the network takes, such as 84; got 82"):
        fv.segment(model, variables, x, tile=82)
    with pytest.raises(ValueError, match=r"scales must be \(1.0,\) for a network without padding; got \(2.0,\)"):
        fv.segment(model, variables, x, scales=(2.0,))
    with pytest.raises(ValueError, match=r"images must have the shape \[N, H, W, C\]"):
        fv.segment(model, variables, x[0])
