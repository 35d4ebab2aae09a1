"""The pixels of every op against numpy, Pillow and colorsys, and the distributions that it draws from."""

from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from flaxvision.data import augment
from tests.conftest import AS_USERS

SMALL = np.random.default_rng(0).random((9, 12, 3), dtype=np.float32)
SQUARE = np.random.default_rng(1).random((11, 11, 3), dtype=np.float32)

OPS = {
    "flip": augment.random_flip,
    "crop": partial(augment.random_crop, padding=2),
    "crop_reflect": partial(augment.random_crop, padding=2, mode="reflect", size=(7, 12)),
    "shift": partial(augment.random_shift, max_shift=2, fill=0.5),
    "resized_crop": partial(augment.random_resized_crop, size=(8, 6)),
    "rotation": augment.random_rotation,
    "scale": partial(augment.random_scale, factors=(0.7, 1.3)),
    "brightness": augment.random_brightness,
    "contrast": augment.random_contrast,
    "saturation": augment.random_saturation,
    "hue": augment.random_hue,
    "lighting": augment.random_lighting,
    "cutout": partial(augment.random_cutout, size=3, fill=(0.1, 0.2, 0.3)),
}
STRENGTH_ZERO = {
    "flip": partial(augment.random_flip, probability=0.0),
    "crop": partial(augment.random_crop, padding=0),
    "shift": partial(augment.random_shift, max_shift=0),
    "resized_crop": partial(augment.random_resized_crop, size=(9, 12), area=(1.0, 1.0), ratio=(4 / 3, 4 / 3)),
    "rotation": partial(augment.random_rotation, max_degrees=0.0),
    "scale": partial(augment.random_scale, factors=(1.0, 1.0)),
    "brightness": partial(augment.random_brightness, max_delta=0.0),
    "contrast": partial(augment.random_contrast, strength=0.0),
    "saturation": partial(augment.random_saturation, strength=0.0),
    "hue": partial(augment.random_hue, max_delta=0.0),
    "lighting": partial(augment.random_lighting, std=0.0),
    "cutout": partial(augment.random_cutout, size=0),
}

RECORDED = Path(__file__).parent / "recorded" / "augmentations.npz"

# Compiled once for all cases.
TRANSLATE = jax.jit(lambda image, dy, dx: augment.translate(image, dy, dx, (0.1, 0.2, 0.3)))
ROTATE = jax.jit(lambda image, degrees: augment.rotate(image, degrees, 0.5))
SCALE = jax.jit(lambda image, factor: augment.scale(image, factor, 0.25))
RESIZED_CROP = jax.jit(augment.resized_crop, static_argnums=2)
CUTOUT = jax.jit(lambda image, y, x, size: augment.cutout(image, y, x, size, (0.1, 0.2, 0.3)))


def of_image(op):
    """The op as a function of the image alone."""
    return lambda key, image: op(key, {"image": jnp.asarray(image)})["image"]


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def planes(image, function):
    """Applies a Pillow function to each channel, in 32-bit floats."""
    channels = [function(Image.fromarray(np.ascontiguousarray(image[..., c]))) for c in range(image.shape[-1])]
    return np.stack([np.asarray(c, dtype=np.float32) for c in channels], -1)


@pytest.mark.parametrize("name", OPS)
def test_op_is_float32_finite_in_range_keyed_and_vmaps(name):
    batched = jax.jit(jax.vmap(of_image(OPS[name]), in_axes=(0, None)))
    out = batched(keys(16), SMALL)
    assert out.dtype == jnp.float32
    assert bool(jnp.isfinite(out).all())
    assert float(out.min()) >= -1e-6
    assert float(out.max()) <= 1 + 1e-6
    np.testing.assert_array_equal(out, batched(keys(16), SMALL))
    assert len(np.unique(np.asarray(out).reshape(16, -1), axis=0)) > 1


@pytest.mark.parametrize("name", STRENGTH_ZERO)
def test_op_of_strength_zero_changes_nothing(name):
    out = jax.jit(of_image(STRENGTH_ZERO[name]))(jax.random.key(0), SMALL)
    np.testing.assert_allclose(out, SMALL, atol=2e-6)


def test_flip_mirrors_about_half():
    out = np.asarray(jax.jit(jax.vmap(of_image(augment.random_flip), in_axes=(0, None)))(keys(2000), SMALL))
    flipped = (out == SMALL[:, ::-1]).all((1, 2, 3))
    assert (flipped | (out == SMALL).all((1, 2, 3))).all()
    assert abs(flipped.mean() - 0.5) < 0.05


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_random_crop_takes_every_window_equally_often(mode):
    out = np.asarray(
        jax.jit(jax.vmap(of_image(partial(augment.random_crop, padding=2, mode=mode)), in_axes=(0, None)))(
            keys(1000), SMALL
        )
    )
    around = ((2, 2), (2, 2), (0, 0))
    padded = np.pad(SMALL, around) if mode == "zero" else np.pad(SMALL, around, mode="reflect")
    windows = np.stack([padded[y : y + 9, x : x + 12] for y in range(5) for x in range(5)])
    hits = (out[:, None] == windows[None]).all((2, 3, 4))
    assert (hits.sum(1) == 1).all()
    counts = hits.sum(0)  # 40 each; chi-square with 24 degrees of freedom exceeds 60 once in 15,000
    assert ((counts - 40) ** 2 / 40).sum() < 60


def test_crop_sizes():
    np.testing.assert_array_equal(augment.crop(jnp.asarray(SMALL), 2, 3, (4, 5)), SMALL[2:6, 3:8])
    example = {"image": jnp.asarray(SMALL)}
    chex.assert_shape(augment.random_crop(keys(1)[0], example, padding=0, size=5)["image"], (5, 5, 3))
    with pytest.raises(ValueError, match=r"size must not exceed the 9x12 image with padding 4; got \(20, 20\)"):
        augment.random_crop(keys(1)[0], example, size=20)
    with pytest.raises(ValueError, match="mode must be 'zero' or 'reflect'; got 'edge'"):
        augment.random_crop(keys(1)[0], example, mode="edge")


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (2, -3), (-8, 11), (9, 0), (-40, 5)])
def test_translate_moves_content_and_fills(dy, dx):
    expected = np.empty_like(SMALL)
    for y in range(9):
        for x in range(12):
            inside = 0 <= y - dy < 9 and 0 <= x - dx < 12
            expected[y, x] = SMALL[y - dy, x - dx] if inside else (0.1, 0.2, 0.3)
    np.testing.assert_array_equal(TRANSLATE(SMALL, dy, dx), expected)


def test_random_shift_covers_its_range():
    ramp = np.broadcast_to(np.arange(1, 13, dtype=np.float32)[None, :, None], (9, 12, 1))
    out = jax.jit(jax.vmap(of_image(partial(augment.random_shift, max_shift=3)), in_axes=(0, None)))(keys(300), ramp)
    out = np.asarray(out)
    shifts = 6 - out[:, 4, 5, 0]
    assert set(shifts) == set(range(-3, 4))
    assert abs(shifts.mean()) < 0.4


@pytest.mark.parametrize("degrees", [17.0, -33.5, 90.0, 170.0])
@pytest.mark.parametrize("image", [SMALL, SQUARE], ids=["9x12", "11x11"])
def test_rotate_equals_pillow(image, degrees):
    if degrees == 90.0 and image is SQUARE:
        expected = np.rot90(image)
    else:
        expected = planes(image, lambda p: p.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=0.5))
    out = np.asarray(ROTATE(image, degrees))
    # A source point on the very border of the image may round to either side of it.
    assert (np.abs(out - expected).max(-1) < 1e-4).mean() > 0.97


def test_random_rotation_draws_uniform_angles():
    """The angle is read back from where a line through the centre comes to lie."""
    line = np.zeros((41, 41, 1), np.float32)
    line[20, 21:] = 1
    out = jax.jit(jax.vmap(of_image(partial(augment.random_rotation, max_degrees=30.0)), in_axes=(0, None)))(
        keys(300), line
    )
    out = np.asarray(out)[..., 0]
    y, x = np.mgrid[:41, :41] - 20
    angles = np.degrees(np.arctan2(-(out * y).sum((1, 2)), (out * x).sum((1, 2))))
    assert angles.min() < -28
    assert angles.max() > 28
    assert np.abs(angles).max() < 31
    assert abs(angles.mean()) < 3
    assert abs(angles.std() - 60 / np.sqrt(12)) < 1.5


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.7])
def test_scale_resizes_about_the_centre(factor):
    """Compared with a box around the centre, resized by Pillow; for factors below 1 it is larger than the image."""
    pad = 12
    padded = np.pad(SMALL, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    height, width = 9 / factor, 12 / factor
    box = (pad + 6 - width / 2, pad + 4.5 - height / 2, pad + 6 + width / 2, pad + 4.5 + height / 2)
    expected = planes(padded, lambda p: p.resize((12, 9), Image.Resampling.BILINEAR, box=box))
    out = np.asarray(SCALE(SMALL, factor))
    centre_y = (np.arange(9) + 0.5 - 4.5) / factor + 4.5
    centre_x = (np.arange(12) + 0.5 - 6) / factor + 6
    outside = ((centre_y < 0) | (centre_y > 9))[:, None] | ((centre_x < 0) | (centre_x > 12))[None]
    np.testing.assert_allclose(out[outside], 0.25, atol=1e-6)
    reach = max(1, 1 / factor)  # beside the border Pillow sees the repeated edge, we see what is there, renormalised
    inner = ((centre_y >= reach) & (centre_y <= 9 - reach))[:, None]
    inner = inner & ((centre_x >= reach) & (centre_x <= 12 - reach))[None]
    assert inner.any()
    np.testing.assert_allclose(out[inner], expected[inner], atol=1e-5)


@pytest.mark.parametrize("box", [(0, 0, 9, 12), (2, 3, 5, 4), (1, 0, 8, 7), (4, 4, 1, 1)])
@pytest.mark.parametrize("size", [(8, 6), (20, 17), (3, 3)])
def test_resized_crop_equals_pillow(box, size):
    top, left, height, width = box
    expected = planes(
        SMALL,
        lambda p: p.resize(size[::-1], Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)),
    )
    np.testing.assert_allclose(RESIZED_CROP(SMALL, box, size), expected, atol=1e-5)


def test_crop_boxes_are_distributed_as_torchvision_draws_them():
    """Compares the quartiles of area and aspect ratio with a plain loop over tries."""
    height, width, area, ratio = 60, 80, (0.08, 1.0), (3 / 4, 4 / 3)
    draw = jax.jit(jax.vmap(lambda k: augment.draw_crop_box(k, height, width, area, ratio)))
    boxes = np.asarray(draw(keys(3000)))
    rng = np.random.default_rng(5)
    reference = []
    while len(reference) < 3000:
        part = height * width * rng.uniform(*area)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(part * aspect)), round(np.sqrt(part / aspect))
        if 0 < w <= width and 0 < h <= height:
            reference.append((rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w))
    reference = np.asarray(reference)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    for of in (lambda b: b[:, 2] * b[:, 3] / 4800, lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0] / 60):
        ours, theirs = (np.quantile(of(b), (0.25, 0.5, 0.75)) for b in (boxes, reference))
        np.testing.assert_allclose(ours, theirs, atol=0.04)


def test_crop_box_falls_back_to_the_centre():
    """A 10x100 image contains no square of 90 % of its area, so the largest centred square is used."""
    box = jax.jit(lambda k: augment.draw_crop_box(k, 10, 100, (0.9, 1.0), (1.0, 1.0)))(jax.random.key(0))
    np.testing.assert_array_equal(box, (0, 45, 10, 10))


@pytest.mark.parametrize(("y", "x", "size"), [(4, 5, 4), (0, 0, 5), (8, 11, 3), (3, 3, 40)])
def test_cutout_fills_the_clipped_square(y, x, size):
    expected = SMALL.copy()
    top, left = max(y - size // 2, 0), max(x - size // 2, 0)
    expected[top : y - size // 2 + size, left : x - size // 2 + size] = (0.1, 0.2, 0.3)
    np.testing.assert_array_equal(CUTOUT(SMALL, y, x, size), expected)


def test_cutout_centres_are_everywhere():
    out = jax.jit(jax.vmap(of_image(partial(augment.random_cutout, size=1, fill=-1.0)), in_axes=(0, None)))(
        keys(3000), SMALL
    )
    holes = (np.asarray(out)[..., 0] == -1).sum(0)
    assert holes.sum() == 3000
    assert holes.min() > 8  # 27.8 expected
    assert holes.max() < 52


def test_standardize_scales_bytes_but_not_floats():
    image = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3) * 10
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    out = augment.standardize(image, mean, std)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, (image / 255 - np.asarray(mean)) / np.asarray(std), atol=1e-6)
    np.testing.assert_allclose(augment.standardize((image / 255).astype(np.float32), mean, std), out, atol=1e-6)
    np.testing.assert_allclose(
        augment.standardize(image[..., :1], 0.5, 2.0), (image[..., :1] / 255 - 0.5) / 2, atol=1e-6
    )
    with pytest.raises(ValueError, match="std must be a number"):
        augment.standardize(image, 0.5, (1.0, 2.0))
    with pytest.raises(TypeError, match="int32"):
        augment.standardize(jnp.ones((2, 2, 3), jnp.int32), 0.5, 0.5)


def test_resize_or_pad():
    digits = np.random.default_rng(2).integers(0, 256, (2, 28, 27, 1), dtype=np.uint8)
    padded = np.asarray(augment.resize_or_pad(digits, (32, 30)))
    assert padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[:, 2:30, 1:28], digits)
    assert padded.sum(dtype=int) == digits.sum(dtype=int)
    assert augment.resize_or_pad(digits, (28, 27)) is digits
    resized = np.asarray(augment.resize_or_pad(digits, 14))
    assert resized.dtype == np.uint8
    pillow = planes(digits[0].astype(np.float32), lambda p: p.resize((14, 14), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(resized[0], pillow, atol=0.5001)
    enlarged = augment.resize_or_pad(SMALL, (20, 12))
    np.testing.assert_allclose(
        enlarged, planes(SMALL, lambda p: p.resize((12, 20), Image.Resampling.BILINEAR)), atol=1e-5
    )


def images(n=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def test_make_transform_keys_each_row_by_its_index():
    ops = (augment.random_flip, partial(augment.random_crop, padding=2), augment.random_brightness)
    transform = jax.jit(augment.make_transform(*ops, size=12, mean=(0.4, 0.5, 0.6), std=0.25))
    batch = {"image": images(), "label": np.arange(16), "mask": np.ones(16, np.float32)}
    out = transform(jax.random.key(3), batch)
    assert set(out) == set(batch)
    np.testing.assert_array_equal(out["label"], batch["label"])
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 5)
    row = augment.to_float(images()[5])
    for i, op in enumerate(ops):
        row = jax.jit(of_image(op))(jax.random.fold_in(key, i), row)
    row = np.pad(row, ((2, 2), (2, 2), (0, 0)))
    np.testing.assert_allclose(out["image"][5], (row - np.asarray([0.4, 0.5, 0.6])) / 0.25, atol=1e-5)
    evaluated = augment.make_transform(mean=0.5, std=0.5)(jax.random.key(0), batch)
    np.testing.assert_allclose(evaluated["image"], images() / 127.5 - 1, atol=1e-6)


def test_pixels_are_those_of_the_ops_of_images():
    """Recorded when ops were functions of the image alone: neither pixels nor random numbers may change."""
    batch = {"image": np.random.default_rng(9).integers(0, 256, (3, 9, 12, 3), np.uint8), "label": np.arange(3)}
    exact = {"flip", "crop", "crop_reflect", "shift", "cutout", "size_pad"}  # they only move pixels
    mix = partial(augment.mixup, num_classes=3)
    transforms = {name: augment.make_transform(op, mean=(0.4, 0.5, 0.6), std=0.25) for name, op in OPS.items()}
    every = augment.make_transform(*OPS.values(), size=(10, 11), mix=mix, mean=0.5, std=0.5)

    @partial(jax.jit, compiler_options=AS_USERS)
    def run(batch):
        out = {name: transform(jax.random.key(11), batch)["image"] for name, transform in transforms.items()}
        for name, size in (("size_resize", (20, 7)), ("size_pad", (12, 13))):
            out[name] = augment.make_transform(size=size)(jax.random.key(1), batch)["image"]
        mixed = every(jax.random.key(12), batch)
        return out | {"all": mixed["image"], "all_label": mixed["label"]}

    got = run(batch)
    with np.load(RECORDED) as recorded:
        assert set(got) == set(recorded)
        for name in recorded:
            atol = 0 if name in exact else 2e-5
            np.testing.assert_allclose(got[name], recorded[name], atol=atol, rtol=1e-6 * (atol > 0), err_msg=name)


def test_eight_devices_give_the_same_batch_as_one():
    mix = partial(augment.cutmix, num_classes=4)
    ops = (augment.random_crop, augment.random_rotation, augment.random_brightness, augment.random_flip)
    transform = augment.make_transform(*ops, mix=mix, mean=0.5, std=0.5)
    batch = {"image": images(), "label": np.arange(16, dtype=np.int32) % 4, "mask": np.ones(16, np.float32)}
    single = jax.jit(transform)(jax.random.key(0), batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(transform, out_shardings=rows)(jax.random.key(0), jax.device_put(batch, rows))
    for name in batch:
        assert len(sharded[name].sharding.device_set) == 8
        np.testing.assert_allclose(sharded[name], single[name], atol=2e-5)


def test_per_example_ops_need_no_exchange_between_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*p)) for p in (("data",), ()))
    transform = augment.make_transform(augment.random_crop, augment.random_rotation)
    jitted = jax.jit(transform, in_shardings=(everywhere, rows), out_shardings=rows)
    text = jitted.lower(jax.random.key(0), {"image": images()}).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text
