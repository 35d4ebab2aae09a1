"""The recipes of `segment.py`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Recipe(fv.train.Recipe):
    """A training recipe with augmentations. Crops and their padding are computed on the device."""

    crop: tuple[int, int] | None = None
    """Height and width of random crops for training. Default: whole images."""
    padding: int = 0
    """Pixels by which images are mirrored on all sides before the crop. The labels of these pixels are unknown."""
    flip: bool = True
    """Augmentation: random horizontal flips."""
    vertical_flip: bool = False
    """Augmentation: random vertical flips."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Augmentation: lowest and highest factor of random resizing."""
    rotation: float = 0.0
    """Augmentation: maximum angle of random rotations in degrees."""
    elastic: float = 0.0
    """Augmentation: standard deviation in pixels of random elastic deformations, as in the U-Net paper."""
    hue: float = 0.0
    """Augmentation: maximum shift of the hue, as a fraction of the colour circle."""
    saturation: float = 0.0
    """Augmentation: maximum relative change of the saturation."""
    brightness: float = 0.0
    """Augmentation: maximum change of the brightness."""
    contrast: float = 0.0
    """Augmentation: maximum relative change of the contrast."""
    loss: Literal["cross_entropy", "dice", "lovasz", "focal"] = "cross_entropy"
    """Loss. dice and lovasz are added to the cross-entropy."""
    per_image: bool = True
    """Compute dice and lovasz for each image; with --no-per-image, for the whole batch."""
    aux_heads: bool = False
    """Train the auxiliary head of the model, if it has one."""


# Shelhamer et al. 2017: FCN-32s starts from VGG-16, FCN-16s from FCN-32s, and FCN-8s from FCN-16s. Each of the latter
# two lowers the learning rate by a factor of 100 (section 4.2). Training is SGD on single whole images with a momentum
# of 0.99, no augmentation (section 4.3) and fixed bilinear upsampling. The authors' released solvers take 100,000 steps
# on 8,498 images. They sum the loss over the pixels, with a learning rate of 1e-10 and a weight decay of 5e-4. Here the
# loss is the mean over the pixels. For the same steps, the learning rate is multiplied by the number of pixels, and the
# weight decay is divided by it. The authors double the learning rate of biases; this recipe does not.
_PIXELS = 375 * 500
_FCN = Recipe(
    epochs=12.0, batch_size=1, optimizer="momentum", momentum=0.99, learning_rate=1e-10 * _PIXELS, schedule="constant",
    weight_decay=5e-4 / _PIXELS, flip=False, frozen=("upsample*",),
)  # fmt: skip
RECIPES = {
    # The small model from scratch.
    "small": Recipe(
        epochs=10.0, batch_size=8, optimizer="adamw", learning_rate=2e-3, schedule="cosine", warmup_epochs=0.4,
        weight_decay=1e-4, clip_norm=10.0, vertical_flip=True, loss="dice", ema_decay=0.99,
    ),
    # Ronneberger et al. 2015, section 3: one large tile per step, momentum 0.99, elastic deformations. The paper gives
    # no learning rate.
    "unet": Recipe(
        epochs=60.0, batch_size=1, optimizer="momentum", momentum=0.99, learning_rate=1e-3, schedule="cosine",
        weight_decay=0.0, crop=(572, 572), padding=92, vertical_flip=True, rotation=15.0, elastic=10.0,
    ),
    # From the weights of a trained backbone.
    "finetune": Recipe(
        epochs=40.0, batch_size=8, optimizer="adamw", learning_rate=1e-3, schedule="cosine", warmup_epochs=1.0,
        weight_decay=1e-3, clip_norm=10.0, scale=(0.75, 1.5), hue=0.02, saturation=0.3, brightness=0.15, contrast=0.2,
        ema_decay=0.99,
    ),
    # torchvision's reference for segmentation: 30 epochs of 32 crops of 480 pixels, SGD with a polynomial schedule.
    "deeplab": Recipe(
        epochs=30.0, batch_size=32, optimizer="momentum", learning_rate=0.02, schedule="polynomial", power=0.9,
        weight_decay=1e-4, crop=(480, 480), scale=(0.5, 2.0), aux_heads=True,
    ),
    "fcn32s": _FCN,
    "fcn16s": dataclasses.replace(_FCN, learning_rate=1e-12 * _PIXELS),
    "fcn8s": dataclasses.replace(_FCN, learning_rate=1e-14 * _PIXELS),
}  # fmt: skip
# The default model: a U-Net with narrow stages, especially the first.
SMALL = {"features": (8, 24, 64, 96, 128), "decoder_features": (96, 64, 24, 8)}
