r"""Trains and evaluates any of the ImageNet models, each by the recipe of its family.

    python experiments/imagenet.py                                 # a demo on drawn patterns
    python experiments/imagenet.py --dataset imagenet2012 --model resnet50 --bfloat16
    python experiments/imagenet.py --dataset FOLDER --model vgg16 --recipe resnet_cosine --batch-size 1024
    python experiments/imagenet.py --dataset imagenet2012 --model resnet50 \
        --eval-only --weights torchvision/IMAGENET1K_V2

The demo takes a minute on 2 CPU cores and only shows that the program runs. Training on ImageNet needs GPUs or TPUs;
expect the results of the papers of the recipes. experiments/README.md has measured evaluations.

FOLDER contains class directories under `train` and `val`. `imagenet2012` is read by TFDS, prepared in --data-dir or
from the archives in --manual-dir. The batch sizes of the recipes suit the hardware of their papers; if you change
--batch-size, scale --learning-rate too. A finished run writes `weights.safetensors` to its work directory; `--eval-only
--weights` evaluates it again. `--help --model NAME --dataset FOLDER` shows the defaults of the recipe of a model;
without a data set, those of the demo are shown below.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from imagenet_recipes import DEMO_SIZES, FAMILIES, RECIPES, Recipe

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Choice:
    """The flags on which the defaults of the others depend."""

    recipe: str | None = None
    model: str = "mobilenet_v2"
    dataset: str = "patterns"
    eval_only: bool = False


@dataclasses.dataclass(frozen=True)
class Config(Recipe, fv.train.RunSettings):
    """Train, evaluate, checkpoint and resume. --recipe sets the defaults of the training settings."""

    recipe: Literal[tuple(RECIPES)] = "resnet"  # type: ignore[valid-type]
    """Recipe that gives the other defaults. Default: that of the model's family, or demo without a data set."""
    model: str = "mobilenet_v2"
    """A registered classifier."""
    dataset: str = "patterns"
    """imagenet2012 or another TFDS name, a directory with train and val, or patterns, which need no files."""
    eval_split: str | None = None
    """Split to evaluate. Default: validation for imagenet2012, else test (val for a directory without test). all is for
    a directory that has class directories and no splits."""
    weights: str | None = None
    """Weights to evaluate with their own preprocessing: a published tag or a file."""
    source: str | None = None
    """Library that wrote the file of --weights. Default: flaxvision."""
    preprocessing: str | None = None
    """Preprocessing for a weights file: a tag or a source. Default: that of its card or of --source."""
    eval_only: bool = False
    """Only evaluate --weights."""
    eval_batch_size: int = 256
    """Images per step of evaluation, over all devices; rounded up to a multiple of their number."""
    threads: int | None = None
    """Number of threads that decode and crop. Default: one per processor, at most 16."""
    workers: int = 0
    """Number of worker processes that decode and crop, for hosts with many processors. Default: only threads."""
    verify: bool = False
    """Decode every file of a directory once before the run, and end with an error if some are broken."""
    skip_broken: bool = False
    """Decode every file of a directory once before the run, and leave out those that are broken."""


def parse(args: list[str] | None = None) -> Config:
    """Reads the flags that choose the recipe first, and then all flags, with the recipe as defaults."""
    args = sys.argv[1:] if args is None else args
    choice, _ = tyro.cli(Choice, args=[a for a in args if a not in ("-h", "--help")], return_unknown_args=True)
    family = next(recipe for pattern, recipe in FAMILIES.items() if fnmatch.fnmatchcase(choice.model, pattern))
    recipe = choice.recipe if choice.recipe in RECIPES else "demo" if choice.dataset == "patterns" else family
    values = dataclasses.asdict(RECIPES[recipe])
    if choice.eval_only:  # the weights have sizes of their own
        values |= {"eval_size": None, "eval_shorter": None}
    elif recipe == "demo":
        size = next(size for pattern, size in DEMO_SIZES.items() if fnmatch.fnmatchcase(choice.model, pattern))
        values |= {"size": size, "eval_size": size}
    defaults = Config(recipe=recipe, **values)  # type: ignore[arg-type]
    return tyro.cli(Config, default=defaults, args=args, description=__doc__)


def main(config: Config) -> int:
    """Runs the experiment and returns the exit status of the process."""
    config.start()
    check(config)
    if config.dataset == "patterns":
        fv.train.print_once(
            "using drawn patterns, not photographs; use --dataset imagenet2012 or --dataset FOLDER for photographs"
        )
    places = {"data_dir": config.data_dir, "manual_dir": config.manual_dir}
    read = partial(fv.data.load, config.dataset, **places, seed=config.seed, as_stored=True)
    # The split "test" of imagenet2012 has no labels.
    photos = read(config.eval_split or ("validation" if config.dataset.startswith("imagenet2012") else "test"))
    photos = check_photos(config, photos, photos.classes)
    if config.eval_only:
        return evaluate_weights(config, photos)
    crop = centre_crop(config)
    test = fv.data.Mapped(photos, crop.resized, repr(crop))
    return run(config, check_photos(config, read("train"), photos.classes), test)


def check_photos(config: Config, source, classes):
    """Checks a source, and returns it without its broken files if --skip-broken is set."""
    if config.skip_broken and hasattr(source, "without_broken"):
        source, broken = source.without_broken()
        if broken:
            fv.train.print_once(f"left out {len(broken)} broken files of {source.name}:", *broken, sep="\n  ")
    fv.data.validate(source, channels=3, num_classes=len(classes), verify=config.verify)
    return source


def cropped(example: dict[str, Any], rng: np.random.Generator, crop) -> dict[str, Any]:
    """Crops the photograph of an example at random for training."""
    return {**example, "image": crop(example["image"], rng)}


def check(config: Config) -> None:
    """Raises ValueError for settings that are out of range or do not go together."""
    for field in ("eval_every", "log_every", "eval_batch_size"):
        if not 0 < getattr(config, field) < math.inf:
            raise ValueError(f"--{field.replace('_', '-')} must be positive and finite; got {getattr(config, field)}")
    if config.eval_only != bool(config.weights):
        raise ValueError(
            f"--eval-only and --weights FILE-OR-TAG must be given together; got {config.eval_only} and {config.weights}"
        )
    size = config.eval_size or fv.model_info(config.model).input_size[0]
    if config.eval_shorter and config.eval_shorter < size:
        raise ValueError(f"--eval-shorter must be at least {size}, the size of the crop; got {config.eval_shorter}")


def centre_crop(config: Config) -> fv.data.Preprocessing:
    """Returns the preprocessing of evaluation that --eval-size and --eval-shorter ask for."""
    info = fv.model_info(config.model)
    size = config.eval_size or info.input_size[0]
    shorter = config.eval_shorter or round(size * 8 / 7)
    return fv.data.Preprocessing(crop=size, resize=shorter, mean=info.mean, std=info.std)


def run(config: Config, train, test) -> int:
    """Trains, evaluates and saves a model."""
    overrides = model_overrides(config, len(test.classes))
    batches = training_batches(config, train)
    rate = config.learning_rate_schedule(batches.steps_per_epoch)
    init_rng, run_rng = jax.random.split(jax.random.key(config.seed))
    state = create_state(config, fv.create_model(config.model, **overrides), rate, init_rng)
    train_step, eval_step, view = compile_steps(config, len(test.classes))

    name = f"{Path(config.dataset).name}-{config.model}-{config.recipe}-{config.seed}"
    workdir = Path(config.workdir or f"runs/{name}")
    free = (*config.FREE, "threads", "workers", "verify", "eval_only", "weights", "source", "preprocessing")
    fv.train.open_workdir(workdir, config, free=(*free, "eval_batch_size"))
    fv.train.draw_samples(workdir / "samples.png", batches, view, run_rng)
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
        **config.fit_options(config.model),
    )
    if result.exit_status is not None:
        return result.exit_status
    variables = fv.train.collect(result.state.variables if config.ema_decay is None else result.state.ema)
    if jax.process_index() != 0:
        return 0
    records = fv.train.read_records(workdir / "metrics.jsonl")
    fv.plot.curves(records, path=workdir / "curves.png", steps_per_epoch=batches.steps_per_epoch)
    report(result.metrics, test)
    save_weights(config, variables, result.metrics, test.classes, overrides, workdir / "weights.safetensors")
    print(f"see {workdir / 'curves.png'}; tensorboard --logdir {workdir / 'tensorboard'}")
    return 0


def model_overrides(config: Config, num_classes: int) -> dict[str, Any]:
    """Returns the fields of the model that differ from its defaults."""
    fields = fv.model_fields(fv.create_model(config.model))
    overrides = config.model_overrides(fields, num_classes)
    if config.aux_weight and "aux_heads" in fields:
        overrides["aux_heads"] = True
    return overrides


def training_batches(config: Config, train) -> fv.data.TrainBatches:
    """Returns the batches of training; threads decode and crop the images."""
    size = config.size or fv.model_info(config.model).input_size[0]
    crop = partial(fv.data.cropping.random_resized_crop, size=size, area=config.area)
    if config.crop == "scaled":
        crop = partial(fv.data.cropping.random_scaled_crop, size=size, shorter=config.shorter)
    return fv.data.train_batches(
        train,
        config.batch_size,
        seed=config.seed,
        transform=partial(cropped, crop=crop),
        num_threads=config.threads,
        num_workers=config.workers,
    )


def create_state(config: Config, model, rate, rng) -> fv.train.TrainState:
    """Initializes the model at the training size, and checks that it takes the evaluation size too."""
    size = config.size or fv.model_info(config.model).input_size[0]
    sample = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    state = fv.train.create_state(model, config.make_optimizer(rate), rng, sample, ema_decay=config.ema_decay)
    eval_size = centre_crop(config).crop
    try:
        jax.eval_shape(model.apply, state.variables, jax.ShapeDtypeStruct((1, eval_size, eval_size, 3), jnp.float32))
    except (flax.errors.FlaxError, ValueError) as error:
        raise ValueError(f"--eval-size must fit {config.model} at --size {size}; got {eval_size} ({error})") from error
    return state


def compile_steps(config: Config, num_classes: int):
    """Returns the train step, the eval step and the transform for the picture of samples."""
    a, info = fv.data.augment, fv.model_info(config.model)
    ops = [a.random_flip] if config.flip else []
    if config.lighting:
        ops.append(partial(a.random_lighting, std=config.lighting))
    mix = a.mixing(num_classes, mixup_alpha=config.mixup, cutmix_alpha=config.cutmix)
    steps = fv.train.compile_steps(
        fv.train.classification(label_smoothing=config.label_smoothing, aux_weight=config.aux_weight),
        train_transform=a.make_transform(*ops, mix=mix, mean=info.mean, std=info.std),
        eval_transform=a.make_transform(mean=info.mean, std=info.std),
        accumulate=config.accumulate,
        use_ema=config.ema_decay is not None,
        **config.step_options,
    )
    return *steps, a.make_transform(*ops)


def evaluate_weights(config: Config, photos) -> int:
    """Evaluates the weights of --weights with the preprocessing that belongs to them."""
    assert config.weights is not None
    classes = len(photos.classes)
    options = {"source": config.source, "dtype": jnp.bfloat16 if config.bfloat16 else None}
    model, variables = fv.weights.load_model(config.model, config.weights, **options)
    if model.num_classes != classes:
        raise ValueError(
            f"--weights must be for the {classes} classes of {photos.name}; got {config.weights} for "
            f"{model.num_classes}"
        )
    preprocessing = fv.weights.preprocessing_for(config.model, config.preprocessing or config.source or config.weights)
    published = config.preprocessing or config.weights in fv.weights.tags(config.model)
    if not published and (config.eval_size or config.eval_shorter):
        crop = centre_crop(config)
        preprocessing = dataclasses.replace(preprocessing, crop=crop.crop, resize=crop.resize)
    objective = fv.train.classification(label_smoothing=config.label_smoothing)
    _, eval_step = fv.train.compile_steps(objective, **config.step_options)
    state = fv.train.create_state(model, optax.identity(), jax.random.key(0), None, variables=variables)
    report(evaluation(config, eval_step, fv.data.Mapped(photos, preprocessing, repr(preprocessing)))(state), photos)
    return 0


def evaluation(config: Config, eval_step, source) -> fv.train.Evaluation:
    """Returns the evaluation on a source."""
    size = fv.train.eval_batch_size(config.eval_batch_size)
    batches = fv.data.eval_batches(source, size, num_threads=config.threads, num_workers=config.workers)
    return fv.train.Evaluation(eval_step, batches, config.input_timeout)


def save_weights(config: Config, variables, metrics, classes, overrides: dict[str, Any], path: Path) -> None:
    """Writes the weights that were evaluated, with their preprocessing and class names."""
    size = config.size or fv.model_info(config.model).input_size[0]
    fv.weights.save(
        path,
        variables,
        name=config.model,
        metadata={**metrics, "preprocessing": dataclasses.asdict(centre_crop(config))},
        input_size=(size, size),
        class_names=classes,
        **{k: v for k, v in overrides.items() if k not in ("dtype", "batch_norm", "ghost_size")},
    )


def report(metrics: dict[str, float], source) -> None:
    """Prints the accuracy and the loss."""
    top5 = f", top-5 {metrics['top5_accuracy']:.2%}" if "top5_accuracy" in metrics else ""
    fv.train.print_once(f"top-1 {metrics['accuracy']:.2%}{top5}, loss {metrics['loss']:.4f}, on {len(source)} images")


if __name__ == "__main__":
    fv.train.run_experiment(main, parse)
