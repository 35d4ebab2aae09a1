"""The losses of darknet's YOLO and region layers as loops over cells and anchors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flaxvision.models import RegionHead, YoloHead
from flaxvision.models.yolo_heads import Truth
from tests.models.darknet_loops import iou_loop, sigmoid
from tests.models.smallest import QUICK

ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0), (81.0, 60.0))
YOLO = YoloHead(ANCHORS, (1, 3), 3, 16)
REGION = RegionHead(((1.0, 0.7), (2.5, 3.0), (4.0, 2.0)), 4, 16, prior_images=100)
GRID = (4, 6)
HEIGHT, WIDTH = 64, 96
quick = functools.partial(jax.jit, compiler_options=QUICK)
# Two truths share the cell and the anchor; one lies at the end of the canvas; the last two are padding.
BOXES = [
    *([20, 10, 45, 35], [8, 10, 90, 62], [22, 12, 42, 36], [60, 2, 95.9, 63]),
    *([70, 40, 84, 55], [3, 40, 14, 52], [0, 0, 0, 0], [0, 0, 0, 0]),
]
LABELS = [0, 1, 2, 2, 1, 0, 0, 0]
VALID = [1, 1, 1, 1, 1, 1, 0, 0]


def truth_of(seen=100, ignored=(), rows=1):
    valid = np.array(VALID, bool) & ~np.isin(np.arange(8), ignored)
    leaves = (
        np.array(BOXES, np.float32),
        np.array(LABELS),
        valid,
        np.isin(np.arange(8), ignored),
        np.array(seen),
    )
    return Truth(*(jnp.stack([jnp.asarray(leaf)] * rows) for leaf in leaves))


def raw_of(head, anchors, rows=1, seed=0):
    depth = anchors * (5 + head.num_classes)
    return np.random.default_rng(seed).normal(0, 0.7, (rows, *GRID, depth)).astype(np.float32)


def normalized(box):
    x1, y1, x2, y2 = box
    return (x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT


def predicted(x, j, i, anchor, scale_xy=1.0):
    """A box (x, y, w, h) as a share of the canvas; the anchor is in pixels."""
    center = sigmoid(x[:2]) * scale_xy - 0.5 * (scale_xy - 1)
    return (
        (i + center[0]) / GRID[1],
        (j + center[1]) / GRID[0],
        np.exp(x[2]) * anchor[0] / WIDTH,
        np.exp(x[3]) * anchor[1] / HEIGHT,
    )


def best_of(shapes, truth):
    """The first of the (w, h) that overlap most with the truth's shape."""
    overlaps = [iou_loop((0, 0, w, h), (0, 0, *truth[2:])) for w, h in shapes]
    return int(np.argmax(overlaps)), overlaps


def within_ignored(box, ignored, threshold):
    for other in ignored:
        w = min(box[0] + box[2] / 2, other[0] + other[2] / 2) - max(box[0] - box[2] / 2, other[0] - other[2] / 2)
        h = min(box[1] + box[3] / 2, other[1] + other[3] / 2) - max(box[1] - box[3] / 2, other[1] - other[3] / 2)
        if w > 0 and h > 0 and w * h / (box[2] * box[3]) > threshold:
            return True
    return False


def bce(p, target):
    """The logistic loss of a probability, minus its minimum."""
    parts = [-t * np.log(q / t) for q, t in ((p, target), (1 - p, 1 - target)) if t > 0]
    return sum(parts)


def put_negative(delta, loss, at, x, weight, head, box, truths, ignored):
    """The objectness of an anchor that no truth belongs to."""
    best = max((iou_loop(box, truth) for truth in truths), default=0)
    if best > head.ignore_threshold or within_ignored(box, ignored, head.ignore_threshold):
        delta[(*at, 4)] = loss["object"][at] = 0
        return
    objectness = sigmoid(x[(*at, 4)])
    delta[(*at, 4)] = weight * (0 - objectness)
    loss["object"][at] = weight * bce(objectness, 0)


def yolo_loop(head, raw, truths, labels, ignored=()):
    """darknet's forward_yolo_layer: deltas [h, w, A, 5 + K] and losses; also the further anchors of its fork."""
    x = raw.reshape(*GRID, len(head.mask), -1).astype(np.float64)
    delta, loss = np.zeros_like(x), {"box": {}, "object": {}, "class": {}}
    for j, i, n in np.ndindex(*x.shape[:3]):
        box = predicted(x[j, i, n], j, i, head.anchors[head.mask[n]], head.scale_xy)
        put_negative(delta, loss, (j, i, n), x, head.object_weight, head, box, truths, ignored)
    for truth, label in zip(truths, labels, strict=True):
        i, j = int(truth[0] * GRID[1]), int(truth[1] * GRID[0])
        best, overlaps = best_of([(w / WIDTH, h / HEIGHT) for w, h in head.anchors], truth)
        for n, anchor in enumerate(head.mask):
            if anchor != best and overlaps[anchor] <= head.iou_threshold:
                continue
            at, scale = x[j, i, n], 2 - truth[2] * truth[3]
            center = sigmoid(at[:2]) * head.scale_xy - 0.5 * (head.scale_xy - 1)
            target = np.array([truth[0] * GRID[1] - i, truth[1] * GRID[0] - j])
            size = np.log([truth[2] * WIDTH / head.anchors[anchor][0], truth[3] * HEIGHT / head.anchors[anchor][1]])
            delta[j, i, n, :2] = head.box_weight * scale * (target - center)
            delta[j, i, n, 2:4] = head.box_weight * scale * (size - at[2:4])
            s = head.scale_xy
            logistic = [s * bce(sigmoid(a), (t + (s - 1) / 2) / s) for a, t in zip(at[:2], target, strict=True)]
            loss["box"][j, i, n] = head.box_weight * scale * (sum(logistic) + ((size - at[2:4]) ** 2).sum() / 2)
            delta[j, i, n, 4] = head.object_weight * (1 - sigmoid(at[4]))
            loss["object"][j, i, n] = head.object_weight * bce(sigmoid(at[4]), 1)
            classes = sigmoid(at[5:])
            if delta[j, i, n, 5]:  # a second truth: only its class
                delta[j, i, n, 5 + label] = head.class_weight * (1 - classes[label])
                loss["class"][j, i, n] += head.class_weight * (bce(classes[label], 1) - bce(classes[label], 0))
                continue
            delta[j, i, n, 5:] = head.class_weight * (np.eye(len(classes))[label] - classes)
            hot = [bce(p, float(k == label)) for k, p in enumerate(classes)]
            loss["class"][j, i, n] = head.class_weight * sum(hot)
    return delta, {name: sum(parts.values()) for name, parts in loss.items()}


def region_loop(head, raw, truths, labels, seen, ignored=()):
    """darknet's forward_region_layer."""
    x = raw.reshape(*GRID, len(head.anchors), -1).astype(np.float64)
    delta, loss = np.zeros_like(x), {"box": {}, "object": {}, "class": {}, "prior": {}}
    for j, i, n in np.ndindex(*x.shape[:3]):
        box = predicted(x[j, i, n], j, i, head.sizes[n])
        put_negative(delta, loss, (j, i, n), x, head.noobject_scale, head, box, truths, ignored)
        if seen < head.prior_images:
            center = sigmoid(x[j, i, n, :2])
            delta[j, i, n, :2] = head.prior_scale * (0.5 - center)
            delta[j, i, n, 2:4] = head.prior_scale * (0 - x[j, i, n, 2:4])
            prior = sum(bce(p, 0.5) for p in center) + (x[j, i, n, 2:4] ** 2).sum() / 2
            loss["prior"][j, i, n] = head.prior_scale * prior
    for truth, label in zip(truths, labels, strict=True):
        i, j = int(truth[0] * GRID[1]), int(truth[1] * GRID[0])
        shapes = [(w / WIDTH, h / HEIGHT) for w, h in head.sizes]
        if not head.match_anchors:
            shapes = [predicted(x[j, i, n], j, i, size)[2:] for n, size in enumerate(head.sizes)]
        n = best_of(shapes, truth)[0]
        at, scale = x[j, i, n], head.coord_scale * (2 - truth[2] * truth[3])
        iou = iou_loop(predicted(at, j, i, head.sizes[n]), truth)
        target = np.array([truth[0] * GRID[1] - i, truth[1] * GRID[0] - j])
        size = np.log([truth[2] * GRID[1] / head.anchors[n][0], truth[3] * GRID[0] / head.anchors[n][1]])
        delta[j, i, n, :2] = scale * (target - sigmoid(at[:2]))
        delta[j, i, n, 2:4] = scale * (size - at[2:4])
        logistic = [bce(sigmoid(a), t) for a, t in zip(at[:2], target, strict=True)]
        loss["box"][j, i, n] = scale * (sum(logistic) + ((size - at[2:4]) ** 2).sum() / 2)
        loss["prior"].pop((j, i, n), None)
        goal = iou if head.rescore else 1.0
        delta[j, i, n, 4] = head.object_scale * (goal - sigmoid(at[4]))
        loss["object"][j, i, n] = head.object_scale * bce(sigmoid(at[4]), goal)
        if head.softmax:
            classes = np.exp(at[5:]) / np.exp(at[5:]).sum()
            delta[j, i, n, 5:] = head.class_scale * (np.eye(len(classes))[label] - classes)
            loss["class"][j, i, n] = -head.class_scale * np.log(classes[label])
            continue
        classes = sigmoid(at[5:])
        if delta[j, i, n, 5]:
            delta[j, i, n, 5 + label] = head.class_scale * (1 - classes[label])
            loss["class"][j, i, n] += head.class_scale * (bce(classes[label], 1) - bce(classes[label], 0))
            continue
        delta[j, i, n, 5:] = head.class_scale * (np.eye(len(classes))[label] - classes)
        loss["class"][j, i, n] = head.class_scale * sum(bce(p, float(k == label)) for k, p in enumerate(classes))
    return delta, {name: sum(parts.values()) for name, parts in loss.items()}


def compare(head, anchors, loop, seen=100, ignored=()):
    raw, truth = raw_of(head, anchors, rows=2), truth_of(seen, ignored, rows=2)

    @quick
    def both(raw):
        def total(raw):
            losses = head.losses(raw, truth)
            return sum(map(jnp.sum, losses.values())), losses

        return jax.grad(total, has_aux=True)(raw)

    gradient, losses = both(jnp.asarray(raw))
    keep = [m for m in range(8) if VALID[m] and m not in ignored]
    boxes = [normalized(BOXES[m]) for m in keep]
    for row in range(2):
        apart = [normalized(BOXES[m]) for m in ignored]
        delta, expected = loop(head, raw[row], boxes, [LABELS[m] for m in keep], ignored=apart)
        np.testing.assert_allclose(gradient[row], -delta.reshape(gradient[row].shape), rtol=1e-4, atol=2e-6)
        assert set(losses) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(losses[name][row], value, rtol=1e-5, err_msg=name)
    return delta
