"""A training recipe as data: what a paper's section on training says, in numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import optax

from flaxvision.train import optim


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; the defaults are those of ResNet on ImageNet (He 2015; Goyal 2017, section 5.1).

    Times are fractions of the run, so that a shortened run keeps its shape. An experiment subclasses it with its
    augmentations and lists its recipes in a table; a field's text is the help of its flag.

    Raises:
        ValueError: A number is out of range, naming the field.
    """

    epochs: float = 90.0
    """Passes over the training set."""
    batch_size: int = 256
    """Images a step, over all devices."""
    optimizer: Literal["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "lamb", "lars"] = "momentum"
    """Update rule."""
    learning_rate: float = 0.1
    """The schedule's peak."""
    schedule: Literal["constant", "step", "cosine", "polynomial", "one_cycle"] = "step"
    """Course of the learning rate over the run."""
    boundaries: tuple[float, ...] = (1 / 3, 2 / 3, 8 / 9)
    """Where step multiplies the rate by the factor, as fractions of the run."""
    factor: float = 0.1
    """What step multiplies by."""
    power: float = 1.0
    """Of polynomial."""
    warmup_epochs: float = 0.0
    """Linear rise before the schedule; one_cycle brings its own."""
    momentum: float = 0.9
    """Of momentum, nesterov, rmsprop and lars."""
    rms_decay: float = 0.9
    """Decay of rmsprop's squared gradient."""
    epsilon: float | None = None
    """Added to the denominator of rmsprop, adam, adamw and lamb. Default: the optimizer's own."""
    weight_decay: float = 1e-4
    """On kernels; biases and norms are spared."""
    clip_norm: float | None = None
    """Largest global norm of the gradient."""
    label_smoothing: float = 0.0
    """Share of each target spread over all classes."""
    aux_weight: float = 0.3
    """Weight of each auxiliary classifier, in models that have them; 0 builds none."""
    ema_decay: float | None = None
    """Evaluate a moving average of the weights with this decay a step."""
    accumulate: int = 1
    """Parts into which a batch is cut to save memory."""

    def __post_init__(self):
        for field in ("epochs", "batch_size", "learning_rate", "factor", "power", "accumulate", "epsilon"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} must be positive and finite; got {value}")
        for field in ("momentum", "rms_decay", "ema_decay"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{field} must be at least 0 and below 1; got {value}")
        for field in ("warmup_epochs", "weight_decay", "aux_weight"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must not be negative; got {getattr(self, field)}")
        if not all(0 < b < 1 for b in self.boundaries):
            raise ValueError(f"boundaries must be fractions of the run, between 0 and 1; got {self.boundaries}")

    def num_steps(self, steps_per_epoch: int) -> int:
        """The run's steps."""
        return max(1, round(self.epochs * steps_per_epoch))

    def rates(self, steps_per_epoch: int) -> optax.Schedule:
        """The learning rate by step; see `flaxvision.train.schedule`."""
        return optim.schedule(
            self.schedule,
            self.learning_rate,
            self.num_steps(steps_per_epoch),
            warmup_steps=round(self.warmup_epochs * steps_per_epoch),
            boundaries=self.boundaries,
            factor=self.factor,
            power=self.power,
        )

    def update_rule(self, rates: float | optax.Schedule) -> optax.GradientTransformation:
        """The optimizer; see `flaxvision.train.optimizer`."""
        return optim.optimizer(
            self.optimizer,
            rates,
            momentum=self.momentum,
            eps=self.epsilon,
            rms_decay=self.rms_decay,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )
