"""Greedy choice of boxes: non-maximum suppression, soft-NMS and top-k. Fixed sizes, for one image; `vmap` them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from flaxvision.ops.boxes import box_iou

# Boxes that are decided together, which changes the time but not the result. On a CPU, XLA shares the work on larger
# blocks among threads in every step: on 2 cores, 2,000 boxes take 1 to 2 ms with 32 and 2 to 20 ms with 64 or 128.
# Elsewhere the steps are what costs.
_CPU_BLOCK, _BLOCK = 32, 256


def top_k(scores: ArrayLike, valid: ArrayLike | None, k: int) -> tuple[Array, Array]:
    """Finds the k best valid scores.

    Args:
        scores: `[A]` floats; an entry that is NaN does not exist.
        valid: `[A]` bool: which entries exist; None for all.
        k: How many, at least 1. It may exceed A.

    Returns:
        indices `[k]` int32, in order of falling score, equal scores in order of their indices, and kept `[k]` bool:
        which of them exist. The other indices are 0.

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
    """Decides block by block.

    Args:
        block: Boxes of a block.
        max_outputs: Number of boxes to choose.
        order: `[A]`, the indices of the boxes by falling score.
        exists: `[A]` bool, which of them exist: the first ones.
        columns: The boxes in this order, `[4, A]`, and possibly their labels, `[A]`.
        threshold: Largest IoU of two chosen boxes.

    Returns:
        The number of boxes found, which may exceed `max_outputs`, and the indices `[max_outputs]`.
    """
    count = order.shape[0]
    order, exists, *columns = (_padded(x, -count % block) for x in (order, exists, *columns))
    earlier = jnp.arange(block)[None] < jnp.arange(block)[:, None]

    def take(arrays, start):
        return [lax.dynamic_slice_in_dim(x, start, block, axis=-1) for x in arrays]

    def suppressed_by(mine, theirs):
        """Whether each box of a block `[block, 1]` may be suppressed by each box of another one `[1, block]`."""
        found = box_iou(mine[0].T, theirs[0].T) > threshold
        return found if len(mine) == 1 else found & (mine[1][:, None] == theirs[1][None])

    def unfinished(state):
        start, found, _, _ = state
        # Boxes that exist come first.
        return (start < count) & (found < max_outputs) & exists[jnp.minimum(start, count - 1)]

    def step(state):
        start, found, chosen, better = state
        mine = take(columns, start)

        def compare(i, alive):
            real = i * block + jnp.arange(block) < found
            return alive & ~jnp.any(suppressed_by(mine, take(better, i * block)) & real[None], axis=1)

        alive = lax.fori_loop(0, -(-found // block), compare, *take([exists], start))
        kept = _greedy(suppressed_by(mine, mine) & earlier, alive)
        # A place beyond the last one is dropped.
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
    """Lowers the score of a box that overlaps a better one instead of removing it (Bodla et al. 2017, section 3).

    The box with the highest score is taken, the scores of the others are multiplied by `1 - iou` if their IoU with it
    is at least the threshold (`"linear"`), or by `exp(-iou^2 / sigma)` (`"gaussian"`), and so on.

    Args:
        boxes: `[A, 4]`.
        scores: `[A]`, not negative; a box whose score is NaN is never taken.
        valid: `[A]` bool: which boxes exist; None for all.
        max_outputs: Number of boxes to return, at least 1.
        method: `"linear"` or `"gaussian"`.
        iou_threshold: The paper's N_t, for `"linear"`.
        sigma: The paper's sigma, for `"gaussian"`.
        score_threshold: A box is dropped when its score falls below this.
        labels: `[A]` integers: boxes only lower the scores of boxes of the same label. None for a single class.

    Returns:
        indices `[max_outputs]` int32 in the order in which the boxes are taken, their lowered scores `[max_outputs]`,
        which fall, and kept `[max_outputs]` bool: which of them exist. The other indices and scores are 0.

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
        # What is dropped stays at minus infinity, also where the factor is 0.
        lowered = jnp.where(lowered >= score_threshold, lowered, nothing)
        return lowered.at[at].set(nothing), (at.astype(jnp.int32), left[at])

    start = jnp.where(exists & (scores >= score_threshold), scores, nothing)
    _, (indices, found) = lax.scan(step, start, None, length=max_outputs)
    kept = found > nothing
    return jnp.where(kept, indices, 0), jnp.where(kept, found, 0), kept


def _padded(x: Array, count: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)])


def _greedy(suppressed_by: Array, alive: Array) -> Array:
    """Decides a block whose box i may be suppressed by the earlier box j: `suppressed_by[i, j]`.

    The decision on a box is final once those on all earlier boxes that may suppress it are, so the number of rounds is
    the length of the longest chain of overlapping boxes.
    """

    def step(state):
        kept, _ = state
        now = alive & ~jnp.any(suppressed_by & kept[None], axis=1)
        return now, jnp.any(now != kept)

    return lax.while_loop(lambda state: state[1], step, (alive, jnp.any(alive)))[0]


def _falling(scores: Array, valid: ArrayLike | None) -> tuple[Array, Array]:
    """Sorts: indices `[A]` by falling score, those that do not exist last, and which of them exist, `[A]`."""
    key = -_key(scores, valid)
    key, order = lax.sort((key, jnp.arange(scores.shape[0], dtype=jnp.int32)), num_keys=1, is_stable=True)
    return order, key < jnp.inf


def _key(scores: Array, valid: ArrayLike | None) -> Array:
    """The scores, with minus infinity for those that do not exist and for these alone."""
    return jnp.where(_existing(scores, valid), jnp.maximum(scores, jnp.finfo(scores.dtype).min), -jnp.inf)


def _existing(scores: Array, valid: ArrayLike | None) -> Array:
    return ~jnp.isnan(scores) if valid is None else jnp.asarray(valid, bool) & ~jnp.isnan(scores)


def at_most(threshold: float, dtype) -> Array:
    """Rounds a threshold down to `dtype`.

    Then `iou > threshold` decides as if the threshold had double precision. A traced threshold is only converted.

    Args:
        threshold: A Python number.
        dtype: The dtype of what is compared with it.

    Returns:
        An array of that dtype.
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
