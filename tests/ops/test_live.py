"""The operators beside torchvision's, on 1,000 random cases each: `pytest -m reference tests/ops`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision import ops
from parity import operators

pytestmark = pytest.mark.reference
CASES = 1000


def stacked(cases):
    return {key: np.stack([case[key] for case in cases]) for key in cases[0]}


@pytest.mark.parametrize("classwise", [False, True])
@pytest.mark.parametrize("threshold", operators.THRESHOLDS)
def test_nms_keeps_the_same_indices(threshold, classwise):
    cases = [operators.nms_case(seed) for seed in range(CASES)]
    batch = stacked(cases)
    run = partial(ops.nms, iou_threshold=threshold, max_outputs=operators.BOXES)
    labels = batch["labels"] if classwise else np.zeros_like(batch["labels"])
    indices, kept = jax.jit(jax.vmap(lambda b, s, v, k: run(b, s, v, labels=k)))(
        batch["boxes"], batch["scores"], batch["valid"], labels
    )
    suppressed = 0
    for i, case in enumerate(cases):
        theirs = operators.torch_nms(case, threshold, classwise)
        assert indices[i][kept[i]].tolist() == theirs, i
        suppressed += case["valid"].sum() - len(theirs)
    assert suppressed > CASES


def test_nms_of_many_boxes():
    rng = np.random.default_rng(0)
    for extent in (50, 300, 2000):
        boxes = operators.boxes(rng, 1500, extent=extent)
        scores = (rng.integers(0, 400, 1500) / 400).astype(np.float32)
        case = {"boxes": boxes, "scores": scores, "labels": rng.integers(0, 5, 1500), "valid": np.ones(1500, bool)}
        for labels in (None, case["labels"]):
            indices, kept = ops.nms(boxes, scores, iou_threshold=0.5, max_outputs=1500, labels=labels)
            assert indices[kept].tolist() == operators.torch_nms(case, 0.5, labels is not None)


def compare_roi(name, ours, options, count):
    cases = [operators.roi_case(seed, options["spatial_scale"]) for seed in range(count)]
    batch = stacked(cases)
    run = jax.vmap(partial(ours, **options))
    values = jax.jit(run)(batch["features"], batch["rois"])
    cotangent = operators.cotangent(values.shape[1:])
    loss = lambda features, rois: jnp.sum(run(features, rois) * cotangent[None])
    gradients = jax.jit(jax.grad(loss))(batch["features"], batch["rois"])
    for i, case in enumerate(cases):
        value, gradient = operators.torch_roi(name, case, options)
        np.testing.assert_allclose(values[i], value, atol=1e-5, rtol=1e-5, err_msg=str(i))
        np.testing.assert_allclose(gradients[i], gradient, atol=1e-5, rtol=1e-5, err_msg=str(i))


@pytest.mark.parametrize("options", operators.ROI_ALIGN, ids=str)
def test_roi_align(options):
    compare_roi("roi_align", ops.roi_align, options, CASES // len(operators.ROI_ALIGN))


@pytest.mark.parametrize("options", operators.ROI_POOL, ids=str)
def test_roi_max_pool(options):
    compare_roi("roi_pool", ops.roi_max_pool, options, CASES // len(operators.ROI_POOL))


def test_multiscale_roi_align():
    import torch
    from torchvision.ops import MultiScaleRoIAlign

    rng = np.random.default_rng(0)
    strides, size = (4, 8, 16, 32), (256, 384)
    features = [rng.standard_normal((size[0] // s, size[1] // s, 5)).astype(np.float32) for s in strides]
    corner, side = rng.uniform(0, 200, (1000, 2)), 2 ** rng.uniform(2, 9, (1000, 2))
    side[:64] = 2.0 ** rng.integers(4, 10, (64, 1)) * 7 / 8  # at the limits of the levels
    rois = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    pool = MultiScaleRoIAlign(list("0123"), 7, 2)
    maps = {
        str(i): torch.tensor(f).permute(2, 0, 1)[None].contiguous().requires_grad_() for i, f in enumerate(features)
    }
    theirs = pool(maps, [torch.tensor(rois)], [size])
    cotangent = operators.cotangent((1000, 7, 7, 5))
    gradients = torch.autograd.grad(theirs, list(maps.values()), torch.tensor(cotangent).permute(0, 3, 1, 2))
    run = lambda maps: ops.multiscale_roi_align(maps, strides, rois, 7)
    np.testing.assert_allclose(jax.jit(run)(features), theirs.detach().permute(0, 2, 3, 1), atol=1e-5)
    ours = jax.jit(jax.grad(lambda maps: jnp.sum(run(maps) * cotangent)))(features)
    for mine, other in zip(ours, gradients, strict=True):
        scale = float(other.abs().max())
        np.testing.assert_allclose(mine / scale, other[0].permute(1, 2, 0) / scale, atol=1e-5)


@pytest.mark.parametrize("kind", operators.KINDS)
def test_overlaps(kind):
    """For points and empty unions torchvision gives NaN; test_boxes.py has what flaxvision gives."""
    ours = {"iou": ops.box_iou, "giou": ops.box_giou, "diou": ops.box_diou, "ciou": ops.box_ciou}[kind]
    ours, loss = jax.jit(ours), jax.jit(lambda a, b: 1 - ops.paired_iou(a, b, kind))
    gradient = jax.jit(jax.grad(lambda a, b: jnp.sum(loss(a, b)), (0, 1)))
    compared = 0
    for seed in range(CASES):
        rng = np.random.default_rng([seed, 5])
        a, b = (operators.boxes(rng, 16, inverted=False) for _ in range(2))
        theirs = operators.torch_pairwise(kind, a, b)
        known = ~np.isnan(theirs)
        np.testing.assert_allclose(np.asarray(ours(a, b))[known], theirs[known], atol=1e-6, rtol=1e-6)
        value, *gradients = operators.torch_loss(kind, a, b)
        known = ~np.isnan(value)
        compared += known.sum()
        np.testing.assert_allclose(np.asarray(loss(a, b))[known], value[known], atol=1e-6, rtol=1e-6)
        # torchvision adds 1e-7 to the divisors, which shows in the gradients of tiny boxes.
        outer = np.maximum(a, b)[:, 2:] - np.minimum(a, b)[:, :2]
        for mine, other in zip(gradient(a, b), gradients, strict=True):
            assert np.isfinite(mine).all()
            known = np.isfinite(other).all(1) & (outer.min(1) > 0.1)
            np.testing.assert_allclose(np.asarray(mine)[known], other[known], atol=1e-6, rtol=1e-5)
    assert compared > 0.8 * CASES * 16


def test_coding():
    import torch
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.ops import box_convert, clip_boxes_to_image

    for weights in ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)):
        coder = BoxCoder(weights)
        encode, decode = (jax.jit(partial(f, weights=weights)) for f in (ops.encode_boxes, ops.decode_boxes))
        for seed in range(CASES // 2):
            rng = np.random.default_rng([seed, 6])
            corner, side = rng.uniform(-20, 800, (2, 16, 2)), rng.uniform(1, 300, (2, 16, 2))
            boxes, anchors = np.concatenate([corner, corner + side], axis=-1).astype(np.float32)
            theirs = coder.encode_single(torch.tensor(boxes), torch.tensor(anchors)).numpy()
            np.testing.assert_allclose(encode(boxes, anchors), theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())
            deltas = rng.normal(0, 2, (16, 4)).astype(np.float32)
            theirs = coder.decode_single(torch.tensor(deltas), torch.tensor(anchors))
            scale = float(theirs.abs().max())
            ours = decode(deltas, anchors)
            np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-6)
            np.testing.assert_array_equal(
                ops.clip_boxes(boxes, (300, 500)), clip_boxes_to_image(torch.tensor(boxes), (300, 500))
            )
            centers = box_convert(torch.tensor(boxes), "xyxy", "cxcywh")
            np.testing.assert_allclose(ops.to_centers(boxes), centers, rtol=1e-6)
            theirs = box_convert(centers, "cxcywh", "xyxy")
            np.testing.assert_allclose(ops.from_centers(centers.numpy()), theirs, rtol=1e-6, atol=1e-4)


def test_anchors():
    import torch
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList

    for seed in range(CASES):
        rng = np.random.default_rng([seed, 7])
        sizes, ratios = rng.uniform(4, 600, 1 + seed % 3).tolist(), rng.uniform(0.2, 5, 3).tolist()
        if seed % 2:
            sizes, ratios = np.round(sizes).tolist(), [0.5, 1.0, 2.0]
        (height, width), stride = ((3, 5), (1, 1), (6, 2))[seed % 3], int(rng.integers(1, 65))
        generator = AnchorGenerator((tuple(sizes),), (tuple(ratios),))
        shape = (height * stride, width * stride)
        images = ImageList(torch.zeros(1, 3, *shape), [shape])
        (theirs,) = generator(images, [torch.zeros(1, 1, height, width)])
        ours = ops.level_anchors(height, width, stride, sizes, ratios)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_matching():
    import torch
    from torchvision.models.detection._utils import Matcher

    for low, high, allow in ((0.3, 0.7, True), (0.5, 0.5, False), (0.4, 0.5, False)):
        theirs = Matcher(high, low, allow)
        ours = jax.jit(partial(ops.match, low=low, high=high, allow_low_quality=allow))
        for seed in range(CASES // 3 + 1):
            rng = np.random.default_rng([seed, 8])
            iou = np.round(rng.random((6, 30)) ** 2, int(rng.integers(1, 6))).astype(np.float32)
            iou[:, 0] += 0.01  # torchvision makes every box positive for an object that overlaps none
            exists = rng.random(6) < 0.7
            exists[0] = True
            matched, label = ours(iou, exists)
            expected = theirs(torch.tensor(iou[exists])).numpy()
            np.testing.assert_array_equal(label, np.where(expected >= 0, 1, np.where(expected == -1, 0, -1)))
            positive = expected >= 0
            np.testing.assert_array_equal(matched[positive], np.flatnonzero(exists)[expected[positive]])


def test_sampling_counts():
    import torch
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

    for size, fraction in ((16, 0.5), (20, 0.25), (7, 0.33)):
        theirs = BalancedPositiveNegativeSampler(size, fraction)
        ours = jax.jit(partial(ops.sample, size=size, positive_fraction=fraction))
        for seed in range(CASES // 3 + 1):
            rng = np.random.default_rng([seed, 9])
            p = rng.dirichlet([0.3, 1, 1])
            label = rng.choice([1, 0, -1], 40, p=p).astype(np.int8)
            indices, kept = ours(jax.random.key(seed), label)
            drawn = label[np.asarray(indices)[kept]]
            (positive,), (negative,) = theirs([torch.tensor(label)])
            assert (drawn == 1).sum() == positive.sum()
            assert (drawn == 0).sum() == negative.sum()
            assert len(drawn) == positive.sum() + negative.sum()


def test_masks():
    """The targets of the mask head, and the pasted masks."""
    import torch
    from torchvision.models.detection import roi_heads

    rng, size = np.random.default_rng(0), (90, 131)
    masks = rng.random((5, *size)) < 0.5
    rois = operators.boxes(rng, CASES, extent=60, inverted=False)
    rois = np.minimum(rois, np.asarray([131, 90, 131, 90], np.float32))
    rois[0] = [0, 0, 131, 90]
    indices = rng.integers(0, 5, CASES)
    theirs = roi_heads.project_masks_on_boxes(torch.tensor(masks), torch.tensor(rois), torch.tensor(indices), 28)
    ours = jax.jit(partial(ops.crop_masks, output_size=28))(masks, rois, indices)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)
    found = rng.random((CASES, 28, 28)).astype(np.float32)
    boxes = rois - rng.uniform(-5, 5, (CASES, 1)).astype(np.float32)
    theirs = roi_heads.paste_masks_in_image(torch.tensor(found)[:, None], torch.tensor(boxes), size)[:, 0].numpy()
    np.testing.assert_allclose(jax.jit(partial(ops.paste_masks, size=size))(found, boxes), theirs, atol=1e-6)
    for one, wanted in zip(ops.iter_masks(found, boxes, size), theirs, strict=True):
        assert not ((one != (wanted > 0.5)) & (np.abs(wanted - 0.5) > 1e-6)).any()
