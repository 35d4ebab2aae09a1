"""The recipes of `imagenet.py`, one for each family of models."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Recipe(fv.train.Recipe):
    """A recipe with its augmentations. Threads decode and crop the images, the device does the rest."""

    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""
    aux_weight: float = 0.3
    """Weight of the loss of each auxiliary classifier, in models that have them; 0 builds none."""
    size: int | None = None
    """Height and width of a training crop. Default: the published input size of the model."""
    crop: Literal["resized", "scaled"] = "resized"
    """resized: resize a part of random position and shape. scaled: resize the shorter side, then crop."""
    area: tuple[float, float] = (0.08, 1.0)
    """Lowest and highest share of the image in a resized crop."""
    shorter: tuple[int, int] = (256, 256)
    """Lowest and highest length of the shorter side for a scaled crop."""
    flip: bool = True
    """Augmentation: mirror left and right."""
    lighting: float = 0.0
    """Augmentation: standard deviation of AlexNet's colour shift along the principal components."""
    mixup: float = 0.0
    """Augmentation: alpha of mixup."""
    cutmix: float = 0.0
    """Augmentation: alpha of cutmix; with mixup too, each batch uses one of the two."""
    eval_size: int | None = None
    """Height and width of the centre crop in evaluation. Default: the published input size of the model."""
    eval_shorter: int | None = None
    """Length of the shorter side before the centre crop. Default: 8/7 of the crop."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("size", "eval_size", "eval_shorter"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} must be at least 1; got {value}")
        for field in ("aux_weight", "lighting", "mixup", "cutmix"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must not be negative; got {getattr(self, field)}")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area must be two fractions with 0 < low <= high <= 1; got {self.area}")
        if not 0 < self.shorter[0] <= self.shorter[1]:
            raise ValueError(f"shorter must be two lengths with 1 <= low <= high; got {self.shorter}")


def every(epochs: int, total: int) -> tuple[float, ...]:
    """Returns boundaries every `epochs` epochs of a run of `total` epochs."""
    return tuple(e / total for e in range(epochs, total, epochs))


RECIPES = {
    # Goyal 2017, section 5.1: 90 epochs, a learning rate of 0.1 per 256 images, and the crops of GoogLeNet.
    "resnet": Recipe(),
    # The same for large batches, with warm-up and a cosine schedule (He 2019, section 5.1, trains for 120 epochs).
    "resnet_cosine": Recipe(batch_size=1024, learning_rate=0.4, schedule="cosine", warmup_epochs=5.0),
    # torchvision's recipe of 2021 (IMAGENET1K_V2) without TrivialAugment, random erasing and repeated augmentation.
    # torchvision updates its average every 32 steps with weight 2e-5 * 1024 * 32 / 600; this is the same per step.
    "long": Recipe(
        epochs=600.0, batch_size=1024, learning_rate=0.5, schedule="cosine", warmup_epochs=5.0, weight_decay=2e-5,
        label_smoothing=0.1, mixup=0.2, cutmix=1.0, ema_decay=0.999966, size=176, eval_size=224, eval_shorter=232,
    ),
    # Krizhevsky 2012, sections 4.1 and 5. The authors lowered the learning rate by hand, three times in 90 epochs.
    "alexnet": Recipe(
        batch_size=128, learning_rate=0.01, weight_decay=5e-4, crop="scaled", lighting=0.1, eval_shorter=256
    ),
    # Simonyan 2014, section 3.1: 74 epochs with scale jittering. The learning rate was lowered by hand three times.
    "vgg": Recipe(epochs=74.0, learning_rate=0.01, weight_decay=5e-4, crop="scaled", shorter=(256, 512), lighting=0.1),
    # Szegedy 2014, section 6: the learning rate falls by 4 % every 8 epochs. The rest is from Caffe's bvlc_googlenet.
    "googlenet": Recipe(
        epochs=250.0, batch_size=32, learning_rate=0.01, boundaries=every(8, 250), factor=0.96, weight_decay=2e-4
    ),
    # Szegedy 2015, section 8: RMSprop. Its 50 replicas of 32 images make one batch here. Weight decay and momentum are
    # those of TF-Slim, which weights the auxiliary classifier by 0.4.
    "inception": Recipe(
        epochs=100.0, batch_size=1600, optimizer="rmsprop", learning_rate=0.045, boundaries=every(2, 100), factor=0.94,
        epsilon=1.0, weight_decay=4e-5, clip_norm=2.0, label_smoothing=0.1, ema_decay=0.9999,
    ),
    # Chollet 2016, section 4.3, which gives neither the batch size nor the number of epochs.
    "xception": Recipe(
        epochs=100.0, learning_rate=0.045, boundaries=every(2, 100), factor=0.94, weight_decay=1e-5, ema_decay=0.9999,
    ),
    # Hu 2017, section 5: the learning rate is divided by 10 every 30 epochs.
    "senet": Recipe(epochs=100.0, batch_size=1024, learning_rate=0.6, boundaries=(0.3, 0.6, 0.9)),
    # The solver of Iandola 2016: 170,000 steps of 512 images; the learning rate falls linearly.
    "squeezenet": Recipe(epochs=68.0, batch_size=512, learning_rate=0.04, schedule="polynomial", weight_decay=2e-4),
    # torchvision's recipe for MobileNetV2: the learning rate falls by 2 % every epoch.
    "mobilenet": Recipe(epochs=300.0, learning_rate=0.045, boundaries=every(1, 300), factor=0.98, weight_decay=4e-5),
    # For the drawn patterns, which only show that the program runs.
    "demo": Recipe(
        epochs=2.0, batch_size=32, optimizer="nesterov", learning_rate=0.05, schedule="one_cycle", area=(0.35, 1.0),
        aux_weight=0.0,
    ),
}  # fmt: skip
# The first pattern that matches the name of a model gives its recipe.
FAMILIES = {
    "alexnet*": "alexnet", "zfnet*": "alexnet", "vgg*": "vgg", "googlenet*": "googlenet", "*inception*": "inception",
    "xception*": "xception", "se_*": "senet", "senet*": "senet", "squeezenet*": "squeezenet", "mobilenet*": "mobilenet",
    "*": "resnet",
}  # fmt: skip
# Image sizes for the drawn patterns: the smallest that each family takes without auxiliary classifiers.
DEMO_SIZES = {"alexnet_dli": 200, "alexnet*": 64, "zfnet*": 64, "*inception*": 80, "lenet5*": 32, "*": 48}
