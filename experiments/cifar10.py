r"""Trains and evaluates the CIFAR ResNets, by the recipe of the paper or a fast one.

    python experiments/cifar10.py                                  # a demo on drawn patterns
    python experiments/cifar10.py --manual-dir FOLDER              # He 2015: 64,000 steps
    python experiments/cifar10.py --manual-dir FOLDER --recipe fast
    python experiments/cifar10.py --manual-dir FOLDER --eval-only --weights FILE --source akamaster

The demo takes a minute on 2 CPU cores. The recipe of the paper is meant for a GPU (a step takes 0.8 s on a CPU core);
the paper reports a test accuracy of 91.25 % for ResNet-20. experiments/README.md has times and results.

FOLDER contains the binary version of CIFAR-10 (cifar-10-batches-bin: data_batch_1.bin ... test_batch.bin). Without it,
`--dataset cifar10` reads CIFAR-10 from TFDS. A finished run writes `weights.safetensors` to its work directory;
`--eval-only --weights` evaluates it again. `--help --recipe NAME` shows the defaults of a recipe; without a data set,
those of the demo are shown below.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Recipe(fv.train.Recipe):
    """A recipe with its augmentations, which run on the device."""

    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""
    aux_weight: float = 0.3
    """Weight of the loss of each auxiliary classifier, in models that have them; 0 builds none."""
    crop_padding: int = 4
    """Augmentation: pad every side by this many pixels and crop at a random place; 0 for no crop."""
    padding_mode: Literal["zero", "reflect"] = "zero"
    """Content of the padding."""
    flip: bool = True
    """Augmentation: mirror left and right."""
    cutout: int = 0
    """Augmentation: blank a square of this side."""
    mixup: float = 0.0
    """Augmentation: alpha of mixup."""
    cutmix: float = 0.0
    """Augmentation: alpha of cutmix; with mixup too, each batch uses one of the two."""

    def __post_init__(self):
        super().__post_init__()
        for field in ("aux_weight", "crop_padding", "cutout", "mixup", "cutmix"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must not be negative; got {getattr(self, field)}")


RECIPES = {
    # He 2015, section 4.2: 64,000 steps of 128 images; the learning rate is divided by 10 at steps 32,000 and 48,000.
    # An epoch has 390 full batches. The paper trains the 110-layer network with a learning rate of 0.01 for the first
    # 400 steps or so; use `--warmup-epochs 1` instead.
    "he": Recipe(epochs=64_000 / 390, batch_size=128, boundaries=(1 / 2, 3 / 4)),
    # One cycle (Smith and Topin 2018), in a twelfth of the time.
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
    # For the drawn patterns, which only show that the program runs.
    "demo": Recipe(epochs=3.0, batch_size=32, optimizer="nesterov", schedule="one_cycle", crop_padding=2),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The flags on which the defaults of the others depend."""

    recipe: str | None = None
    dataset: str | None = None
    manual_dir: str | None = None
    data_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class Config(Recipe, fv.train.RunSettings):
    """Train, evaluate, checkpoint and resume. --recipe sets the defaults of the training settings."""

    recipe: Literal["he", "fast", "demo"] = "he"
    """Recipe that gives the other defaults. Default: demo without a data set, else he."""
    model: str = "resnet20_cifar"
    """A registered classifier: resnet20_cifar, resnet32_cifar, resnet44_cifar, resnet56_cifar, resnet110_cifar, ..."""
    dataset: str | None = None
    """cifar10, patterns, or another set of 32x32 colour images; see flaxvision.data.load. Default: cifar10 if
    --manual-dir or --data-dir is given, else patterns."""
    weights: str | None = None
    """Weights to evaluate: a file or a published tag."""
    source: str | None = None
    """Library that wrote the file of --weights, such as akamaster. Default: flaxvision."""
    eval_only: bool = False
    """Only evaluate --weights on the test images."""
    eval_batch_size: int = 500
    """Images per step of evaluation, over all devices; rounded up to a multiple of their number."""
    eval_every: float = 2.0
    """Epochs between evaluations."""


def parse(args: list[str] | None = None) -> Config:
    """Reads the flags that choose the recipe first, and then all flags, with the recipe as defaults."""
    args = sys.argv[1:] if args is None else args
    choice, _ = tyro.cli(Choice, args=[a for a in args if a not in ("-h", "--help")], return_unknown_args=True)
    real = choice.dataset not in (None, "patterns") or choice.manual_dir or choice.data_dir
    recipe = choice.recipe if choice.recipe in RECIPES else "he" if real else "demo"
    defaults = Config(recipe=recipe, **dataclasses.asdict(RECIPES[recipe]))  # type: ignore[arg-type]
    return tyro.cli(Config, default=defaults, args=args, description=__doc__)


def main(config: Config) -> int:
    """Runs the experiment and returns the exit status of the process."""
    config.start()
    check(config)
    dataset = config.dataset or ("cifar10" if config.manual_dir or config.data_dir else "patterns")
    if dataset == "patterns":
        fv.train.print_once(
            "training on drawn patterns, not photographs; use --manual-dir FOLDER or --dataset cifar10 for CIFAR-10"
        )
    read = partial(fv.data.load, dataset, data_dir=config.data_dir, manual_dir=config.manual_dir, image_size=32)
    test = read("test")
    fv.data.validate(test, channels=3, num_classes=len(test.classes))
    channels = fv.model_info(config.model).channels
    if channels != 3:
        raise ValueError(
            f"--model must take colour images; got {config.model}, which takes images of {channels} channel"
        )
    if config.eval_only:
        return evaluate_weights(config, test)
    train = read("train")
    fv.data.validate(train, channels=3, num_classes=len(test.classes))
    name = Path(dataset).stem
    workdir = Path(config.workdir or f"runs/{name}-{config.model}-{config.recipe}-{config.seed}")
    return run(config, train, test, workdir, f"{config.model} on {dataset}")


def check(config: Config) -> None:
    """Raises ValueError for settings that are out of range or do not go together."""
    for field in ("eval_every", "log_every", "eval_batch_size"):
        if not 0 < getattr(config, field) < math.inf:
            raise ValueError(f"--{field.replace('_', '-')} must be positive and finite; got {getattr(config, field)}")
    if config.eval_only != bool(config.weights):
        raise ValueError(
            f"--eval-only and --weights FILE-OR-TAG must be given together; got {config.eval_only} and {config.weights}"
        )


def run(config: Config, train, test, workdir: Path, title: str) -> int:
    """Trains, evaluates and saves a model."""
    a, info, overrides = fv.data.augment, fv.model_info(config.model), model_overrides(config, len(test.classes))
    shape = test[0]["image"].shape
    ops, mix, common = augmentations(config, info, len(test.classes), shape)
    train_step, eval_step = fv.train.compile_steps(
        fv.train.classification(label_smoothing=config.label_smoothing, aux_weight=config.aux_weight),
        train_transform=a.make_transform(*ops, mix=mix, **common),
        eval_transform=a.make_transform(**common),
        accumulate=config.accumulate,
        use_ema=config.ema_decay is not None,
        **config.step_options,
    )
    batches = fv.data.train_batches(train, config.batch_size, seed=config.seed)
    rate = config.learning_rate_schedule(batches.steps_per_epoch)
    init_rng, run_rng = jax.random.split(jax.random.key(config.seed))
    sample = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    model = fv.create_model(config.model, **overrides)
    state = fv.train.create_state(model, config.make_optimizer(rate), init_rng, sample, ema_decay=config.ema_decay)

    free = (*config.FREE, "eval_only", "weights", "source", "eval_batch_size")
    fv.train.open_workdir(workdir, config, free=free)
    fv.train.draw_samples(workdir / "samples.png", batches, a.make_transform(*ops), run_rng)
    result = fv.train.fit_in_workdir(
        workdir,
        state,
        train_step,
        batches,
        model=config.model,
        overrides=overrides,
        num_steps=config.num_steps(batches.steps_per_epoch),
        rng=run_rng,
        evaluate=evaluation(config, eval_step, test),
        eval_every=max(1, round(config.eval_every * batches.steps_per_epoch)),
        learning_rate=rate,
        **config.fit_options(title),
    )
    if result.exit_status is not None:
        return result.exit_status
    variables = fv.train.collect(result.state.variables if config.ema_decay is None else result.state.ema)
    if jax.process_index() != 0:
        return 0
    records = fv.train.read_records(workdir / "metrics.jsonl")
    fv.plot.curves(records, path=workdir / "curves.png", steps_per_epoch=batches.steps_per_epoch)
    report(result.metrics, test)
    save_weights(config, variables, result.metrics, test, overrides, workdir / "weights.safetensors")
    print(f"see {workdir / 'curves.png'}; tensorboard --logdir {workdir / 'tensorboard'}")
    return 0


def model_overrides(config: Config, num_classes: int) -> dict[str, Any]:
    """Returns the fields of the model that differ from its defaults."""
    fields = fv.model_fields(fv.create_model(config.model))
    overrides = config.model_overrides(fields, num_classes)
    if config.aux_weight and "aux_heads" in fields:
        overrides["aux_heads"] = True
    return overrides


def augmentations(config: Config, info: fv.ModelInfo, num_classes: int, shape):
    """Returns the ops, the mixing transform, and the options of both transforms."""
    a, ops = fv.data.augment, []
    if config.crop_padding:
        ops.append(partial(a.random_crop, padding=config.crop_padding, mode=config.padding_mode))
    if config.flip:
        ops.append(a.random_flip)
    if config.cutout:
        ops.append(partial(a.random_cutout, size=config.cutout, fill=info.mean))
    mix = a.mixing(num_classes, mixup_alpha=config.mixup, cutmix_alpha=config.cutmix)
    return ops, mix, {"size": shape[:2], "mean": info.mean, "std": info.std}


def evaluate_weights(config: Config, test) -> int:
    """Evaluates the weights of --weights on the test images."""
    assert config.weights is not None
    options = {"source": config.source, "dtype": jnp.bfloat16 if config.bfloat16 else None}
    model, variables = fv.weights.load_model(config.model, config.weights, **options)
    if model.num_classes != len(test.classes):
        raise ValueError(
            f"--weights must be for the {len(test.classes)} classes of {test.name}; got {config.weights} for "
            f"{model.num_classes}"
        )
    info = fv.model_info(config.model)
    size = test[0]["image"].shape[:2]
    transform = fv.data.augment.make_transform(size=size, mean=info.mean, std=info.std)
    objective = fv.train.classification(label_smoothing=config.label_smoothing, aux_weight=config.aux_weight)
    _, eval_step = fv.train.compile_steps(objective, eval_transform=transform, **config.step_options)
    state = fv.train.create_state(model, optax.identity(), jax.random.key(0), None, variables=variables)
    report(evaluation(config, eval_step, test)(state), test)
    return 0


def evaluation(config: Config, eval_step, test) -> fv.train.Evaluation:
    """Returns the evaluation on the test images."""
    batches = fv.data.eval_batches(test, fv.train.eval_batch_size(config.eval_batch_size))
    return fv.train.Evaluation(eval_step, batches, config.input_timeout)


def save_weights(config: Config, variables, metrics, test, overrides: dict[str, Any], path: Path) -> None:
    """Writes the weights that were evaluated, with their preprocessing and class names."""
    info, side = fv.model_info(config.model), test[0]["image"].shape[0]
    preprocessing = fv.data.Preprocessing(crop=side, resize=side, mean=info.mean, std=info.std)
    fv.weights.save(
        path,
        variables,
        name=config.model,
        metadata={**metrics, "preprocessing": dataclasses.asdict(preprocessing)},
        input_size=(side, side),
        class_names=test.classes,
        **{k: v for k, v in overrides.items() if k not in ("dtype", "batch_norm", "ghost_size")},
    )


def report(metrics: dict[str, float], test) -> None:
    """Prints the test accuracy and loss."""
    top5 = f", top-5 {metrics['top5_accuracy']:.2%}" if "top5_accuracy" in metrics else ""
    fv.train.print_once(
        f"test accuracy {metrics['accuracy']:.2%}{top5}, loss {metrics['loss']:.4f}, on {len(test)} images"
    )


if __name__ == "__main__":
    fv.train.run_experiment(main, parse)
