import tracemalloc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision import ops
from tests.ops import loops

SIZE = (13, 17)
BOXES = np.asarray(
    [
        [2.3, 1.8, 9.1, 10.4],
        [0, 0, 17, 13],  # the whole image
        [-4.5, 3.2, 6.7, 19.9],  # beyond three borders
        [4, 5, 4, 5],  # a point
        [3.2, 4.1, 3.6, 4.2],
        [30, 40, 50, 60],  # outside
    ],
    np.float32,
)


def test_cropping_is_an_adaptive_loop():
    rng = np.random.default_rng(0)
    masks, indices = rng.random((3, *SIZE)) < 0.5, np.asarray([0, 1, 2, 1, 0])
    rois = np.concatenate([np.clip(BOXES[:4], 0, [17, 13, 17, 13]), [[1, 2, 7, 8]]]).astype(np.float32)
    run = jax.jit(partial(ops.crop_masks, output_size=(3, 2)))
    expected = [
        loops.roi_align(masks[i][..., None], box, (3, 2), 1, None, False)[0]
        for i, box in zip(indices, rois, strict=True)
    ]
    for dtype in (bool, np.uint8, np.float32):
        np.testing.assert_allclose(run(masks.astype(dtype), rois, indices), np.asarray(expected)[..., 0], atol=1e-5)


def test_cropping_at_another_resolution_and_in_a_valid_region():
    rng = np.random.default_rng(1)
    masks, roi = rng.random((1, *SIZE)) < 0.5, np.asarray([[3, 2, 20, 19.5]], np.float32)
    ours = ops.crop_masks(masks, roi, np.asarray([0]), 3, spatial_scale=(0.5, 0.75))
    expected, _ = loops.roi_align(masks[0][..., None], [2.25, 1, 15, 9.75], 3, 1, None, False)
    np.testing.assert_allclose(ours[0], expected[..., 0], atol=1e-5)
    # Beyond the valid region, a mask does not count: the region alone gives the same.
    roi = np.asarray([[0, 0, 11, 9]], np.float32)
    ours = ops.crop_masks(masks, roi, np.asarray([0]), 4, size=np.asarray([9, 11]))
    np.testing.assert_allclose(ours, ops.crop_masks(masks[:, :9, :11], roi, np.asarray([0]), 4), atol=1e-6)
    assert np.abs(ours - ops.crop_masks(masks, roi, np.asarray([0]), 4)).max() > 0.01


def test_pasting_is_a_loop():
    masks = np.random.default_rng(0).random((6, 4, 4)).astype(np.float32)
    expected = [loops.paste_mask(mask, box, SIZE) for mask, box in zip(masks, BOXES, strict=True)]
    assert np.asarray(expected).any((1, 2)).tolist() == [True, True, True, True, True, False]
    paste = partial(ops.paste_masks, size=SIZE)
    np.testing.assert_allclose(jax.jit(paste)(masks, BOXES), expected, atol=1e-6)
    nested = jax.jit(paste)(masks.reshape(2, 3, 4, 4), BOXES.reshape(2, 3, 4))
    np.testing.assert_allclose(nested.reshape(6, *SIZE), expected, atol=1e-6)
    found = list(ops.iter_masks(masks, BOXES, SIZE, threshold=0.4))
    assert [mask.dtype for mask in found] == [bool] * 6
    np.testing.assert_array_equal(found, np.asarray(expected) > 0.4)


def test_masks_that_are_not_square():
    mask = np.random.default_rng(2).random((1, 3, 5)).astype(np.float32)
    expected = loops.paste_mask(mask[0], BOXES[0], SIZE)
    np.testing.assert_allclose(ops.paste_masks(mask, BOXES[:1], SIZE)[0], expected, atol=1e-6)
    np.testing.assert_array_equal(next(ops.iter_masks(mask, BOXES[:1], SIZE)), expected > 0.5)


def test_a_filled_mask_covers_its_box():
    filled, box = np.ones((1, 28, 28), np.float32), np.asarray([[40, 20, 140, 90]], np.float32)
    pasted = np.asarray(ops.paste_masks(filled, box, (100, 150))[0] > 0.5)
    expected = np.zeros((100, 150), bool)
    expected[20:90, 40:140] = True
    assert (pasted & expected).sum() == expected.sum()
    assert pasted.sum() < 1.05 * expected.sum()


def test_the_host_needs_the_memory_of_one_mask():
    """100 masks in an image of 12 megapixels, which together would need 1.2 GB."""
    rng = np.random.default_rng(3)
    corner = rng.uniform(0, 2000, (100, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(50, 400, (100, 2))], axis=1).astype(np.float32)
    masks = rng.random((100, 28, 28)).astype(np.float32)
    tracemalloc.start()
    area = sum(int(mask.sum()) for mask in ops.iter_masks(masks, boxes, (3000, 4000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.2 < area / np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).sum() < 0.8
    assert peak < 4 * 12e6


def test_masks_have_gradients():
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(1, *SIZE)), jnp.float32)
    mask = jnp.full((1, 4, 4), 0.5)
    loss = lambda mask: jnp.sum(ops.paste_masks(mask, BOXES[:1], SIZE) * weights)
    expected = [loss(mask.at[0, i, j].add(1)) - loss(mask) for i, j in np.ndindex(4, 4)]
    np.testing.assert_allclose(jax.grad(loss)(mask).ravel(), expected, atol=1e-4)


def test_errors():
    masks, boxes = np.zeros((6, 4, 4), np.float32), BOXES
    with pytest.raises(
        ValueError, match=r"masks must be \[..., h, w\] and boxes \[..., 4\]; got \(6, 4, 4\) and \(5, 4\)"
    ):
        ops.paste_masks(masks, boxes[:5], SIZE)
    with pytest.raises(ValueError, match=r"size must be a height and a width of at least 1; got \(0, 3\)"):
        ops.paste_masks(masks, boxes, (0, 3))
    with pytest.raises(ValueError, match=r"masks must be the masks \[M, h, w\] of one image; got \(4, 4\)"):
        ops.iter_masks(masks[0], boxes[0], SIZE)
    with pytest.raises(ValueError, match=r"masks must be \[M, H, W\] and indices \(6,\); got \(6, 4, 4\), \(5,\)"):
        ops.crop_masks(masks, boxes, np.zeros(5, int), 3)
    with pytest.raises(ValueError, match="output_size must be at least 1; got 0"):
        ops.crop_masks(masks, boxes, np.zeros(6, int), 0)
