"""Region proposal network.

S. Ren, K. He, R. Girshick, J. Sun, "Faster R-CNN: towards real-time object detection with region proposal networks",
NIPS 2015, section 3; on the levels of a feature pyramid as in T.-Y. Lin et al., "Feature pyramid networks for object
detection", CVPR 2017, section 4.1.

The definition is torchvision's. It differs from the papers in these points: anchors that cross the border of the image
take part in training; the corners of anchors are rounded to whole pixels; the anchors of a level are
`canvas // map` pixels apart, which is less than the stride where the map was rounded up; and the regression loss is
smooth L1 with beta 1/9, divided by the number of sampled anchors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flaxvision.layers import Conv
from flaxvision.models.backbone import Dtype, as_float32
from flaxvision.models.detector import batch_mean
from flaxvision.ops import box_area, box_iou, clip_boxes, decode_boxes, encode_boxes, level_anchors, match, nms, sample

Levels = list[jax.Array]


class RPNHead(nn.Module):
    """A 3x3 convolution and two 1x1 convolutions, shared by all levels: `conv`, `objectness` and `deltas`.

    Attributes:
        anchors: Number of anchors at each position.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    anchors: int = 3
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> tuple[Levels, Levels]:
        """Maps levels `[N, H, W, C]` to logits `[N, A]` and offsets `[N, A, 4]`, with A = `H * W * anchors`."""
        make = functools.partial(
            Conv, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype, param_dtype=self.param_dtype
        )
        conv = make(levels[0].shape[-1], (3, 3), padding=1, name="conv")
        objectness = make(self.anchors, (1, 1), name="objectness")
        deltas = make(4 * self.anchors, (1, 1), name="deltas")
        hidden = [nn.relu(conv(level)) for level in levels]
        rows = levels[0].shape[0]
        logits = [as_float32(objectness(x)).reshape(rows, -1) for x in hidden]
        return logits, [as_float32(deltas(x)).reshape(rows, -1, 4) for x in hidden]


def anchors_of(
    levels: Sequence[Sequence[int]],
    canvas: Sequence[int],
    sizes: jax.Array,
    *,
    anchor_sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    size_divisor: int,
    dtype: Dtype = jnp.float32,
) -> tuple[Levels, Levels]:
    """Lays out the anchors of every level, and tells which of them belong to an image.

    The image is thought to end where its sides are rounded up to multiples of `size_divisor`. An anchor whose center
    lies beyond is one of the canvas alone.

    Args:
        levels: Height and width of each map.
        canvas: Height and width of the canvas.
        sizes: Valid height and width of each image, `[N, 2]`.
        anchor_sizes: Square roots of the areas of the anchors, for each level.
        aspect_ratios: Heights divided by widths.
        size_divisor: See above; 1 for the valid part alone.
        dtype: Dtype of the anchors.

    Returns:
        For each level, anchors `[A, 4]` in the order row, column, shape; and which of them belong to each image,
        `[N, A]` bool.
    """
    ends = -(-sizes // size_divisor) * size_divisor
    anchors, inside = [], []
    for (height, width), shapes in zip(levels, anchor_sizes, strict=True):
        stride = (canvas[0] // height, canvas[1] // width)
        anchors.append(level_anchors(height, width, stride, shapes, aspect_ratios).astype(dtype))
        within = [
            jnp.arange(n)[None] * step < ends[:, i, None]
            for i, (n, step) in enumerate(zip((height, width), stride, strict=True))
        ]
        within = (within[0][:, :, None] & within[1][:, None, :]).reshape(sizes.shape[0], -1)
        inside.append(jnp.repeat(within, len(shapes) * len(aspect_ratios), axis=1))
    return anchors, inside


def propose(
    objectness: Levels,
    deltas: Levels,
    anchors: Levels,
    inside: Levels,
    sizes: jax.Array,
    *,
    pre_nms: int,
    post_nms: int,
    iou_threshold: float,
    min_size: float,
    score_threshold: float,
) -> tuple[jax.Array, jax.Array]:
    """Chooses proposals: the best of every level, decoded, clipped and without duplicates. They have no gradient.

    Args:
        objectness: Logits `[N, A]` of each level.
        deltas: Offsets `[N, A, 4]` of each level.
        anchors: Anchors `[A, 4]` of each level.
        inside: Which anchors belong to the image, `[N, A]` bool, of each level.
        sizes: Valid height and width of each image, `[N, 2]`.
        pre_nms: Number of anchors to take from each level.
        post_nms: Number of proposals R.
        iou_threshold: Largest IoU of two proposals from one level.
        min_size: Least height and width in pixels.
        score_threshold: Least probability of an object.

    Returns:
        Proposals `[N, R, 4]` by falling probability, and which of them exist, `[N, R]` bool.
    """

    def of_image(objectness, deltas, inside, size):
        scores, boxes, exists, numbers = [], [], [], []
        for number, anchor in enumerate(anchors):
            k = min(pre_nms, anchor.shape[0])
            logit, index = jax.lax.top_k(jnp.where(inside[number], objectness[number], -jnp.inf), k)
            scores.append(jax.nn.sigmoid(logit))
            boxes.append(decode_boxes(deltas[number][index], anchor[index]))
            exists.append(inside[number][index])
            numbers.append(jnp.full(k, number, jnp.int32))
        score, box, exist, level = (jnp.concatenate(x) for x in (scores, boxes, exists, numbers))
        box = clip_boxes(box, size)
        exist &= jnp.all(box[:, 2:] - box[:, :2] >= min_size, axis=-1) & (score >= score_threshold)
        chosen, kept = nms(box, score, exist, iou_threshold=iou_threshold, max_outputs=post_nms, labels=level)
        return jnp.where(kept[:, None], box[chosen], 0), kept

    objectness, deltas = jax.lax.stop_gradient((objectness, deltas))
    return jax.vmap(of_image)(objectness, deltas, inside, sizes)


def assign(
    boxes: jax.Array, valid: jax.Array, ignored: jax.Array, candidates: jax.Array, exists: jax.Array, **thresholds: Any
) -> tuple[jax.Array, jax.Array]:
    """Matches candidates with the true boxes of one image.

    Args:
        boxes: `[M, 4]`.
        valid: `[M]` bool: which of them are truths.
        ignored: `[M]` bool: which of them mark areas without a label. A negative with at least half of its area in one
            of them is ignored.
        candidates: Anchors or proposals `[A, 4]`.
        exists: `[A]` bool; the others are ignored.
        **thresholds: `low`, `high` and `allow_low_quality` of `ops.match`.

    Returns:
        The index of the truth `[A]`, and 1 for positive, 0 for negative and -1 for ignored candidates, `[A]`.
    """
    # An anchor of the canvas alone must not be the best one of a truth.
    matched, label = match(jnp.where(exists[None], box_iou(boxes, candidates), -1), valid, **thresholds)
    low = jnp.maximum(boxes[:, None, :2], candidates[None, :, :2])
    high = jnp.minimum(boxes[:, None, 2:], candidates[None, :, 2:])
    shared = box_area(jnp.concatenate([low, high], axis=-1))
    covered = jnp.any(ignored[:, None] & (2 * shared >= box_area(candidates)[None]), axis=0)
    return matched, jnp.where(exists & ~(covered & (label == 0)), label, -1)


def rpn_losses(
    keys: jax.Array,
    objectness: Levels,
    deltas: Levels,
    anchors: Levels,
    inside: Levels,
    truths: tuple[jax.Array, jax.Array, jax.Array],
    mask: jax.Array | None,
    *,
    fg_iou: float,
    bg_iou: float,
    size: int,
    positive_fraction: float,
    beta: float,
) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """Samples anchors and compares their outputs with the true boxes (section 3.1.2).

    Args:
        keys: A key for each image, `[N]`.
        objectness: Logits `[N, A]` of each level.
        deltas: Offsets `[N, A, 4]` of each level.
        anchors: Anchors `[A, 4]` of each level.
        inside: Which anchors belong to the image, `[N, A]` bool, of each level.
        truths: `boxes`, `valid` and `ignored` of `assign`, each with a leading N.
        mask: `[N]`, 0 for padded rows; None if all are real.
        fg_iou: Least IoU of a positive anchor.
        bg_iou: IoU below which an anchor is negative.
        size: Number of anchors to sample from an image.
        positive_fraction: Largest share of positive ones.
        beta: Where smooth L1 turns linear.

    Returns:
        The losses `objectness` and `rpn_box`, `[N]` each, scaled as `Detector.losses` requires; and the sample: indices
        `[N, size]` into the anchors of all levels, and which of them exist.
    """
    anchor = jnp.concatenate(anchors)

    def of_image(key, objectness, deltas, inside, boxes, valid, ignored):
        matched, label = assign(boxes, valid, ignored, anchor, inside, low=bg_iou, high=fg_iou, allow_low_quality=True)
        chosen, kept = sample(key, label, size=size, positive_fraction=positive_fraction)
        positive = kept & (label[chosen] == 1)
        entropy = optax.sigmoid_binary_cross_entropy(objectness[chosen], positive.astype(objectness.dtype))
        target = encode_boxes(boxes[matched[chosen]], anchor[chosen])
        distance = smooth_l1(deltas[chosen] - target, beta).sum(-1)
        return jnp.where(kept, entropy, 0).sum(), jnp.where(positive, distance, 0).sum(), (chosen, kept)

    logits, offsets, within = (jnp.concatenate(x, axis=1) for x in (objectness, deltas, inside))
    entropy, distance, chosen = jax.vmap(of_image)(keys, logits, offsets, within, *truths)
    count = jnp.maximum(batch_mean(chosen[1].sum(-1), mask), 1e-6)  # no anchors, no loss
    return {"objectness": entropy / count, "rpn_box": distance / count}, chosen


def smooth_l1(difference: jax.Array, beta: float) -> jax.Array:
    """Computes `d^2 / (2 beta)` for `|d| < beta` and `|d| - beta / 2` beyond (Fast R-CNN, equation 3, has beta 1)."""
    return optax.losses.huber_loss(difference, delta=beta) / beta
