r"""Trains and evaluates segmenters.

    python experiments/segment.py                                  # a small U-Net on drawn shapes
    python experiments/segment.py --dataset folder --data-dir FOLDER --recipe finetune --model unet_mobilenet_v2 \
        --backbone-model mobilenet_v2 --backbone-weights torchvision/IMAGENET1K_V1
    python experiments/segment.py --dataset folder --data-dir SLICES --recipe unet --model unet --channels 1 \
        --classes membrane cell --values 0:0 255:1 --train-split "all[:24]" --eval-split "all[24:]"
    python experiments/segment.py --dataset voc --data-dir VOC2012 --recipe deeplab --model deeplabv3_resnet50
    python experiments/segment.py --dataset voc --data-dir VOC2012 --size 500 500 --recipe fcn32s --model fcn32s_vgg16 \
        --backbone-model vgg16 --backbone-weights torchvision/IMAGENET1K_V1 --workdir FCN32S
    python experiments/segment.py --dataset voc --data-dir VOC2012 --size 500 500 --recipe fcn16s --model fcn16s_vgg16 \
        --weights FCN32S/weights.safetensors
    python experiments/segment.py --dataset oxford_iiit_pet --size 256 256

The first command needs no files and no GPU. With seed 0 it took 17 minutes of one CPU core, and reached a mean IoU of
0.831 on the 500 test images.

FOLDER holds `images` and `masks`, or the same in a folder for each split; see `flaxvision.data.load_segmentation`. At
the end, a run prints the metrics of each class, draws the best, middle and worst images in its work directory, and
writes `weights.safetensors` for `flaxvision predict`.

`--help --recipe NAME` shows the defaults of a recipe.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import segment_models
import tyro
from segment_recipes import RECIPES, Recipe

import flaxvision as fv

_LOSSES = {"dice": fv.losses.soft_dice, "lovasz": fv.losses.lovasz_softmax}
# Names of the splits train and val in other data sets.
_SPLITS = {
    "ade20k": {"train": "training", "val": "validation"},
    "oxford_iiit_pet": {"val": "test"},
    "cityscapes": {"val": "validation"},
    "scene_parse150": {"val": "test"},
}
_SHOWN = 4  # images in each picture of the results


@dataclasses.dataclass(frozen=True)
class Choice:
    """The flag that determines the defaults of the other flags."""

    recipe: str = "small"


@dataclasses.dataclass(frozen=True)
class Config(Recipe, fv.train.RunSettings):
    """Train, evaluate, checkpoint and resume. --recipe sets the defaults of the training settings."""

    recipe: Literal[tuple(RECIPES)] = "small"  # type: ignore[valid-type]
    """Recipe that sets the other defaults."""
    model: str = "small"
    """A registered segmenter, or small: unet_same with narrow stages."""
    dataset: str = "shapes"
    """shapes (drawn, needs no files), folder (images and masks), voc or ade20k (their layouts), or a TFDS name:
    oxford_iiit_pet, cityscapes or scene_parse150."""
    data_dir: str | None = None
    """Folder of the data set. For a TFDS name, the directory of prepared sets; default: the directory of TFDS."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "val"
    """Split to evaluate on during training. For val, the split validation is used, or test if the data set has none."""
    test_split: str | None = None
    """Split for the final metrics. Default: test for shapes, else --eval-split."""
    classes: tuple[str, ...] = ()
    """Class names. Default: the classes of the data set; for a folder, the lines of its classes.txt."""
    values: tuple[str, ...] = ()
    """Class of each mask value, as VALUE:CLASS; class 255 is unknown. Default: the table of the data set; for a folder,
    the values are the classes."""
    instances: bool = False
    """The masks hold instance numbers. Class 0 is the background, and class 1 the instances."""
    components: str | None = None
    """Class whose connected parts are compared as instances in the final metrics. Default: the class of --instances."""
    border_weights: bool = False
    """Weight pixels between close instances as in the U-Net paper; only with --instances and --loss cross_entropy."""
    channels: Literal[1, 3] = 3
    """Channels of the images: 3 for RGB, 1 for grey. Drawn shapes always have 3."""
    size: tuple[int, int] | None = None
    """Height and width to which images are resized and padded. Required if the images differ in size."""
    weights: str | None = None
    """Weights to start from: a published tag or a file. fcn16s_vgg16 can also start from a file of fcn32s_vgg16, and
    fcn8s_vgg16 from a file of either."""
    source: str | None = None
    """Library that wrote the file of --weights or --backbone-weights. Default: flaxvision."""
    backbone_model: str | None = None
    """A registered classifier with the backbone of the segmenter; only with --backbone-weights."""
    backbone_weights: str | None = None
    """Pretrained weights of --backbone-model for the backbone: a published tag or a file."""
    eval_only: bool = False
    """Only evaluate the model of --weights."""
    eval_batch_size: int = 16
    """Images per evaluation step over all devices. It is rounded up to a multiple of the number of devices."""
    tile: int | None = None
    """Side of the tiles of the final evaluation. Default: whole images."""
    overlap: int = 0
    """Pixels that neighbouring tiles share."""
    threads: int | None = None
    """Number of threads that read images. Default: one per processor, at most 16."""
    cache: bool = True
    """Keep the decoded images in memory."""


def parse(args: list[str] | None = None) -> Config:
    """Reads --recipe first, and then all flags, with the recipe as defaults."""
    args = sys.argv[1:] if args is None else args
    choice, _ = tyro.cli(Choice, args=[a for a in args if a not in ("-h", "--help")], return_unknown_args=True)
    name = choice.recipe if choice.recipe in RECIPES else "small"
    values: dict[str, Any] = dataclasses.asdict(RECIPES[name])
    return tyro.cli(Config, default=Config(recipe=name, **values), args=args, description=__doc__)


def main(config: Config) -> int:
    """Runs the experiment and returns the exit status of the process."""
    config.start()
    check(config)
    train, val, test = load(config)
    workdir = Path(
        config.workdir or f"runs/segment-{Path(config.dataset).name}-{config.model}-{config.recipe}-{config.seed}"
    )
    if config.eval_only:
        workdir.mkdir(parents=True, exist_ok=True)
    else:
        free = ("threads", "cache", "eval_batch_size", "eval_only", "tile", "overlap", "components")
        fv.train.open_workdir(workdir, config, free=(*config.FREE, *free))
    run = Run(config, train, val, test, workdir)
    return run.evaluate() if config.eval_only else run.train()


def check(config: Config) -> None:
    """Raises ValueError for settings that are out of range or contradict each other."""
    if config.model != "small" and fv.model_info(config.model).task != "segmentation":
        known = ", ".join(fv.list_models(task="segmentation"))
        raise ValueError(f"--model must be small or a segmenter ({known}); got {config.model!r}")
    if config.eval_only and not config.weights:
        raise ValueError("--weights FILE-OR-TAG must be given with --eval-only; got none")
    if bool(config.backbone_model) != bool(config.backbone_weights):
        raise ValueError("--backbone-model and --backbone-weights must be given together; got one of them")
    if config.components and config.instances:
        raise ValueError("--components must be left out with --instances, which has instances")
    if config.border_weights and not config.instances:
        raise ValueError("--border-weights must be left out without --instances")
    if config.border_weights and config.loss != "cross_entropy":
        raise ValueError(f"--border-weights must be used with --loss cross_entropy; got --loss {config.loss}")
    if not config.per_image and (config.parallel == "pmap" or config.accumulate > 1):
        raise ValueError("--per-image must be left on with --parallel pmap or --accumulate, which split the batch")
    for field in ("eval_every", "log_every", "eval_batch_size"):
        if not getattr(config, field) > 0:
            raise ValueError(f"--{field.replace('_', '-')} must be positive; got {getattr(config, field)}")


def load(config: Config):
    """Loads and checks the training, validation and test sources."""
    shapes = config.dataset == "shapes"
    test = config.test_split or ("test" if shapes else config.eval_split)
    options: dict[str, Any] = {"cache": config.cache}
    if not shapes:
        try:
            values = {int(a): int(b) for a, b in (pair.split(":") for pair in config.values)} or None
        except ValueError:
            raise ValueError(f"--values must be pairs VALUE:CLASS; got {' '.join(config.values)}") from None
        options |= {"data_dir": config.data_dir, "classes": config.classes or None, "values": values}
        options |= {"channels": config.channels, "size": config.size}
    options |= {"instances": config.instances} if config.instances else {}
    sources, own = [], _SPLITS.get(config.dataset.split("/")[0].split(":")[0], {})
    for i, split in enumerate((config.train_split, config.eval_split, test)):
        weight: dict[str, Any] = {"weight": fv.data.border_weights} if config.border_weights and i == 0 else {}
        source = fv.data.load_segmentation(config.dataset, own.get(split, split), **options, **weight)
        fv.data.validate(source, task="segmentation", num_classes=len(source.classes), verify=False)
        sources.append(source)
    if config.components and config.components not in sources[-1].classes:
        known = ", ".join(sources[-1].classes)
        raise ValueError(f"--components must be one of {known}; got {config.components!r}")
    return sources


class Run:
    """The parts of a run: data, model and compiled steps."""

    def __init__(self, config: Config, train, val, test, workdir: Path):
        self.config, self.workdir, self.classes = config, workdir, test.classes
        self.train_source, self.val, self.test = train, val, test
        self.channels = test[0]["image"].shape[-1]
        self.built = built = segment_models.build(config, len(self.classes), self.channels)
        self.model: Any = built.model
        self.train_step, self.eval_step = self._steps()
        self.find = jax.jit(partial(self._labels, tile=config.tile, overlap=config.overlap))

    def _steps(self):
        config, a = self.config, fv.data.augment
        chosen = (
            (config.elastic > 0, partial(a.random_elastic, sigma=config.elastic)),
            (config.scale != (1.0, 1.0), partial(a.random_scale, factors=config.scale)),
            (config.rotation > 0, partial(a.random_rotation, max_degrees=config.rotation)),
            (
                config.crop is not None or config.padding > 0,
                partial(a.random_crop, padding=config.padding, size=config.crop, mode="reflect"),
            ),
            (config.flip, a.random_flip),
            (config.vertical_flip, partial(a.random_flip, vertical=True)),
            (config.hue > 0, partial(a.random_hue, max_delta=config.hue)),
            (config.saturation > 0, partial(a.random_saturation, strength=config.saturation)),
            (config.brightness > 0, partial(a.random_brightness, max_delta=config.brightness)),
            (config.contrast > 0, partial(a.random_contrast, strength=config.contrast)),
        )
        ops = [op for wanted, op in chosen if wanted]
        self.view = a.make_transform(*ops)
        standardize = {"mean": self.built.mean, "std": self.built.std}
        self.eval_transform = a.make_transform(**standardize)
        return fv.train.compile_steps(
            fv.train.segmentation(loss=_loss(config.loss, config.per_image)),
            train_transform=a.make_transform(*ops, **standardize),
            eval_transform=self.eval_transform,
            accumulate=config.accumulate,
            use_ema=config.ema_decay is not None,
            **config.step_options,
        )

    def _labels(self, variables, images, **options):
        images = self.eval_transform(jax.random.key(0), {"image": images})["image"]
        return fv.segment(self.model, variables, images, **options)

    def create_state(self, learning_rate, rng) -> fv.train.TrainState:
        """Creates the train state, with newly initialized variables or those of the weights."""
        height, width = self.config.crop or self.train_source[0]["image"].shape[:2]
        sample = jax.ShapeDtypeStruct((1, height, width, self.channels), jnp.float32)
        config = self.config
        tx = config.make_optimizer(learning_rate)
        return fv.train.create_state(
            self.model, tx, rng, sample, variables=self.built.variables, ema_decay=config.ema_decay
        )

    def train(self) -> int:
        """Trains, evaluates and saves the model."""
        config = self.config
        batches = fv.data.train_batches(
            self.train_source, config.batch_size, seed=config.seed, num_threads=config.threads
        )
        init_rng, run_rng = jax.random.split(jax.random.key(config.seed))
        rate = config.learning_rate_schedule(batches.steps_per_epoch)
        options: dict[str, Any] = config.fit_options(config.model)
        options |= {"best_metric": "segmentation_mean_iou", "best_mode": "max"}
        size = fv.train.eval_batch_size(config.eval_batch_size)
        evaluated = fv.data.eval_batches(self.val, size, num_threads=config.threads)
        self._draw_samples(batches, run_rng)
        result = fv.train.fit_in_workdir(
            self.workdir,
            self.create_state(rate, init_rng),
            self.train_step,
            batches,
            model=self.built.name,
            overrides=self.built.overrides,
            num_steps=config.num_steps(batches.steps_per_epoch),
            rng=run_rng,
            evaluate=fv.train.Evaluation(self.eval_step, evaluated, config.input_timeout),
            eval_every=max(1, round(config.eval_every * batches.steps_per_epoch)),
            learning_rate=rate,
            **options,
        )
        if result.exit_status is not None:
            return result.exit_status
        variables = fv.train.collect(result.state.variables if config.ema_decay is None else result.state.ema)
        figures = self.report(variables)
        if jax.process_index() == 0:
            records = fv.train.read_records(self.workdir / "metrics.jsonl")
            names, path = ["loss", "accuracy", "segmentation_mean_iou"], self.workdir / "curves.png"
            fv.plot.curves(records, path=path, steps_per_epoch=batches.steps_per_epoch, metrics=names)
            preprocessing = {"crop": None, "resize": None, "mean": self.built.mean, "std": self.built.std}
            if self.channels == 1:
                preprocessing["order"] = "L"
            fv.weights.save(
                self.workdir / "weights.safetensors",
                variables,
                name=self.built.name,
                channels=self.channels,
                class_names=self.classes,
                metadata={**figures, "preprocessing": preprocessing},
                **{k: v for k, v in self.built.overrides.items() if k not in ("dtype", "ghost_size")},
            )
            print(f"see {self.workdir}; tensorboard --logdir {self.workdir / 'tensorboard'}")
        return 0

    def evaluate(self) -> int:
        """Evaluates the model of --weights."""
        self.report(self.built.variables)
        return 0

    def report(self, variables) -> dict[str, float]:
        """Labels the test images one by one, prints the metrics of each class, and draws images."""
        config = self.config
        counts, instances = [], []
        part = self.classes.index(config.components) if config.components else 1 if config.instances else None
        labels_of = lambda image: np.asarray(self.find(variables, image[None]))[0]
        for i in range(len(self.test)):
            example = self.test[i]
            found = labels_of(example["image"])
            matrix = fv.metrics.ConfusionMatrix.init(len(self.classes)).update(found, example["label"])
            counts.append(np.asarray(matrix.counts, np.int64))
            if part is not None:
                truth, parts = (fv.metrics.label_components(x == part) for x in (example["label"], found))
                truth = example["instances"] if config.instances else truth
                instances.append(fv.metrics.InstanceRecords.of(parts, truth, index=np.array([i])))
        records = fv.metrics.SegmentationRecords(np.stack(counts), np.arange(len(counts)))
        figures = records.compute()
        low, high = records.bootstrap("mean_iou")
        if jax.process_index() != 0:
            return figures
        print(f"{self.test.name}: {len(records)} images")
        print(f"{'class':16} {'pixels':>10} {'accuracy':>9} {'IoU':>7} {'Dice':>7}")
        table = records.per_class(self.classes)
        for row in table:
            print(
                f"{row['name'][:16]:16} {row['pixels']:10} {row['accuracy']:9.3f} {row['iou']:7.3f} {row['dice']:7.3f}"
            )
        print(
            f"mean IoU {figures['mean_iou']:.3f} (95 % bootstrap interval {low:.3f} to {high:.3f}), accuracy"
            f" {figures['accuracy']:.3f}, Dice {figures['dice']:.3f}"
        )
        results = {**figures, "mean_iou_low": low, "mean_iou_high": high, "classes": table}
        if instances:
            results |= _instances(instances)
        (self.workdir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        order = np.argsort(records.per_image())
        middle = max(0, (len(order) - _SHOWN) // 2)
        for name, chosen in (
            ("worst", order[:_SHOWN]),
            ("middle", order[middle : middle + _SHOWN]),
            ("best", order[-_SHOWN:]),
        ):
            examples = [self.test[int(i)] for i in chosen]
            fv.plot.overlays(
                [_picture(example["image"]) for example in examples],
                [labels_of(example["image"]) for example in examples],
                [example["label"] for example in examples],
                self.classes,
                background=0,
                columns=1,
                path=self.workdir / f"{name}.png",
            )
        fv.plot.confusion_matrix(records.matrix.counts, self.classes, path=self.workdir / "confusion.png")
        return figures

    def _draw_samples(self, batches, rng) -> None:
        """Draws augmented training images with their labels."""
        if jax.process_index() != 0:
            return
        with batches.from_step(0) as iterator:
            first = {key: value[: 2 * _SHOWN] for key, value in next(iterator).items()}
        made = jax.device_get(jax.jit(self.view)(rng, first))
        images = [_picture(image) for image in made["image"]]
        path = self.workdir / "samples.png"
        fv.plot.overlays(images, list(made["label"]), None, self.classes, background=0, columns=4, path=path)


def _instances(records: list[fv.metrics.InstanceRecords]) -> dict[str, float]:
    """Prints the metrics of instances and returns them."""
    figures = reduce(fv.metrics.InstanceRecords.merge, records).compute()
    print(
        f"adapted Rand error {figures['rand_error']:.3f}, variation of information {figures['vi']:.3f} bits,"
        f" panoptic quality {figures['pq']:.3f},"
        f" {figures['separated']:.0f} of {figures['touching']:.0f} touching pairs separated"
    )
    return figures


def _loss(name: str, per_image: bool):
    """Returns the loss of each image for `train.segmentation`, or None for the cross-entropy."""
    if name == "cross_entropy":
        return None

    def loss(logits, labels):
        known = (labels != fv.losses.IGNORED).sum((1, 2))
        mean = lambda values: values.sum((1, 2)) / jnp.maximum(known, 1)
        if name == "focal":
            return mean(fv.losses.focal(logits, labels))
        return mean(fv.losses.pixel_cross_entropy(logits, labels)) + _LOSSES[name](logits, labels, per_image=per_image)

    return loss


def _picture(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.shape[-1] == 1 else image


if __name__ == "__main__":
    fv.train.run_experiment(main, parse)
