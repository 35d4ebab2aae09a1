"""Network for Fashion-MNIST from A. Géron, "Hands-On Machine Learning", 2nd edition, 2019, chapter 14."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, max_pool
from flaxvision.models.backbone import Dtype, as_float32, check_images
from flaxvision.registry import register


class FashionCNN(nn.Module):
    """A 7x7 convolution, then pairs of 3x3 convolutions between max-pools, then two dense layers with dropout.

    Attributes:
        num_classes: Number of logits; 0 returns the features of the last hidden layer.
        stage_features: Channels of the first convolution and of each pair.
        dense_features: Units of the hidden dense layers.
        dropout_rate: Rate of the dropout after each hidden dense layer.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """

    num_classes: int = 10
    stage_features: tuple[int, ...] = (64, 128, 256)
    dense_features: tuple[int, ...] = (128, 64)
    dropout_rate: float = 0.5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[N, H, W, C]`, 28x28x1 as published, to logits `[N, num_classes]` float32."""
        check_images(x)
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": nn.initializers.he_uniform()}
        first, *pairs = self.stage_features
        x = nn.relu(Conv(first, (7, 7), padding="SAME", name="conv1", **policy)(x))
        x = max_pool(x, 2)
        for i, features in enumerate(pairs, 2):
            x = nn.relu(Conv(features, (3, 3), padding="SAME", name=f"conv{i}a", **policy)(x))
            x = nn.relu(Conv(features, (3, 3), padding="SAME", name=f"conv{i}b", **policy)(x))
            x = max_pool(x, 2)
        x = x.reshape((x.shape[0], -1))
        for i, features in enumerate(self.dense_features, 1):
            x = nn.relu(nn.Dense(features, name=f"dense{i}", **policy)(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if self.num_classes:
            x = nn.Dense(self.num_classes, dtype=self.dtype, param_dtype=self.param_dtype, name="head")(x)
        return as_float32(x)


register(
    FashionCNN,
    "fashion_cnn",
    task="classification",
    paper="Géron 2019, Hands-On Machine Learning, chapter 14",
    year=2019,
    input_size=(28, 28),
    channels=1,
    params=1_413_834,
    mean=(0.2860,),
    std=(0.3530,),
)
