"""YOLOv3, YOLOv3 with spatial pyramid pooling, and tiny YOLOv3.

J. Redmon, A. Farhadi, "YOLOv3: An incremental improvement", arXiv:1804.02767, section 2. The definitions are those of
darknet's `yolov3.cfg`, `yolov3-spp.cfg` and `yolov3-tiny.cfg`, for COCO. The constants of the loss are those of the
paper; `yolov3.cfg` and the other files for COCO have `ignore_threshold=0.7`. For VOC, set `num_classes=20`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers.darknet import darknet_max_pool
from flaxvision.models.backbone import Backbone
from flaxvision.models.darknet import TINY_YOLO, Darknet53Backbone, DarknetBackbone, darknet_unit
from flaxvision.models.grid_detector import GridDetector, check_canvas, head_output
from flaxvision.models.yolo_heads import Anchors, YoloHead
from flaxvision.registry import register

Necks = tuple[tuple[tuple[int, int], ...], ...]

# Width and height in pixels, computed by k-means on COCO.
ANCHORS: Anchors = (
    *((10, 13), (16, 30), (33, 23)),
    *((30, 61), (62, 45), (59, 119)),
    *((116, 90), (156, 198), (373, 326)),
)
TINY_ANCHORS: Anchors = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
# Features and kernel size of the convolutions before each head, coarsest first. (0, 0) is spatial pyramid pooling.
NECKS: Necks = (
    ((512, 1), (1024, 3), (512, 1), (1024, 3), (512, 1)),
    ((256, 1), (512, 3), (256, 1), (512, 3), (256, 1)),
    ((128, 1), (256, 3), (128, 1), (256, 3), (128, 1)),
)
SPP_NECKS: Necks = (((512, 1), (1024, 3), (512, 1), (0, 0), (512, 1), (1024, 3), (512, 1)), *NECKS[1:])
TINY_NECKS: Necks = (((256, 1),), ())


class YoloV3(GridDetector):
    """YOLOv3: a head on each stage that the backbone returns. Coarser features are upsampled and concatenated.

    The height and width of the canvas must be multiples of the stride of the last stage, which is 32 by default.

    Attributes:
        backbone: Maps images to stages. The stride doubles from stage to stage.
        num_classes: Number of classes.
        anchors: Width and height of the anchors of all heads, in pixels, smallest first. Every head has the same
            number.
        necks: For each head, coarsest first, the features and kernel size of the convolutions before it; (0, 0) for
            spatial pyramid pooling.
        head_features: Channels of the 3x3 convolution of each head, coarsest first.
        lateral_features: Channels of the 1x1 convolution before each upsampling.
        spp_sizes: Windows of spatial pyramid pooling, largest first.
        scale_xy: As in `YoloHead`; so are the following fields.
        ignore_threshold: IoU with a ground-truth box above which a negative is left out of the objectness loss.
        iou_threshold: IoU of shapes above which other anchors are positive too; 1 for only the best anchor.
        box_loss: `"mse"`, or the kind of IoU that is maximized.
        box_weight: Weight of the box loss.
        object_weight: Weight of the objectness loss.
        class_weight: Weight of the class loss.

    Raises:
        ValueError: The length of `necks`, `head_features`, `lateral_features` or `anchors` does not match the number of
            stages of the backbone.
    """

    backbone: Backbone
    num_classes: int = 80
    anchors: Anchors = ANCHORS
    necks: Necks = NECKS
    head_features: tuple[int, ...] = (1024, 512, 256)
    lateral_features: tuple[int, ...] = (256, 128)
    spp_sizes: tuple[int, ...] = (13, 9, 5)
    scale_xy: float = 1.0
    ignore_threshold: float = 0.5
    iou_threshold: float = 1.0
    box_loss: str = "mse"
    box_weight: float = 1.0
    object_weight: float = 1.0
    class_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        count = len(self.backbone.strides)
        lengths = (len(self.necks), len(self.head_features), len(self.lateral_features) + 1)
        if set(lengths) != {count} or not self.anchors or len(self.anchors) % count:
            raise ValueError(
                f"necks, head_features, lateral_features and anchors must have {count}, {count}, {count - 1} and a"
                f" multiple of {count} entries for a backbone with {count} stages; got {lengths[0]}, {lengths[1]},"
                f" {len(self.lateral_features)} and {len(self.anchors)}"
            )

    @property
    def heads(self) -> dict[str, YoloHead]:
        """The heads, coarsest first: `stride32`, `stride16`, `stride8`."""
        strides = list(self.backbone.strides.values())
        each = len(self.anchors) // len(strides)
        return {
            f"stride{stride}": YoloHead(
                self.anchors,
                tuple(range(level * each, (level + 1) * each)),
                self.num_classes,
                stride,
                scale_xy=self.scale_xy,
                ignore_threshold=self.ignore_threshold,
                iou_threshold=self.iou_threshold,
                box_loss=self.box_loss,
                box_weight=self.box_weight,
                object_weight=self.object_weight,
                class_weight=self.class_weight,
            )
            for level, stride in reversed(list(enumerate(strides)))
        }

    @nn.compact
    def __call__(self, images: jax.Array, sizes: jax.Array | None = None, *, train: bool = False) -> dict[str, Any]:
        """Maps images to the raw outputs of the heads; see `GridDetector`."""
        backbone = self.backbone
        check_canvas(images, sizes, max(backbone.strides.values()))
        unit = darknet_unit(backbone, train)
        stages = backbone(images, train=train)
        outputs: dict[str, Any] = {}
        x = None
        for level, (stage, (name, head)) in enumerate(
            zip(reversed(list(backbone.strides)), self.heads.items(), strict=True)
        ):
            prefix = f"head{head.stride}"
            if x is None:
                x = stages[stage]
            else:
                x = unit(self.lateral_features[level - 1], (1, 1), padding=0, name=f"{prefix}_lateral")(x)
                x = jnp.concatenate([jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), stages[stage]], axis=-1)
            number = 0
            for features, size in self.necks[level]:
                if not features:
                    x = jnp.concatenate([*(darknet_max_pool(x, k, 1) for k in self.spp_sizes), x], axis=-1)
                    continue
                number += 1
                x = unit(features, (size, size), padding=size // 2, name=f"{prefix}_conv{number}")(x)
            y = unit(self.head_features[level], (3, 3), padding=1, name=f"{prefix}_conv{number + 1}")(x)
            outputs[name] = head_output(y, len(head.mask), self.num_classes, name=f"{prefix}_out", **backbone.dtypes)
        return outputs


_info: dict[str, Any] = {
    "task": "detection",
    "paper": "Redmon and Farhadi 2018, YOLOv3: An incremental improvement",
    "year": 2018,
    "input_size": (416, 416),
    "channels": 3,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}
_stages = {"stages": ("stage3", "stage4", "stage5")}
register(YoloV3, "yolo_v3", backbone=Darknet53Backbone, defaults=_stages, params=61_949_149, **_info)
register(
    YoloV3,
    "yolo_v3_spp",
    backbone=Darknet53Backbone,
    defaults=_stages | {"necks": SPP_NECKS},
    params=62_998_749,
    **_info,
)
register(
    YoloV3,
    "yolo_v3_tiny",
    backbone=DarknetBackbone,
    defaults={
        "stages": ("stage4", "stage5"),
        "convs": TINY_YOLO,
        "last_pool": True,
        "anchors": TINY_ANCHORS,
        "necks": TINY_NECKS,
        "head_features": (512, 256),
        "lateral_features": (128,),
    },
    params=8_852_366,
    **_info,
)
