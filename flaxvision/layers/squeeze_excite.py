"""The squeeze-and-excitation block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers.pooling import global_avg_pool


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from the spatial means of all channels.

    Hu, Shen and Sun 2018, "Squeeze-and-Excitation Networks", section 3: squeeze (equation 2), excitation
    `s = sigmoid(W2 relu(W1 z))` (equation 3), scale (equation 4). Both dense layers have biases, as in the networks
    that the authors released.

    Attributes:
        reduction: Channels per hidden unit, the paper's r.
        gate: Activation of the gates.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters, `reduce [C, C // reduction]` and `expand [C // reduction, C]`.
        kernel_init: Initializer of both kernels.
    """

    reduction: int = 16
    gate: Callable[[jax.Array], jax.Array] = nn.sigmoid
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, *spatial, C]` to the same shape.

        Raises:
            ValueError: `reduction` is less than 1 or more than the number of channels.
        """
        channels = x.shape[-1]
        if not 1 <= self.reduction <= channels:
            raise ValueError(f"reduction must be between 1 and the {channels} channels; got {self.reduction}")
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": self.kernel_init}
        s = nn.relu(nn.Dense(channels // self.reduction, name="reduce", **policy)(global_avg_pool(x)))
        s = self.gate(nn.Dense(channels, name="expand", **policy)(s))
        return x * s.reshape(s.shape[0], *(1,) * (x.ndim - 2), channels)
