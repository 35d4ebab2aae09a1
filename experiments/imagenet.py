r"""Trains and evaluates any of the ImageNet models, each by its family's recipe.

    python experiments/imagenet.py                                 # drawn patterns, to see that it runs; 1 minute
    python experiments/imagenet.py --dataset imagenet2012 --model resnet50 --bfloat16
    python experiments/imagenet.py --dataset FOLDER --model vgg16 --recipe resnet_cosine --batch-size 1024
    python experiments/imagenet.py --dataset imagenet2012 --model resnet50 \
        --eval-only --weights torchvision/IMAGENET1K_V2

FOLDER has class folders under `train` and `val`. `imagenet2012` is TFDS's, prepared in --data-dir or made from the
archives in --manual-dir. The recipes were written for the hardware of their papers: --batch-size and --learning-rate
go together. A finished run leaves `weights.safetensors` in its folder, which `--eval-only --weights` measures again.
`--help --model NAME --dataset FOLDER` shows the defaults of a model's recipe: without a set, those below are the drawn
patterns'. experiments/README.md has more.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import signal
import sys
from pathlib import Path
from typing import Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Recipe(fv.train.Recipe):
    """A recipe with its augmentations: threads decode and crop, the device does the rest."""

    size: int | None = None
    """Height and width of a training crop. Default: the model's published input."""
    crop: Literal["resized", "scaled"] = "resized"
    """resized: a random part of random shape, resized. scaled: the shorter side resized, then a crop of the size."""
    area: tuple[float, float] = (0.08, 1.0)
    """Of resized: the part's lowest and highest share of the image."""
    shorter: tuple[int, int] = (256, 256)
    """Of scaled: lowest and highest length of the shorter side."""
    flip: bool = True
    """Augment: mirror left and right."""
    lighting: float = 0.0
    """Augment: deviation of AlexNet's colour shift along the principal components."""
    mixup: float = 0.0
    """Augment: mixup's alpha."""
    cutmix: float = 0.0
    """Augment: cutmix's alpha; with mixup too, each batch takes one of the two."""
    eval_size: int | None = None
    """Height and width of the middle crop in evaluation. Default: the model's published input."""
    eval_shorter: int | None = None
    """The shorter side before that crop. Default: the crop is 7/8 of it."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("size", "eval_size", "eval_shorter"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"{field} must be at least 1; got {value}")
        for field in ("lighting", "mixup", "cutmix"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must not be negative; got {getattr(self, field)}")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area must be two rising shares of the image, above 0 and at most 1; got {self.area}")
        if not 0 < self.shorter[0] <= self.shorter[1]:
            raise ValueError(f"shorter must be two rising lengths; got {self.shorter}")


def every(epochs: int, total: int) -> tuple[float, ...]:
    """Boundaries every so many epochs of a run."""
    return tuple(e / total for e in range(epochs, total, epochs))


RECIPES = {
    # Goyal 2017, section 5.1: He's 90 epochs, rate 0.1 for each 256 images, with GoogLeNet's crops.
    "resnet": Recipe(),
    # The same in a large batch: its warm-up, with a cosine (He 2019, "Bag of tricks", section 5.1, which trains
    # for 120 epochs).
    "resnet_cosine": Recipe(batch_size=1024, learning_rate=0.4, schedule="cosine", warmup_epochs=5.0),
    # torchvision's of 2021 (IMAGENET1K_V2), without its TrivialAugment, random erasing and repeated augmentation. Its
    # average moves every 32 steps by 2e-5 * 1024 * 32 / 600: so much a step.
    "long": Recipe(
        epochs=600.0, batch_size=1024, learning_rate=0.5, schedule="cosine", warmup_epochs=5.0, weight_decay=2e-5,
        label_smoothing=0.1, mixup=0.2, cutmix=1.0, ema_decay=0.999966, size=176, eval_size=224, eval_shorter=232,
    ),
    # Krizhevsky 2012, sections 4.1 and 5. The authors lowered the rate by hand, three times in 90 epochs.
    "alexnet": Recipe(
        batch_size=128, learning_rate=0.01, weight_decay=5e-4, crop="scaled", lighting=0.1, eval_shorter=256
    ),
    # Simonyan 2014, section 3.1: 74 epochs, the rate lowered by hand three times, scale jittering.
    "vgg": Recipe(epochs=74.0, learning_rate=0.01, weight_decay=5e-4, crop="scaled", shorter=(256, 512), lighting=0.1),
    # Szegedy 2014, section 6: 4 % less every 8 epochs. The other numbers are those of Caffe's bvlc_googlenet.
    "googlenet": Recipe(
        epochs=250.0, batch_size=32, learning_rate=0.01, boundaries=every(8, 250), factor=0.96, weight_decay=2e-4
    ),
    # Szegedy 2015, section 8: RMSprop; its 50 replicas of 32 images, here together. Weight decay and momentum as in
    # TF-Slim, whose auxiliary classifier weighs 0.4.
    "inception": Recipe(
        epochs=100.0, batch_size=1600, optimizer="rmsprop", learning_rate=0.045, boundaries=every(2, 100), factor=0.94,
        epsilon=1.0, weight_decay=4e-5, clip_norm=2.0, label_smoothing=0.1, ema_decay=0.9999,
    ),
    # Chollet 2016, section 4.3, which gives neither the batch nor the length.
    "xception": Recipe(
        epochs=100.0, learning_rate=0.045, boundaries=every(2, 100), factor=0.94, weight_decay=1e-5, ema_decay=0.9999,
    ),
    # Hu 2017, section 5: divided by 10 every 30 epochs.
    "senet": Recipe(epochs=100.0, batch_size=1024, learning_rate=0.6, boundaries=(0.3, 0.6, 0.9)),
    # The solver of Iandola 2016: 170,000 steps of 512, the rate falling in a line.
    "squeezenet": Recipe(epochs=68.0, batch_size=512, learning_rate=0.04, schedule="polynomial", weight_decay=2e-4),
    # torchvision's for MobileNetV2: 2 % less every epoch.
    "mobilenet": Recipe(epochs=300.0, learning_rate=0.045, boundaries=every(1, 300), factor=0.98, weight_decay=4e-5),
    # For the drawn patterns, which measure nothing but that the program runs.
    "demo": Recipe(
        epochs=2.0, batch_size=32, optimizer="nesterov", learning_rate=0.05, schedule="one_cycle", area=(0.35, 1.0),
        aux_weight=0.0,
    ),
}  # fmt: skip
# The first pattern that fits a model's name says its recipe.
FAMILIES = {
    "alexnet*": "alexnet", "zfnet*": "alexnet", "vgg*": "vgg", "googlenet*": "googlenet", "*inception*": "inception",
    "xception*": "xception", "se_*": "senet", "senet*": "senet", "squeezenet*": "squeezenet", "mobilenet*": "mobilenet",
    "*": "resnet",
}  # fmt: skip
# The drawn patterns' size: as small as the family takes, without its auxiliary classifiers.
DEMO_SIZES = {
    "alexnet_dli": 200, "alexnet*": 64, "zfnet*": 64, "*inception*": 80, "lenet5*": 32, "*": 48,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choice:
    """The flags that the defaults of the others depend on."""

    recipe: str | None = None
    model: str = "mobilenet_v2"
    dataset: str = "patterns"
    eval_only: bool = False


@dataclasses.dataclass(frozen=True)
class Config(Recipe):
    """Train, evaluate, checkpoint and resume; --recipe sets the defaults of the settings of training."""

    recipe: Literal[tuple(RECIPES)] = "resnet"  # type: ignore[valid-type]
    """Where the other defaults are from. Default: the recipe of the model's family; demo without a data set."""
    model: str = "mobilenet_v2"
    """A registered classifier."""
    dataset: str = "patterns"
    """imagenet2012 or another TFDS name, a folder with train and val, or patterns, which need no file."""
    eval_split: str | None = None
    """The part to evaluate. Default: validation of imagenet2012, of others test (a folder's val, where it has no test);
    all takes a folder of class folders whole."""
    manual_dir: str | None = None
    """Folder with a TFDS set's original archives."""
    data_dir: str | None = None
    """TFDS folder with the prepared sets. Default: TFDS' own."""
    workdir: str | None = None
    """Where the run is kept; the same folder again goes on where it was. Default: runs/DATASET-MODEL-RECIPE-SEED."""
    weights: str | None = None
    """A published tag, or a file, to evaluate with the preprocessing that belongs to it."""
    source: str | None = None
    """Of a file that is no bundle of flaxvision: the library whose names its tensors have."""
    preprocessing: str | None = None
    """Preprocessing for a weights file: a tag or a source. Default: that of its card or of --source."""
    eval_only: bool = False
    """Measure --weights; no training."""
    eval_batch_size: int = 256
    """Images a step of evaluation, over all devices."""
    eval_every: float = 1.0
    """Epochs between evaluations and checkpoints."""
    log_every: int = 100
    """Steps between training records."""
    threads: int | None = None
    """Threads that decode and crop. Default: one per processor, at most 16."""
    verify: bool = False
    """Decode every file of a folder once before all else."""
    bfloat16: bool = False
    """Compute in bfloat16, with float32 parameters; for GPUs and TPUs."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the step is compiled for several devices."""
    seed: int = 0
    """Of the parameters, the data's order and all else."""
    progress: bool = True
    """Show the progress bar."""


def parse(args: list[str] | None = None) -> Config:
    """Reads the flags: first those that choose the recipe, then all, with the recipe's values as defaults."""
    args = sys.argv[1:] if args is None else args
    choice, _ = tyro.cli(Choice, args=[a for a in args if a not in ("-h", "--help")], return_unknown_args=True)
    family = next(recipe for pattern, recipe in FAMILIES.items() if fnmatch.fnmatchcase(choice.model, pattern))
    recipe = choice.recipe if choice.recipe in RECIPES else "demo" if choice.dataset == "patterns" else family
    values = dataclasses.asdict(RECIPES[recipe])
    if choice.eval_only:  # the weights say how they want to be evaluated
        values |= {"eval_size": None, "eval_shorter": None}
    elif recipe == "demo":
        size = next(size for pattern, size in DEMO_SIZES.items() if fnmatch.fnmatchcase(choice.model, pattern))
        values |= {"size": size, "eval_size": size}
    defaults = Config(recipe=recipe, **values)  # type: ignore[arg-type]
    return tyro.cli(Config, default=defaults, args=args, description=__doc__)


def main(config: Config) -> int:
    """Runs the experiment; returns the process's exit status."""
    for field in ("eval_every", "log_every", "eval_batch_size"):
        if not 0 < getattr(config, field) < math.inf:
            raise ValueError(f"--{field.replace('_', '-')} must be positive and finite; got {getattr(config, field)}")
    if config.eval_only != bool(config.weights):
        raise ValueError("--eval-only and --weights FILE-OR-TAG go together; a run starts from fresh parameters")
    if config.dataset == "patterns":
        print("these are drawn patterns, not photographs: --dataset imagenet2012 or a folder takes real ones")
    info = fv.model_info(config.model)
    size, eval_size = config.size or info.input_size[0], config.eval_size or info.input_size[0]
    shorter = config.eval_shorter or round(eval_size * 8 / 7)
    middle = fv.data.Preprocessing(crop=eval_size, resize=shorter, mean=info.mean, std=info.std)
    if config.eval_shorter and config.eval_shorter < eval_size:
        raise ValueError(f"--eval-shorter must be at least the crop's {eval_size}; got {config.eval_shorter}")
    places = {"data_dir": config.data_dir, "manual_dir": config.manual_dir}
    read = functools.partial(fv.data.load, config.dataset, **places, seed=config.seed, as_stored=True)
    # imagenet2012 has a test part too, without labels.
    photos = read(config.eval_split or ("validation" if config.dataset.startswith("imagenet2012") else "test"))
    a, classes = fv.data.augment, len(photos.classes)
    overrides = {"num_classes": classes, "dtype": jnp.bfloat16 if config.bfloat16 else None}
    objective = fv.train.classification(label_smoothing=config.label_smoothing, aux_weight=config.aux_weight)

    if config.eval_only and config.weights:
        fv.data.validate(photos, channels=3, num_classes=classes, verify=config.verify)
        options = {"source": config.source, "dtype": overrides["dtype"]}
        model, variables = fv.weights.load_model(config.model, config.weights, **options)
        how = fv.weights.preprocessing_for(config.model, config.preprocessing or config.source or config.weights)
        published = config.preprocessing or config.weights in fv.weights.tags(config.model)
        if not published and (config.eval_size or config.eval_shorter):
            how = dataclasses.replace(how, crop=middle.crop, resize=middle.resize)
        prepared = fv.data.Mapped(photos, how, repr(how))
        if model.num_classes != classes:
            raise ValueError(f"{photos.name} has {classes} classes, the weights {config.weights} {model.num_classes}")
        _, eval_step = fv.train.compile_steps(objective, parallel=config.parallel)
        state = fv.train.create_state(model, optax.identity(), jax.random.key(0), None, variables=variables)
        batches = fv.data.eval_batches(prepared, config.eval_batch_size, num_threads=config.threads)
        report(fv.train.evaluate(state, eval_step, batches), photos)
        return 0

    test = fv.data.Mapped(photos, lambda image: np.asarray(middle.resized(image)), repr(middle))
    train = read("train")
    for source in (train, test):
        fv.data.validate(source, channels=3, num_classes=classes, verify=config.verify)
    fields = fv.model_fields(fv.create_model(config.model))
    if config.parallel == "pmap" and "axis_name" in fields:
        overrides["axis_name"] = "data"
    if config.aux_weight and "aux_heads" in fields:
        overrides["aux_heads"] = True
    model = fv.create_model(config.model, **overrides)
    crop = functools.partial(fv.data.cropping.random_resized_crop, size=size, area=config.area)
    if config.crop == "scaled":
        crop = functools.partial(fv.data.cropping.random_scaled_crop, size=size, shorter=config.shorter)
    batches = fv.data.train_batches(
        train,
        config.batch_size,
        seed=config.seed,
        transform=lambda example, rng: {**example, "image": crop(example["image"], rng)},
        num_threads=config.threads,
    )
    rates = config.rates(batches.steps_per_epoch)
    ops = [a.random_flip] if config.flip else []
    if config.lighting:
        ops.append(functools.partial(a.random_lighting, std=config.lighting))
    mix = a.mixing(classes, mixup_alpha=config.mixup, cutmix_alpha=config.cutmix)
    train_step, eval_step = fv.train.compile_steps(
        objective,
        augment=a.make_transform(*ops, mix=mix, mean=info.mean, std=info.std),
        plain=a.make_transform(mean=info.mean, std=info.std),
        accumulate=config.accumulate,
        use_ema=config.ema_decay is not None,
        parallel=config.parallel,
    )
    init_rng, run_rng = jax.random.split(jax.random.key(config.seed))
    sample = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    state = fv.train.create_state(model, config.update_rule(rates), init_rng, sample, ema_decay=config.ema_decay)

    seen = jax.ShapeDtypeStruct((1, eval_size, eval_size, 3), jnp.float32)
    try:
        jax.eval_shape(model.apply, state.variables, seen)
    except (flax.errors.FlaxError, ValueError) as error:
        raise ValueError(f"{config.model} of --size {size} cannot take --eval-size {eval_size}: {error}") from error

    workdir = Path(config.workdir or f"runs/{Path(config.dataset).name}-{config.model}-{config.recipe}-{config.seed}")
    free = ("workdir", "data_dir", "manual_dir", "progress", "threads", "verify", "eval_only", "weights", "source")
    fv.train.open_workdir(workdir, config, free=(*free, "preprocessing", "eval_batch_size", "log_every"))
    with batches.from_step(0) as iterator:
        shown = {k: v[:32] for k, v in next(iterator).items()}
    shown = jax.jit(a.make_transform(*ops))(run_rng, shown)
    fv.plot.image_grid(shown["image"], shown["label"], train.classes, path=workdir / "samples.png")
    held_out = fv.data.eval_batches(test, config.eval_batch_size, num_threads=config.threads)
    result = fv.train.fit_in_workdir(
        workdir,
        state,
        train_step,
        batches,
        model=config.model,
        overrides=overrides,
        num_steps=config.num_steps(batches.steps_per_epoch),
        rng=run_rng,
        evaluate=functools.partial(fv.train.evaluate, eval_step=eval_step, batches=held_out),
        eval_every=max(1, round(config.eval_every * batches.steps_per_epoch)),
        log_every=config.log_every,
        learning_rate=rates,
        progress=config.model if config.progress else None,
    )
    if result.stopped:
        return 0 if result.stopped == "SIGTERM" else 130
    records = fv.train.read_records(workdir / "metrics.jsonl")
    fv.plot.curves(records, path=workdir / "curves.png", steps_per_epoch=batches.steps_per_epoch)
    report(result.metrics, test)
    final = result.state.variables if config.ema_decay is None else result.state.ema
    fields = {k: v for k, v in overrides.items() if k not in ("dtype", "axis_name")}
    how = {"metadata": {**result.metrics, "preprocessing": dataclasses.asdict(middle)}, "input_size": (size, size)}
    how["class_names"] = test.classes
    fv.weights.save(workdir / "weights.safetensors", final, name=config.model, **how, **fields)
    print(f"see {workdir / 'curves.png'}; tensorboard --logdir {workdir / 'tensorboard'}")
    return 0


def report(metrics: dict[str, float], test) -> None:
    """Prints the figures of the evaluated part."""
    top5 = f", top-5 {metrics['top5_accuracy']:.2%}" if "top5_accuracy" in metrics else ""
    print(f"top-1 {metrics['accuracy']:.2%}{top5}, loss {metrics['loss']:.4f}, on {len(test)} images")


def leave(number, frame):
    """Outside the loop, which handles the signal itself, there is nothing to save."""
    sys.exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    try:
        sys.exit(main(parse()))
    except (ValueError, ArithmeticError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
