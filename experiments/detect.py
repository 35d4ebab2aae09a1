r"""Trains and evaluates detectors, with the recipe of their family.

    python experiments/detect.py                                   # a small YOLOv3 on drawn shapes
    python experiments/detect.py --dataset voc_xml --data-dir FOLDER --model yolo_v3_tiny
    python experiments/detect.py --dataset coco --data-dir FOLDER --model faster_rcnn_resnet50_fpn
    python experiments/detect.py --dataset yolo --data-dir FOLDER --model yolo_v2 --weights FILE --source darknet
    python experiments/detect.py --dataset yolo --data-dir FOLDER --model NAME.cfg --weights NAME.weights

`instance.py` trains detectors that also predict masks.

The first command needs no files and no GPU. With seed 0 it took 6 minutes on 2 shared CPU cores, and reached an AP50
(average precision at an IoU of 0.5) of 0.923 on the 500 test images.

FOLDER has the layout of PASCAL VOC, COCO or YOLO. For `--dataset coco` it can also be a TFDS directory. Batch sizes and
learning rates are those of the papers. If you change --batch-size, scale --learning-rate too.

The best checkpoint is the one with the highest COCO AP50, or on PASCAL VOC (`voc_xml` and `voc/...`) the one with the
highest VOC mAP, which leaves out difficult objects.

At the end, a run prints the metrics of each class and draws pictures in its work directory. For
`flaxvision predict`, it writes `weights.safetensors`, or with a .cfg file `model.cfg`, `model.weights` and
`classes.names`.

`--help --model NAME --dataset NAME` shows the defaults of a recipe.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import detect_models
import detect_report
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from detect_recipes import FAMILIES, RECIPES, SMALL, SPLITS, Recipe

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Choice:
    """Flags that determine the defaults of the other flags."""

    recipe: str | None = None
    model: str = "small"
    dataset: str = "shapes"


@dataclasses.dataclass(frozen=True)
class Config(Recipe, fv.train.RunSettings):
    """Train, evaluate, checkpoint and resume. --recipe sets the defaults of the training settings."""

    SMALL: ClassVar[tuple[str, dict[str, Any]]] = ("yolo_v3_tiny", SMALL)  # the model of `--model small`

    recipe: Literal[tuple(RECIPES)] = "small"  # type: ignore[valid-type]
    """Recipe that sets the other defaults. Default: the recipe of the model's family."""
    model: str = "small"
    """A registered detector, a .cfg file of darknet, or small: a YOLOv3 with a narrow backbone."""
    dataset: str = "shapes"
    """shapes (drawn, needs no files), voc_xml, coco, yolo, instances (images and maps of instances), or a TFDS name
    such as voc/2007."""
    data_dir: str | None = None
    """Folder of the data set. For a TFDS name, the directory of prepared sets; default: that of TFDS."""
    train_split: str | None = None
    """Split to train on. Default: train; for coco, train2017."""
    eval_split: str | None = None
    """Split to evaluate on during training. Default: val; for coco, val2017; for a TFDS name, validation."""
    test_split: str | None = None
    """Split for the final metrics. Default: test for shapes and for a voc_xml folder that has it, else that of
    --eval-split."""
    faulty_boxes: Literal["drop", "refuse"] = "drop"
    """Boxes of zero width or height: drop leaves them out and lists them, refuse raises an error."""
    weights: str | None = None
    """Weights to start from: a published tag or a file. Layers for another number of classes are newly initialized."""
    source: str | None = None
    """Library that wrote the file of --weights or --backbone-weights. Default: flaxvision."""
    backbone_model: str | None = None
    """A registered classifier with the backbone of the detector, such as resnet50; only with --backbone-weights."""
    backbone_weights: str | None = None
    """Pretrained weights of --backbone-model for the backbone: a published tag or a file."""
    batch_norm: Literal["sync", "local", "ghost", "frozen"] | None = None
    """Statistics of BatchNorm in training. sync: of the whole batch; local: of the rows on each device; ghost: of
    groups of --ghost-size rows; frozen: the running statistics. Default: frozen for a Faster R-CNN with pretrained
    weights, else sync."""
    eval_only: bool = False
    """Only evaluate the model of --weights."""
    eval_batch_size: int = 32
    """Images per evaluation step over all devices. It is rounded up to a multiple of the number of devices."""
    threads: int | None = None
    """Number of threads that read images. Default: one per processor, at most 16."""
    cache: bool = False
    """Keep the resized images in memory. Always on for shapes."""
    max_detections: int = 100
    """Number of detections per image in evaluation."""
    eval_every: float = 2.0
    """Epochs between evaluations."""


def parse(args: list[str] | None = None) -> Config:
    """Reads the flags that select the recipe first, and then all flags, with the recipe as defaults."""
    args = sys.argv[1:] if args is None else args
    choice, _ = tyro.cli(Choice, args=[a for a in args if a not in ("-h", "--help")], return_unknown_args=True)
    family = next(recipe for pattern, recipe in FAMILIES.items() if fnmatch.fnmatchcase(choice.model, pattern))
    recipe = choice.recipe if choice.recipe in RECIPES else "small" if choice.model == "small" else family
    values: dict[str, Any] = dataclasses.asdict(RECIPES[recipe])
    return tyro.cli(Config, default=Config(recipe=recipe, **values), args=args, description=__doc__)


def main(config: Config) -> int:
    """Runs the experiment and returns the exit status of the process."""
    config.start()
    check(config)
    train, val, test = load(config)
    workdir = Path(
        config.workdir or f"runs/{Path(config.dataset).name}-{Path(config.model).stem}-{config.recipe}-{config.seed}"
    )
    if config.eval_only:
        workdir.mkdir(parents=True, exist_ok=True)
    else:
        free = ("threads", "cache", "eval_batch_size", "eval_only", "faulty_boxes")
        fv.train.open_workdir(workdir, config, free=(*config.FREE, *free))
    run = Run(config, train, val, test, workdir)
    return run.evaluate() if config.eval_only else run.train()


def check(config: Config) -> None:
    """Raises ValueError for settings that are out of range or contradict each other."""
    detect_models.check(config)
    for field in ("eval_every", "log_every", "eval_batch_size", "max_detections"):
        if not getattr(config, field) > 0:
            raise ValueError(f"--{field.replace('_', '-')} must be positive; got {getattr(config, field)}")


def load(config: Config):
    """Loads and checks the training, validation and test sources."""
    names = SPLITS.get(config.dataset, ("train", "validation", None))
    given = (config.train_split, config.eval_split, config.test_split)
    splits = [own or usual for own, usual in zip(given, names, strict=True)]
    if config.dataset == "voc_xml" and config.data_dir and not given[2]:  # VOC2012 has no test split
        listed = Path(config.data_dir).expanduser() / "ImageSets" / "Main" / "test.txt"
        splits[2] = "test" if listed.is_file() else None
    classes = detect_models.class_names(config)
    sources = []
    for split in splits:
        if split is None:
            sources.append(sources[1])
            continue
        options: Any = {"data_dir": config.data_dir, "drop_empty": config.faulty_boxes == "drop"}
        options["masks"] = detect_models.has_masks(config)
        source = fv.data.load_detection(config.dataset, split, **options)
        if classes and source.classes != classes and set(source.classes) < set(classes):
            source = fv.data.load_detection(config.dataset, split, classes=classes, **options)
        for text in getattr(source, "dropped", ()):
            fv.train.print_once(f"left out of {source.name}: {text}")
        fv.data.validate(source, task="detection", channels=3, num_classes=len(source.classes), verify=False)
        sources.append(source)
    if len({source.classes for source in sources}) != 1:
        raise ValueError(f"all splits must have the same classes; got {[source.classes for source in sources]}")
    return sources


def canvases(config: Config, sizes: tuple[str, ...]) -> fv.data.Canvases:
    """Returns the canvases for sizes such as "416" or "800x1344"."""
    try:
        pairs = tuple((int(a), int(b or a)) for a, _, b in (size.partition("x") for size in sizes))
    except ValueError:
        raise ValueError(f"--canvases must be sides or HEIGHTxWIDTH; got {' '.join(sizes)}") from None
    return fv.data.Canvases(pairs, shorter=config.shorter, longer=config.longer, resize=config.resize)


class Run:
    """The parts of a run: data, model and compiled steps."""

    def __init__(self, config: Config, train, val, test, workdir: Path):
        self.config, self.workdir = config, workdir
        self.classes = test.classes
        cache = config.cache or config.dataset == "shapes"
        sizes = canvases(config, config.canvases)
        largest = max(sizes.sizes, key=lambda size: size[0] * size[1])
        own = dataclasses.replace(sizes, sizes=(largest,)) if config.multiscale else sizes
        evaluated = canvases(config, config.eval_canvases) if config.eval_canvases else own
        self.canvases = evaluated
        self.train_source = fv.data.on_canvases(train, sizes, multiscale=config.multiscale, cache=cache)
        self.val, self.test = (fv.data.on_canvases(source, evaluated, cache=cache) for source in (val, test))
        # With several scales in training, anchors are those of the canvases of evaluation.
        find_anchors = partial(detect_report.anchors_of, fv.data.on_canvases(train, evaluated), seed=config.seed)
        self.built = detect_models.build(config, len(self.classes), find_anchors)
        self.model = self.built.model
        self.train_step, self.eval_step = self._steps()
        self.find = jax.jit(partial(self._find, **self._detect_options))

    @property
    def metrics(self) -> dict[str, type[fv.metrics.DetectionAP]]:
        """The metrics of an evaluation by name. Only PASCAL VOC has difficult objects, which COCO's metrics count."""
        chosen: dict[str, type[fv.metrics.DetectionAP]] = {"coco": fv.metrics.CocoAP}
        if detect_models.has_masks(self.config):
            chosen["masks"] = fv.metrics.CocoMaskAP
        elif self.config.dataset == "voc_xml" or self.config.dataset.partition("/")[0] == "voc":
            chosen["voc"] = fv.metrics.VocAP
        return chosen

    @property
    def best_metric(self) -> str:
        """The metric that chooses the best checkpoint."""
        return {"coco": "coco_ap50", "masks": "masks_ap50", "voc": "voc_map50"}[[*self.metrics][-1]]

    @property
    def _detect_options(self) -> dict[str, Any]:
        config = self.config
        names = ("score_threshold", "iou_threshold", "max_detections")
        return {name: getattr(config, name) for name in names}

    def _find(self, variables, batch, **options):
        batch = self.eval_transform(jax.random.key(0), batch)
        return fv.detect(self.model, variables, batch["image"], batch["size"], **options)

    def _steps(self):
        config, a = self.config, fv.data.augment
        fill = tuple(np.asarray(self.built.mean) + config.padding * np.asarray(self.built.std))
        chosen = (
            (config.expand > 1, partial(a.random_expand, ratios=(1.0, config.expand), fill=fill)),
            (config.iou_crop, partial(a.random_iou_crop, fill=fill)),
            (config.zoom != (1.0, 1.0), partial(a.random_zoom, factors=config.zoom, fill=fill)),
            (config.flip, a.random_flip),
            (config.vertical_flip, partial(a.random_flip, vertical=True)),
            (config.hue, partial(a.random_hue, max_delta=config.hue)),
            (config.saturation, partial(a.random_saturation, strength=config.saturation)),
            (config.brightness, partial(a.random_brightness, max_delta=config.brightness)),
        )
        ops = [op for wanted, op in chosen if wanted]
        mix = partial(a.mosaic, probability=config.mosaic, fill=fill) if config.mosaic else None
        common: dict[str, Any] = {"mean": self.built.mean, "std": self.built.std, "padding": config.padding}
        self.eval_transform = a.make_transform(**common)
        self.view = a.make_transform(*ops, mix=mix)
        augmented = a.make_transform(*ops, mix=mix, **common)

        def train_transform(rng, batch):
            # Trained weights need no warm-up, as in darknet, whose files count the images that training has seen.
            return augmented(rng, {k: v for k, v in batch.items() if k != "seen" or config.weights is None})

        measure = fv.train.average_precision(
            self.model, len(self.classes), metrics=self.metrics, **self._detect_options
        )
        return fv.train.compile_steps(
            fv.train.detection(measure=measure),
            train_transform=train_transform,
            eval_transform=self.eval_transform,
            accumulate=config.accumulate,
            use_ema=config.ema_decay is not None,
            **config.step_options,
        )

    def create_state(self, learning_rate, rng) -> fv.train.TrainState:
        """Creates the train state, with newly initialized variables or those of the weights."""
        height, width = self.train_source.canvases.sizes[0]
        sample = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        backbone = getattr(self.model, "backbone", None)
        held = [] if backbone is None else [f"backbone/{path}" for path in backbone.frozen_params(sample)]
        tx = dataclasses.replace(self.config, frozen=(*self.config.frozen, *held)).make_optimizer(learning_rate)
        start = detect_models.start(self.built, self.config, rng, sample)
        return fv.train.create_state(self.model, tx, rng, sample, variables=start, ema_decay=self.config.ema_decay)

    def evaluation(self, source) -> fv.train.Evaluation:
        """Returns the evaluation on a source."""
        size = fv.train.eval_batch_size(self.config.eval_batch_size)
        batches = fv.data.eval_batches(source, size, num_threads=self.config.threads)
        return fv.train.Evaluation(self.eval_step, batches, self.config.input_timeout)

    def train(self) -> int:
        """Trains, evaluates and saves the model."""
        config = self.config
        batches = fv.data.train_batches(
            self.train_source, config.batch_size, seed=config.seed, num_threads=config.threads
        )
        init_rng, run_rng = jax.random.split(jax.random.key(config.seed))
        rate = config.learning_rate_schedule(batches.steps_per_epoch)
        options: dict[str, Any] = config.fit_options(config.model) | {
            "best_metric": self.best_metric,
            "best_mode": "max",
        }
        fv.train.print_once(f"the best checkpoint is the one with the highest {self.best_metric} on {self.val.name}")
        detect_report.draw_samples(batches, self.view, run_rng, self.workdir / "samples.png")
        result = fv.train.fit_in_workdir(
            self.workdir,
            self.create_state(rate, init_rng),
            self.train_step,
            batches,
            model=self.built.name,
            overrides=self.built.overrides,
            num_steps=config.num_steps(batches.steps_per_epoch),
            rng=run_rng,
            evaluate=self.evaluation(self.val),
            eval_every=max(1, round(config.eval_every * batches.steps_per_epoch)),
            learning_rate=rate,
            callbacks=[detect_report.Pictures(partial(self.draw, source=self.val), self.workdir / "detections")],
            **options,
        )
        if result.exit_status is not None:
            return result.exit_status
        figures = self.report(result.state)
        variables = fv.train.collect(self.variables_of(result.state))
        if jax.process_index() == 0:
            records = fv.train.read_records(self.workdir / "metrics.jsonl")
            names = ["loss", *dict.fromkeys((self.best_metric, "coco_ap50", "coco_ap"))]
            path = self.workdir / "curves.png"
            fv.plot.curves(records, path=path, steps_per_epoch=batches.steps_per_epoch, metrics=names)
            detect_models.save(
                self.workdir, self.built, variables, self.canvases, self.classes, config.padding, figures
            )
            print(f"see {path.parent}; tensorboard --logdir {self.workdir / 'tensorboard'}")
        return 0

    def evaluate(self) -> int:
        """Evaluates the model of --weights."""
        state = self.create_state(optax.constant_schedule(0.0), jax.random.key(0))
        self.report(state)
        return 0

    def variables_of(self, state) -> dict[str, Any]:
        """Returns the variables that are evaluated."""
        return state.variables if self.config.ema_decay is None else state.ema

    def report(self, state) -> dict[str, float]:
        """Computes and prints the metrics on the test split, and draws detections and curves."""
        evaluation = self.evaluation(self.test)
        metrics = fv.train.accumulate(state, self.eval_step, evaluation.batches, evaluation.input_timeout)
        figures = fv.metrics.compute(metrics)
        self.draw(state, self.test, self.workdir / "detections.png")
        if jax.process_index() == 0:
            figures |= detect_report.report(metrics["coco"], self.test.name, self.classes, figures, self.workdir)
            if "masks" in metrics:
                masks = metrics["masks"].with_truth(self.test.source)  # of the original size
                figures |= detect_report.report_masks(masks, self.classes, self.workdir)
        return figures

    def draw(self, state, source, path: Path) -> None:
        """Draws detections next to the ground truth for a few images."""
        variables = fv.train.collect(self.variables_of(state))
        detect_report.draw(partial(self.find, variables), source, self.classes, path)


if __name__ == "__main__":
    fv.train.run_experiment(main, parse)
