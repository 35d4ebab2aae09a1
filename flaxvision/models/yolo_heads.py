"""Grid heads of YOLOv2 and YOLOv3: decoding and losses.

The computation is that of darknet's `region_layer.c` and `yolo_layer.c` (J. Redmon). darknet defines its losses by
their gradients only, the deltas. These are exactly the gradients of the following losses:

* the logistic loss for the center of a box within its cell and for the objectness,
* half the squared error of the log size, where the size is relative to the anchor, and
* the softmax cross-entropy (YOLOv2) or logistic losses (YOLOv3) for the classes.

Each loss is reduced by its minimum, so that a perfect prediction has a loss of 0. The losses of the center and the size
are multiplied by 2 - (area of the ground-truth box / area of the canvas), which gives small boxes more weight.

Letters: N batch, h, w cells, A anchors of a head, M objects, K classes. A raw output is `[N, h, w, A * (5 + K)]`; an
anchor has x, y, width, height, objectness, then the classes. Anchors are (width, height).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import xlogy

from flaxvision.ops import box_area, box_iou, from_centers, paired_iou, to_centers

Anchors = tuple[tuple[float, float], ...]
BOX_LOSSES = ("mse", "iou", "giou", "diou", "ciou")
_LARGEST = 30.0  # limit of the log size: the size of a box, and its area, stay finite


@dataclasses.dataclass(frozen=True)
class YoloHead:
    """A head of YOLOv3 (darknet's `[yolo]`), with logistic losses for the classes.

    A ground-truth box is matched to the anchor, of all heads, whose shape has the highest IoU with it. If this anchor
    is one of this head, its prediction in the cell of the box center is positive: its targets are the box, the class
    and an objectness of 1. All other predictions are negative: their target is an objectness of 0. Negatives whose IoU
    with a ground-truth box exceeds `ignore_threshold` are ignored. If several boxes match the same prediction, its
    targets are the last box and the classes of all of them.

    Attributes:
        anchors: Anchors of all heads, in pixels.
        mask: Indices of the anchors of this head.
        num_classes: Number of classes K.
        stride: Pixels per cell.
        scale_xy: Range of the predicted center in cells; above 1 the center can leave its cell (`scale_x_y` of YOLOv4).
        ignore_threshold: IoU with a ground-truth box above which a negative is left out of the objectness loss.
        iou_threshold: IoU of shapes above which other anchors are positive too (YOLOv4); 1 for only the best anchor.
        box_loss: `"mse"` (YOLOv3), or the kind of IoU that is maximized: `"iou"`, `"giou"`, `"diou"`, `"ciou"`. The
            gradients of the IoU losses are exact here, whereas darknet omits some factors.
        box_weight: Weight of the box loss (`iou_normalizer`).
        object_weight: Weight of the objectness loss (`obj_normalizer`).
        class_weight: Weight of the class loss (`cls_normalizer`).

    Raises:
        ValueError: `mask` is empty or has an index without an anchor, `box_loss` is unknown, or `num_classes` is not
            positive.
    """

    anchors: Anchors
    mask: tuple[int, ...]
    num_classes: int
    stride: int
    scale_xy: float = 1.0
    ignore_threshold: float = 0.5
    iou_threshold: float = 1.0
    box_loss: str = "mse"
    box_weight: float = 1.0
    object_weight: float = 1.0
    class_weight: float = 1.0

    def __post_init__(self):
        if not self.mask or not set(self.mask) <= set(range(len(self.anchors))):
            raise ValueError(f"mask must hold indices of the {len(self.anchors)} anchors; got {self.mask}")
        if self.box_loss not in BOX_LOSSES:
            raise ValueError(f"box_loss must be one of {', '.join(BOX_LOSSES)}; got {self.box_loss!r}")
        _check_classes(self.num_classes)

    @property
    def sizes(self) -> Anchors:
        """The anchors of this head, in pixels."""
        return tuple(self.anchors[i] for i in self.mask)

    def decode(self, raw: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decodes a raw output to boxes `[N, h, w, A, 4]` in pixels and scores `[N, h, w, A, K]`."""
        x = _split(raw, len(self.mask), self.num_classes)
        scores = jax.nn.sigmoid(x[..., 4:5]) * jax.nn.sigmoid(x[..., 5:])
        return grid_boxes(x, self.sizes, self.stride, self.scale_xy), scores

    def losses(self, raw: jax.Array, truth: Truth) -> dict[str, jax.Array]:
        """Computes the losses `box`, `object` and `class` of each image, `[N]`."""
        return jax.vmap(self._losses)(_split(raw, len(self.mask), self.num_classes), truth)

    def _losses(self, x: jax.Array, truth: Truth) -> dict[str, jax.Array]:
        size = to_centers(truth.boxes)[..., 2:]
        overlap = _shape_iou(size[:, None], jnp.asarray(self.anchors, x.dtype)[None])  # [M, all anchors]
        mask = jnp.asarray(self.mask)
        positive = jnp.argmax(overlap, axis=1)[:, None] == mask[None]
        positive = (positive | (overlap[:, mask] > self.iou_threshold)) & truth.valid[:, None]
        found = _assign(x, truth, positive, self.sizes, self.stride)
        predicted = grid_boxes(x, self.sizes, self.stride, self.scale_xy)
        if self.box_loss == "mse":
            s = self.scale_xy
            center = jnp.clip((found.center + (s - 1) / 2) / s, 0, 1)
            errors = s * _logistic(found.raw[..., :2], center) + jnp.square(found.log_size - found.raw[..., 2:4]) / 2
            box = (2 - found.share) * errors.sum(-1)
        else:
            at = predicted[found.row, found.column]  # [M, A, 4]
            box = 1 - paired_iou(at, jnp.broadcast_to(truth.boxes[:, None], at.shape), self.box_loss)
        negative = ~(_overlapping(predicted, truth, self.ignore_threshold) | found.map)
        target = found.map.astype(x.dtype)
        objectness = jnp.where(negative | found.map, _logistic(x[..., 4], target), 0)
        classes = _logistic(found.raw[..., 5:], found.classes).sum(-1)
        return {
            "box": self.box_weight * jnp.where(found.winner, box, 0).sum(),
            "object": self.object_weight * objectness.sum(),
            "class": self.class_weight * jnp.where(found.winner, classes, 0).sum(),
        }


@dataclasses.dataclass(frozen=True)
class RegionHead:
    """The head of YOLOv2 (darknet's `[region]`), with a softmax over the classes.

    In the cell of the center of a ground-truth box, the prediction of the anchor whose shape has the highest IoU with
    the box is positive. Its targets are the box, the class, and as objectness the IoU of its box with the ground truth.
    All other predictions are negative: their target is an objectness of 0. Negatives whose IoU with a ground-truth box
    exceeds `ignore_threshold` are ignored. During the warm-up, the first `prior_images` images of training, predictions
    that are not positive also have their anchor as target. If several boxes match the same prediction, its target is
    the last one; without `softmax`, its classes are those of all of them.

    Attributes:
        anchors: Anchors in cells.
        num_classes: Number of classes K.
        stride: Pixels per cell.
        softmax: Whether the classes exclude each other. If False, each has a logistic loss.
        match_anchors: Whether ground-truth boxes are matched to the anchors (`bias_match`) or to the predicted sizes.
        rescore: Whether the target objectness of a positive is its IoU with the ground-truth box. If False, it is 1.
        ignore_threshold: IoU with a ground-truth box above which a negative is left out of the objectness loss
            (`thresh`).
        coord_scale: Weight of the box loss.
        object_scale: Weight of the objectness loss of positives.
        noobject_scale: Weight of the objectness loss of negatives.
        class_scale: Weight of the class loss.
        prior_images: Length of the warm-up in images.
        prior_scale: Weight of the warm-up loss.

    Raises:
        ValueError: There are no anchors, or `num_classes` is not positive.
    """

    anchors: Anchors
    num_classes: int
    stride: int
    softmax: bool = True
    match_anchors: bool = True
    rescore: bool = True
    ignore_threshold: float = 0.6
    coord_scale: float = 1.0
    object_scale: float = 5.0
    noobject_scale: float = 1.0
    class_scale: float = 1.0
    prior_images: int = 12800
    prior_scale: float = 0.01

    def __post_init__(self):
        if not self.anchors:
            raise ValueError(f"anchors must have at least one (width, height); got {self.anchors}")
        _check_classes(self.num_classes)

    @property
    def sizes(self) -> Anchors:
        """The anchors in pixels."""
        return tuple((width * self.stride, height * self.stride) for width, height in self.anchors)

    def decode(self, raw: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decodes a raw output to boxes `[N, h, w, A, 4]` in pixels and scores `[N, h, w, A, K]`."""
        x = _split(raw, len(self.anchors), self.num_classes)
        classes = jax.nn.softmax(x[..., 5:]) if self.softmax else jax.nn.sigmoid(x[..., 5:])
        return grid_boxes(x, self.sizes, self.stride), jax.nn.sigmoid(x[..., 4:5]) * classes

    def losses(self, raw: jax.Array, truth: Truth) -> dict[str, jax.Array]:
        """Computes the losses `box`, `object`, `class` and `prior` of each image, `[N]`."""
        return jax.vmap(self._losses)(_split(raw, len(self.anchors), self.num_classes), truth)

    def _losses(self, x: jax.Array, truth: Truth) -> dict[str, jax.Array]:
        anchors = jnp.asarray(self.sizes, x.dtype)
        center, size = jnp.split(to_centers(truth.boxes), 2, axis=-1)
        shapes = anchors[None]
        if not self.match_anchors:
            row, column = _cells(center, x.shape[:2], self.stride)
            shapes = jnp.exp(jnp.minimum(x[row, column, :, 2:4], _LARGEST)) * anchors[None]
        best = jnp.argmax(_shape_iou(size[:, None], shapes), axis=1)
        positive = (best[:, None] == jnp.arange(len(anchors))[None]) & truth.valid[:, None]
        found = _assign(x, truth, positive, self.sizes, self.stride)
        predicted = jax.lax.stop_gradient(grid_boxes(x, self.sizes, self.stride))
        at = predicted[found.row, found.column]
        iou = paired_iou(at, jnp.broadcast_to(truth.boxes[:, None], at.shape)) if self.rescore else 1.0
        target = jnp.zeros(x.shape[:3], x.dtype).at[found.row, found.column].add(jnp.where(found.winner, iou, 0))
        negative = ~(_overlapping(predicted, truth, self.ignore_threshold) | found.map)
        weight = jnp.where(found.map, self.object_scale, jnp.where(negative, self.noobject_scale, 0))
        box = _logistic(found.raw[..., :2], found.center) + jnp.square(found.log_size - found.raw[..., 2:4]) / 2
        box = (2 - found.share) * box.sum(-1)
        prior = _logistic(x[..., :2], jnp.full((), 0.5, x.dtype)) + jnp.square(x[..., 2:4]) / 2
        prior = jnp.where(found.map | (truth.seen >= self.prior_images), 0, prior.sum(-1))
        if self.softmax:
            last = jax.nn.one_hot(truth.labels, self.num_classes, dtype=x.dtype)[:, None]
            classes = optax.softmax_cross_entropy(found.raw[..., 5:], jnp.broadcast_to(last, found.classes.shape))
        else:
            classes = _logistic(found.raw[..., 5:], found.classes).sum(-1)
        return {
            "box": self.coord_scale * jnp.where(found.winner, box, 0).sum(),
            "object": (weight * _logistic(x[..., 4], target)).sum(),
            "class": self.class_scale * jnp.where(found.winner, classes, 0).sum(),
            "prior": self.prior_scale * prior.sum(),
        }


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["boxes", "labels", "valid", "ignored", "seen"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Truth:
    """The ground truth of a batch.

    Attributes:
        boxes: `[N, M, 4]`, xyxy in pixels.
        labels: `[N, M]`, from 0.
        valid: `[N, M]` bool, which objects are to be detected.
        ignored: `[N, M]` bool, crowds and difficult objects. Negatives are ignored if the fraction of their area within
            such a box exceeds `ignore_threshold`.
        seen: `[N]`, the number of images that training has seen before.
    """

    boxes: jax.Array
    labels: jax.Array
    valid: jax.Array
    ignored: jax.Array
    seen: jax.Array


@dataclasses.dataclass(frozen=True)
class _Found:
    """The targets of one image, for each ground-truth box and each anchor in the cell of its center."""

    row: jax.Array  # [M]
    column: jax.Array  # [M]
    winner: jax.Array  # [M, A] bool, whether the anchor is positive with this box as target
    raw: jax.Array  # [M, A, 5 + K]
    center: jax.Array  # [M, 1, 2], within the cell
    log_size: jax.Array  # [M, A, 2]
    share: jax.Array  # [M, 1], area of the box / area of the canvas
    classes: jax.Array  # [M, A, K]
    map: jax.Array  # [h, w, A] bool, which predictions are positive


def _assign(x: jax.Array, truth: Truth, positive: jax.Array, sizes: Anchors, stride: int) -> _Found:
    """Collects the targets of the `positive` anchors `[M, A]`. If boxes share an anchor, the last box is its target."""
    rows, columns, _, depth = x.shape
    center, size = jnp.split(to_centers(truth.boxes.astype(x.dtype)), 2, axis=-1)
    row, column = _cells(center, (rows, columns), stride)
    cell = row * columns + column
    meet = (cell[:, None] == cell[None])[..., None] & positive[None] & positive[:, None]  # [M, M, A]
    number = jnp.arange(cell.size)
    winner = positive & ~jnp.any(meet & (number[None] > number[:, None])[..., None], axis=1)
    hot = jax.nn.one_hot(truth.labels, depth - 5, dtype=x.dtype)
    size = jnp.where(truth.valid[:, None], jnp.maximum(size, 1e-3), 1)
    return _Found(
        row,
        column,
        winner,
        x[row, column],
        jnp.clip(center / stride - jnp.stack([column, row], axis=-1).astype(x.dtype), 0, 1)[:, None],
        jnp.log(size[:, None] / jnp.asarray(sizes, x.dtype)[None]),
        (size.prod(-1) / (rows * columns * stride * stride))[:, None],
        jnp.minimum(jnp.einsum("mna,nk->mak", meet.astype(x.dtype), hot), 1),
        jnp.zeros(x.shape[:3], bool).at[row, column].max(winner),
    )


def _cells(center: jax.Array, grid: tuple[int, ...], stride: int) -> tuple[jax.Array, jax.Array]:
    """Returns the row and the column `[M]` of the cell of each center `[M, 2]`."""
    column, row = jnp.moveaxis(jnp.floor(center / stride).astype(jnp.int32), -1, 0)
    return jnp.clip(row, 0, grid[0] - 1), jnp.clip(column, 0, grid[1] - 1)


def _overlapping(predicted: jax.Array, truth: Truth, threshold: float) -> jax.Array:
    """Returns which predictions `[h, w, A, 4]` overlap a ground-truth box or lie in an ignored one, `[h, w, A]`."""
    boxes = jax.lax.stop_gradient(predicted).reshape(-1, 4)
    overlap = jnp.where(truth.valid[None], box_iou(boxes, truth.boxes), 0)
    corners = jnp.maximum(boxes[:, None, :2], truth.boxes[None, :, :2])
    ends = jnp.minimum(boxes[:, None, 2:], truth.boxes[None, :, 2:])
    shared = box_area(jnp.concatenate([corners, ends], -1))
    within = jnp.where(truth.ignored[None], shared / jnp.maximum(box_area(boxes), 1e-6)[:, None], 0)
    return jnp.any(jnp.maximum(overlap, within) > threshold, axis=1).reshape(predicted.shape[:-1])


def _shape_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes the IoU of concentric boxes from their sizes `[..., 2]`."""
    shared = jnp.minimum(a, b).prod(-1)
    return shared / jnp.maximum(a.prod(-1) + b.prod(-1) - shared, 1e-9)


def _logistic(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the logistic loss minus its minimum. Its derivative is `sigmoid(logits) - target`."""
    entropy = -(xlogy(target, target) + xlogy(1 - target, 1 - target))
    return jax.nn.softplus(logits) - logits * target - jax.lax.stop_gradient(entropy)


def _split(raw: jax.Array, anchors: int, classes: int) -> jax.Array:
    """Reshapes a raw output to `[N, h, w, A, 5 + K]`, float32 or wider."""
    x = raw.reshape(*raw.shape[:3], anchors, 5 + classes)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1 for a detector; got {num_classes}")


def grid_boxes(x: jax.Array, sizes: Anchors, stride: int, scale_xy: float = 1.0) -> jax.Array:
    """Decodes the boxes of a grid (YOLO9000, section 2, "direct location prediction").

    Args:
        x: `[..., h, w, A, 4 or more]`: raw x, y, width and height.
        sizes: Width and height of the A anchors in pixels.
        stride: Pixels per cell.
        scale_xy: Range of the predicted center in cells.

    Returns:
        `[..., h, w, A, 4]`, xyxy in pixels, not clipped.
    """
    rows, columns = x.shape[-4:-2]
    cells = jnp.stack(jnp.meshgrid(jnp.arange(columns), jnp.arange(rows)), -1).astype(x.dtype)[:, :, None]
    center = (jax.nn.sigmoid(x[..., :2]) * scale_xy - (scale_xy - 1) / 2 + _like(cells, x)) * stride
    size = jnp.exp(jnp.minimum(x[..., 2:4], _LARGEST)) * _like(jnp.asarray(sizes, x.dtype), x)
    return from_centers(jnp.concatenate([center, size], -1))


def _like(a: jax.Array, x: jax.Array) -> jax.Array:
    return a.reshape((1,) * (x.ndim - a.ndim) + a.shape)
