r"""Trains and evaluates detectors that predict the mask of each object.

    python experiments/instance.py                                 # a small Mask R-CNN on drawn shapes
    python experiments/instance.py --dataset instances --data-dir FOLDER --canvases 256 --batch-size 4
    python experiments/instance.py --dataset coco --data-dir FOLDER --model mask_rcnn_resnet50_fpn

The first command needs no files and no GPU. The flags, the pictures and the files of a run
are the same as for `detect.py`.

For `--dataset coco`, FOLDER has the layout of COCO with its JSON files. For `--dataset instances`, it holds `images`
and `masks`. The values of the masks are instance numbers; see `flaxvision.data.load_detection`.

The best checkpoint is the one with the highest COCO AP50 of the masks. During training, masks are compared at the
resolution of the canvas. At the end of a run, they are compared in pixels of the original images.

`--help --model NAME` shows the defaults of a recipe.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, ClassVar, Literal

import detect
import detect_models
import tyro
from detect_recipes import RECIPES as OF_DETECTION

import flaxvision as fv

RECIPES = {
    # Training from scratch on the drawn shapes and other small data sets.
    "small": dataclasses.replace(OF_DETECTION["small"], anchors=0, padding=0.0, zoom=(0.8, 1.25)),
    # He et al. 2017 use the recipe of Faster R-CNN; so does torchvision.
    "mask_rcnn": OF_DETECTION["faster_rcnn"],
}
# The default model: narrow stages, a pyramid of four levels, and few proposals.
SMALL = {
    "stage_sizes": (1, 1, 1),
    "features": (24, 48, 96),
    "bottleneck": False,
    "stages": ("stage1", "stage2", "stage3"),
    "batch_norm": "sync",
    "epsilon": 1e-5,
    "fpn_features": 48,
    "head_features": 128,
    "mask_features": (32, 32),
    "anchor_sizes": ((10, 14), (20, 28), (40, 56), (80, 112)),
    "aspect_ratios": (1.0,),
    "rpn_pre_nms_train": 300,
    "rpn_pre_nms_eval": 300,
    "rpn_post_nms_train": 200,
    "rpn_post_nms_eval": 200,
    "rpn_sample_size": 128,
    "box_sample_size": 64,
}


@dataclasses.dataclass(frozen=True)
class Config(detect.Config):
    """Train, evaluate, checkpoint and resume. --recipe sets the defaults of the training settings."""

    SMALL: ClassVar[tuple[str, dict[str, Any]]] = ("mask_rcnn_resnet50_fpn", SMALL)

    recipe: Literal[tuple(RECIPES)] = "small"  # type: ignore[valid-type]
    """Recipe that sets the other defaults. Default: small for the model small, else mask_rcnn."""
    model: str = "small"
    """A registered detector with masks, or small: a Mask R-CNN with a narrow backbone."""
    dataset: Literal["shapes", "instances", "coco"] = "shapes"
    """shapes (drawn, needs no files), instances (images and maps of instances), or coco."""


def parse(args: list[str] | None = None) -> Config:
    """Reads --recipe and --model first, and then all flags, with the recipe as defaults."""
    args = sys.argv[1:] if args is None else args
    choice, _ = tyro.cli(detect.Choice, args=[a for a in args if a not in ("-h", "--help")], return_unknown_args=True)
    usual = "small" if choice.model == "small" else "mask_rcnn"
    recipe = choice.recipe if choice.recipe in RECIPES else usual
    values: dict[str, Any] = dataclasses.asdict(RECIPES[recipe])
    return tyro.cli(Config, default=Config(recipe=recipe, **values), args=args, description=__doc__)


def main(config: Config) -> int:
    """Runs the experiment and returns the exit status of the process."""
    if detect_models.is_cfg(config.model) or not detect_models.has_masks(config):
        known = ", ".join(name for name in fv.list_models(task="detection") if name.startswith("mask"))
        raise ValueError(f"--model must be small or a detector with masks ({known}); got {config.model!r}")
    return detect.main(config)


if __name__ == "__main__":
    fv.train.run_experiment(main, parse)
