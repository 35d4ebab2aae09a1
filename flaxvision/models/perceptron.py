"""The perceptron: a layer of threshold logic units and its learning rule.

F. Rosenblatt, "The perceptron: a probabilistic model for information storage and organization in the brain", 1958.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import heaviside
from flaxvision.models.backbone import Dtype, as_float32
from flaxvision.registry import register


class Perceptron(nn.Module):
    """One layer of threshold logic units over flattened features.

    A call returns the weighted sums `[N, num_classes]`, which are the logits. With `threshold=True` it returns the
    outputs of the units, 0 or 1. A single unit (`num_classes=1`) separates one class from the rest.

    Attributes:
        num_classes: Number of units; 0 returns the flattened features.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    num_classes: int = 1
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, threshold: bool = False) -> jax.Array:
        """Maps `x [N, ...]` to weighted sums `[N, num_classes]`, or to 0 and 1 with `threshold=True`.

        The result is float32 or wider.
        """
        del train
        x = x.reshape((x.shape[0], -1))
        if not self.num_classes:
            return as_float32(x)
        zeros = nn.initializers.zeros
        x = nn.Dense(self.num_classes, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=zeros, name="units")(
            x
        )
        x = as_float32(x)
        return heaviside(x) if threshold else x


def perceptron_update(params: Any, x: jax.Array, y: jax.Array, learning_rate: float = 1.0) -> tuple[Any, jax.Array]:
    """Updates a perceptron by one pass over the examples, in order, with Rosenblatt's rule `w += eta (y - y_hat) x`.

    Args:
        params: The parameters of `Perceptron`.
        x: Features `[N, F]`.
        y: Targets `[N, K]`, each 0 or 1.
        learning_rate: `eta`.

    Returns:
        The new parameters and the number of wrong outputs during the pass. If the classes are linearly separable, the
        number becomes 0 after finitely many passes (Novikoff 1962).

    Raises:
        ValueError: The shapes of `x`, `y` and the parameters do not match.
    """
    units = params["units"]
    features, outputs = units["kernel"].shape
    if x.ndim != 2 or x.shape[1] != features or y.shape != (x.shape[0], outputs):
        raise ValueError(
            f"x must be [N, {features}] and y [N, {outputs}] for a kernel {units['kernel'].shape}; "
            f"got x {x.shape} and y {y.shape}"
        )

    dtype = units["kernel"].dtype

    def show(carry, example):
        kernel, bias, wrong = carry
        xi, yi = example
        error = yi - heaviside(xi @ kernel + bias)
        kernel = kernel + jnp.asarray(learning_rate, dtype) * xi[:, None] * error[None, :]
        return (kernel, bias + jnp.asarray(learning_rate, dtype) * error, wrong + jnp.sum(error != 0)), None

    start = (units["kernel"], units["bias"], jnp.zeros((), jnp.int32))
    (kernel, bias, wrong), _ = jax.lax.scan(show, start, (x.astype(dtype), y.astype(dtype)))
    return {**params, "units": {"kernel": kernel, "bias": bias}}, wrong


register(
    Perceptron,
    "perceptron",
    task="classification",
    paper="Rosenblatt 1958, The perceptron",
    year=1958,
    input_size=(2,),
    channels=1,
    params=3,
)
