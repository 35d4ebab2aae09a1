r"""Trains a small network on digits, MNIST, Fashion-MNIST, CIFAR-10, a folder or an .npz.

    python experiments/mnist.py                                # LeNet-5 on scikit-learn's handwritten digits
    python experiments/mnist.py --dataset mnist --model lenet_dli --epochs 10 --batch-size 128 \
        --learning-rate 1e-3 --manual-dir FOLDER               # FOLDER has the four original files

The first command needs no download and no GPU; on 2 CPU cores it takes 20 seconds and reaches a test accuracy of 98.6 %
(mean of 3 seeds). The second takes 11 minutes there and reaches 99.27 %. experiments/README.md has all results.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Config(fv.train.RunSettings):
    """Train, evaluate, checkpoint and resume a classifier."""

    dataset: str = "digits"
    """digits (embedded), mnist, fashion_mnist, cifar10, another TFDS name, a folder of class folders, or an .npz with
    train_image, train_label, test_image and test_label."""
    model: str = "lenet5"
    """A registered classifier: perceptron, mlp, lenet5, lenet5_modern, lenet_dli, fashion_cnn."""
    epochs: float = 30.0
    """Passes over the training set."""
    batch_size: int = 32
    """Images per step, over all devices."""
    optimizer: Literal["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "lamb", "lars"] = "adam"
    """Optimizer."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    schedule: Literal["constant", "step", "cosine", "polynomial", "one_cycle"] = "one_cycle"
    """Learning-rate schedule."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the schedule; one_cycle has its own warm-up."""
    momentum: float = 0.9
    """Momentum of momentum, nesterov, rmsprop and lars."""
    weight_decay: float = 0.0
    """Weight decay of kernels; biases and normalization parameters have none."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; larger gradients are scaled down."""
    accumulate: int = 1
    """Number of parts into which a batch is split to save memory."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""
    loss: Literal["auto", "cross_entropy", "lenet_map"] = "auto"
    """lenet_map is the criterion of LeNet-5 (LeCun 1998, equation 9); auto uses it for lenet5 only."""
    hidden: tuple[int, ...] | None = None
    """Units of the hidden layers of mlp. Default: 300 100."""
    flip: bool = False
    """Augmentation: mirror left and right."""
    shift: int = 0
    """Augmentation: translate by up to this many pixels."""
    rotate: float = 0.0
    """Augmentation: rotate by up to this many degrees."""
    zoom: float = 0.0
    """Augmentation: zoom by up to this fraction."""
    cutout: int = 0
    """Augmentation: blank a square of this side."""
    mixup: float = 0.0
    """Augmentation: alpha of mixup."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights, which is then evaluated. Default: no average."""
    validation: float = 0.0
    """Share of the training set held out for validation. With 0, the test set is evaluated during training, and nothing
    is chosen by it."""
    early_stopping: int = 0
    """Stop after this many evaluations without a lower loss and test the best checkpoint; requires --validation."""
    log_every: int = 50
    """Steps between training records."""
    range_test: bool = False
    """Only run a learning-rate range test and draw lr_range.png."""


def main(config: Config) -> int:
    """Runs the experiment and returns the exit status of the process."""
    config.start()
    check(config)
    name = Path(config.dataset).stem if "/" in config.dataset or config.dataset.endswith(".npz") else config.dataset
    workdir = Path(config.workdir or f"runs/{name}-{config.model}-{config.seed}")
    train, validation, test = load(config)
    overrides = model_overrides(config, len(train.classes))
    model = fv.create_model(config.model, **overrides)
    image, info = train[0]["image"], fv.model_info(config.model)
    size = info.input_size if len(info.input_size) == 2 else image.shape[:2]
    train_transform, eval_transform, view = transforms(config, train, size)
    train_step, eval_step = fv.train.compile_steps(
        objective(config),
        train_transform=train_transform,
        eval_transform=eval_transform,
        accumulate=config.accumulate,
        use_ema=config.ema_decay is not None,
        **config.step_options,
    )
    batches = fv.data.train_batches(train, config.batch_size, seed=config.seed)
    init_rng, run_rng = jax.random.split(jax.random.key(config.seed))

    def create_state(learning_rate):
        tx = fv.train.optimizer(
            config.optimizer,
            learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
        )
        sample = jax.ShapeDtypeStruct((1, *size, image.shape[-1]), jnp.float32)
        return fv.train.create_state(model, tx, init_rng, sample, ema_decay=config.ema_decay)

    if config.range_test:
        return range_test(create_state, train_step, batches, run_rng, workdir)

    fv.train.open_workdir(workdir, config, free=config.FREE)
    if view is not None:
        fv.train.draw_samples(workdir / "samples.png", batches, view, run_rng)
    options = {"model": config.model, "overrides": overrides, "rng": run_rng}
    options |= config.fit_options(f"{config.model} on {name}")
    evaluate = evaluation(config, eval_step)
    result = fit(config, workdir, create_state, train_step, batches, evaluate(validation), options)
    if result.exit_status is not None:
        return result.exit_status
    final = evaluate(test)(result.state)
    if jax.process_index() != 0:
        return 0
    records = fv.train.read_records(workdir / "metrics.jsonl")
    fv.plot.curves(records, path=workdir / "curves.png", steps_per_epoch=batches.steps_per_epoch)
    print(f"test accuracy {final['accuracy']:.2%}, loss {final['loss']:.4f}, on {len(test)} images")
    print(f"see {workdir / 'curves.png'}; tensorboard --logdir {workdir / 'tensorboard'}")
    return 0


def check(config: Config) -> None:
    """Raises ValueError for settings that are out of range or do not go together."""
    for field in ("epochs", "eval_every", "log_every", "batch_size", "accumulate", "learning_rate"):
        if not getattr(config, field) > 0:
            raise ValueError(f"--{field.replace('_', '-')} must be positive; got {getattr(config, field)}")
    fv.model_info(config.model)  # raises for an unknown name
    if config.hidden is not None and config.model != "mlp":
        raise ValueError(f"--hidden must be left out for models other than mlp; got --model {config.model}")
    if config.early_stopping and not config.validation:
        raise ValueError("--validation must be above 0 with --early-stopping, which must not use the test set; got 0")


def load(config: Config):
    """Loads and checks the training, validation and test sources; without --validation the test source is both."""
    read = partial(
        fv.data.load, config.dataset, data_dir=config.data_dir, manual_dir=config.manual_dir, seed=config.seed
    )
    train, test = read("train"), read("test")
    validation = test
    if config.validation:
        rest, held_out = fv.data.stratified_split(train.label, fraction=config.validation, seed=config.seed)
        validation = fv.data.subset(train, held_out, f"{train.name}/validation")
        train = fv.data.subset(train, rest, f"{train.name}/rest")
    channels = np.shape(train[0]["image"])[-1] if len(train) and np.ndim(train[0]["image"]) == 3 else None
    for source in (train, test) if validation is test else (train, validation, test):
        fv.data.validate(source, channels=channels, num_classes=len(train.classes))
    return train, validation, test


def model_overrides(config: Config, num_classes: int) -> dict[str, Any]:
    """Returns the fields of the model that differ from its defaults."""
    overrides = config.model_overrides(fv.model_fields(fv.create_model(config.model)), num_classes)
    if config.hidden is not None:
        overrides["features"] = config.hidden
    return overrides


def objective(config: Config) -> fv.train.Objective:
    """Returns the objective that --loss names."""
    loss = {"auto": "lenet_map" if config.model == "lenet5" else "cross_entropy"}.get(config.loss, config.loss)
    return fv.train.classification(
        label_smoothing=config.label_smoothing, loss=fv.losses.lenet_map if loss == "lenet_map" else None
    )


def transforms(config: Config, train, size):
    """Returns the transforms of training, of evaluation and, with augmentations, of the picture of samples.

    Pixels are standardized by the statistics of the training set.
    """
    a = fv.data.augment
    mean, std = fv.data.channel_statistics(train)
    ops = []
    if config.flip:
        ops.append(a.random_flip)
    if config.rotate:
        ops.append(partial(a.random_rotation, max_degrees=config.rotate))
    if config.zoom:
        ops.append(partial(a.random_scale, factors=(1 - config.zoom, 1 + config.zoom)))
    if config.shift:
        ops.append(partial(a.random_shift, max_shift=config.shift))
    if config.cutout:
        ops.append(partial(a.random_cutout, size=config.cutout))
    mix = partial(a.mixup, num_classes=len(train.classes), alpha=config.mixup) if config.mixup else None
    common = {"size": tuple(size), "mean": mean, "std": std}
    view = a.make_transform(*ops, size=tuple(size)) if ops else None
    return a.make_transform(*ops, mix=mix, **common), a.make_transform(**common), view


def evaluation(config: Config, eval_step):
    """Returns `source -> Evaluation`."""
    size = fv.train.eval_batch_size(max(config.batch_size, 500))
    return lambda source: fv.train.Evaluation(eval_step, fv.data.eval_batches(source, size), config.input_timeout)


def fit(config: Config, workdir: Path, create_state, train_step, batches, evaluate, options) -> fv.train.FitResult:
    """Trains in the work directory. Early stopping keeps the checkpoint with the lowest loss."""
    num_steps = max(1, round(config.epochs * batches.steps_per_epoch))
    warmup = round(config.warmup_epochs * batches.steps_per_epoch)
    rate = fv.train.schedule(config.schedule, config.learning_rate, num_steps, warmup_steps=warmup)
    if config.early_stopping:
        stopping = fv.train.EarlyStopping(config.early_stopping)
        options |= {"early_stopping": stopping, "best_metric": None}
    return fv.train.fit_in_workdir(
        workdir,
        create_state(rate),
        train_step,
        batches,
        num_steps=num_steps,
        evaluate=evaluate,
        eval_every=max(1, round(config.eval_every * batches.steps_per_epoch)),
        learning_rate=rate,
        **options,
    )


def range_test(create_state, train_step, batches, rng, workdir: Path) -> int:
    """Runs the learning-rate range test and draws it. With several processes, process 0 does."""
    found = fv.train.learning_rate_range(create_state, train_step, batches.from_step(0), rng)
    if jax.process_index() != 0:
        return 0
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "lr_range.png"
    fv.plot.lr_range(found.rates, found.losses, found.suggestion, path=path, diverged=found.turned)
    if not found.diverged:
        print(f"the loss did not diverge up to a learning rate of {found.rates[-1]:.3g}")
    print(f"the loss was lowest at {found.turned:.3g}; a third of it: --learning-rate {found.suggestion:.3g}")
    print(f"see {path}")
    return 0


if __name__ == "__main__":
    fv.train.run_experiment(main, lambda: tyro.cli(Config, description=__doc__))
