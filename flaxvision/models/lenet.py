"""LeNet-5, as published and as usually taught.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition", Proceedings of
the IEEE, 1998, section II.B. Layer names follow the paper: C convolution, S subsampling, F fully connected.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxvision.layers import RBF, Conv, TrainableAvgPool, avg_pool, digit_codes, random_codes
from flaxvision.layers.lowering import conv_general_dilated
from flaxvision.models.backbone import Dtype, as_float32
from flaxvision.registry import register

# Table I of the paper: the maps of S2 that each map of C3 sees.
C3_INPUTS = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)  # fmt: skip


def scaled_tanh(x: jax.Array) -> jax.Array:
    """Applies the paper's squashing function, `1.7159 tanh(2x/3)` (equation 6 and appendix A)."""
    return 1.7159 * jnp.tanh(x * (2 / 3))


def _uniform_by_fan_in(fan_in: int):
    # Appendix A: uniform between -2.4/F and 2.4/F, F the number of inputs of the unit.
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -2.4 / fan_in, 2.4 / fan_in)

    return init


class PartialConv(nn.Module):
    """Unpadded convolution in which each output map sees only some of the input maps.

    Only existing connections have parameters: `kernel` is `[kh, kw, connections]`.

    Attributes:
        connections: For each output map, the indices of the input maps that it sees.
        kernel_size: Height and width of the window.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    connections: tuple[tuple[int, ...], ...]
    kernel_size: tuple[int, int]
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x [N, H, W, C]` to `[N, H - kh + 1, W - kw + 1, len(connections)]`."""
        source = np.concatenate([np.asarray(c) for c in self.connections])
        target = np.repeat(np.arange(len(self.connections)), [len(c) for c in self.connections])
        window = int(np.prod(self.kernel_size))

        def init(key, shape, dtype):
            fan_in = window * np.asarray([len(self.connections[t]) for t in target], np.float32)
            limit = jnp.asarray(2.4 / fan_in, dtype).reshape((1, 1, -1))
            return limit * jax.random.uniform(key, shape, dtype, -1, 1)

        kernel = self.param("kernel", init, (*self.kernel_size, len(source)), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (len(self.connections),), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        dense = jnp.zeros((*self.kernel_size, x.shape[-1], len(self.connections)), kernel.dtype)
        dense = dense.at[:, :, source, target].set(kernel)
        x = conv_general_dilated(x, dense, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x + bias.reshape((1, 1, 1, -1))


class LeNet5(nn.Module):
    """LeNet-5 as published: trainable subsampling, a partially connected C3, and a fixed RBF output layer.

    The logits are the negative squared distances of the RBF units (equation 7), so the largest logit belongs to the
    nearest code. `flaxvision.losses.lenet_map` is the paper's criterion (equation 9) for these logits. Images must have
    32x32 pixels; in the paper the background is -0.1 and the ink is 1.175.

    Deviation: the subsampling layers use the same squashing function as the other layers instead of a sigmoid.

    Attributes:
        num_classes: Number of logits. The codes are bitmaps of the digits for 10 classes and seeded random codes
            otherwise; 0 returns the 84 features of F6.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    num_classes: int = 10
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[N, 32, 32, C]` to logits `[N, num_classes]` float32."""
        del train
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        _check_size(x)
        init = _uniform_by_fan_in(25 * x.shape[-1])
        x = scaled_tanh(Conv(6, (5, 5), padding="VALID", kernel_init=init, name="c1", **policy)(x))
        x = scaled_tanh(TrainableAvgPool(name="s2", **policy)(x))
        x = scaled_tanh(PartialConv(C3_INPUTS, (5, 5), name="c3", **policy)(x))
        x = scaled_tanh(TrainableAvgPool(name="s4", **policy)(x))
        x = scaled_tanh(Conv(120, (5, 5), padding="VALID", kernel_init=_uniform_by_fan_in(400), name="c5", **policy)(x))
        x = x.reshape((x.shape[0], -1))
        x = scaled_tanh(nn.Dense(84, kernel_init=_uniform_by_fan_in(120), name="f6", **policy)(x))
        x = as_float32(x)
        if not self.num_classes:
            return x
        codes = digit_codes() if self.num_classes == 10 else random_codes(self.num_classes, 84)
        return -RBF(self.num_classes, codes=codes, name="output")(x)


class LeNet5Modern(nn.Module):
    """LeNet-5 as usually taught: a fully connected C3, average pools, tanh, and a linear output layer.

    Attributes:
        num_classes: Number of logits; 0 returns the 84 features of F6.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    num_classes: int = 10
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[N, 32, 32, C]` to logits `[N, num_classes]` float32."""
        del train
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": nn.initializers.glorot_uniform()}
        conv5 = functools.partial(Conv, kernel_size=(5, 5), padding="VALID", **policy)
        _check_size(x)
        x = avg_pool(jnp.tanh(conv5(6, name="c1")(x)), 2)
        x = avg_pool(jnp.tanh(conv5(16, name="c3")(x)), 2)
        x = jnp.tanh(conv5(120, name="c5")(x))
        x = x.reshape((x.shape[0], -1))
        x = jnp.tanh(nn.Dense(84, name="f6", **policy)(x))
        if self.num_classes:
            x = nn.Dense(self.num_classes, name="output", **policy)(x)
        return as_float32(x)


def _check_size(x: jax.Array) -> None:
    if x.ndim != 4 or x.shape[1:3] != (32, 32):
        raise ValueError(
            f"images must have the shape [N, 32, 32, C] (pad 28x28 digits by 2 on every side); got {x.shape}"
        )


_PAPER = {
    "task": "classification",
    "paper": "LeCun et al. 1998, Gradient-based learning applied to document recognition",
    "year": 1998,
    "input_size": (32, 32),
    "channels": 1,
}
# The paper's normalization of MNIST, at 32x32 pixels: background -0.1, ink 1.175.
register(LeNet5, "lenet5", params=60_000, mean=(0.1 / 1.275,), std=(1 / 1.275,), **_PAPER)
register(LeNet5Modern, "lenet5_modern", params=61_706, mean=(0.1 / 1.275,), std=(1 / 1.275,), **_PAPER)
