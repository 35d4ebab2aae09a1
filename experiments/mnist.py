r"""Trains a small network on digits, MNIST, Fashion-MNIST, CIFAR-10, a folder or an .npz.

    python experiments/mnist.py                                    # LeNet-5 on scikit-learn's real digits
    python experiments/mnist.py --dataset mnist --model lenet_dli --epochs 10 --batch-size 128 \
        --learning-rate 1e-3 --manual-dir FOLDER               # FOLDER has the four original files

The first needs neither a network nor a GPU. experiments/README.md has the results to expect, with commands and times.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Config:
    """Train, evaluate, checkpoint and resume a classifier."""

    dataset: str = "digits"
    """digits (embedded), mnist, fashion_mnist, cifar10, another TFDS name, a folder of class folders, or an .npz with
    train_image, train_label, test_image and test_label."""
    model: str = "lenet5"
    """A registered classifier: perceptron, mlp, lenet5, lenet5_modern, lenet_dli, fashion_cnn."""
    workdir: str | None = None
    """Where the run is kept; the same folder again goes on where it was. Default: runs/DATASET-MODEL-SEED."""
    data_dir: str | None = None
    """TFDS folder with the prepared sets. Default: TFDS' own."""
    manual_dir: str | None = None
    """Folder with a set's original files, from which TFDS prepares it without a network."""
    epochs: float = 30.0
    """Passes over the training set."""
    batch_size: int = 32
    """Images a step, over all devices."""
    optimizer: Literal["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "lamb", "lars"] = "adam"
    """Update rule."""
    learning_rate: float = 2e-3
    """The schedule's peak."""
    schedule: Literal["constant", "step", "cosine", "polynomial", "one_cycle"] = "one_cycle"
    """Course of the learning rate over the run."""
    warmup_epochs: float = 0.0
    """Linear rise before the schedule; one_cycle brings its own."""
    momentum: float = 0.9
    """Of momentum, nesterov, rmsprop and lars."""
    weight_decay: float = 0.0
    """On kernels; biases and norms are spared."""
    clip_norm: float | None = None
    """Largest global norm of the gradient."""
    accumulate: int = 1
    """Parts into which a batch is cut to save memory."""
    label_smoothing: float = 0.0
    """Share of each target spread over all classes."""
    loss: Literal["auto", "cross_entropy", "lenet_map"] = "auto"
    """lenet_map is LeNet-5's own criterion (LeCun 1998, equation 9); auto takes it for lenet5 alone."""
    hidden: tuple[int, ...] | None = None
    """Units of mlp's hidden layers. Default: 300 100."""
    flip: bool = False
    """Augment: mirror left and right."""
    shift: int = 0
    """Augment: move by up to this many pixels."""
    rotate: float = 0.0
    """Augment: turn by up to this many degrees."""
    zoom: float = 0.0
    """Augment: scale by up to this fraction."""
    cutout: int = 0
    """Augment: blank a square of this side."""
    mixup: float = 0.0
    """Augment: mixup's alpha."""
    ema_decay: float | None = None
    """Evaluate a moving average of the weights with this decay."""
    bfloat16: bool = False
    """Compute in bfloat16, with float32 parameters; for GPUs and TPUs."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the step is compiled for several devices."""
    validation: float = 0.0
    """Fraction of the training set held out to watch; 0 watches the test set and chooses nothing by it."""
    early_stopping: int = 0
    """Stop after this many evaluations without a lower loss, and test the best; needs --validation."""
    eval_every: float = 1.0
    """Epochs between evaluations and checkpoints."""
    log_every: int = 50
    """Steps between training records."""
    range_test: bool = False
    """Only raise the learning rate until the loss diverges, and draw lr_range.png."""
    seed: int = 0
    """Of the parameters, the data's order and all else."""
    progress: bool = True
    """Show the progress bar."""


def main(config: Config) -> int:
    """Runs the experiment; returns the process's exit status."""
    name = Path(config.dataset).stem if "/" in config.dataset or config.dataset.endswith(".npz") else config.dataset
    workdir = Path(config.workdir or f"runs/{name}-{config.model}-{config.seed}")
    info = fv.model_info(config.model)
    for field in ("epochs", "eval_every", "log_every", "batch_size", "accumulate", "learning_rate"):
        if not getattr(config, field) > 0:
            raise ValueError(f"--{field.replace('_', '-')} must be positive; got {getattr(config, field)}")
    if config.hidden is not None and config.model != "mlp":
        raise ValueError(f"--hidden is for --model mlp; {config.model} has its own widths")
    if config.early_stopping and not config.validation:
        raise ValueError("--early-stopping needs --validation: choosing by the test set would be no test")

    train, watched, test = load(config)
    classes = len(train.classes)
    overrides = {"num_classes": classes, "dtype": jnp.bfloat16 if config.bfloat16 else None}
    if config.hidden is not None:
        overrides["features"] = config.hidden
    if config.parallel == "pmap" and "axis_name" in fv.model_fields(fv.create_model(config.model)):
        overrides["axis_name"] = "data"
    model = fv.create_model(config.model, **overrides)

    batches = fv.data.train_batches(train, config.batch_size, seed=config.seed)
    num_steps = max(1, round(config.epochs * batches.steps_per_epoch))
    warmup = round(config.warmup_epochs * batches.steps_per_epoch)
    rate = fv.train.schedule(config.schedule, config.learning_rate, num_steps, warmup_steps=warmup)
    make_tx = functools.partial(
        fv.train.optimizer,
        config.optimizer,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    image = train[0]["image"]
    size = info.input_size if len(info.input_size) == 2 else image.shape[:2]
    augment, plain, view = transforms(config, train, size, classes)
    loss = {"auto": "lenet_map" if config.model == "lenet5" else "cross_entropy"}.get(config.loss, config.loss)
    objective = fv.train.classification(
        label_smoothing=config.label_smoothing,
        loss=fv.losses.lenet_map if loss == "lenet_map" else None,
    )
    train_step, eval_step = fv.train.compile_steps(
        objective,
        augment=augment,
        plain=plain,
        accumulate=config.accumulate,
        use_ema=config.ema_decay is not None,
        parallel=config.parallel,
    )

    init_rng, run_rng = jax.random.split(jax.random.key(config.seed))
    sample = jax.ShapeDtypeStruct((1, *size, image.shape[-1]), jnp.float32)

    def create_state(learning_rate):
        return fv.train.create_state(model, make_tx(learning_rate), init_rng, sample, ema_decay=config.ema_decay)

    if config.range_test:
        workdir.mkdir(parents=True, exist_ok=True)
        found = fv.train.learning_rate_range(create_state, train_step, batches.from_step(0), run_rng)
        fv.plot.lr_range(
            found.rates, found.losses, found.suggestion, path=workdir / "lr_range.png", diverged=found.turned
        )
        if not found.diverged:
            print(f"the loss did not diverge up to a rate of {found.rates[-1]:.3g}")
        print(f"the loss turned at {found.turned:.3g}; a third of it: --learning-rate {found.suggestion:.3g}")
        print(f"see {workdir / 'lr_range.png'}")
        return 0

    fv.train.open_workdir(workdir, config, free=("workdir", "data_dir", "manual_dir", "progress"))
    if view is not None:
        shown = next(batches.from_step(0))
        images = jax.jit(view)(run_rng, {"image": shown["image"][:32]})["image"]
        labels = [train.classes[k] for k in shown["label"][:32]]
        fv.plot.image_grid(np.asarray(images), labels, path=workdir / "samples.png")
    eval_size = max(config.batch_size, 500 // jax.device_count() * jax.device_count())
    evaluate = functools.partial(
        fv.train.evaluate, eval_step=eval_step, batches=fv.data.eval_batches(watched, eval_size)
    )
    by_loss = bool(config.early_stopping)
    result = fv.train.fit_in_workdir(
        workdir,
        create_state(rate),
        train_step,
        batches,
        model=config.model,
        overrides=overrides,
        num_steps=num_steps,
        rng=run_rng,
        evaluate=evaluate,
        eval_every=max(1, round(config.eval_every * batches.steps_per_epoch)),
        log_every=config.log_every,
        early_stopping=fv.train.EarlyStopping(config.early_stopping) if config.early_stopping else None,
        best_metric="loss" if by_loss else "accuracy",
        best_mode="min" if by_loss else "max",
        learning_rate=rate,
        progress=f"{config.model} on {name}" if config.progress else None,
    )
    if result.stopped in ("SIGTERM", "SIGINT"):
        return 0 if result.stopped == "SIGTERM" else 130

    final = fv.train.evaluate(result.state, eval_step, fv.data.eval_batches(test, eval_size))
    records = fv.train.read_records(workdir / "metrics.jsonl")
    fv.plot.curves(records, path=workdir / "curves.png", steps_per_epoch=batches.steps_per_epoch)
    print(f"test accuracy {final['accuracy']:.2%}, loss {final['loss']:.4f}, on {len(test)} images")
    print(f"see {workdir / 'curves.png'}; tensorboard --logdir {workdir / 'tensorboard'}")
    return 0


def load(config: Config):
    """The training, watched and test sources, checked."""
    read = functools.partial(
        fv.data.load, config.dataset, data_dir=config.data_dir, manual_dir=config.manual_dir, seed=config.seed
    )
    train, test = read("train"), read("test")
    watched = test
    if config.validation:
        rest, held_out = fv.data.stratified_split(train.label, fraction=config.validation, seed=config.seed)
        watched = fv.data.subset(train, held_out, f"{train.name}/validation")
        train = fv.data.subset(train, rest, f"{train.name}/rest")
    channels = np.shape(train[0]["image"])[-1] if len(train) and np.ndim(train[0]["image"]) == 3 else None
    for source in (train, test) if watched is test else (train, watched, test):
        fv.data.validate(source, channels=channels, num_classes=len(train.classes))
    return train, watched, test


def transforms(config: Config, train, size, classes):
    """The training's, the evaluation's and the picture's transforms, standardised by the training set's figures."""
    a = fv.data.augment
    mean, std = fv.data.channel_statistics(train)
    ops = []
    if config.flip:
        ops.append(a.random_flip)
    if config.rotate:
        ops.append(functools.partial(a.random_rotation, max_degrees=config.rotate))
    if config.zoom:
        ops.append(functools.partial(a.random_scale, factors=(1 - config.zoom, 1 + config.zoom)))
    if config.shift:
        ops.append(functools.partial(a.random_shift, max_shift=config.shift))
    if config.cutout:
        ops.append(functools.partial(a.random_cutout, size=config.cutout))
    mix = functools.partial(a.mixup, num_classes=classes, alpha=config.mixup) if config.mixup else None
    common = {"size": tuple(size), "mean": mean, "std": std}
    view = a.make_transform(*ops, size=tuple(size)) if ops else None
    return a.make_transform(*ops, mix=mix, **common), a.make_transform(**common), view


def leave(number, frame):
    """Outside the loop, which handles the signal itself, there is nothing to save."""
    sys.exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except (ValueError, ArithmeticError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
