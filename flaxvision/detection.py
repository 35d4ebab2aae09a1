"""Inference with detectors: decodes raw outputs and selects the boxes, scores and labels of each image."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.typing import ArrayLike

from flaxvision.ops.boxes import box_iou
from flaxvision.ops.nms import at_most


class Candidates(NamedTuple):
    """Scored boxes before non-maximum suppression, as returned by `Detector.candidates`.

    Attributes:
        boxes: `[N, A, 4]`, or `[N, A, K, 4]` if each class has its own boxes; x1, y1, x2, y2 in pixels.
        scores: `[N, A, K]`, one score per class, without a background class.
        valid: `[N, A]` bool: which candidates exist.
    """

    boxes: Array
    scores: Array
    valid: Array


class Detections(struct.PyTreeNode):
    """Detected objects of each image, by decreasing score. Entries that are not valid are 0.

    Attributes:
        boxes: `[N, M, 4]`; x1, y1, x2, y2 in pixels.
        scores: `[N, M]`.
        labels: `[N, M]` int32, from 0 and without a background class.
        valid: `[N, M]` bool: which detections exist.
        masks: `[N, M, h, w]`: the probability that a point of the box belongs to the object. `ops.paste_masks` and
            `ops.iter_masks` place these masks in the image. None for a detector without masks.
    """

    boxes: Any
    scores: Any
    labels: Any
    valid: Any
    masks: Any = None


def detect(
    model: Any,
    variables: Any,
    images: ArrayLike,
    sizes: ArrayLike | None = None,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    min_size: float = 0.01,
    class_agnostic: bool = False,
    soft_sigma: float | None = None,
) -> Detections:
    """Detects objects in images, with any detector.

    A detector may have a method `masks(outputs, boxes, labels)`. It maps the raw outputs and the selected detections to
    the masks `[N, M, h, w]` of these detections.

    This function is pure. To compile it with `jax.jit`, fix the model and the options, as with `functools.partial`.

    Args:
        model: A detector.
        variables: Variables of the model.
        images: `[N, H, W, 3]`, normalized as the model expects.
        sizes: `[N, 2]`, height and width in pixels of the valid region at the top left of each image. None if there is
            no padding.
        score_threshold: See `select_detections`.
        iou_threshold: See `select_detections`.
        max_detections: See `select_detections`.
        min_size: See `select_detections`.
        class_agnostic: See `select_detections`.
        soft_sigma: See `select_detections`.

    Returns:
        The detections.

    Raises:
        ValueError: An option is out of range.
    """
    images = jnp.asarray(images)
    if sizes is None:
        sizes = jnp.broadcast_to(jnp.asarray([images.shape[1:3]], jnp.int32), (images.shape[0], 2))
    outputs = model.apply(variables, images, sizes)
    found = select_detections(
        model.candidates(outputs, sizes),
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        min_size=min_size,
        class_agnostic=class_agnostic,
        soft_sigma=soft_sigma,
    )
    if not hasattr(model, "masks"):
        return found
    masks = model.apply(variables, outputs, found.boxes, found.labels, method="masks")
    return found.replace(masks=jnp.where(found.valid[..., None, None], masks, 0))


def select_detections(
    candidates: Candidates,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    min_size: float = 0.01,
    class_agnostic: bool = False,
    soft_sigma: float | None = None,
) -> Detections:
    """Selects the detections of each image by greedy non-maximum suppression (NMS) within each class.

    The result is exact for any number of candidates. Equal scores are visited by increasing index of the candidate,
    then of the class. Boxes and scores can be differentiated. With `soft_sigma`, the scores can only be differentiated
    in forward mode.

    Args:
        candidates: Result of `Detector.candidates`.
        score_threshold: Only candidates with a score above this are selected.
        iou_threshold: A candidate is suppressed if its IoU with a selected candidate of the same class exceeds this.
        max_detections: Number of detections M per image, at least 1.
        min_size: Minimum width and height of a box in pixels. The default removes boxes that clipping made empty.
        class_agnostic: Whether candidates also suppress candidates of other classes. If the classes share a box, only
            the class with the highest score is kept for it.
        soft_sigma: Enables soft-NMS (Bodla et al. 2017, who use 0.5): overlapping candidates are not suppressed, but
            their scores are multiplied by `exp(-iou^2 / soft_sigma)`.

    Returns:
        The detections. With `soft_sigma`, their scores are the lowered scores. Without candidates (A or K is 0), none
        is valid.

    Raises:
        ValueError: `candidates` has other shapes, `max_detections` is below 1, or `soft_sigma` is not positive.
    """
    boxes, scores, valid = map(jnp.asarray, candidates)
    if scores.ndim != 3 or valid.shape != scores.shape[:2]:
        raise ValueError(f"scores must be [N, A, K] and valid [N, A]; got {scores.shape} and {valid.shape}")
    if boxes.shape not in ((*valid.shape, 4), (*scores.shape, 4)):
        raise ValueError(f"boxes must be [N, A, 4] or [N, A, K, 4] with scores {scores.shape}; got {boxes.shape}")
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1; got {max_detections}")
    if soft_sigma is not None and soft_sigma <= 0:
        raise ValueError(f"soft_sigma must be positive; got {soft_sigma}")
    if not min(scores.shape[1:]):
        shape = scores.shape[0], max_detections
        return Detections(
            boxes=jnp.zeros((*shape, 4), boxes.dtype),
            scores=jnp.zeros(shape, scores.dtype),
            labels=jnp.zeros(shape, jnp.int32),
            valid=jnp.zeros(shape, bool),
        )
    threshold = at_most(iou_threshold, boxes.dtype)

    large = jnp.all(boxes[..., 2:] - boxes[..., :2] >= min_size, axis=-1)
    large = large[..., None] if large.ndim == 2 else large
    scores = jnp.where(valid[..., None] & large & (scores > score_threshold), scores, -jnp.inf)
    names = None
    if class_agnostic:
        # Merge the classes into one. Keep the best label of a shared box, or list the boxes of all classes.
        if boxes.ndim == 3:
            names, scores = lax.argmax(scores, 2, jnp.int32), jnp.max(scores, axis=2, keepdims=True)
        else:
            count, shape = scores.shape[2], (scores.shape[0], -1)
            names = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None, None], scores.shape).reshape(shape)
            boxes, scores = boxes.reshape(*shape, 4), scores.reshape(*shape, 1)
    boxes = boxes if boxes.ndim == 3 else jnp.moveaxis(boxes, 2, 1)
    lower = lambda row, iou: _lowered(row, iou, threshold, soft_sigma, score_threshold)
    rows = jnp.moveaxis(scores, 2, 1)
    place, label, found = _greedy(boxes, rows if soft_sigma else lax.stop_gradient(rows), max_detections, lower)
    exists = found > -jnp.inf
    if soft_sigma is None:  # read from the scores, because the loop has no gradient
        found = jax.vmap(lambda row, p, k: row[k, p])(rows, place, label)
    chosen = jax.vmap(lambda b, p, k: b[p] if b.ndim == 2 else b[k, p])(boxes, place, label)
    label = label if names is None else jnp.take_along_axis(names, place, axis=1)
    chosen, found, label = (
        jnp.where(exists[..., None], chosen, 0),
        jnp.where(exists, found, 0),
        jnp.where(exists, label, 0),
    )
    return Detections(boxes=chosen, scores=found, labels=label, valid=exists)


def _lowered(row, iou, threshold, soft_sigma, score_threshold):
    """Returns the scores `row [A]` of a class after one of its boxes was selected; `iou [A]` is the IoU with it."""
    if soft_sigma is None:
        return jnp.where(iou > threshold, -jnp.inf, row)
    row = row * jnp.exp(-jnp.square(iou) / soft_sigma)
    return jnp.where(row > score_threshold, row, -jnp.inf)


def _greedy(boxes, scores, steps, lower) -> tuple[Array, Array, Array]:
    """Repeatedly takes the highest score and lowers the other scores of its class.

    A score of minus infinity cannot be taken. The highest score of each class is carried from step to step, so a step
    visits the candidates of one class only.

    Args:
        boxes: `[N, A, 4]` or `[N, K, A, 4]`.
        scores: `[N, K, A]`.
        steps: Number of steps M; each takes one candidate.
        lower: `(row [A], iou [A]) -> row [A]`.

    Returns:
        The candidate, class and score taken in each step, `[N, M]`.
    """

    def take(boxes, scores, best, at):
        # In a tie, take the first candidate, then the first class.
        label = lax.argmin(jnp.where(best == jnp.max(best), at, scores.shape[1]), 0, jnp.int32)
        place = at[label]
        mine = boxes if boxes.ndim == 2 else boxes[label]
        row = lower(scores[label], box_iou(mine[place][None], mine)[0]).at[place].set(-jnp.inf)
        at = at.at[label].set(lax.argmax(row, 0, jnp.int32))
        return scores.at[label].set(row), best.at[label].set(jnp.max(row)), at, (place, label, best[label])

    def unfinished(state):
        # A step does not change a finished image. One condition per image, as `vmap` would create, would copy all
        # scores in every step.
        i, _, best, _, _ = state
        return (i < steps) & jnp.any(best > -jnp.inf)

    def step(state):
        i, scores, best, at, taken = state
        scores, best, at, found = jax.vmap(take)(boxes, scores, best, at)
        return i + 1, scores, best, at, tuple(x.at[:, i].set(y) for x, y in zip(taken, found, strict=True))

    none = jnp.zeros((scores.shape[0], steps), jnp.int32)
    taken = (none, none, jnp.full(none.shape, -jnp.inf, scores.dtype))
    best, at = jnp.max(scores, axis=2), lax.argmax(scores, 2, jnp.int32)
    return lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), scores, best, at, taken))[-1]
