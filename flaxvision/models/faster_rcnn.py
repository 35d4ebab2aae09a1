"""Faster R-CNN with a feature pyramid.

S. Ren, K. He, R. Girshick, J. Sun, "Faster R-CNN: towards real-time object detection with region proposal networks",
NIPS 2015; with the pyramid and the heads of T.-Y. Lin, P. Dollár, R. Girshick, K. He, B. Hariharan, S. Belongie,
"Feature pyramid networks for object detection", CVPR 2017, sections 4.1 and 4.2.

The definition is torchvision's. It differs from the papers in these points:

* RoIAlign (He et al. 2017), without the shift by half a pixel, replaces RoI pooling.
* The two stages are trained jointly.
* In training, the ground-truth boxes are added to the proposals.

It differs from torchvision in one point. If the images of a batch have different sizes, torchvision uses the anchors of
the whole padded batch for each of them. Here, an image only uses the anchors within its own size, rounded up to
`size_divisor`.

`faster_rcnn_resnet50_fpn` has frozen BatchNorm with epsilon 0, as torchvision's model with pretrained weights.
`batch_norm="sync", epsilon=1e-5` gives the model that torchvision trains from scratch. `frozen_stages=2` corresponds to
torchvision's `trainable_backbone_layers=3`, its default for a pretrained backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flaxvision.detection import Candidates
from flaxvision.layers.fpn import FeaturePyramid
from flaxvision.models import rpn
from flaxvision.models.backbone import Backbone, Dtype, as_float32
from flaxvision.models.detector import Detector, batch_mean, row_keys, valid_sizes
from flaxvision.models.resnet import ResNetBackbone
from flaxvision.ops import clip_boxes, decode_boxes, encode_boxes, multiscale_roi_align, sample
from flaxvision.registry import register

_dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class BoxHead(nn.Module):
    """Hidden layers `fc1` and `fc2`, and output layers `classes` and `deltas` (Lin et al. 2017, section 4.2).

    Attributes:
        num_classes: Number of classes K, including the background, which is class 0.
        features: Width of the hidden layers.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    num_classes: int
    features: int = 1024
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps pooled features `[..., h, w, C]` to logits `[..., K]` and box offsets `[..., K, 4]`."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": _dense_init}
        x = x.reshape(*x.shape[:-3], -1)
        x = nn.relu(nn.Dense(self.features, name="fc1", **dtypes)(x))
        x = nn.relu(nn.Dense(self.features, name="fc2", **dtypes)(x))
        deltas = as_float32(nn.Dense(4 * self.num_classes, name="deltas", **dtypes)(x))
        return as_float32(nn.Dense(self.num_classes, name="classes", **dtypes)(x)), deltas.reshape(*x.shape[:-1], -1, 4)


class Regions(NamedTuple):
    """Proposals sampled for training, positives first.

    Attributes:
        boxes: `[N, S, 4]`.
        kept: `[N, S]` bool: which of them exist.
        classes: `[N, S]` int32: the class of each, 0 for the background.
        truths: `[N, S]` int32: the index of the matched ground-truth box. It has no meaning for the background.
    """

    boxes: jax.Array
    kept: jax.Array
    classes: jax.Array
    truths: jax.Array


class FasterRCNN(Detector):
    """Faster R-CNN on any backbone: feature pyramid, region proposal network (RPN) and box head.

    The pyramid has one level for each stage of the backbone, and above them `pool`, every second pixel of the coarsest
    one. `losses` returns `classes`, `box`, `objectness` and `rpn_box`. It sows the sampled anchors and regions into the
    collection `intermediates`.

    Attributes:
        backbone: Maps images to a dict of stages. Its field `stages` selects the levels of the pyramid.
        num_classes: Number of classes K, including the background, as in torchvision. Labels start at 0 and exclude the
            background.
        fpn_features: Channels of the pyramid.
        head_features: Width of the hidden layers of the box head.
        anchor_sizes: Sizes of the anchors of each level in pixels; the size is the square root of the area.
        aspect_ratios: Ratios of height to width of the anchors.
        size_divisor: Height and width of each image are rounded up to multiples of it. Anchors with a center beyond
            them are not used.
        rpn_pre_nms_train: Number of anchors taken from each level before NMS in training.
        rpn_pre_nms_eval: The same in evaluation.
        rpn_post_nms_train: Number of proposals after NMS in training.
        rpn_post_nms_eval: Number of proposals R after NMS in evaluation.
        rpn_nms_iou: Maximum IoU of two proposals of the same level.
        rpn_min_size: Minimum height and width of a proposal in pixels.
        rpn_score_threshold: Minimum objectness of a proposal, a probability.
        rpn_fg_iou: Minimum IoU of a positive anchor with a ground-truth box. The best anchor of a box is positive below
            this too.
        rpn_bg_iou: IoU below which an anchor is negative.
        rpn_sample_size: Number of anchors sampled per image for the losses of the RPN.
        rpn_positive_fraction: Maximum fraction of positives in this sample.
        pool_size: Number of bins of RoIAlign along each side.
        sampling_ratio: Number of samples of RoIAlign along each side of a bin.
        box_fg_iou: Minimum IoU of a positive proposal with a ground-truth box.
        box_bg_iou: IoU below which a proposal is background.
        box_sample_size: Number of proposals sampled per image for the losses of the box head.
        box_positive_fraction: Maximum fraction of positives in this sample.
        box_weights: Factors of the box offsets of the box head; see `flaxvision.ops.encode_boxes`.
        beta: Absolute difference above which smooth L1 is linear, for both regression losses.

    Raises:
        ValueError: `num_classes` is below 2, or `anchor_sizes` does not have one entry for each level.
    """

    backbone: Backbone
    num_classes: int = 91
    fpn_features: int = 256
    head_features: int = 1024
    anchor_sizes: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    size_divisor: int = 32
    rpn_pre_nms_train: int = 2000
    rpn_pre_nms_eval: int = 1000
    rpn_post_nms_train: int = 2000
    rpn_post_nms_eval: int = 1000
    rpn_nms_iou: float = 0.7
    rpn_min_size: float = 1e-3
    rpn_score_threshold: float = 0.0
    rpn_fg_iou: float = 0.7
    rpn_bg_iou: float = 0.3
    rpn_sample_size: int = 256
    rpn_positive_fraction: float = 0.5
    pool_size: int = 7
    sampling_ratio: int = 2
    box_fg_iou: float = 0.5
    box_bg_iou: float = 0.5
    box_sample_size: int = 512
    box_positive_fraction: float = 0.25
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    beta: float = 1 / 9

    def __post_init__(self):
        super().__post_init__()
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, the background and a class; got {self.num_classes}")
        levels = [*self.backbone.strides, "pool"]
        sizes = self.anchor_sizes
        if len(sizes) != len(levels) or len({len(shapes) for shapes in sizes}) != 1 or not sizes[0]:
            raise ValueError(
                f"anchor_sizes must have one tuple per level ({', '.join(levels)}), all of the same length; got {sizes}"
            )

    def setup(self):
        """Creates the modules after the backbone."""
        dtypes = self.backbone.dtypes
        self.fpn = FeaturePyramid(tuple(self.backbone.strides), self.fpn_features, **dtypes)
        self.rpn = rpn.RPNHead(len(self.anchor_sizes[0]) * len(self.aspect_ratios), **dtypes)
        self.box_head = BoxHead(self.num_classes, self.head_features, **dtypes)

    @property
    def num_labels(self) -> int:
        """Number of classes, without the background."""
        return self.num_classes - 1

    def __call__(self, images: jax.Array, sizes: jax.Array | None = None, *, train: bool = False) -> dict[str, Any]:
        """Maps images to the outputs of both stages, with the number of proposals used in evaluation.

        Args:
            images: Normalized images `[N, H, W, C]`. Pixels outside of `sizes` are set to 0.
            sizes: Valid height and width of each image, `[N, 2]`; None for the whole canvas.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            `proposals [N, R, 4]` and `valid [N, R]`; `class_logits [N, R, K]` and `box_deltas [N, R, K, 4]` of the box
            head; and for each level, as lists, `objectness [N, A]` and `rpn_deltas [N, A, 4]`.

        Raises:
            ValueError: `images` is not of rank 4, or `sizes` has another shape.
        """
        return self._both_stages(images, sizes, train)[0]

    def _both_stages(self, images: jax.Array, sizes: jax.Array | None, train: bool) -> tuple[dict[str, Any], Any]:
        """Returns the result of `__call__`, and the levels of the pyramid."""
        sizes = valid_sizes(images, sizes)
        levels, objectness, deltas, anchors, inside = self._first_stage(images, sizes, train)
        proposals, valid, _ = rpn.propose(
            objectness,
            deltas,
            anchors,
            inside,
            sizes,
            pre_nms=self.rpn_pre_nms_eval,
            post_nms=self.rpn_post_nms_eval,
            **self._proposing,
        )
        class_logits, box_deltas = self._second_stage(levels, proposals)
        outputs = {
            "proposals": proposals,
            "valid": valid,
            "class_logits": class_logits,
            "box_deltas": box_deltas,
            "objectness": objectness,
            "rpn_deltas": deltas,
        }
        return outputs, levels

    @nn.nowrap
    def candidates(self, outputs: dict[str, Any], sizes: jax.Array) -> Candidates:
        """Decodes the box of every proposal and class.

        Args:
            outputs: Result of `__call__`.
            sizes: Valid height and width of each image, `[N, 2]`.

        Returns:
            Boxes `[N, R, K - 1, 4]`, clipped to the images; probabilities `[N, R, K - 1]`; and `[N, R]` bool, which
            proposals exist.
        """
        deltas, anchors = outputs["box_deltas"][:, :, 1:], outputs["proposals"][:, :, None]
        boxes = clip_boxes(decode_boxes(deltas, anchors, self.box_weights), sizes)
        scores = jax.nn.softmax(outputs["class_logits"], axis=-1)[..., 1:]
        return Candidates(boxes, scores, outputs["valid"])

    def losses(
        self, batch: Mapping[str, Any], rng: jax.Array | None = None, *, train: bool = True
    ) -> dict[str, jax.Array]:
        """Computes the four losses of each image.

        Args:
            batch: As for `Detector.losses`.
            rng: A PRNG key, or one key per row, for sampling anchors and proposals; see `row_keys`.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            `classes`, `box`, `objectness` and `rpn_box`, `[N]` each.
        """
        return self._joint_losses(batch, rng, train)[0]

    def _joint_losses(self, batch: Mapping[str, Any], rng: jax.Array | None, train: bool) -> tuple[Any, Any, Regions]:
        """Returns the losses of both stages, the levels of the pyramid, and the sampled proposals."""
        images, mask = batch["image"], batch.get("mask")
        sizes = valid_sizes(images, batch.get("size"))
        boxes, ignored = batch["boxes"], jnp.zeros(batch["valid"].shape, bool)
        for kind in ("crowd", "difficult"):
            ignored |= jnp.asarray(batch.get(kind, ignored), bool)
        valid = jnp.asarray(batch["valid"], bool)
        valid, ignored = valid & ~ignored, valid & ignored
        levels, objectness, deltas, anchors, inside = self._first_stage(images, sizes, train)
        boxes = boxes.astype(anchors[0].dtype)

        keys = jax.vmap(jax.random.split)(row_keys(rng, images.shape[0]))
        losses, chosen = rpn.rpn_losses(
            keys[:, 0],
            objectness,
            deltas,
            anchors,
            inside,
            (boxes, valid, ignored),
            mask,
            fg_iou=self.rpn_fg_iou,
            bg_iou=self.rpn_bg_iou,
            size=self.rpn_sample_size,
            positive_fraction=self.rpn_positive_fraction,
            beta=self.beta,
        )
        self.sow("intermediates", "rpn_sample", chosen)
        proposals, exists, sources = rpn.propose(
            objectness,
            deltas,
            anchors,
            inside,
            sizes,
            pre_nms=self.rpn_pre_nms_train,
            post_nms=self.rpn_post_nms_train,
            **self._proposing,
        )
        proposals, exists = jnp.concatenate([proposals, boxes], 1), jnp.concatenate([exists, valid], 1)
        # Rounding can swap proposals of nearly the same score. The sample must not depend on their order.
        more = jnp.broadcast_to(sum(map(len, anchors)) + jnp.arange(valid.shape[1])[None], valid.shape)
        ids = jnp.concatenate([sources, more.astype(sources.dtype)], 1)
        regions, targets = jax.vmap(self._box_targets)(
            keys[:, 1], ids, proposals, exists, boxes, valid, ignored, batch["labels"]
        )
        kept, classes = regions.kept, regions.classes
        self.sow("intermediates", "box_sample", (regions.boxes, kept))
        logits, deltas = self._second_stage(levels, regions.boxes)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
        own = jnp.take_along_axis(deltas, classes[..., None, None], axis=2)[:, :, 0]
        distance = rpn.smooth_l1(own - targets, self.beta).sum(-1)
        count = jnp.maximum(batch_mean(kept.sum(-1), mask), 1e-6)
        losses = {
            "classes": jnp.where(kept, entropy, 0).sum(-1) / count,
            "box": jnp.where(kept & (classes > 0), distance, 0).sum(-1) / count,
            **losses,
        }
        return losses, levels, regions

    @property
    def _proposing(self) -> dict[str, float]:
        return {
            "iou_threshold": self.rpn_nms_iou,
            "min_size": self.rpn_min_size,
            "score_threshold": self.rpn_score_threshold,
        }

    def _first_stage(self, images: jax.Array, sizes: jax.Array, train: bool) -> tuple[Any, ...]:
        rows, columns = (jnp.arange(extent)[None] < sizes[:, i, None] for i, extent in enumerate(images.shape[1:3]))
        images = jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], images, jnp.zeros((), images.dtype))
        levels = self.fpn(self.backbone(images, train=train))
        maps = list(levels.values())
        objectness, deltas = self.rpn(maps)
        anchors, inside = rpn.anchors_of(
            [x.shape[1:3] for x in maps],
            images.shape[1:3],
            sizes,
            anchor_sizes=self.anchor_sizes,
            aspect_ratios=self.aspect_ratios,
            size_divisor=self.size_divisor,
            dtype=objectness[0].dtype,
        )
        return levels, objectness, deltas, anchors, inside

    def _second_stage(self, levels: dict[str, jax.Array], regions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps regions `[N, R, 4]` to logits `[N, R, K]` and box offsets `[N, R, K, 4]`."""
        return self.box_head(self._pool(levels, regions, self.pool_size))

    @nn.nowrap
    def _pool(self, levels: dict[str, jax.Array], regions: jax.Array, size: int) -> jax.Array:
        """Maps regions `[N, R, 4]` to features `[N, R, size, size, C]`."""
        strides = self.backbone.strides

        def pool(maps, rois):
            return multiscale_roi_align(
                maps, list(strides.values()), rois, (size, size), sampling_ratio=self.sampling_ratio
            )

        return jax.vmap(pool)([levels[name] for name in strides], regions)

    @nn.nowrap
    def _box_targets(self, key, ids, proposals, exists, boxes, valid, ignored, labels) -> tuple[Regions, jax.Array]:
        """Samples proposals of one image; returns them and their target offsets."""
        matched, label = rpn.assign(
            boxes,
            valid,
            ignored,
            proposals,
            exists,
            low=self.box_bg_iou,
            high=self.box_fg_iou,
            allow_low_quality=False,
        )
        fraction = self.box_positive_fraction
        chosen, kept = sample(key, label, size=self.box_sample_size, positive_fraction=fraction, ids=ids)
        truth = matched[chosen]
        classes = jnp.where(kept & (label[chosen] == 1), labels[truth].astype(jnp.int32) + 1, 0)
        regions = jnp.where(kept[:, None], proposals[chosen], 0)
        targets = encode_boxes(boxes[truth], regions, self.box_weights)
        return Regions(regions, kept, classes, truth), targets


register(
    FasterRCNN,
    "faster_rcnn_resnet50_fpn",
    backbone=ResNetBackbone,
    defaults={
        "stage_sizes": (3, 4, 6, 3),
        "bottleneck": True,
        "stages": ("stage1", "stage2", "stage3", "stage4"),
        "epsilon": 0.0,
        "batch_norm": "frozen",
    },
    task="detection",
    paper="Ren et al. 2015, Faster R-CNN: towards real-time object detection with region proposal networks",
    year=2015,
    input_size=(800, 1344),
    channels=3,
    params=41_755_286,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
