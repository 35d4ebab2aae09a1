"""CapsNet.

S. Sabour, N. Frosst, G. Hinton, "Dynamic routing between capsules", NIPS 2017: figure 1 (the network) and figure 2
(the decoder). The logits are the lengths of the digit capsules; `flaxvision.train.capsule` is the paper's objective.

The paper does not say how its parameters start: convolutions and dense layers by Glorot's rule here, the matrices
between capsules with deviation 0.1. It gives the layers between capsules no bias.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, PrimaryCapsules, RoutedCapsules, capsule_lengths
from flaxvision.models.backbone import check_images
from flaxvision.registry import register

Dtype = Any


class CapsuleDecoder(nn.Module):
    """Draws the image that a capsule stands for (section 4.1): dense layers with ReLU, the last one with a sigmoid.

    Attributes:
        image_shape: Height, width and channels of the image.
        features: Units of the hidden layers.
        dtype: Of the computation.
        param_dtype: Of the parameters.
    """

    image_shape: tuple[int, int, int] = (28, 28, 1)
    features: tuple[int, ...] = (512, 1024)
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, capsules: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """Maps capsules `[N, J, E]` to images `[N, *image_shape]` in [0, 1], float32.

        Args:
            capsules: One capsule for each class.
            label: Classes `[N]` whose capsules are drawn; None for the longest of each image. The others are zeros.
        """
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": nn.initializers.glorot_uniform()}
        chosen = jnp.argmax(capsule_lengths(capsules), axis=-1) if label is None else label
        x = capsules * jax.nn.one_hot(chosen, capsules.shape[1], dtype=capsules.dtype)[..., None]
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate(self.features, start=1):
            x = nn.relu(nn.Dense(features, name=f"dense{i}", **policy)(x))
        x = nn.Dense(math.prod(self.image_shape), name="pixels", **policy)(x)
        x = nn.sigmoid(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return x.reshape(-1, *self.image_shape)


class CapsNet(nn.Module):
    """A convolution, primary capsules, and one capsule for each class, found by routing.

    With `decoder=True` the image can be drawn from its capsules. A call whose caller makes the collection
    `reconstruction` mutable sows the drawing there; any other call leaves the decoder out, in training too.
    `model.apply(variables, x, method="encode")` gives the capsules, `method="decode"` draws from them.

    Attributes:
        num_classes: Classes; 0 gives the numbers of all primary capsules, `[N, 9216]` at 28x28.
        routing_iterations: Rounds of the routing, at least 1.
        decoder: Whether there is a decoder.
        image_shape: What it draws: height, width and channels of the images.
        decoder_features: Units of its hidden layers.
        conv_features: Channels of the first convolution.
        primary_features: Primary capsules at each place of their map.
        primary_dim: Numbers of a primary capsule.
        capsule_dim: Numbers of a class's capsule.
        dtype: Of the computation; the routing is float32 or wider.
        param_dtype: Of the parameters.
    """

    num_classes: int = 10
    routing_iterations: int = 3
    decoder: bool = False
    image_shape: tuple[int, int, int] = (28, 28, 1)
    decoder_features: tuple[int, ...] = (512, 1024)
    conv_features: int = 256
    primary_features: int = 32
    primary_dim: int = 8
    capsule_dim: int = 16
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self):
        """Names the layers after the paper's."""
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.glorot_uniform()
        self.conv1 = Conv(self.conv_features, (9, 9), padding="VALID", kernel_init=init, **policy)
        self.primary_caps = PrimaryCapsules(self.primary_features, self.primary_dim, **policy)
        if self.num_classes:
            self.digit_caps = RoutedCapsules(self.num_classes, self.capsule_dim, self.routing_iterations, **policy)
        if self.decoder:
            if not self.num_classes:
                raise ValueError("decoder=True draws from the classes' capsules; num_classes=0 has none")
            self.reconstruction = CapsuleDecoder(self.image_shape, self.decoder_features, **policy)

    def __call__(self, x: jax.Array, *, train: bool = False, label: jax.Array | None = None) -> jax.Array:
        """Maps images `[N, H, W, C]`, at least 17x17, to logits `[N, num_classes]` float32: the capsules' lengths.

        Args:
            x: Images in [0, 1].
            train: Changes nothing.
            label: Classes `[N]` whose capsules the decoder draws; None for the longest.

        Raises:
            ValueError: The images are too small, or not of the shape that the decoder draws.
        """
        check_images(x)
        del train
        if self.decoder and x.shape[1:] != tuple(self.image_shape):
            raise ValueError(f"the decoder draws images {self.image_shape}, got {x.shape[1:]}; set image_shape")
        if not self.num_classes:
            features = self._primary(x)
            features = features.reshape(x.shape[0], -1)
            return features.astype(jnp.promote_types(features.dtype, jnp.float32))
        capsules = self.encode(x)
        if self.decoder and self.is_mutable_collection("reconstruction"):
            image = self.reconstruction(capsules, label)
            if not self.is_initializing():  # then it is called for its parameters alone
                self.sow("reconstruction", "image", image)
        return capsule_lengths(capsules)

    def encode(self, x: jax.Array) -> jax.Array:
        """Maps images `[N, H, W, C]` to the classes' capsules `[N, num_classes, capsule_dim]` float32."""
        return self.digit_caps(self._primary(x))

    def decode(self, capsules: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """Maps the classes' capsules to images; see `CapsuleDecoder`.

        Raises:
            ValueError: There is no decoder.
        """
        if not self.decoder:
            raise ValueError("there is no decoder; set decoder=True")
        return self.reconstruction(capsules, label)

    def _primary(self, x: jax.Array) -> jax.Array:
        if min(x.shape[1:3]) < 17:
            raise ValueError(f"two windows of 9, the second at steps of 2, need images of 17x17, got {x.shape[1:3]}")
        return self.primary_caps(nn.relu(self.conv1(x)))


register(
    CapsNet,
    "capsnet",
    task="classification",
    paper="Sabour, Frosst and Hinton 2017, Dynamic routing between capsules",
    year=2017,
    input_size=(28, 28),
    channels=1,
    params=6_804_224,
)
