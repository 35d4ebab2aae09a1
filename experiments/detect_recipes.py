"""The recipes of `detect.py`, one for each family of detectors, and the default splits of the data sets."""

from __future__ import annotations

import dataclasses

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Recipe(fv.train.Recipe):
    """A training recipe with canvases and augmentations. Threads read and resize images; the device augments them."""

    canvases: tuple[str, ...] = ("416",)
    """Canvas sizes, to which images are resized and padded: SIDE or HEIGHTxWIDTH. The steps compile once for each."""
    eval_canvases: tuple[str, ...] = ()
    """Canvas sizes in evaluation. Default: those of training, or with --multiscale the largest one."""
    shorter: int | None = None
    """Length to which the shorter side is resized. Default: images fill their canvas."""
    longer: int | None = None
    """Maximum length of the longer side, with --shorter. Alone: length to which it is resized."""
    resize: bool = True
    """Resize images. If off, only images that are larger than every canvas are resized."""
    multiscale: int | None = None
    """Multi-scale training: steps after which a new canvas is drawn for all images. Default: off."""
    flip: bool = True
    """Augmentation: random horizontal flips."""
    vertical_flip: bool = False
    """Augmentation: random vertical flips."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Augmentation: lowest and highest factor of random resizing."""
    iou_crop: bool = False
    """Augmentation: random crops that overlap an object, as in SSD."""
    expand: float = 1.0
    """Augmentation: largest factor by which half of the images are shrunk onto an empty image, as in SSD."""
    mosaic: float = 0.0
    """Augmentation: probability that an image is combined with three others (mosaic)."""
    hue: float = 0.0
    """Augmentation: maximum shift of the hue, as a fraction of the colour circle."""
    saturation: float = 0.0
    """Augmentation: maximum relative change of the saturation."""
    brightness: float = 0.0
    """Augmentation: maximum change of the brightness."""
    padding: float = 0.0
    """Value of the padding after normalization."""
    frozen_stages: int = 0
    """Stages of the backbone, from the image on, that stay as they are if it starts from weights."""
    anchors: int = 0
    """YOLO: number of anchors to compute from the boxes by k-means. 0: the anchors of the model."""
    score_threshold: float = 0.01
    """Minimum score of a detection in evaluation."""
    iou_threshold: float = 0.5
    """IoU above which a detection suppresses others of its class (NMS)."""


_SIDES = tuple(str(side) for side in range(320, 609, 32))
RECIPES = {
    # darknet's yolov3.cfg: 500,200 steps of 64 images are 273 epochs of COCO.
    "yolo_v3": Recipe(
        epochs=273.0, batch_size=64, learning_rate=1e-3, boundaries=(0.8, 0.9), warmup_epochs=0.55, weight_decay=5e-4,
        canvases=_SIDES, eval_canvases=("416",), multiscale=10, zoom=(0.7, 1.4), hue=0.1, saturation=0.5,
        brightness=0.2, padding=0.5,
    ),
    # Redmon and Farhadi 2017, section 2: 160 epochs, learning rate divided by 10 at 60 and 90.
    "yolo_v2": Recipe(
        epochs=160.0, batch_size=64, learning_rate=1e-3, boundaries=(60 / 160, 90 / 160), warmup_epochs=1.0,
        weight_decay=5e-4, canvases=_SIDES, eval_canvases=("416",), multiscale=10, zoom=(0.7, 1.4), hue=0.1,
        saturation=0.5, brightness=0.2, padding=0.5,
    ),
    # torchvision's recipe for Faster R-CNN on COCO: 26 epochs of 16 images, with 1,000 steps of warm-up. It trains
    # three stages of a trained backbone.
    "faster_rcnn": Recipe(
        epochs=26.0, batch_size=16, learning_rate=0.02, boundaries=(16 / 26, 22 / 26), warmup_epochs=0.14,
        weight_decay=1e-4, canvases=("800x1344", "1344x800"), shorter=800, longer=1333, score_threshold=0.05,
        frozen_stages=2,
    ),
    # Fine-tuning on small data sets, from pretrained weights.
    "finetune": Recipe(
        epochs=80.0, batch_size=16, optimizer="adamw", learning_rate=1e-3, schedule="cosine", warmup_epochs=2.0,
        weight_decay=5e-4, clip_norm=10.0, canvases=("416",), zoom=(0.7, 1.4), hue=0.02, saturation=0.3,
        brightness=0.15, padding=0.5, ema_decay=0.995,
    ),
    # Training from scratch on the drawn shapes and other small data sets.
    "small": Recipe(
        epochs=16.0, batch_size=16, optimizer="adamw", learning_rate=3e-3, schedule="cosine", warmup_epochs=0.4,
        weight_decay=1e-4, clip_norm=10.0, canvases=("96",), resize=False, padding=0.5, anchors=2, ema_decay=0.998,
    ),
}  # fmt: skip
# The first pattern that matches the name of a model selects its recipe.
FAMILIES = {"*.cfg": "finetune", "*_rcnn_*": "faster_rcnn", "yolo_v2*": "yolo_v2", "*": "yolo_v3"}
# The default model: YOLOv3 with heads of stride 8 and 16, narrow and shallow.
SMALL = {
    "convs": (((12, 3),), ((24, 3),), ((32, 3), (32, 3)), ((64, 3), (64, 3)), ((96, 3), (96, 3))),
    "stages": ("stage3", "stage4"),
    "last_pool": False,
    "necks": (((64, 1),), ()),
    "head_features": (128, 96),
    "lateral_features": (48,),
    "ignore_threshold": 0.7,
    "iou_threshold": 0.6,
    "class_weight": 2.0,
}
_USUAL = ("train", "val", "test")
SPLITS = {
    "shapes": _USUAL,
    "voc_xml": _USUAL,
    "yolo": ("train", "val", None),
    "instances": ("train", "val", None),
    "coco": ("train2017", "val2017", None),
}
