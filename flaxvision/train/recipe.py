"""A training recipe as data: the numbers of a paper's section on training."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import optax

from flaxvision.train import optim


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are those of ResNet on ImageNet (He 2015; Goyal 2017, section 5.1).

    Points in time are fractions of the run, so that a shorter run has the same schedule. Experiments subclass it with
    their augmentations and keep their recipes in a table. The text below a field is the help text of its flag.

    Raises:
        ValueError: A field is out of range.
    """

    epochs: float = 90.0
    """Passes over the training set."""
    batch_size: int = 256
    """Images per step, over all devices."""
    optimizer: Literal["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "lamb", "lars"] = "momentum"
    """Optimizer."""
    learning_rate: float = 0.1
    """Peak learning rate."""
    schedule: Literal["constant", "step", "cosine", "polynomial", "one_cycle"] = "step"
    """Learning-rate schedule."""
    boundaries: tuple[float, ...] = (1 / 3, 2 / 3, 8 / 9)
    """Points at which the step schedule multiplies the learning rate by --factor, as fractions of the run."""
    factor: float = 0.1
    """Factor of the step schedule."""
    power: float = 1.0
    """Power of the polynomial schedule."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the schedule; one_cycle has its own warm-up."""
    momentum: float = 0.9
    """Momentum of momentum, nesterov, rmsprop and lars."""
    rms_decay: float = 0.9
    """Decay of rmsprop's average of squared gradients."""
    epsilon: float | None = None
    """Epsilon of rmsprop, adam, adamw and lamb. Default: that of the optimizer."""
    weight_decay: float = 1e-4
    """Weight decay of kernels; biases and normalization parameters have none."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; larger gradients are scaled down."""
    ema_decay: float | None = None
    """Decay per step of a moving average of the weights, which is then evaluated. Default: no average."""
    accumulate: int = 1
    """Number of parts into which a batch is split to save memory."""
    frozen: tuple[str, ...] = ()
    """Shell patterns of the parameters that stay as they are, such as 'backbone/stem*'."""

    def __post_init__(self):
        for field in ("epochs", "batch_size", "learning_rate", "factor", "power", "accumulate", "epsilon"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} must be positive and finite; got {value}")
        for field in ("momentum", "rms_decay", "ema_decay"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{field} must be in [0, 1); got {value}")
        for field in ("warmup_epochs", "weight_decay"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must not be negative; got {getattr(self, field)}")
        if not all(0 < b < 1 for b in self.boundaries):
            raise ValueError(f"boundaries must be fractions of the run in (0, 1); got {self.boundaries}")

    def num_steps(self, steps_per_epoch: int) -> int:
        """Returns the number of steps of the run.

        Args:
            steps_per_epoch: Number of batches in the training set.
        """
        return max(1, round(self.epochs * steps_per_epoch))

    def learning_rate_schedule(self, steps_per_epoch: int) -> optax.Schedule:
        """Makes the learning-rate schedule, a function of the step; see `flaxvision.train.schedule`.

        Args:
            steps_per_epoch: Number of batches in the training set.
        """
        return optim.schedule(
            self.schedule,
            self.learning_rate,
            self.num_steps(steps_per_epoch),
            warmup_steps=round(self.warmup_epochs * steps_per_epoch),
            boundaries=self.boundaries,
            factor=self.factor,
            power=self.power,
        )

    def make_optimizer(self, learning_rate: float | optax.Schedule) -> optax.GradientTransformation:
        """Makes the optimizer; see `flaxvision.train.optimizer`.

        Args:
            learning_rate: A number or a schedule, such as that of `learning_rate_schedule`.
        """
        return optim.optimizer(
            self.optimizer,
            learning_rate,
            momentum=self.momentum,
            eps=self.epsilon,
            rms_decay=self.rms_decay,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            frozen=self.frozen,
        )
