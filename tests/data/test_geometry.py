"""Boxes, masks, label maps and key points move with the image.

The oracle is the image itself: a filled rectangle is drawn into the image, the masks and the label map, and what has
moved is compared with the box.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.data import augment

HEIGHT, WIDTH = 24, 32
BOXES = np.array([[4, 6, 13, 17], [20, 3, 30, 10], [0, 0, 0, 0]], np.float32)  # the last one is padding
VALID = np.array([1, 1, 0], np.float32)

OPS = {
    "flip": partial(augment.random_flip, probability=1.0),
    "vertical_flip": partial(augment.random_flip, probability=1.0, vertical=True),
    "no_flip": partial(augment.random_flip, probability=0.0),
    "crop": partial(augment.random_crop, padding=5),
    "crop_to_size": partial(augment.random_crop, padding=0, size=(16, 20)),
    "shift": partial(augment.random_shift, max_shift=12),
    "resized_crop": partial(augment.random_resized_crop, size=(48, 40), area=(0.3, 0.8)),
    "rotation": partial(augment.random_rotation, max_degrees=60.0),
    "scale": partial(augment.random_scale, factors=(0.6, 1.7)),
    "pad": partial(augment.to_size, size=(27, 36)),
    "resize": partial(augment.to_size, size=(48, 40)),
    "none": lambda key, example: example,
}
WHOLE_PIXELS = {"flip", "no_flip", "crop", "crop_to_size", "shift", "pad", "none"}


def scene():
    """A batch of one example: each object has a channel of its own, 1 where it is."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = np.stack([(x >= x1) & (x < x2) & (y >= y1) & (y < y2) for x1, y1, x2, y2 in BOXES])
    label = np.select([masks[0], masks[1]], [1, 2], 0)
    corners = np.stack([BOXES[:2, [0, 1]], BOXES[:2, [2, 1]], BOXES[:2, [2, 3]], BOXES[:2, [0, 3]]], 1)
    return {
        "image": np.moveaxis(masks, 0, -1).astype(np.float32),
        "boxes": BOXES,
        "valid": VALID,
        "labels": np.array([5, 6, 0]),
        "masks": masks.astype(np.uint8),
        "label": label.astype(np.int32),
        "keypoints": corners.astype(np.float32),  # [2, 4, 2]
        "visible": np.ones((2, 4), bool),
    }


def bounds(mask):
    """The bounding box of the pixels above 0."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


@pytest.mark.parametrize("name", OPS)
def test_everything_moves_with_the_image(name):
    seeds = 12
    run = jax.jit(jax.vmap(OPS[name], in_axes=(0, None)))
    out = jax.device_get(run(jax.random.split(jax.random.key(4), seeds), scene()))
    height, width = out["image"].shape[1:3]
    chex.assert_shape(out["boxes"], (seeds, 3, 4))
    chex.assert_shape(out["masks"], (seeds, 3, height, width))
    chex.assert_shape(out["label"], (seeds, height, width))
    tolerance = 0 if name in WHOLE_PIXELS else 1.1
    compared = 0
    for i in range(seeds):
        boxes, valid, points = out["boxes"][i], out["valid"][i], out["keypoints"][i]
        assert valid[2] == 0
        assert (boxes >= 0).all()
        assert (boxes <= [width, height, width, height]).all()
        for k in range(2):
            image, mask = out["image"][i, ..., k], out["masks"][i, k]
            if name in WHOLE_PIXELS:
                np.testing.assert_array_equal(mask, image)
            else:
                assert np.abs(mask - image).mean() < 0.05  # nearest beside bilinear
                solid = np.abs(image - 0.5) > 0.49
                assert ((mask > 0) == (image > 0.5))[solid].mean() > 0.99
            np.testing.assert_array_equal(out["label"][i] == k + 1, mask > 0)
            if mask.any():
                compared += 1
                assert valid[k] == 1
                np.testing.assert_allclose(boxes[k], bounds(mask), atol=tolerance)
            elif name in WHOLE_PIXELS:
                assert valid[k] == 0
            inside = (points[k] >= 0).all(-1) & (points[k] <= [width, height]).all(-1)
            np.testing.assert_array_equal(out["visible"][i, k], inside)
            if name != "rotation":  # the corners stay the corners, if the box was not clipped
                corner = np.stack([points[k].min(0), points[k].max(0)]).reshape(4)
                np.testing.assert_allclose(np.clip(corner, 0, [width, height] * 2), boxes[k], atol=1e-4)
        np.testing.assert_array_equal(out["labels"][i], [5, 6, 0])
    assert compared > seeds / 2
    if name in ("crop", "shift", "rotation", "pad"):
        assert (out["label"] == 255).any()
    if name in ("flip", "no_flip", "resized_crop", "resize", "none"):
        assert not (out["label"] == 255).any()


def test_key_points_rotate_with_the_pixels():
    image = np.zeros((41, 41, 1), np.float32)
    image[9:12, 29:32] = 1
    example = {"image": image, "keypoints": np.array([[30.5, 10.5]], np.float32)}
    run = jax.jit(jax.vmap(partial(augment.random_rotation, max_degrees=90.0), in_axes=(0, None)))
    out = jax.device_get(run(jax.random.split(jax.random.key(0), 20), example))
    y, x = np.mgrid[:41, :41] + 0.5
    for moved, point in zip(out["image"][..., 0], out["keypoints"][:, 0], strict=True):
        centre = np.array([(moved * x).sum(), (moved * y).sum()]) / moved.sum()
        np.testing.assert_allclose(point, centre, atol=0.1)


def test_a_box_that_leaves_the_image_is_no_longer_valid():
    example = scene() | {"boxes": BOXES, "valid": VALID}
    moved = augment.move("test", example, example["image"], jnp.asarray([[1.0, 0, 15], [0, 1, 0]]))
    np.testing.assert_array_equal(moved["valid"], [1, 0, 0])
    np.testing.assert_array_equal(moved["boxes"], [[19, 6, 28, 17], [32, 3, 32, 10], [15, 0, 15, 0]])
    assert not moved["visible"][1].any()


def test_masks_keep_their_own_resolution():
    small = scene()["masks"][:, ::4, ::4]
    example = {"image": scene()["image"], "masks": small}
    flipped = augment.random_flip(jax.random.key(0), example, probability=1.0)
    np.testing.assert_array_equal(flipped["masks"], small[:, :, ::-1])
    resized = augment.to_size(None, example, size=(48, 64))
    np.testing.assert_array_equal(resized["masks"], small.repeat(2, 1).repeat(2, 2))
    with pytest.raises(
        ValueError, match=r"masks must keep a whole number of pixels under to_size for the image \(24, 32\); got"
    ):
        augment.to_size(None, example, size=(50, 64))


def test_a_flip_with_a_size_mirrors_the_valid_part():
    example = scene() | {"size": np.array([24, 30])}
    example["image"][:, 30:] = 0.5
    flipped = jax.device_get(augment.random_flip(jax.random.key(0), example, probability=1.0))
    np.testing.assert_array_equal(flipped["image"][:, :30], example["image"][:, :30][:, ::-1])
    np.testing.assert_array_equal(flipped["image"][:, 30:], 0.5)
    np.testing.assert_array_equal(flipped["boxes"][:2], [[17, 6, 26, 17], [0, 3, 10, 10]])
    np.testing.assert_array_equal(bounds(flipped["masks"][0]), flipped["boxes"][0])
    np.testing.assert_array_equal(flipped["size"], example["size"])


def test_a_vertical_flip_is_a_horizontal_one_of_the_transpose():
    example = {"image": scene()["image"], "boxes": BOXES, "valid": VALID, "size": np.array([20, 32])}
    turned = {"image": example["image"].swapaxes(0, 1), "boxes": BOXES[:, [1, 0, 3, 2]], "valid": VALID}
    down = augment.random_flip(jax.random.key(0), example, probability=1.0, vertical=True)
    across = augment.random_flip(jax.random.key(0), turned | {"size": example["size"][::-1]}, probability=1.0)
    np.testing.assert_array_equal(down["image"], np.swapaxes(across["image"], 0, 1))
    np.testing.assert_array_equal(down["boxes"], np.asarray(across["boxes"])[:, [1, 0, 3, 2]])
    assert not np.array_equal(down["image"], example["image"])


@pytest.mark.parametrize(("change", "message"), [
    ({"depth": np.zeros((24, 32))}, r"only keys that random_shift can move; got 'depth' of the shape \[24, 32\]; rem"),
    ({"size": np.array([24, 30])}, r"example must hold only keys that random_shift can move; got 'size' .* \[2\]"),
    ({"valid": None}, r"example must hold valid \[M\] with boxes \[M, 4\], because random_shift .*; got the keys \['b"),
    ({"label": np.zeros((12, 16), int)}, r"label must be .* of the image's size \[24, 32\] for random_shift; got"),
    ({"label": np.zeros((24, 32, 1), int)}, r"label must be a class \[\], .*; got the shape \[24, 32, 1\]"),
    ({"label": np.zeros((24, 32, 5))}, r"label must be a class \[\], .*; got the shape \[24, 32, 5\]"),
    ({"mask": np.ones((24, 32))}, r"mask must be one number \[\] for random_shift; got the shape \[24, 32\]"),
    ({"labels": np.ones((24, 32))}, r"labels must be \[M\] for random_shift; got the shape \[24, 32\]"),
    ({"valid": np.ones((24, 32))}, r"valid must be \[3\], one entry for each box, .*; got the shape \[24, 32\]"),
    ({"valid": np.ones(1)}, r"valid must be \[3\], one entry for each box, for random_shift; got the shape \[1\]"),
    ({"boxes": None, "valid": np.ones((24, 32))}, r"valid must be \[M\] for random_shift; got the shape \[24, 32\]"),
    ({"crowd": np.ones((24, 32))}, r"crowd must be \[M\] for random_shift; got the shape \[24, 32\]"),
    ({"difficult": np.ones((24, 32))}, r"difficult must be \[M\] for random_shift; got the shape \[24, 32\]"),
    ({"boxes": np.ones((3, 5))}, r"boxes must be \[M, 4\] for random_shift; got the shape \[3, 5\]"),
    ({"boxes": np.ones(4)}, r"boxes must be \[M, 4\] for random_shift; got the shape \[4\]"),
    ({"keypoints": np.ones((4, 3))}, r"keypoints must be \[..., 2\] for random_shift; got the shape \[4, 3\]"),
    ({"visible": np.ones((24, 32))}, r"visible must be \[2, 4\], one entry for each key point, .*; got the shape \[24"),
    ({"keypoints": None}, r"visible must be \[M\] for random_shift; got the shape \[2, 4\]"),
    ({"masks": np.zeros((3, 5, 4, 1))}, r"masks must be \[M, h, w\] for random_shift; got the shape \[3, 5, 4, 1\]"),
])  # fmt: skip
def test_what_cannot_move_is_refused_when_traced(change, message):
    example = {k: v for k, v in (scene() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(augment.random_shift, jax.random.key(0), example)


def test_what_belongs_to_the_whole_image_or_to_a_box_stays():
    example = scene() | {"crowd": np.array([0, 1, 0]), "difficult": np.array([1, 0, 0]), "mask": np.float32(1), "id": 7}
    for label in (np.int32(3), np.array([0.25, 0.75], np.float32)):
        out = augment.random_flip(jax.random.key(0), example | {"label": label}, probability=1.0)
        kept = ("labels", "crowd", "difficult", "mask", "id")
        chex.assert_trees_all_equal([out[key] for key in kept], [example[key] for key in kept])
        np.testing.assert_array_equal(out["label"], label)


def test_photometric_ops_move_nothing():
    example = scene()
    for op in (augment.random_brightness, partial(augment.random_cutout, size=8), augment.random_hue):
        out = op(jax.random.key(1), example | {"depth": np.zeros((24, 32))})
        assert (out["image"] != example["image"]).any()
        chex.assert_trees_all_equal({k: out[k] for k in example if k != "image"}, {
            k: v for k, v in example.items() if k != "image"
        })  # fmt: skip
    inverted = augment.photometric(lambda key, image: 1 - image)
    np.testing.assert_array_equal(inverted(jax.random.key(0), example)["image"], 1 - example["image"])
    with pytest.raises(ValueError, match=r"keep the image's shape \(24, 32, 3\); got \(12, 32, 3\)"):
        augment.photometric(lambda key, image: image[:12])(jax.random.key(0), example)


def test_a_transform_moves_a_batch():
    batch = jax.tree.map(lambda x: np.stack([x] * 4), scene()) | {"mask": np.ones(4, np.float32)}
    transform = augment.make_transform(OPS["flip"], augment.random_brightness, size=(48, 64), mean=0.5, std=0.5)
    out = jax.device_get(jax.jit(transform)(jax.random.key(0), batch))
    mirrored = 2 * np.array([[WIDTH - x2, y1, WIDTH - x1, y2] for x1, y1, x2, y2 in BOXES[:2]])
    np.testing.assert_array_equal(out["boxes"][:, :2], np.stack([mirrored] * 4))
    np.testing.assert_array_equal(out["mask"], batch["mask"])
    for i in range(4):
        for k in range(2):
            np.testing.assert_array_equal(bounds(out["masks"][i, k]), mirrored[k])
    plain = augment.make_transform(size=(HEIGHT, WIDTH))(jax.random.key(0), batch)
    np.testing.assert_array_equal(plain["boxes"], batch["boxes"])


def test_ops_that_return_no_example_and_mixing_of_objects_are_refused():
    batch = jax.tree.map(lambda x: np.stack([x] * 4), scene())
    image_only = augment.make_transform(lambda key, example: example["image"])
    with pytest.raises(TypeError, match=r"an op must return an example, a dict \(`photometric` makes"):
        image_only(jax.random.key(0), batch)
    for mix in (augment.mixup, augment.cutmix):
        for key in ("boxes", "masks", "keypoints"):
            with pytest.raises(ValueError, match=rf"batch must hold no {key} for {mix.__name__}; got '{key}' of"):
                mix(jax.random.key(0), {"image": batch["image"], "label": np.arange(4), key: batch[key]}, num_classes=4)
    with pytest.raises(ValueError, match=r"mode must be 'zero' for random_crop of an example with \['boxes'"):
        augment.random_crop(jax.random.key(0), scene(), mode="reflect")
