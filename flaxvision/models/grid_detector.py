"""`GridDetector`, the base class of detectors with the grid heads of YOLO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.detection import Candidates
from flaxvision.layers import Conv
from flaxvision.models.backbone import as_float32
from flaxvision.models.detector import Detector, valid_sizes
from flaxvision.models.yolo_heads import RegionHead, Truth, YoloHead
from flaxvision.ops import box_area, clip_boxes


class GridDetector(Detector):
    """Base class of detectors that predict boxes on grids.

    A subclass defines `heads` and `__call__`, which returns the raw output of each head by name. Images are RGB, in
    [0, 1]. The height and width of the canvas must be multiples of the coarsest stride. The warm-up of YOLOv2 needs
    `batch["seen"]`, an integer or `[N]`: the number of images that training has seen before this batch. The batches of
    `train_batches` for images on canvases have it. Without it there is no warm-up.
    """

    @property
    def heads(self) -> dict[str, YoloHead | RegionHead]:
        """The heads, by the names of their raw outputs."""
        raise NotImplementedError(f"{type(self).__name__} must define heads")

    def __call__(self, images: jax.Array, sizes: jax.Array | None = None, *, train: bool = False) -> dict[str, Any]:
        """Maps images to the raw outputs of the heads.

        Args:
            images: Images `[N, H, W, C]`, RGB in [0, 1].
            sizes: Valid height and width of each image, `[N, 2]`; they do not change the result.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            `[N, h, w, A * (5 + K)]` by the name of the head, float32 or wider.

        Raises:
            ValueError: `images` is not of rank 4, H or W is not a multiple of the coarsest stride, or `sizes` has
                another shape.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return next(iter(self.heads.values())).num_classes

    @nn.nowrap
    def candidates(self, outputs: dict[str, Any], sizes: jax.Array | None = None) -> Candidates:
        """Decodes raw outputs to scored boxes, ordered by head, row, column and anchor.

        Args:
            outputs: Result of `__call__`.
            sizes: Valid height and width of each image, `[N, 2]`; None for the whole canvas.

        Returns:
            Boxes `[N, A, 4]`, clipped to the images; scores `[N, A, K]`, the objectness times the probability of the
            class; and `[N, A]` bool, which boxes have an area.
        """
        boxes, scores = [], []
        for name, head in self.heads.items():
            box, score = head.decode(outputs[name])
            boxes.append(box.reshape(box.shape[0], -1, 4))
            scores.append(score.reshape(score.shape[0], -1, head.num_classes))
        if sizes is None:
            name, head = next(iter(self.heads.items()))
            size = jnp.asarray(outputs[name].shape[1:3]) * head.stride
            sizes = jnp.broadcast_to(size[None], (outputs[name].shape[0], 2))
        clipped = clip_boxes(jnp.concatenate(boxes, 1), jnp.asarray(sizes))
        return Candidates(clipped, jnp.concatenate(scores, 1), box_area(clipped) > 0)

    def losses(
        self, batch: Mapping[str, Any], rng: jax.Array | None = None, *, train: bool = True
    ) -> dict[str, jax.Array]:
        """Computes the losses of each image: sums over cells and anchors, as in darknet.

        Args:
            batch: As for `Detector.losses`, and optionally `seen`.
            rng: Not used.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            `box`, `object` and `class`, and `prior` for YOLOv2, `[N]` each, summed over the heads.
        """
        outputs = self(batch["image"], batch.get("size"), train=train)
        valid, boxes = jnp.asarray(batch["valid"], bool), jnp.asarray(batch["boxes"])
        nothing = jnp.zeros_like(valid)
        apart = jnp.asarray(batch.get("crowd", nothing), bool) | jnp.asarray(batch.get("difficult", nothing), bool)
        seen = jnp.broadcast_to(jnp.asarray(batch.get("seen", jnp.iinfo(jnp.int32).max)), boxes.shape[:1])
        truth = Truth(boxes, jnp.asarray(batch["labels"]), valid & ~apart, valid & apart, seen)
        total: dict[str, jax.Array] = {}
        for name, head in self.heads.items():
            for loss, value in head.losses(outputs[name], truth).items():
                total[loss] = total[loss] + value if loss in total else value
        return total


def head_output(x: jax.Array, anchors: int, classes: int, *, name: str, **dtypes: Any) -> jax.Array:
    """Applies the last layer of a head, a linear 1x1 convolution. Call it in a compact method.

    Args:
        x: Features `[N, h, w, C]`.
        anchors: Number of anchors A of the head.
        classes: Number of classes K.
        name: Name of the convolution.
        **dtypes: The `dtypes` of the backbone.

    Returns:
        `[N, h, w, A * (5 + K)]`, float32 or wider.
    """
    conv = Conv(anchors * (5 + classes), (1, 1), kernel_init=nn.initializers.he_normal(), name=name, **dtypes)
    return as_float32(conv(x))


def check_canvas(images: jax.Array, sizes: jax.Array | None, multiple: int) -> None:
    """Checks the shapes of the images and of their sizes.

    Raises:
        ValueError: `images` is not `[N, H, W, C]` with a height and a width that are multiples of `multiple`, or
            `sizes` has another shape than `[N, 2]`.
    """
    valid_sizes(images, sizes)
    if images.shape[1] % multiple or images.shape[2] % multiple:
        raise ValueError(
            f"images must have a height and a width that are multiples of {multiple}; got {images.shape[1:3]}"
        )
