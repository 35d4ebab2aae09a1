r"""Trains and evaluates CIFAR's ResNets, by the paper's recipe or a fast one.

    python experiments/cifar10.py                                  # drawn patterns, to see that it runs; 1 minute
    python experiments/cifar10.py --manual-dir FOLDER              # He 2015: 64,000 steps, to 91.25 % (ResNet-20)
    python experiments/cifar10.py --manual-dir FOLDER --recipe fast
    python experiments/cifar10.py --manual-dir FOLDER --eval-only --weights FILE --source akamaster

FOLDER has the files of CIFAR-10's binary version (cifar-10-batches-bin: data_batch_1.bin ... test_batch.bin). Without
it, `--dataset cifar10` takes the set from TFDS. A finished run leaves `weights.safetensors` in its folder, which
`--eval-only --weights` measures again. `--help --recipe NAME` shows a recipe's own defaults: without a set, those below
are the drawn patterns'. experiments/README.md has times and results.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import tyro

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Recipe(fv.train.Recipe):
    """A recipe with its augmentations, which run on the device."""

    crop_padding: int = 4
    """Augment: crop anywhere after padding every side by so many pixels; 0 leaves the image alone."""
    padding_mode: Literal["zero", "reflect"] = "zero"
    """What the padding holds."""
    flip: bool = True
    """Augment: mirror left and right."""
    cutout: int = 0
    """Augment: blank a square of this side."""
    mixup: float = 0.0
    """Augment: mixup's alpha."""
    cutmix: float = 0.0
    """Augment: cutmix's alpha; with mixup too, each batch takes one of the two."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("crop_padding", "cutout", "mixup", "cutmix"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must not be negative; got {getattr(self, field)}")


RECIPES = {
    # He 2015, section 4.2: 64,000 steps of 128, divided by 10 at 32,000 and 48,000. An epoch has 390 full batches.
    # There the 110-layer net begins at a rate of 0.01 for some 400 steps; here `--warmup-epochs 1` serves.
    "he": Recipe(epochs=64_000 / 390, batch_size=128, boundaries=(1 / 2, 3 / 4)),
    # One cycle (Smith & Topin 2018), for a first look in a twelfth of the time.
    "fast": Recipe(
        epochs=14.0,
        batch_size=128,
        optimizer="nesterov",
        learning_rate=0.2,
        schedule="one_cycle",
        weight_decay=5e-4,
        label_smoothing=0.05,
        padding_mode="reflect",
    ),
    # For the drawn patterns, which measure nothing but that the program runs.
    "demo": Recipe(epochs=3.0, batch_size=32, optimizer="nesterov", schedule="one_cycle", crop_padding=2),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The flags that the defaults of the others depend on."""

    recipe: str | None = None
    dataset: str | None = None
    manual_dir: str | None = None
    data_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class Config(Recipe):
    """Train, evaluate, checkpoint and resume; --recipe sets the defaults of the settings of training."""

    recipe: Literal["he", "fast", "demo"] = "he"
    """Where the other defaults are from; demo without a data set."""
    model: str = "resnet20_cifar"
    """A registered classifier: resnet20_cifar, resnet32_cifar, resnet44_cifar, resnet56_cifar, resnet110_cifar, ..."""
    dataset: str | None = None
    """cifar10, patterns, or another set of 32x32 colour images; see flaxvision.data.load. Default: cifar10 where
    --manual-dir or --data-dir is given, else drawn patterns."""
    manual_dir: str | None = None
    """Folder with the files of CIFAR-10's binary version."""
    data_dir: str | None = None
    """TFDS folder with the prepared sets. Default: TFDS' own."""
    workdir: str | None = None
    """Where the run is kept; the same folder again goes on where it was. Default: runs/DATASET-MODEL-RECIPE-SEED."""
    weights: str | None = None
    """A file of weights, or a published tag, to evaluate."""
    source: str | None = None
    """Whose names the file's tensors have, such as akamaster."""
    eval_only: bool = False
    """Measure --weights on the test images; no training."""
    eval_batch_size: int = 500
    """Images a step of evaluation, over all devices."""
    eval_every: float = 2.0
    """Epochs between evaluations and checkpoints."""
    log_every: int = 100
    """Steps between training records."""
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
    real = choice.dataset not in (None, "patterns") or choice.manual_dir or choice.data_dir
    recipe = choice.recipe if choice.recipe in RECIPES else "he" if real else "demo"
    defaults = Config(recipe=recipe, **dataclasses.asdict(RECIPES[recipe]))  # type: ignore[arg-type]
    return tyro.cli(Config, default=defaults, args=args, description=__doc__)


def main(config: Config) -> int:
    """Runs the experiment; returns the process's exit status."""
    for field in ("eval_every", "log_every", "eval_batch_size"):
        if not 0 < getattr(config, field) < math.inf:
            raise ValueError(f"--{field.replace('_', '-')} must be positive and finite; got {getattr(config, field)}")
    if config.eval_only != bool(config.weights):
        raise ValueError("--eval-only and --weights FILE-OR-TAG go together; a run starts from fresh parameters")
    dataset = config.dataset or ("cifar10" if config.manual_dir or config.data_dir else "patterns")
    if dataset == "patterns":
        print("these are drawn patterns, not photographs: --manual-dir FOLDER or --dataset cifar10 takes CIFAR-10")
    load = functools.partial(
        fv.data.load, dataset, data_dir=config.data_dir, manual_dir=config.manual_dir, image_size=32
    )
    test = load("test")
    classes = len(test.classes)
    fv.data.validate(test, channels=3, num_classes=classes)
    info = fv.model_info(config.model)
    if info.channels != 3:
        raise ValueError(f"--model must take colour images; {config.model} takes images of {info.channels} channel")
    overrides = {"num_classes": classes, "dtype": jnp.bfloat16 if config.bfloat16 else None}
    a, common = fv.data.augment, {"size": test[0]["image"].shape[:2], "mean": info.mean, "std": info.std}
    plain = a.make_transform(**common)
    objective = fv.train.classification(label_smoothing=config.label_smoothing, aux_weight=config.aux_weight)

    if config.eval_only and config.weights:
        options = {"source": config.source, "dtype": overrides["dtype"]}
        model, variables = fv.weights.load_model(config.model, config.weights, **options)
        if model.num_classes != classes:
            raise ValueError(f"{test.name} has {classes} classes, the weights {config.weights} {model.num_classes}")
        _, eval_step = fv.train.compile_steps(objective, plain=plain, parallel=config.parallel)
        state = fv.train.create_state(model, optax.identity(), jax.random.key(0), None, variables=variables)
        report(fv.train.evaluate(state, eval_step, fv.data.eval_batches(test, config.eval_batch_size)), test)
        return 0

    train = load("train")
    fv.data.validate(train, channels=3, num_classes=classes)
    workdir = Path(config.workdir or f"runs/{Path(dataset).stem}-{config.model}-{config.recipe}-{config.seed}")
    fields = fv.model_fields(fv.create_model(config.model))
    if config.parallel == "pmap" and "axis_name" in fields:
        overrides["axis_name"] = "data"
    if config.aux_weight and "aux_heads" in fields:
        overrides["aux_heads"] = True
    model = fv.create_model(config.model, **overrides)
    batches = fv.data.train_batches(train, config.batch_size, seed=config.seed)
    rates = config.rates(batches.steps_per_epoch)
    ops = []
    if config.crop_padding:
        ops.append(functools.partial(a.random_crop, padding=config.crop_padding, mode=config.padding_mode))
    if config.flip:
        ops.append(a.random_flip)
    if config.cutout:
        ops.append(functools.partial(a.random_cutout, size=config.cutout, fill=info.mean))
    mix = a.mixing(classes, mixup_alpha=config.mixup, cutmix_alpha=config.cutmix)
    train_step, eval_step = fv.train.compile_steps(
        objective,
        augment=a.make_transform(*ops, mix=mix, **common),
        plain=plain,
        accumulate=config.accumulate,
        use_ema=config.ema_decay is not None,
        parallel=config.parallel,
    )
    init_rng, run_rng = jax.random.split(jax.random.key(config.seed))
    sample = jax.ShapeDtypeStruct((1, *test[0]["image"].shape), jnp.float32)
    state = fv.train.create_state(model, config.update_rule(rates), init_rng, sample, ema_decay=config.ema_decay)

    free = ("workdir", "data_dir", "manual_dir", "progress", "eval_only", "weights", "source")
    fv.train.open_workdir(workdir, config, free=(*free, "eval_batch_size", "log_every"))
    draw(train, batches, a.make_transform(*ops), run_rng, workdir / "samples.png")
    evaluate = functools.partial(
        fv.train.evaluate, eval_step=eval_step, batches=fv.data.eval_batches(test, config.eval_batch_size)
    )
    result = fv.train.fit_in_workdir(
        workdir,
        state,
        train_step,
        batches,
        model=config.model,
        overrides=overrides,
        num_steps=config.num_steps(batches.steps_per_epoch),
        rng=run_rng,
        evaluate=evaluate,
        eval_every=max(1, round(config.eval_every * batches.steps_per_epoch)),
        log_every=config.log_every,
        learning_rate=rates,
        progress=f"{config.model} on {dataset}" if config.progress else None,
    )
    if result.stopped:
        return 0 if result.stopped == "SIGTERM" else 130
    records = fv.train.read_records(workdir / "metrics.jsonl")
    fv.plot.curves(records, path=workdir / "curves.png", steps_per_epoch=batches.steps_per_epoch)
    report(result.metrics, test)
    final = result.state.variables if config.ema_decay is None else result.state.ema
    fields = {k: v for k, v in overrides.items() if k not in ("dtype", "axis_name")}
    side = test[0]["image"].shape[0]
    how = fv.data.Preprocessing(crop=side, resize=side, mean=info.mean, std=info.std)
    metadata = {**result.metrics, "preprocessing": dataclasses.asdict(how)}
    more = {"metadata": metadata, "input_size": (side, side), "class_names": test.classes, **fields}
    fv.weights.save(workdir / "weights.safetensors", final, name=config.model, **more)
    print(f"see {workdir / 'curves.png'}; tensorboard --logdir {workdir / 'tensorboard'}")
    return 0


def report(metrics: dict[str, float], test) -> None:
    """Prints the test's figures."""
    top5 = f", top-5 {metrics['top5_accuracy']:.2%}" if "top5_accuracy" in metrics else ""
    print(f"test accuracy {metrics['accuracy']:.2%}{top5}, loss {metrics['loss']:.4f}, on {len(test)} images")


def draw(train, batches, view, rng, path) -> None:
    """Draws the first images as the model will see them, before normalisation."""
    with batches.from_step(0) as iterator:
        shown = {k: v[:32] for k, v in next(iterator).items()}
    images = jax.jit(view)(rng, shown)["image"]
    fv.plot.image_grid(images, [train.classes[k] for k in shown["label"]], path=path)


def leave(number, frame):
    """Outside the loop, which handles the signal itself, there is nothing to save."""
    sys.exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    try:
        sys.exit(main(parse()))
    except (ValueError, ArithmeticError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
