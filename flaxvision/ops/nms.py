"""Greedy selection of boxes with fixed output sizes: non-maximum suppression (NMS), soft-NMS and top-k.

The functions take one image; use `jax.vmap` for a batch.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from flaxvision.ops.boxes import box_iou

# Number of boxes per block. It affects the speed, but not the result. On a CPU, XLA splits the work on larger blocks
# among threads in every step, which is slow: on 2 cores, 2,000 boxes take 1 to 2 ms with blocks of 32, and 2 to 20 ms
# with blocks of 64 or 128. On other platforms the number of steps dominates the time.
_CPU_BLOCK, _BLOCK = 32, 256


def top_k(scores: ArrayLike, valid: ArrayLike | None, k: int) -> tuple[Array, Array]:
    """Finds the k highest valid scores.

    Args:
        scores: `[A]` floats; NaN counts as a score that does not exist.
        valid: `[A]` bool: which scores exist; None for all.
        k: Number of scores, at least 1. It may exceed A.

    Returns:
        A pair `(indices, kept)`: `indices [k]` int32, by decreasing score and in a tie by increasing index, and
        `kept [k]` bool, which tells which of them exist. The other indices are 0.

    Raises:
        ValueError: `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    scores = jnp.asarray(scores)
    key, order = lax.top_k(_key(scores, valid), min(k, scores.shape[0]))
    key, order = jnp.pad(key, (0, k - key.shape[0]), constant_values=-jnp.inf), jnp.pad(order, (0, k - order.shape[0]))
    kept = key > -jnp.inf
    return jnp.where(kept, order, 0), kept


def nms(
    boxes: ArrayLike,
    scores: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    iou_threshold: float,
    max_outputs: int,
    labels: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Performs exact greedy non-maximum suppression (NMS).

    Boxes are visited by decreasing score, and in a tie by increasing index. A box is suppressed if its IoU with a kept
    box exceeds `iou_threshold`. Boxes without an area neither suppress nor are suppressed.

    Args:
        boxes: `[A, 4]`.
        scores: `[A]`; a box whose score is NaN is never kept.
        valid: `[A]` bool: which boxes exist; None for all.
        iou_threshold: Maximum IoU of two kept boxes.
        max_outputs: Number of boxes to return, at least 1. The search ends once it is reached.
        labels: `[A]` integers: boxes only suppress boxes with the same label. None for a single class.

    Returns:
        A pair `(indices, kept)`: `indices [max_outputs]` int32, by decreasing score, and `kept [max_outputs]` bool,
        which tells which of them exist. The other indices are 0.

    Raises:
        ValueError: The shapes do not fit, or `max_outputs` is below 1.
    """
    boxes, scores = _checked(boxes, scores, valid, labels, max_outputs)
    count = boxes.shape[0]
    if not count:
        return jnp.zeros(max_outputs, jnp.int32), jnp.zeros(max_outputs, bool)
    order, exists = _falling(scores, valid)
    columns = [boxes[order].T] if labels is None else [boxes[order].T, jnp.asarray(labels)[order]]
    threshold = at_most(iou_threshold, boxes.dtype)
    found, chosen = lax.platform_dependent(
        order,
        exists,
        columns,
        threshold,
        cpu=partial(_by_blocks, min(_CPU_BLOCK, count), max_outputs),
        default=partial(_by_blocks, min(_BLOCK, count), max_outputs),
    )
    return chosen, jnp.arange(max_outputs) < found


def _by_blocks(block, max_outputs, order, exists, columns, threshold) -> tuple[Array, Array]:
    """Runs NMS block by block.

    Args:
        block: Number of boxes per block.
        max_outputs: Number of boxes to keep.
        order: `[A]`, the indices of the boxes by decreasing score.
        exists: `[A]` bool, which of them exist; these come first.
        columns: The boxes in this order, `[4, A]`, and possibly their labels, `[A]`.
        threshold: Maximum IoU of two kept boxes.

    Returns:
        The number of kept boxes, which may exceed `max_outputs`, and their indices `[max_outputs]`.
    """
    count = order.shape[0]
    order, exists, *columns = (_padded(x, -count % block) for x in (order, exists, *columns))
    earlier = jnp.arange(block)[None] < jnp.arange(block)[:, None]

    def take(arrays, start):
        return [lax.dynamic_slice_in_dim(x, start, block, axis=-1) for x in arrays]

    def suppressed_by(mine, theirs):
        """Returns `[block, block]`: whether box i of a block overlaps box j of another block by too much."""
        found = box_iou(mine[0].T, theirs[0].T) > threshold
        return found if len(mine) == 1 else found & (mine[1][:, None] == theirs[1][None])

    def unfinished(state):
        start, found, _, _ = state
        # Existing boxes come first, so a block whose first box does not exist ends the search.
        return (start < count) & (found < max_outputs) & exists[jnp.minimum(start, count - 1)]

    def step(state):
        start, found, chosen, better = state
        mine = take(columns, start)

        def compare(i, alive):
            real = i * block + jnp.arange(block) < found
            return alive & ~jnp.any(suppressed_by(mine, take(better, i * block)) & real[None], axis=1)

        alive = lax.fori_loop(0, -(-found // block), compare, *take([exists], start))
        kept = _greedy(suppressed_by(mine, mine) & earlier, alive)
        # `mode="drop"` skips suppressed boxes and those beyond `max_outputs`.
        place = jnp.where(kept, found + jnp.cumsum(kept, dtype=jnp.int32) - 1, max_outputs + block)
        chosen = chosen.at[place].set(*take([order], start), mode="drop")
        better = [x.at[..., place].set(y, mode="drop") for x, y in zip(better, mine, strict=True)]
        return start + block, found + jnp.sum(kept, dtype=jnp.int32), chosen, better

    room = max_outputs + -max_outputs % block
    zero = jnp.zeros((), jnp.int32)
    state = (zero, zero, jnp.zeros(room, jnp.int32), [jnp.zeros((*x.shape[:-1], room), x.dtype) for x in columns])
    _, found, chosen, _ = lax.while_loop(unfinished, step, state)
    return found, chosen[:max_outputs]


def soft_nms(
    boxes: ArrayLike,
    scores: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    max_outputs: int,
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    labels: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """Lowers the scores of overlapping boxes instead of removing them (soft-NMS, Bodla et al. 2017, section 3).

    Each step takes the box with the highest score. It then multiplies the score of every other box by
    `exp(-iou^2 / sigma)` (`"gaussian"`), or by `1 - iou` if the IoU is at least `iou_threshold` (`"linear"`).

    Args:
        boxes: `[A, 4]`.
        scores: `[A]`, not negative; a box whose score is NaN is never taken.
        valid: `[A]` bool: which boxes exist; None for all.
        max_outputs: Number of boxes to return, at least 1.
        method: `"linear"` or `"gaussian"`.
        iou_threshold: N_t of the paper, for `"linear"`.
        sigma: sigma of the paper, for `"gaussian"`.
        score_threshold: A box is dropped when its score falls below this.
        labels: `[A]` integers: boxes only lower the scores of boxes with the same label. None for a single class.

    Returns:
        A triple `(indices, scores, kept)`: `indices [max_outputs]` int32 in the order in which the boxes are taken;
        `scores [max_outputs]`, the lowered scores, which decrease; and `kept [max_outputs]` bool, which tells which of
        them exist. The other indices and scores are 0.

    Raises:
        ValueError: The shapes do not fit, `max_outputs` is below 1, or `method` is not one of the two.
    """
    if method not in ("linear", "gaussian"):
        raise ValueError(f"method must be 'linear' or 'gaussian'; got {method!r}")
    boxes, scores = _checked(boxes, scores, valid, labels, max_outputs)
    labels = None if labels is None else jnp.asarray(labels)
    exists = _existing(scores, valid)
    nothing = jnp.asarray(-jnp.inf, scores.dtype)
    if not scores.shape[0]:
        return jnp.zeros(max_outputs, jnp.int32), jnp.zeros(max_outputs, scores.dtype), jnp.zeros(max_outputs, bool)

    def step(left, _):
        at = jnp.argmax(left)
        iou = box_iou(boxes[at][None], boxes)[0]
        if method == "linear":
            factor = jnp.where(iou >= iou_threshold, 1 - iou, 1)
        else:
            factor = jnp.exp(-jnp.square(iou) / sigma)
        lowered = left * factor if labels is None else jnp.where(labels == labels[at], left * factor, left)
        # A dropped box keeps a score of minus infinity, even if the factor is 0.
        lowered = jnp.where(lowered >= score_threshold, lowered, nothing)
        return lowered.at[at].set(nothing), (at.astype(jnp.int32), left[at])

    start = jnp.where(exists & (scores >= score_threshold), scores, nothing)
    _, (indices, found) = lax.scan(step, start, None, length=max_outputs)
    kept = found > nothing
    return jnp.where(kept, indices, 0), jnp.where(kept, found, 0), kept


def _padded(x: Array, count: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)])


def _greedy(suppressed_by: Array, alive: Array) -> Array:
    """Decides which boxes of a block are kept; with `suppressed_by[i, j]`, box i is suppressed if box j is kept.

    The decision on a box is final once the decisions on all earlier boxes that may suppress it are final. So the number
    of rounds is the length of the longest chain of overlapping boxes.
    """

    def step(state):
        kept, _ = state
        now = alive & ~jnp.any(suppressed_by & kept[None], axis=1)
        return now, jnp.any(now != kept)

    return lax.while_loop(lambda state: state[1], step, (alive, jnp.any(alive)))[0]


def _falling(scores: Array, valid: ArrayLike | None) -> tuple[Array, Array]:
    """Returns the indices `[A]` by decreasing score, with missing boxes last, and which of them exist, `[A]`."""
    key = -_key(scores, valid)
    key, order = lax.sort((key, jnp.arange(scores.shape[0], dtype=jnp.int32)), num_keys=1, is_stable=True)
    return order, key < jnp.inf


def _key(scores: Array, valid: ArrayLike | None) -> Array:
    """Returns the scores, with minus infinity for those that do not exist and for no others."""
    return jnp.where(_existing(scores, valid), jnp.maximum(scores, jnp.finfo(scores.dtype).min), -jnp.inf)


def _existing(scores: Array, valid: ArrayLike | None) -> Array:
    return ~jnp.isnan(scores) if valid is None else jnp.asarray(valid, bool) & ~jnp.isnan(scores)


def at_most(threshold: float, dtype) -> Array:
    """Converts a threshold to `dtype`, rounding down.

    `iou > threshold` then gives the same result as with a threshold in double precision.

    Args:
        threshold: A Python number, or a `jax.Array`, which is converted without rounding down.
        dtype: The dtype of the values that are compared with the threshold.

    Returns:
        A scalar array of that dtype.
    """
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
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        scores = scores.astype(jnp.float32)
    return boxes, scores
