"""Augmentations that crop, shrink and combine images with boxes: the boxes stay on their objects."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.data import augment


def scene(size=None, canvas=(40, 48)):
    """Two objects of a flat colour each, red and green, on black."""
    image = np.zeros((*canvas, 3), np.float32)
    boxes = np.array([[4, 6, 16, 18], [20, 10, 36, 26], [0, 0, 0, 0]], np.float32)
    for k, (x1, y1, x2, y2) in enumerate(boxes[:2].astype(int)):
        image[y1:y2, x1:x2, k] = 1.0
    example = {
        "image": jnp.asarray(image),
        "boxes": jnp.asarray(boxes),
        "labels": jnp.asarray([0, 1, 0]),
        "valid": jnp.asarray([True, True, False]),
        "difficult": jnp.zeros(3, bool),
        "area": jnp.ones(3),
        "scale": jnp.ones(2),
    }
    return example if size is None else {**example, "size": jnp.asarray(size)}


def check(example, tolerance=1.1):
    """Every valid box encloses the pixels of its colour; and lies within the size."""
    image = np.asarray(example["image"])
    height, width = example.get("size", image.shape[:2])
    for k in range(2):
        if not example["valid"][k]:
            continue
        x1, y1, x2, y2 = np.asarray(example["boxes"][k])
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        rows, columns = np.nonzero(image[..., k] > 0.5)
        np.testing.assert_allclose(
            [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], [x1, y1, x2, y2], atol=tolerance
        )


OPS = {
    "iou_crop": augment.random_iou_crop,
    "expand": partial(augment.random_expand, probability=1.0, ratios=(1.0, 2.0)),
    "zoom": partial(augment.random_zoom, factors=(0.6, 1.8), min_visible=0.25),
    "flip": augment.random_flip,
}


def with_masks(size):
    """The scene with masks at the resolution of the image, a label map, and padding that is no object."""
    example, drawn = scene(size), jnp.moveaxis(scene()["image"], -1, 0)
    inside = (jnp.arange(40) < 30)[:, None] & (jnp.arange(48) < 40)[None] if size else jnp.ones((40, 48), bool)
    label = jnp.where(inside, jnp.argmax(drawn, 0) + (drawn.max(0) > 0), 255).astype(jnp.int32)
    image = jnp.where(inside[..., None], example["image"], 0.5)
    return {**example, "image": image, "masks": drawn.astype(jnp.uint8), "label": label}


def check_masks(example):
    """Masks and label maps lie on the pixels of their colour, and nothing lies beyond the new image."""
    height, width = example.get("size", (40, 48))
    beyond = np.ones((40, 48), bool)
    beyond[:height, :width] = False
    assert not example["masks"][:, beyond].any()
    assert (example["label"][beyond] == 255).all()
    for k in range(2):
        colour, mask = example["image"][..., k], example["masks"][k]
        solid = ~beyond & (np.abs(colour - 0.5) > 0.49)  # not at the edges, which are interpolated
        np.testing.assert_array_equal(mask[solid], colour[solid] > 0.5)
        np.testing.assert_array_equal(example["label"][~beyond] == k + 1, mask[~beyond])


@pytest.mark.parametrize("size", [None, (30, 40)], ids=["whole", "part"])
@pytest.mark.parametrize("name", OPS)
def test_boxes_and_masks_stay_on_their_objects(name, size):
    keys = jax.random.split(jax.random.key(1), 64)
    found = jax.device_get(jax.jit(jax.vmap(OPS[name], (0, None)))(keys, with_masks(size)))
    assert {"area", "scale"}.isdisjoint(found)
    assert (found["masks"].shape, found["masks"].dtype) == ((64, 3, 40, 48), np.uint8)
    moved = 0
    for row in range(64):
        example = {key: value[row] for key, value in found.items()}
        check(example)
        check_masks(example)
        assert not example["valid"][2]
        moved += not np.array_equal(example["boxes"][:2], scene()["boxes"][:2])
    assert moved > 20
    assert found["valid"][:, :2].sum() > 60


def test_a_crop_keeps_the_overlap_that_was_drawn():
    """With a least IoU of 0.5, one of the objects fills at least half of the union with the window."""
    op = partial(augment.random_iou_crop, min_ious=(0.5,), tries=400)
    found = jax.jit(jax.vmap(op, (0, None)))(jax.random.split(jax.random.key(0), 32), scene((30, 40)))
    area = (found["boxes"][..., 2] - found["boxes"][..., 0]) * (found["boxes"][..., 3] - found["boxes"][..., 1])
    whole = found["size"][:, 0] * found["size"][:, 1]
    share = jnp.where(found["valid"], area, 0).max(1) / whole
    cropped = np.asarray(jnp.any(found["boxes"][:, 0] != scene()["boxes"][0][None], -1))
    assert cropped.sum() > 16
    assert np.all(np.asarray(share)[cropped] >= 0.45)  # the size is rounded to pixels
    kept = jax.jit(jax.vmap(partial(augment.random_iou_crop, min_ious=(1.0,)), (0, None)))(
        jax.random.split(jax.random.key(0), 8), scene((30, 40))
    )
    np.testing.assert_allclose(kept["image"], jnp.stack([scene()["image"]] * 8), atol=1e-6)
    assert kept["valid"].tolist() == [[True, True, False]] * 8


def test_images_without_objects_are_not_cropped():
    example = {**scene((30, 40)), "valid": jnp.zeros(3, bool)}
    crop = jax.jit(augment.random_iou_crop)
    found = crop(jax.random.key(0), example)
    assert found["size"].tolist() == [30, 40]
    assert not found["valid"].any()
    crowd = {**scene((30, 40)), "crowd": jnp.asarray([True, True, False])}
    assert crop(jax.random.key(0), crowd)["size"].tolist() == [30, 40]


def test_objects_of_which_little_is_left_are_dropped():
    op = partial(augment.random_zoom, factors=(2.5, 2.5), min_visible=0.9)
    found = jax.jit(jax.vmap(op, (0, None)))(jax.random.split(jax.random.key(0), 32), scene())
    area = np.prod(np.asarray(found["boxes"][..., 2:] - found["boxes"][..., :2]), -1) / 2.5**2
    shares = area[:, :2] / np.array([144, 256])[None]
    np.testing.assert_array_equal(np.asarray(found["valid"][:, :2]), shares >= 0.9)
    assert 0 < found["valid"][:, :2].sum() < 64


def test_a_crowd_stays_while_a_part_of_it_is_visible():
    """Its area must not become background: neither in a crop around another object, nor if little of it is left."""
    example = {**scene(), "crowd": jnp.asarray([False, True, False])}
    ops = (
        partial(augment.random_iou_crop, min_ious=(0.0,), scales=(0.4, 0.9)),
        partial(augment.random_zoom, factors=(2.5, 2.5), min_visible=0.9),
    )
    for op in ops:
        found = jax.jit(jax.vmap(op, (0, None)))(jax.random.split(jax.random.key(0), 32), example)
        sides = np.asarray(found["boxes"][:, 1, 2:] - found["boxes"][:, 1, :2])
        left = (sides > 0).all(-1)
        np.testing.assert_array_equal(np.asarray(found["valid"][:, 1]), left)
        assert 16 < left.sum() <= 32
        assert (np.prod(sides[left], -1) < 0.5 * np.prod(sides.max(0))).any()
        assert not found["valid"][:, 2].any()


def test_the_fill_lies_beyond_the_new_image():
    op = partial(augment.random_expand, ratios=(2.0, 2.0), probability=1.0, fill=0.5)
    found = op(jax.random.key(0), scene((30, 40)))
    inside = np.asarray(found["image"][:30, :40])
    assert (inside == 0.5).all(-1).mean() > 0.7
    assert found["size"].tolist() == [30, 40]
    assert np.all(np.asarray(found["image"])[30:] == 0.5)


def batch(rows=5, size=(30, 40)):
    one = {key: value for key, value in scene(size).items() if key not in ("area", "scale")}
    stacked = {key: jnp.stack([value] * rows) for key, value in one.items()}
    # Every row has a blue value of its own, which tells where a pixel comes from.
    blue = (jnp.arange(rows) + 1.0) / 10
    inside = (jnp.arange(40) < size[0])[:, None] & (jnp.arange(48) < size[1])[None]
    image = stacked["image"].at[..., 2].set(blue[:, None, None] * inside[None])
    return {**stacked, "image": image, "mask": jnp.ones(rows).at[-1].set(0)}


def test_mosaic():
    made = jax.jit(partial(augment.mosaic, factors=(0.8, 1.0)))(jax.random.key(0), batch())
    assert made["boxes"].shape == (5, 12, 4)
    assert made["labels"].shape == (5, 12)
    assert made["size"].tolist() == [[40, 48]] * 5
    image, sources = np.asarray(made["image"]), []
    for row in range(4):
        blue = set(np.round(np.unique(image[row][image[row].max(-1) > 0][:, 2]) * 10, 3))
        assert 5.0 not in {round(b) for b in blue if abs(b - round(b)) < 1e-3}  # the padded row is not used
        sources.append(len({round(b) for b in blue if abs(b - round(b)) < 1e-3 and b > 0.5}))
        assert made["valid"][row].sum() >= 2
        for box, label, valid in zip(made["boxes"][row], made["labels"][row], made["valid"][row], strict=True):
            if valid:
                x1, y1, x2, y2 = np.asarray(box).round().astype(int)
                patch = image[row, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1, int(label)]
                assert patch.size == 0 or patch.min() > 0.5
    assert min(sources) >= 3
    assert max(sources) == 4


def test_mosaic_of_some_rows_and_a_limit_of_objects():
    few = jax.jit(partial(augment.mosaic, probability=0.0, max_objects=3))(jax.random.key(0), batch())
    before = batch()
    for key in ("boxes", "labels", "valid", "size"):
        np.testing.assert_array_equal(few[key], before[key])
    np.testing.assert_allclose(few["image"], before["image"], atol=1e-6)
    limited = jax.jit(partial(augment.mosaic, max_objects=4, min_visible=0.1))(jax.random.key(0), batch())
    assert limited["boxes"].shape == (5, 4, 4)
    assert limited["valid"].sum(1).max() <= 4
    for rows, key in (("masks", "masks"), ("label", "label")):
        with pytest.raises(ValueError, match=f"batch must hold boxes and no {rows} for mosaic"):
            augment.mosaic(jax.random.key(0), {**batch(), key: jnp.zeros((5, 3, 40, 48))})
    with pytest.raises(ValueError, match="batch must hold boxes for mosaic"):
        augment.mosaic(jax.random.key(0), {"image": jnp.zeros((2, 4, 4, 3))})
    with pytest.raises(ValueError, match="example must hold boxes for random_iou_crop"):
        augment.random_iou_crop(jax.random.key(0), {"image": jnp.zeros((4, 4, 3))})


def test_the_padding_of_standardized_images():
    transform = augment.make_transform(mean=0.5, std=0.25, padding=0.0)
    image = transform(jax.random.key(0), batch())["image"]
    assert float(jnp.abs(image[:, 30:]).max()) == 0 == float(jnp.abs(image[:, :, 40:]).max())
    np.testing.assert_allclose(image[:, :30, :40], (batch()["image"][:, :30, :40] - 0.5) / 0.25, rtol=1e-5)
    plain = augment.make_transform(mean=0.5, std=0.25)(jax.random.key(0), batch())["image"]
    assert float(plain[0, 35, 0, 0]) == -2
