"""Mask R-CNN: Faster R-CNN with a head that predicts the mask of each object.

K. He, G. Gkioxari, P. Dollár, R. Girshick, "Mask R-CNN", ICCV 2017, with the feature pyramid (figure 4, right).

The definition is torchvision's. `faster_rcnn.py` lists its differences from the paper. In addition, RoIAlign does not
shift its samples by half a pixel. As in the paper, masks are predicted for the detections that NMS keeps, at most 100
by default.

`mask_rcnn_resnet50_fpn` has frozen BatchNorm, like `faster_rcnn_resnet50_fpn`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxvision.layers import Conv, ConvTranspose
from flaxvision.losses import instance_mask
from flaxvision.models.backbone import Dtype, as_float32
from flaxvision.models.detector import batch_mean, valid_sizes
from flaxvision.models.faster_rcnn import FasterRCNN, Regions
from flaxvision.models.resnet import ResNetBackbone
from flaxvision.ops import crop_masks
from flaxvision.registry import register

_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class MaskHead(nn.Module):
    """3x3 convolutions `conv1`, `conv2`, ...; a 2x2 transposed convolution `upsample`; and a 1x1 convolution `logits`.

    Attributes:
        num_classes: Number of classes K, including the background, whose masks have no meaning.
        features: Channels of each 3x3 convolution. The transposed one has as many as the last.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    num_classes: int
    features: tuple[int, ...] = (256, 256, 256, 256)
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps pooled features `[..., h, w, C]` to logits `[..., 2 * h, 2 * w, K]`."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": _init}
        for i, features in enumerate(self.features, start=1):
            x = nn.relu(Conv(features, (3, 3), padding=1, name=f"conv{i}", **dtypes)(x))
        upsample = functools.partial(ConvTranspose, x.shape[-1], (2, 2), (2, 2), "VALID", transpose_kernel=True)
        x = nn.relu(upsample(name="upsample", **dtypes)(x))
        return as_float32(Conv(self.num_classes, (1, 1), name="logits", **dtypes)(x))


class MaskRCNN(FasterRCNN):
    """Mask R-CNN on any backbone: Faster R-CNN and a mask head.

    `losses` returns `mask` and the losses of Faster R-CNN. `flaxvision.detect` returns `masks`.

    Attributes:
        mask_pool_size: Number of bins of RoIAlign along each side, for the mask head. Masks have twice as many pixels
            along each side, 28 by default.
        mask_features: Channels of each 3x3 convolution of the mask head.
    """

    mask_pool_size: int = 14
    mask_features: tuple[int, ...] = (256, 256, 256, 256)

    def setup(self):
        """Creates the modules after the backbone."""
        super().setup()
        self.mask_head = MaskHead(self.num_classes, self.mask_features, **self.backbone.dtypes)

    def __call__(self, images: jax.Array, sizes: jax.Array | None = None, *, train: bool = False) -> dict[str, Any]:
        """Maps images to the outputs of Faster R-CNN, and to the feature maps that `masks` needs.

        Args:
            images: As for `FasterRCNN`.
            sizes: As for `FasterRCNN`.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            The outputs of `FasterRCNN`, and `levels`: the levels `[N, H, W, C]` of the pyramid by name.

        Raises:
            ValueError: `images` is not of rank 4, or `sizes` has another shape.
        """
        outputs, levels = self._both_stages(images, sizes, train)
        outputs["levels"] = levels
        if self.is_initializing():
            self.masks(outputs, outputs["proposals"][:, :1], jnp.zeros((images.shape[0], 1), jnp.int32))
        return outputs

    def masks(self, outputs: dict[str, Any], boxes: jax.Array, labels: jax.Array) -> jax.Array:
        """Predicts the masks of detected objects. Call it with `apply(..., method="masks")`.

        Args:
            outputs: Result of `__call__`.
            boxes: Boxes of the objects in pixels, `[N, M, 4]`.
            labels: Their classes `[N, M]`, from 0 and without the background.

        Returns:
            `[N, M, 28, 28]` for the default `mask_pool_size`: the probability that a point of the box belongs to the
            object.
        """
        logits = self._mask_logits(outputs["levels"], boxes)
        return nn.sigmoid(jnp.take_along_axis(logits, labels[..., None, None, None] + 1, axis=-1)[..., 0])

    def losses(
        self, batch: Mapping[str, Any], rng: jax.Array | None = None, *, train: bool = True
    ) -> dict[str, jax.Array]:
        """Computes the five losses of each image.

        The loss `mask` is the binary cross-entropy of the mask of the true class. It is averaged over the pixels of the
        mask, and over all sampled proposals that are not background (He et al. 2017, section 3).

        Args:
            batch: As for `Detector.losses`, and the truth masks `masks [N, M, h, w]`, zeros and ones of any dtype. They
                cover the canvas, at its resolution or at any other one.
            rng: A PRNG key, or one key per row, for sampling anchors and proposals; see `row_keys`.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            `mask`, `classes`, `box`, `objectness` and `rpn_box`, `[N]` each.

        Raises:
            ValueError: The batch has no `masks`, or they are not `[N, M, h, w]`.
        """
        masks, shape = batch.get("masks"), batch["valid"].shape
        if masks is None or masks.ndim != 4 or masks.shape[:2] != shape:
            found = "none" if masks is None else masks.shape
            raise ValueError(f"batch must hold masks [{shape[0]}, {shape[1]}, h, w], one for each box; got {found}")
        losses, levels, regions = self._joint_losses(batch, rng, train)
        return {"mask": self._mask_loss(batch, levels, regions), **losses}

    def _mask_loss(self, batch: Mapping[str, Any], levels: dict[str, jax.Array], regions: Regions) -> jax.Array:
        images, masks = batch["image"], batch["masks"]
        # The positives come first in the sample. The background has no masks.
        most = max(1, int(self.box_sample_size * self.box_positive_fraction))
        boxes, kept, classes, truths = (x[:, :most] for x in regions)
        logits = self._mask_logits(levels, boxes)
        resolution, canvas = np.asarray(masks.shape[2:]), np.asarray(images.shape[1:3])
        inside = -(-valid_sizes(images, batch.get("size")) * resolution[None] // canvas[None])
        crop = lambda masks, boxes, truths, size: crop_masks(
            masks, boxes, truths, 2 * self.mask_pool_size, spatial_scale=tuple(resolution / canvas), size=size
        )
        targets = jax.vmap(crop)(masks, boxes, truths, inside)
        entropy = instance_mask(logits, targets, classes)
        positive = kept & (classes > 0)
        count = jnp.maximum(batch_mean(positive.sum(-1), batch.get("mask")), 1e-6)  # the loss is 0 without positives
        return jnp.where(positive, entropy, 0).sum(-1) / count

    def _mask_logits(self, levels: dict[str, jax.Array], boxes: jax.Array) -> jax.Array:
        """Maps boxes `[N, R, 4]` to logits `[N, R, h, w, K]`."""
        return self.mask_head(self._pool(levels, boxes, self.mask_pool_size))


register(
    MaskRCNN,
    "mask_rcnn_resnet50_fpn",
    backbone=ResNetBackbone,
    defaults={
        "stage_sizes": (3, 4, 6, 3),
        "bottleneck": True,
        "stages": ("stage1", "stage2", "stage3", "stage4"),
        "epsilon": 0.0,
        "batch_norm": "frozen",
    },
    task="detection",
    paper="He et al. 2017, Mask R-CNN",
    year=2017,
    input_size=(800, 1344),
    channels=3,
    params=44_401_393,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
