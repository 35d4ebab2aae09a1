r"""Trains and evaluates detectors, each by the recipe of its family.

    python experiments/detect.py                                   # a small YOLOv3 on drawn shapes
    python experiments/detect.py --dataset voc_xml --data-dir FOLDER --model yolo_v3_tiny
    python experiments/detect.py --dataset coco --data-dir FOLDER --model faster_rcnn_resnet50_fpn
    python experiments/detect.py --dataset yolo --data-dir FOLDER --model yolo_v2 --weights FILE --source darknet

The first command needs no files and no GPU; it takes TIME on 2 CPU cores and reaches an AP at an IoU of 0.5 of RESULT.

FOLDER is in the layout of PASCAL VOC, COCO or YOLO; `--dataset coco` also takes a TFDS directory. Batch sizes and
learning rates are those of the papers for their hardware; if you change --batch-size, scale --learning-rate too.
A run ends with the figures of each class and with pictures in its work directory, and writes `weights.safetensors`,
which `flaxvision predict` reads. `--help --model NAME --dataset NAME` shows the defaults of a recipe.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import detect_report
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import flaxvision as fv

sys.path.insert(0, str(Path(__file__).parent))


@dataclasses.dataclass(frozen=True)
class Recipe(fv.train.Recipe):
    """A recipe with its canvases and augmentations. Threads read and resize the images, the device does the rest."""

    canvases: tuple[str, ...] = ("416",)
    """Sizes to which images are resized and padded: a side, or HEIGHTxWIDTH. The steps compile once for each."""
    eval_canvases: tuple[str, ...] = ()
    """Sizes in evaluation. Default: those of training, or the largest with --multiscale."""
    shorter: int | None = None
    """Length of the shorter side of an image. Default: images fill their canvas."""
    longer: int | None = None
    """Largest length of the longer side, with --shorter."""
    resize: bool = True
    """Resize images. If not, only those that no canvas holds are resized."""
    multiscale: int | None = None
    """Steps between two canvases, drawn at random for all images. Default: each image has its own canvas."""
    flip: bool = True
    """Augmentation: mirror left and right."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Augmentation: lowest and highest factor of the size."""
    iou_crop: bool = False
    """Augmentation: crop around an object."""
    expand: float = 1.0
    """Augmentation: largest ratio by which the surroundings grow, for half of the images."""
    mosaic: float = 0.0
    """Augmentation: probability that an image is made of four."""
    hue: float = 0.0
    """Augmentation: largest shift of the hue, as a share of the circle."""
    saturation: float = 0.0
    """Augmentation: largest relative change of the saturation."""
    brightness: float = 0.0
    """Augmentation: largest change of the brightness."""
    padding: float = 0.0
    """Value of the padding after normalization."""
    anchors: int = 0
    """Number of anchors to compute from the boxes by k-means, for YOLO. Default: those of the model."""
    score_threshold: float = 0.01
    """Least score of a detection in evaluation."""
    iou_threshold: float = 0.5
    """IoU above which a detection suppresses others of its class."""


RECIPES = {
    # darknet's yolov3.cfg: 500,200 steps of 64 images are 273 epochs of COCO.
    "yolo_v3": Recipe(
        epochs=273.0, batch_size=64, learning_rate=1e-3, boundaries=(0.8, 0.9), warmup_epochs=0.55, weight_decay=5e-4,
        canvases=tuple(str(side) for side in range(320, 609, 32)), eval_canvases=("416",), multiscale=10,
        zoom=(0.7, 1.4), hue=0.1, saturation=0.5, brightness=0.2, padding=0.5,
    ),
    # Redmon 2017, section 2: 160 epochs; the learning rate falls at 60 and 90.
    "yolo_v2": Recipe(
        epochs=160.0, batch_size=64, learning_rate=1e-3, boundaries=(60 / 160, 90 / 160), warmup_epochs=1.0,
        weight_decay=5e-4, canvases=tuple(str(side) for side in range(320, 609, 32)), eval_canvases=("416",),
        multiscale=10, zoom=(0.7, 1.4), hue=0.1, saturation=0.5, brightness=0.2, padding=0.5,
    ),
    # torchvision's recipe for Faster R-CNN on COCO: 26 epochs of 16 images, with 1,000 steps of warm-up.
    "faster_rcnn": Recipe(
        epochs=26.0, batch_size=16, learning_rate=0.02, boundaries=(16 / 26, 22 / 26), warmup_epochs=0.14,
        weight_decay=1e-4, canvases=("800x1344", "1344x800"), shorter=800, longer=1333, score_threshold=0.05,
    ),
    # For the drawn shapes and other small sets, from scratch.
    "small": Recipe(
        epochs=24.0, batch_size=16, optimizer="adamw", learning_rate=3e-3, schedule="cosine", warmup_epochs=0.4,
        weight_decay=1e-4, clip_norm=10.0, canvases=("96",), resize=False, padding=0.5, anchors=6, ema_decay=0.998,
    ),
}  # fmt: skip
# The first pattern that matches the name of a model gives its recipe.
FAMILIES = {"faster_rcnn*": "faster_rcnn", "yolo_v2*": "yolo_v2", "*": "yolo_v3"}
# The default model: YOLOv3 with heads of stride 8 and 16, narrow and shallow.
SMALL = {
    "convs": (((8, 3),), ((16, 3),), ((32, 3),), ((64, 3), (32, 1), (64, 3)), ((96, 3), (48, 1), (96, 3))),
    "stages": ("stage3", "stage4"),
    "last_pool": False,
    "necks": (((64, 1),), ()),
    "head_features": (128, 96),
    "lateral_features": (48,),
}
SPLITS = {
    "shapes": ("train", "val", "test"),
    "voc_xml": ("train", "val", "test"),
    "yolo": ("train", "val", None),
    "coco": ("train2017", "val2017", None),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The flags on which the defaults of the others depend."""

    recipe: str | None = None
    model: str = "small"
    dataset: str = "shapes"


@dataclasses.dataclass(frozen=True)
class Config(Recipe, fv.train.RunSettings):
    """Train, evaluate, checkpoint and resume. --recipe sets the defaults of the training settings."""

    recipe: Literal[tuple(RECIPES)] = "small"  # type: ignore[valid-type]
    """Recipe that gives the other defaults. Default: that of the model's family."""
    model: str = "small"
    """A registered detector, or small: YOLOv3 with a narrow backbone."""
    dataset: str = "shapes"
    """shapes (embedded), voc_xml, coco, yolo, or a TFDS name such as voc/2007."""
    train_split: str | None = None
    """Split to train on. Default: train, or train2017 for coco."""
    eval_split: str | None = None
    """Split to evaluate during training. Default: val, or val2017 for coco."""
    test_split: str | None = None
    """Split of the final figures. Default: test if the data set has one, else --eval-split."""
    faulty_boxes: Literal["drop", "refuse"] = "drop"
    """What happens to boxes of zero width or height: they are left out and listed, or end the run with an error."""
    weights: str | None = None
    """Weights to start from: a published tag or a file; layers that depend on the number of classes start anew."""
    source: str | None = None
    """Library that wrote the file of --weights. Default: flaxvision."""
    eval_only: bool = False
    """Only evaluate --weights."""
    eval_batch_size: int = 32
    """Images per step of evaluation, over all devices; rounded up to a multiple of their number."""
    threads: int | None = None
    """Number of threads that read images. Default: one per processor, at most 16."""
    cache: bool = False
    """Keep the resized images in memory; always for shapes."""
    max_detections: int = 100
    """Number of detections of an image in evaluation."""
    eval_every: float = 2.0
    """Epochs between evaluations."""


def parse(args: list[str] | None = None) -> Config:
    """Reads the flags that choose the recipe first, and then all flags, with the recipe as defaults."""
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
    workdir = Path(config.workdir or f"runs/{Path(config.dataset).name}-{config.model}-{config.recipe}-{config.seed}")
    if config.eval_only:
        workdir.mkdir(parents=True, exist_ok=True)
    else:
        free = ("threads", "cache", "eval_batch_size", "eval_only", "faulty_boxes")
        fv.train.open_workdir(workdir, config, free=(*config.FREE, *free))
    run = Run(config, train, val, test, workdir)
    return run.evaluate() if config.eval_only else run.train()


def check(config: Config) -> None:
    """Raises ValueError for settings that are out of range or do not go together."""
    if config.eval_only and not config.weights:
        raise ValueError("--weights FILE-OR-TAG must be given with --eval-only; got none")
    if config.model != "small" and fv.model_info(config.model).task != "detection":
        known = ", ".join(fv.list_models(task="detection"))
        raise ValueError(f"--model must be small or a detector ({known}); got {config.model!r}")
    for field in ("eval_every", "log_every", "eval_batch_size", "max_detections"):
        if not getattr(config, field) > 0:
            raise ValueError(f"--{field.replace('_', '-')} must be positive; got {getattr(config, field)}")


def load(config: Config):
    """Loads and checks the training, validation and test sources."""
    names = SPLITS.get(config.dataset, ("train", "validation", None))
    given = (config.train_split, config.eval_split, config.test_split)
    splits = [own or usual for own, usual in zip(given, names, strict=True)]
    sources = []
    for split in splits:
        if split is None:
            sources.append(sources[1])
            continue
        source = fv.data.load_detection(
            config.dataset, split, data_dir=config.data_dir, drop_empty=config.faulty_boxes == "drop"
        )
        for text in getattr(source, "dropped", ()):
            fv.train.print_once(f"left out of {source.name}: {text}")
        fv.data.validate(source, task="detection", channels=3, num_classes=len(source.classes), verify=False)
        sources.append(source)
    if len({source.classes for source in sources}) != 1:
        raise ValueError(f"all splits must have the same classes; got {[source.classes for source in sources]}")
    return sources


def canvases(config: Config, sizes: tuple[str, ...]) -> fv.data.Canvases:
    """Returns the canvases of sizes such as "416" or "800x1344"."""
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
        self.name = "yolo_v3_tiny" if config.model == "small" else config.model
        self.overrides = self._overrides()
        self.info = fv.model_info(self.name)
        self.model, self.start = self._model()
        self.train_step, self.eval_step = self._steps()
        self.find = jax.jit(partial(self._find, **self._detect_options))

    def _overrides(self) -> dict[str, Any]:
        config = self.config
        overrides: dict[str, Any] = dict(SMALL) if config.model == "small" else {}
        background = 1 if self.name.startswith("faster_rcnn") else 0
        fields = fv.model_fields(fv.create_model(self.name))
        overrides |= config.model_overrides(fields, len(self.classes) + background)
        if config.anchors:
            overrides["anchors"] = detect_report.anchors_of(self.train_source, config.anchors, config.seed)
        return overrides

    def _model(self):
        config = self.config
        if config.weights is None:
            return fv.create_model(self.name, **self.overrides), None
        overrides = {k: v for k, v in self.overrides.items() if k != "num_classes"}
        return fv.weights.load_model(
            self.name,
            config.weights,
            source=config.source,
            num_classes=self.overrides["num_classes"],
            rng=jax.random.key(config.seed),
            **overrides,
        )

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
        fill = tuple(np.asarray(self.info.mean) + config.padding * np.asarray(self.info.std))
        chosen = (
            (config.expand > 1, partial(a.random_expand, ratios=(1.0, config.expand), fill=fill)),
            (config.iou_crop, partial(a.random_iou_crop, fill=fill)),
            (config.zoom != (1.0, 1.0), partial(a.random_zoom, factors=config.zoom, fill=fill)),
            (config.flip, a.random_flip),
            (config.hue, partial(a.random_hue, max_delta=config.hue)),
            (config.saturation, partial(a.random_saturation, strength=config.saturation)),
            (config.brightness, partial(a.random_brightness, max_delta=config.brightness)),
        )
        ops = [op for wanted, op in chosen if wanted]
        objects = self.train_source.max_objects
        mosaic = partial(a.mosaic, probability=config.mosaic, max_objects=objects, fill=fill)
        mix = mosaic if config.mosaic else None
        common: dict[str, Any] = {"mean": self.info.mean, "std": self.info.std, "padding": config.padding}
        self.eval_transform = a.make_transform(**common)
        self.view = a.make_transform(*ops, mix=mix)
        measure = fv.train.average_precision(self.model, len(self.classes), **self._detect_options)
        return fv.train.compile_steps(
            fv.train.detection(measure=measure),
            train_transform=a.make_transform(*ops, mix=mix, **common),
            eval_transform=self.eval_transform,
            accumulate=config.accumulate,
            use_ema=config.ema_decay is not None,
            **config.step_options,
        )

    def create_state(self, learning_rate, rng) -> fv.train.TrainState:
        """Initializes the model, or copies the weights of --weights."""
        height, width = self.train_source.canvases.sizes[0]
        sample = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        tx = self.config.make_optimizer(learning_rate)
        decay = self.config.ema_decay
        return fv.train.create_state(self.model, tx, rng, sample, variables=self.start, ema_decay=decay)

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
        options = config.fit_options(config.model) | {"best_metric": "coco_ap50", "best_mode": "max"}
        detect_report.draw_samples(batches, self.view, run_rng, self.workdir / "samples.png")
        result = fv.train.fit_in_workdir(
            self.workdir,
            self.create_state(rate, init_rng),
            self.train_step,
            batches,
            model=self.name,
            overrides=self.overrides,
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
            names = ["loss", "coco_ap50", "coco_ap"]
            path = self.workdir / "curves.png"
            fv.plot.curves(records, path=path, steps_per_epoch=batches.steps_per_epoch, metrics=names)
            self.save(variables, figures)
            print(f"see {path.parent}; tensorboard --logdir {self.workdir / 'tensorboard'}")
        return 0

    def evaluate(self) -> int:
        """Evaluates --weights."""
        state = self.create_state(optax.constant_schedule(0.0), jax.random.key(0))
        self.report(state)
        return 0

    def variables_of(self, state) -> dict[str, Any]:
        """Returns the variables that are evaluated."""
        return state.variables if self.config.ema_decay is None else state.ema

    def report(self, state) -> dict[str, float]:
        """Prints the figures on the test split and draws them."""
        evaluation = self.evaluation(self.test)
        metrics = fv.train.accumulate(state, self.eval_step, evaluation.batches, evaluation.input_timeout)
        figures = fv.metrics.compute(metrics)
        self.draw(state, self.test, self.workdir / "detections.png")
        if jax.process_index() == 0:
            figures |= detect_report.report(metrics["coco"], self.test.name, self.classes, figures, self.workdir)
        return figures

    def draw(self, state, source, path: Path) -> None:
        """Draws detections beside the truth for a few images."""
        variables = fv.train.collect(self.variables_of(state))
        detect_report.draw(partial(self.find, variables), source, self.classes, path)

    def save(self, variables, figures: dict[str, float]) -> None:
        """Writes the weights that were evaluated, with their canvases and class names."""
        stated = dataclasses.asdict(self.canvases) | {
            "mean": self.info.mean,
            "std": self.info.std,
            "padding": self.config.padding,
        }
        fv.weights.save(
            self.workdir / "weights.safetensors",
            variables,
            name=self.name,
            class_names=self.classes,
            metadata={**figures, "canvases": stated},
            **{k: v for k, v in self.overrides.items() if k not in ("dtype", "ghost_size")},
        )


if __name__ == "__main__":
    fv.train.run_experiment(main, parse)
