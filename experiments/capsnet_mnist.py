r"""Trains CapsNet on MNIST and draws reconstructions from its capsules (Sabour, Frosst and Hinton 2017).

    python experiments/capsnet_mnist.py                            # scikit-learn's handwritten digits
    python experiments/capsnet_mnist.py --dataset mnist --epochs 5 --batch-size 100 \
        --manual-dir FOLDER                                        # FOLDER has the four original files

The first command needs no download and no GPU. Two cores of an Intel Xeon (AVX-512) train on 70 images per second: 7
minutes for 20 epochs of the digits, 72 minutes for 5 epochs of MNIST, which reached a test accuracy of 99.30 % (one
run). The paper reports an error of 0.25 % after many more epochs. Besides curves, records and checkpoints, the work
directory gets:

    reconstructions.png    test images, and below them the reconstructions from their longest capsules
    perturbations.png      reconstructions of one digit while each of the 16 numbers of its capsule is changed by -0.25
                           to +0.25 in steps of 0.05 (figure 4 of the paper)
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import flaxvision as fv


@dataclasses.dataclass(frozen=True)
class Config(fv.train.RunSettings):
    """Train, evaluate, draw and resume CapsNet."""

    dataset: str = "digits"
    """digits (embedded), mnist, fashion_mnist, another TFDS name, a directory, or an .npz; see flaxvision.data.load.
    Images are brought to 28x28 pixels."""
    epochs: float = 20.0
    """Passes over the training set."""
    batch_size: int = 32
    """Images per step, over all devices."""
    learning_rate: float = 1e-3
    """Initial learning rate of Adam."""
    decay: float = 0.02
    """Final learning rate as a fraction of the initial one; the decay is exponential."""
    shift: int = 2
    """Augmentation: translate by up to this many pixels, as in the paper."""
    routing_iterations: int = 3
    """Iterations of the routing."""
    reconstruction_weight: float = 5e-4
    """Weight of the squared error of the reconstruction; 0 builds no decoder."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights, which is then evaluated. Default: no average."""
    conv_features: int = 256
    """Channels of the first convolution."""
    primary_features: int = 32
    """Primary capsules at each position."""
    log_every: int = 50
    """Steps between training records."""


def main(config: Config) -> int:
    """Runs the experiment and returns the exit status of the process."""
    config.start()
    check(config)
    train, test = load(config)
    name, size = Path(config.dataset).stem, fv.model_info("capsnet").input_size
    workdir = Path(config.workdir or f"runs/{name}-capsnet-{config.seed}")
    overrides = model_overrides(config, train)
    model = fv.create_model("capsnet", **overrides)
    train_transform, eval_transform = transforms(config, size)
    train_step, eval_step = fv.train.compile_steps(
        fv.train.capsule(reconstruction_weight=config.reconstruction_weight),
        train_transform=train_transform,
        eval_transform=eval_transform,
        use_ema=config.ema_decay is not None,
        **config.step_options,
    )
    batches = fv.data.train_batches(train, config.batch_size, seed=config.seed)
    num_steps = max(1, round(config.epochs * batches.steps_per_epoch))
    rate = optax.exponential_decay(config.learning_rate, num_steps, config.decay)
    init_rng, run_rng = jax.random.split(jax.random.key(config.seed))
    sample = jax.ShapeDtypeStruct((1, *overrides["image_shape"]), jnp.float32)
    state = fv.train.create_state(model, fv.train.optimizer("adam", rate), init_rng, sample, ema_decay=config.ema_decay)

    fv.train.open_workdir(workdir, config, free=config.FREE)
    held_out = fv.data.eval_batches(test, fv.train.eval_batch_size(max(config.batch_size, 200)))
    result = fv.train.fit_in_workdir(
        workdir,
        state,
        train_step,
        batches,
        model="capsnet",
        overrides=overrides,
        num_steps=num_steps,
        rng=run_rng,
        evaluate=fv.train.Evaluation(eval_step, held_out, config.input_timeout),
        eval_every=max(1, round(config.eval_every * batches.steps_per_epoch)),
        learning_rate=rate,
        **config.fit_options(f"capsnet on {name}"),
    )
    if result.exit_status is not None:
        return result.exit_status
    variables = fv.train.collect(result.state.variables if config.ema_decay is None else result.state.ema)
    if jax.process_index() != 0:
        return 0

    records = fv.train.read_records(workdir / "metrics.jsonl")
    fv.plot.curves(records, path=workdir / "curves.png", steps_per_epoch=batches.steps_per_epoch)
    final = result.metrics
    print(f"test accuracy {final['accuracy']:.2%}, margin loss {final['margin']:.4f}, on {len(test)} images")
    if config.reconstruction_weight:
        draw(model, variables, test, eval_transform, workdir)
        per_pixel = final["reconstruction"] / np.prod(overrides["image_shape"])
        print(f"mean squared error of the reconstructions {per_pixel:.4f} per pixel, in [0, 1]")
    print(f"see the pictures in {workdir}; tensorboard --logdir {workdir / 'tensorboard'}")
    return 0


def check(config: Config) -> None:
    """Raises ValueError for settings that are out of range."""
    sizes = ("batch_size", "conv_features", "primary_features", "routing_iterations")
    for field in (*sizes, "epochs", "eval_every", "log_every", "learning_rate", "decay"):
        if not 0 < getattr(config, field) < math.inf:
            raise ValueError(f"--{field.replace('_', '-')} must be positive and finite; got {getattr(config, field)}")
    if config.shift < 0:
        raise ValueError(f"--shift must not be negative; got {config.shift}")


def load(config: Config):
    """Loads and checks the training and test sources."""
    if config.dataset == "digits":
        fv.train.print_once(
            "training on scikit-learn's digits, not MNIST; use --dataset mnist --manual-dir FOLDER for MNIST"
        )
    read = partial(
        fv.data.load, config.dataset, data_dir=config.data_dir, manual_dir=config.manual_dir, seed=config.seed
    )
    train, test = read("train"), read("test")
    for source in (train, test):
        channels = np.shape(train[0]["image"])[-1]
        fv.data.validate(source, channels=channels, num_classes=len(train.classes))
    return train, test


def model_overrides(config: Config, train) -> dict[str, Any]:
    """Returns the fields of the model that differ from its defaults."""
    fields = fv.model_fields(fv.create_model("capsnet"))
    return config.model_overrides(fields, len(train.classes)) | {
        "routing_iterations": config.routing_iterations,
        "decoder": config.reconstruction_weight > 0,
        "image_shape": (*fv.model_info("capsnet").input_size, train[0]["image"].shape[-1]),
        "conv_features": config.conv_features,
        "primary_features": config.primary_features,
    }


def transforms(config: Config, size):
    """Returns the transforms of training and of evaluation. Pixels are in [0, 1], as in the paper."""
    a = fv.data.augment
    ops = [partial(a.to_size, size=size)]  # first, so that --shift counts pixels of this size
    if config.shift:
        ops.append(partial(a.random_shift, max_shift=config.shift))
    return a.make_transform(*ops), a.make_transform(size=size)


def draw(model, variables, test, transform, workdir: Path) -> None:
    """Draws one test image per class with its reconstruction, and the reconstructions of a perturbed capsule."""
    labels = np.asarray([test[i]["label"] for i in range(min(len(test), 1000))])
    rows = [int(np.argmax(labels == k)) for k in range(len(test.classes)) if k in labels]
    raw = {"image": np.stack([test[i]["image"] for i in rows])}
    images = transform(jax.random.key(0), raw)["image"]
    capsules = jax.jit(partial(model.apply, method="encode"))(variables, images)
    decode = jax.jit(partial(model.apply, method="decode"))
    longest = np.argmax(fv.layers.capsule_lengths(capsules), axis=-1)
    texts = [test.classes[labels[i]] for i in rows] + [f"as {test.classes[k]}" for k in longest]
    pictures = np.concatenate([images, decode(variables, capsules)])
    fv.plot.image_grid(pictures, texts, columns=len(rows), path=workdir / "reconstructions.png")

    # Section 5.1 of the paper: change one number at a time by -0.25 to 0.25 in steps of 0.05.
    shifts = np.arange(-5, 6) * 0.05
    shown = len(rows) // 2
    dims = capsules.shape[-1]
    moved = np.repeat(np.asarray(capsules[shown])[None], dims * len(shifts), axis=0)
    moved = moved.reshape(dims, len(shifts), *capsules.shape[1:])
    for dim in range(dims):
        moved[dim, :, longest[shown], dim] += shifts
    moved = moved.reshape(-1, *capsules.shape[1:])
    drawings = np.asarray(decode(variables, moved, np.full(len(moved), longest[shown])))
    drawings = np.pad(drawings, ((0, 0), (0, 0), (1, 1), (0, 0)), constant_values=1)
    strips = drawings.reshape(dims, len(shifts), *drawings.shape[1:]).swapaxes(1, 2)
    strips = strips.reshape(dims, drawings.shape[1], -1, drawings.shape[-1])
    texts = [f"number {dim + 1} of {dims}" for dim in range(dims)]
    fv.plot.image_grid(strips, texts, columns=2, path=workdir / "perturbations.png")


if __name__ == "__main__":
    fv.train.run_experiment(main, lambda: tyro.cli(Config, description=__doc__))
