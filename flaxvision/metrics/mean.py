"""The weighted mean."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from flaxvision.metrics.accumulator import Accumulator


@struct.dataclass
class Mean(Accumulator):
    """A weighted mean of values.

    Attributes:
        total: Sum of weight times value, a scalar.
        weight: Sum of the weights, a scalar.

    Example:
        >>> Mean.of(jnp.asarray([1.0, 2.0, 9.0]), jnp.asarray([1.0, 1.0, 0.0])).compute()
        1.5
    """

    total: Any
    weight: Any

    @classmethod
    def init(cls) -> Self:
        """Returns the mean of nothing yet."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array | None = None) -> Self:
        """Returns the mean of one batch; see `update`."""
        weights = jnp.ones(jnp.shape(values), jnp.float32) if weights is None else weights.astype(jnp.float32)
        # `where` and not a product alone: a value of weight 0 may be NaN, as that of a padded row.
        return cls(jnp.sum(jnp.where(weights > 0, weights * values, 0.0)), jnp.sum(weights))

    def update(self, values: jax.Array, weights: jax.Array | None = None) -> Self:
        """Adds a batch of values.

        Args:
            values: Numbers of any shape. Those of weight 0 may be anything, NaN too.
            weights: Weights of the same shape, none negative, such as a batch's `mask`; None weighs every value 1.

        Returns:
            The mean of everything seen.
        """
        return self.merge(self.of(values, weights))

    def compute(self) -> float:
        """Returns the mean, NaN if the weights sum to 0."""
        return float(self.total) / float(self.weight) if float(self.weight) else float("nan")
