"""Greedy choice of boxes: non-maximum suppression, soft-NMS and top-k. Fixed sizes, for one image; `vmap` them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from flaxvision.ops.boxes import box_iou

# Boxes that are decided together. Measured on 2 cores.
_BLOCK = 256


def top_k(scores: ArrayLike, valid: ArrayLike | None, k: int) -> tuple[Array, Array]:
    """Finds the k best valid scores.

    Args:
        scores: `[A]`.
        valid: `[A]` bool: which entries exist; None for all.
        k: How many, at least 1. It may exceed A.

    Returns:
        indices `[k]` int32, in order of falling score, equal scores in order of their indices, and kept `[k]` bool: which
        of them exist. The other indices are 0.

    Raises:
        ValueError: `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    order, exists = _falling(jnp.asarray(scores), valid)
    order, exists = (jnp.pad(x, (0, max(0, k - x.shape[0])))[:k] for x in (order, exists))
    return jnp.where(exists, order, 0), exists


def nms(
    boxes: ArrayLike,
    scores: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    iou_threshold: float,
    max_outputs: int,
    labels: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Keeps each box unless a better one that is kept overlaps it: exact greedy non-maximum suppression.

    Boxes are visited in order of falling score, equal scores in order of their indices. A box is suppressed if its IoU
    with a kept box exceeds the threshold. Boxes without an area neither suppress nor are suppressed.

    Args:
        boxes: `[A, 4]`.
        scores: `[A]`; a box whose score is NaN is never kept.
        valid: `[A]` bool: which boxes exist; None for all.
        iou_threshold: Largest IoU of two kept boxes.
        max_outputs: Number of boxes to return, at least 1. The search ends when it is reached.
        labels: `[A]` integers: boxes only suppress boxes of the same label. None for a single class.

    Returns:
        indices `[max_outputs]` int32, in order of falling score, and kept `[max_outputs]` bool: which of them exist.
        The other indices are 0.

    Raises:
        ValueError: The shapes do not fit, or `max_outputs` is below 1.
    """
    boxes, scores = _checked(boxes, scores, valid, labels, max_outputs)
    count = boxes.shape[0]
    block = min(_BLOCK, max(count, 1))
    order, exists = _falling(scores, valid)
    padding = -count % block
    order, exists = jnp.pad(order, (0, padding)), jnp.pad(exists, (0, padding))
    boxes = boxes[order]
    labels = None if labels is None else jnp.asarray(labels)[order]
    threshold = _at_most(iou_threshold, boxes.dtype)
    earlier = jnp.arange(block)[:, None] < jnp.arange(block)[None]

    def overlaps(a, b, label_a, label_b):
        found = box_iou(a, b) > threshold
        return found if labels is None else found & (label_a[:, None] == label_b[None])

    def unfinished(state):
        start, found, *_ = state
        # Boxes that exist come first.
        return (start < count) & (found < max_outputs) & exists[jnp.minimum(start, count - 1)]

    def step(state):
        start, found, chosen, chosen_boxes, chosen_labels = state
        mine = lax.dynamic_slice_in_dim(boxes, start, block)
        label = None if labels is None else lax.dynamic_slice_in_dim(labels, start, block)
        alive = lax.dynamic_slice_in_dim(exists, start, block)
        before = jnp.arange(max_outputs) < found
        alive &= ~jnp.any(overlaps(chosen_boxes, mine, chosen_labels, label) & before[:, None], axis=0)
        kept = _greedy(overlaps(mine, mine, label, label) & earlier, alive)
        # Places beyond the last one are dropped.
        place = jnp.where(kept, found + jnp.cumsum(kept) - 1, max_outputs)
        chosen = chosen.at[place].set(lax.dynamic_slice_in_dim(order, start, block), mode="drop")
        chosen_boxes = chosen_boxes.at[place].set(mine, mode="drop")
        if labels is not None:
            chosen_labels = chosen_labels.at[place].set(label, mode="drop")
        return start + block, found + jnp.sum(kept), chosen, chosen_boxes, chosen_labels

    zero = jnp.zeros((), jnp.int32)
    chosen = jnp.zeros(max_outputs, jnp.int32)
    chosen_labels = None if labels is None else jnp.zeros(max_outputs, labels.dtype)
    if count:
        state = (zero, zero, chosen, jnp.zeros((max_outputs, 4), boxes.dtype), chosen_labels)
        _, found, chosen, *_ = lax.while_loop(unfinished, step, state)
    else:
        found = zero
    return chosen, jnp.arange(max_outputs) < found


def _greedy(suppresses: Array, alive: Array) -> Array:
    """Decides a block: `suppresses[i, j]` if i would suppress the later j. Exact after as many rounds as the longest chain."""

    def step(state):
        kept, _ = state
        now = alive & ~jnp.any(suppresses & kept[:, None], axis=0)
        return now, jnp.any(now != kept)

    return lax.while_loop(lambda state: state[1], step, (alive, jnp.asarray(True)))[0]


def _falling(scores: Array, valid: ArrayLike | None) -> tuple[Array, Array]:
    """Sorts: indices `[A]` by falling score, those that do not exist last, and which of them exist, `[A]`."""
    exists = ~jnp.isnan(scores) if valid is None else jnp.asarray(valid, bool) & ~jnp.isnan(scores)
    missing, _, order = lax.sort(
        (~exists, -scores, jnp.arange(scores.shape[0], dtype=jnp.int32)), num_keys=2, is_stable=True
    )
    return order, ~missing


def _at_most(threshold: float, dtype) -> Array:
    """Rounds a Python number down to `dtype`, so that `iou > threshold` is as exact as in double precision."""
    if isinstance(threshold, jax.Array):
        return threshold.astype(dtype)
    rounded = np.asarray(threshold, dtype)
    if float(rounded) > float(threshold):
        rounded = np.nextafter(rounded, np.asarray(-np.inf, dtype))
    return jnp.asarray(rounded)


def _checked(boxes, scores, valid, labels, max_outputs) -> tuple[Array, Array]:
    boxes, scores = jnp.asarray(boxes), jnp.asarray(scores)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [A, 4]; got {boxes.shape}")
    for name, value in (("scores", scores), ("valid", valid), ("labels", labels)):
        if value is not None and jnp.shape(value) != boxes.shape[:1]:
            raise ValueError(f"{name} must be {boxes.shape[:1]}, one entry for each box; got {jnp.shape(value)}")
    if max_outputs < 1:
        raise ValueError(f"max_outputs must be at least 1; got {max_outputs}")
    if not jnp.issubdtype(boxes.dtype, jnp.floating):
        boxes = boxes.astype(jnp.float32)
    return boxes, scores
