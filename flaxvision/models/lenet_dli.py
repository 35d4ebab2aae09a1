"""The small MNIST network of many deep-learning courses, from Keras' first `mnist_cnn` example.

It has two 3x3 convolutions, a max-pool, two dense layers and dropout. Its known result makes it a useful reference:
99.27 % on MNIST after nine epochs.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, max_pool
from flaxvision.models.backbone import Dtype, as_float32, check_images
from flaxvision.registry import register


class LeNetDLI(nn.Module):
    """Convolutions of 32 and 64 channels (3x3, unpadded, ReLU), max-pool, dropout, dense layer of 128, dropout, head.

    Attributes:
        num_classes: Number of logits; 0 returns the 128 features.
        pool_dropout_rate: Rate of the dropout after the pool.
        dropout_rate: Rate of the dropout after the hidden dense layer.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    num_classes: int = 10
    pool_dropout_rate: float = 0.25
    dropout_rate: float = 0.5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[N, H, W, C]`, 28x28x1 as published, to logits `[N, num_classes]` float32."""
        check_images(x)
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": nn.initializers.he_uniform()}
        x = nn.relu(Conv(32, (3, 3), padding="VALID", name="conv1", **policy)(x))
        x = nn.relu(Conv(64, (3, 3), padding="VALID", name="conv2", **policy)(x))
        x = max_pool(x, 2)
        x = nn.Dropout(self.pool_dropout_rate, deterministic=not train)(x)
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(128, name="dense", **policy)(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if self.num_classes:
            x = nn.Dense(self.num_classes, dtype=self.dtype, param_dtype=self.param_dtype, name="head")(x)
        return as_float32(x)


register(
    LeNetDLI,
    "lenet_dli",
    task="classification",
    paper="Keras examples, mnist_cnn",
    year=2015,
    input_size=(28, 28),
    channels=1,
    params=1_199_882,
    mean=(0.1307,),
    std=(0.3081,),
)
