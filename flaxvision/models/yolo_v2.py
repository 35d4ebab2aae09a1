"""YOLOv2 and its tiny version.

J. Redmon, A. Farhadi, "YOLO9000: Better, faster, stronger", CVPR 2017, section 2. The definitions are those of
darknet's `yolov2-voc.cfg`, `yolov2.cfg` (COCO), `yolov2-tiny-voc.cfg` and `yolov2-tiny.cfg`. They differ from the paper
in the passthrough layer. A 1x1 convolution to 64 channels precedes it, and it moves pixels to channels in an unusual
order (`layers.darknet.reorg`), whereas the paper describes stacking adjacent features.

The defaults are those for VOC. The networks for COCO need `num_classes=80, anchors=COCO_ANCHORS`. The tiny network for
COCO also needs `head_features=(512,)` and was trained with `rescore=False`. darknet's `.weights` files do not contain
the anchors. For a file with 80 classes, `weights.load_model` uses those of COCO, and `weights.load` requires them.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers.darknet import reorg
from flaxvision.models.backbone import Backbone
from flaxvision.models.darknet import TINY_YOLO, DarknetBackbone, darknet_unit
from flaxvision.models.grid_detector import GridDetector, check_canvas, head_output
from flaxvision.models.yolo_heads import Anchors, RegionHead
from flaxvision.registry import register

# Width and height in cells, computed by k-means on VOC 2007 + 2012 and on COCO.
VOC_ANCHORS: Anchors = (
    (1.3221, 1.73145),
    (3.19275, 4.00944),
    (5.05587, 8.09892),
    (9.47112, 4.84053),
    (11.2364, 10.0071),
)
COCO_ANCHORS: Anchors = (
    (0.57273, 0.677385),
    (1.87446, 2.06253),
    (3.33843, 5.47434),
    (7.88282, 3.52778),
    (9.77052, 9.16828),
)
TINY_VOC_ANCHORS: Anchors = ((1.08, 1.19), (3.42, 4.41), (6.63, 11.38), (9.42, 5.11), (16.62, 10.52))


class YoloV2(GridDetector):
    """YOLOv2: 3x3 convolutions on the last stage of a backbone, with a passthrough layer from the stage before.

    The height and width of the canvas must be multiples of the stride of the last stage, which is 32 by default.

    Attributes:
        backbone: Maps images to stages. The last two are used, or only the last one without a passthrough layer.
        num_classes: Number of classes.
        anchors: Width and height of the anchors, in cells. They do not depend on `num_classes`.
        head_features: Channels of the 3x3 convolutions. The output of the passthrough layer is concatenated before the
            last one.
        passthrough_features: Channels of the 1x1 convolution before the passthrough layer; 0 for no passthrough layer.
        match_anchors: As in `RegionHead`; so are the following fields.
        rescore: Whether the target objectness of a positive is its IoU with the ground-truth box. If False, it is 1.
        ignore_threshold: IoU with a ground-truth box above which a negative is left out of the objectness loss.
        coord_scale: Weight of the box loss.
        object_scale: Weight of the objectness loss of positives.
        noobject_scale: Weight of the objectness loss of negatives.
        class_scale: Weight of the class loss.
        prior_images: Length of the warm-up in images; see `RegionHead` and `GridDetector`.
        prior_scale: Weight of the warm-up loss.
    """

    backbone: Backbone
    num_classes: int = 20
    anchors: Anchors = VOC_ANCHORS
    head_features: tuple[int, ...] = (1024, 1024, 1024)
    passthrough_features: int = 64
    match_anchors: bool = True
    rescore: bool = True
    ignore_threshold: float = 0.6
    coord_scale: float = 1.0
    object_scale: float = 5.0
    noobject_scale: float = 1.0
    class_scale: float = 1.0
    prior_images: int = 12800
    prior_scale: float = 0.01

    @property
    def heads(self) -> dict[str, RegionHead]:
        """The head. Its raw output is named after the stride, `stride32` by default."""
        stride = list(self.backbone.strides.values())[-1]
        head = RegionHead(
            self.anchors,
            self.num_classes,
            stride,
            match_anchors=self.match_anchors,
            rescore=self.rescore,
            ignore_threshold=self.ignore_threshold,
            coord_scale=self.coord_scale,
            object_scale=self.object_scale,
            noobject_scale=self.noobject_scale,
            class_scale=self.class_scale,
            prior_images=self.prior_images,
            prior_scale=self.prior_scale,
        )
        return {f"stride{stride}": head}

    @nn.compact
    def __call__(self, images: jax.Array, sizes: jax.Array | None = None, *, train: bool = False) -> dict[str, Any]:
        """Maps images to the raw output of the head; see `GridDetector`."""
        ((name, head),) = self.heads.items()
        check_canvas(images, sizes, head.stride)
        backbone = self.backbone
        unit = darknet_unit(backbone, train)
        stages = list(backbone.strides)
        features = backbone(images, train=train)
        x = features[stages[-1]]
        for number, channels in enumerate(self.head_features, start=1):
            if number == len(self.head_features) and self.passthrough_features:
                y = unit(self.passthrough_features, (1, 1), padding=0, name="passthrough")(features[stages[-2]])
                x = jnp.concatenate([reorg(y, y.shape[1] // x.shape[1]), x], axis=-1)
            x = unit(channels, (3, 3), padding=1, name=f"head_conv{number}")(x)
        return {name: head_output(x, len(head.anchors), self.num_classes, name="head_out", **backbone.dtypes)}


_info: dict[str, Any] = {
    "task": "detection",
    "paper": "Redmon and Farhadi 2017, YOLO9000: Better, faster, stronger",
    "year": 2017,
    "input_size": (416, 416),
    "channels": 3,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}
register(
    YoloV2,
    "yolo_v2",
    backbone=DarknetBackbone,
    defaults={"stages": ("stage4", "stage5")},
    params=50_655_389,
    **_info,
)
register(
    YoloV2,
    "yolo_v2_tiny",
    backbone=DarknetBackbone,
    defaults={
        "stages": ("stage5",),
        "convs": TINY_YOLO,
        "last_pool": True,
        "anchors": TINY_VOC_ANCHORS,
        "head_features": (1024,),
        "passthrough_features": 0,
    },
    params=15_861_773,
    **_info,
)
