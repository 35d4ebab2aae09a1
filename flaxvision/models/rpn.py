"""Region proposal network.

S. Ren, K. He, R. Girshick, J. Sun, "Faster R-CNN: towards real-time object detection with region proposal networks",
NIPS 2015, section 3; on the levels of a feature pyramid as in T.-Y. Lin et al., "Feature pyramid networks for object
detection", CVPR 2017, section 4.1.

The definition is torchvision's. It differs from the papers in these points:

* Anchors that cross the border of the image take part in training.
* The corners of anchors are rounded to whole pixels.
* The anchors of a level are `canvas // map` pixels apart. This is less than the stride if the size of the feature map
  was rounded up.
* The regression loss is smooth L1 with beta 1/9, divided by the number of sampled anchors.
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
    """The head of the RPN: a 3x3 convolution `conv` and the 1x1 convolutions `objectness` and `deltas`.

    All levels share them.

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
        """Maps each level `[N, H, W, C]` to logits `[N, A]` and box offsets `[N, A, 4]`; A is `H * W * anchors`."""
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
    """Generates the anchors of every level, and a mask of the anchors that belong to each image.

    An anchor belongs to an image if its center lies within it. For this test, the height and width of the image are
    rounded up to multiples of `size_divisor`. All other anchors lie in the padding.

    Args:
        levels: Height and width of each feature map.
        canvas: Height and width of the padded images.
        sizes: Valid height and width of each image, `[N, 2]`.
        anchor_sizes: Sizes of the anchors of each level in pixels; the size is the square root of the area.
        aspect_ratios: Ratios of height to width.
        size_divisor: Multiple to which image sizes are rounded up; 1 for no rounding.
        dtype: Dtype of the anchors.

    Returns:
        For each level, anchors `[A, 4]`, ordered by row, column and shape; and for each level, `[N, A]` bool, which of
        them belong to each image.
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Selects the proposals of each image.

    The anchors with the highest scores of each level are decoded and clipped, and NMS within each level removes
    duplicates. No gradient flows through the proposals.

    Args:
        objectness: Logits `[N, A]` of each level.
        deltas: Box offsets `[N, A, 4]` of each level.
        anchors: Anchors `[A, 4]` of each level.
        inside: `[N, A]` bool of each level: which anchors belong to each image.
        sizes: Valid height and width of each image, `[N, 2]`.
        pre_nms: Number of anchors taken from each level before NMS.
        post_nms: Number of proposals R of all levels after NMS.
        iou_threshold: Maximum IoU of two proposals of the same level.
        min_size: Minimum height and width of a proposal in pixels.
        score_threshold: Minimum objectness of a proposal, a probability.

    Returns:
        Proposals `[N, R, 4]` by decreasing objectness; `[N, R]` bool, which of them exist; and `[N, R]` int32, the
        indices of their anchors among those of all levels.
    """

    def of_image(objectness, deltas, inside, size):
        scores, boxes, exists, numbers, sources = [], [], [], [], []
        for number, anchor in enumerate(anchors):
            k = min(pre_nms, anchor.shape[0])
            logit, index = jax.lax.top_k(jnp.where(inside[number], objectness[number], -jnp.inf), k)
            scores.append(jax.nn.sigmoid(logit))
            boxes.append(decode_boxes(deltas[number][index], anchor[index]))
            exists.append(inside[number][index])
            numbers.append(jnp.full(k, number, jnp.int32))
            sources.append(sum(map(len, anchors[:number])) + index)
        score, box, exist, level, source = (jnp.concatenate(x) for x in (scores, boxes, exists, numbers, sources))
        box = clip_boxes(box, size)
        exist &= jnp.all(box[:, 2:] - box[:, :2] >= min_size, axis=-1) & (score >= score_threshold)
        chosen, kept = nms(box, score, exist, iou_threshold=iou_threshold, max_outputs=post_nms, labels=level)
        return jnp.where(kept[:, None], box[chosen], 0), kept, source[chosen]

    objectness, deltas = jax.lax.stop_gradient((objectness, deltas))
    return jax.vmap(of_image)(objectness, deltas, inside, sizes)


def assign(
    boxes: jax.Array, valid: jax.Array, ignored: jax.Array, candidates: jax.Array, exists: jax.Array, **thresholds: Any
) -> tuple[jax.Array, jax.Array]:
    """Matches candidates to the ground-truth boxes of one image.

    Args:
        boxes: Ground-truth boxes `[M, 4]`.
        valid: `[M]` bool: which boxes are objects to detect.
        ignored: `[M]` bool: which boxes mark regions to ignore, such as crowds. A negative with at least half of its
            area in one of them is ignored.
        candidates: Anchors or proposals `[A, 4]`.
        exists: `[A]` bool: which candidates exist. The others are ignored.
        **thresholds: `low`, `high` and `allow_low_quality` of `ops.match`.

    Returns:
        The index of the matched box `[A]`, and the label `[A]`: 1 for positive, 0 for negative, -1 for ignored.
    """
    # An anchor in the padding must not become the best match of a ground-truth box.
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
    """Samples anchors and computes the losses of the RPN (section 3.1.2).

    Args:
        keys: A PRNG key for each image, `[N]`.
        objectness: Logits `[N, A]` of each level.
        deltas: Box offsets `[N, A, 4]` of each level.
        anchors: Anchors `[A, 4]` of each level.
        inside: `[N, A]` bool of each level: which anchors belong to each image.
        truths: `boxes`, `valid` and `ignored` as in `assign`, each with a leading dimension N.
        mask: `[N]`, 0 for rows that are padding; None if all rows are real.
        fg_iou: Minimum IoU of a positive anchor. The best anchor of a box is positive below this too.
        bg_iou: IoU below which an anchor is negative.
        size: Number of anchors sampled from each image.
        positive_fraction: Maximum fraction of positives in the sample.
        beta: Absolute difference above which smooth L1 is linear.

    Returns:
        The losses `objectness` and `rpn_box`, `[N]` each, scaled as `Detector.losses` requires; and the sample: indices
        `[N, size]` into the concatenated anchors of all levels, and `[N, size]` bool, which of them exist.
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
    count = jnp.maximum(batch_mean(chosen[1].sum(-1), mask), 1e-6)  # the loss is 0 without anchors
    return {"objectness": entropy / count, "rpn_box": distance / count}, chosen


def smooth_l1(difference: jax.Array, beta: float) -> jax.Array:
    """Computes `d^2 / (2 beta)` for `|d| < beta`, else `|d| - beta / 2` (Fast R-CNN, equation 3, with beta 1)."""
    return optax.losses.huber_loss(difference, delta=beta) / beta
