"""CapsNet.

S. Sabour, N. Frosst, G. Hinton, "Dynamic routing between capsules", NIPS 2017: figure 1 (the network) and figure 2
(the decoder). The logits are the lengths of the digit capsules; `flaxvision.train.capsule` is the paper's objective.

The paper does not specify the initialization. Convolutions and dense layers use Glorot's here, and the matrices between
capsules are normal with a standard deviation of 0.1. As in the paper, the layers between capsules have no bias.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.layers import Conv, PrimaryCapsules, RoutedCapsules, capsule_lengths
from flaxvision.models.backbone import Dtype, as_float32, check_images
from flaxvision.registry import register


class CapsuleDecoder(nn.Module):
    """Reconstructs an image from a capsule (section 4.1): dense layers with ReLU, the last one with a sigmoid.

    Attributes:
        image_shape: Height, width and channels of the image.
        features: Units of the hidden layers.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
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
            label: Class `[N]` of the capsule to reconstruct from, None for the longest capsule of each image. The other
                capsules are set to zero.
        """
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": nn.initializers.glorot_uniform()}
        chosen = jnp.argmax(capsule_lengths(capsules), axis=-1) if label is None else label
        x = capsules * jax.nn.one_hot(chosen, capsules.shape[1], dtype=capsules.dtype)[..., None]
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate(self.features, start=1):
            x = nn.relu(nn.Dense(features, name=f"dense{i}", **policy)(x))
        x = nn.Dense(math.prod(self.image_shape), name="pixels", **policy)(x)
        x = nn.sigmoid(as_float32(x))
        return x.reshape(-1, *self.image_shape)


class CapsNet(nn.Module):
    """A convolution, primary capsules, and one capsule per class, computed by dynamic routing.

    With `decoder=True` an image can be reconstructed from its capsules. If the collection `reconstruction` is mutable,
    a call sows the reconstruction there; otherwise it does not run the decoder, not even in training.
    `model.apply(variables, x, method="encode")` returns the capsules and `method="decode"` reconstructs from them.

    Attributes:
        num_classes: Number of classes; 0 returns the flattened primary capsules, `[N, 9216]` at 28x28 pixels.
        routing_iterations: Iterations of the routing, at least 1.
        decoder: Whether there is a decoder.
        image_shape: Height, width and channels of the reconstructed images.
        decoder_features: Units of the decoder's hidden layers.
        conv_features: Channels of the first convolution.
        primary_features: Number of primary capsules at each position.
        primary_dim: Dimension of a primary capsule.
        capsule_dim: Dimension of the capsule of a class.
        dtype: Dtype of the computation; the routing is float32 or wider.
        param_dtype: Dtype of the parameters.
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
        """Creates the layers, with the names of the paper."""
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.glorot_uniform()
        self.conv1 = Conv(self.conv_features, (9, 9), padding="VALID", kernel_init=init, **policy)
        self.primary_caps = PrimaryCapsules(self.primary_features, self.primary_dim, **policy)
        if self.num_classes:
            self.digit_caps = RoutedCapsules(self.num_classes, self.capsule_dim, self.routing_iterations, **policy)
        if self.decoder:
            if not self.num_classes:
                raise ValueError("num_classes must be at least 1 if decoder is set; got 0")
            self.reconstruction = CapsuleDecoder(self.image_shape, self.decoder_features, **policy)

    def __call__(self, x: jax.Array, *, train: bool = False, label: jax.Array | None = None) -> jax.Array:
        """Maps images `[N, H, W, C]` to logits `[N, num_classes]` float32, the lengths of the capsules.

        Args:
            x: Images in [0, 1], of at least 17x17 pixels.
            train: Has no effect.
            label: Class `[N]` of the capsule that the decoder reconstructs from, None for the longest capsule.

        Raises:
            ValueError: The images are too small, or do not have the shape that the decoder reconstructs.
        """
        check_images(x)
        del train
        if self.decoder and x.shape[1:] != tuple(self.image_shape):
            raise ValueError(f"x must have the image_shape {self.image_shape} of the decoder; got {x.shape[1:]}")
        if not self.num_classes:
            features = self._primary(x)
            features = features.reshape(x.shape[0], -1)
            return as_float32(features)
        capsules = self.encode(x)
        if self.decoder and self.is_mutable_collection("reconstruction"):
            image = self.reconstruction(capsules, label)
            if not self.is_initializing():  # at init, the image would become part of the variables
                self.sow("reconstruction", "image", image)
        return capsule_lengths(capsules)

    def encode(self, x: jax.Array) -> jax.Array:
        """Maps images `[N, H, W, C]` to the capsules of the classes, `[N, num_classes, capsule_dim]` float32."""
        return self.digit_caps(self._primary(x))

    def decode(self, capsules: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """Maps the capsules of the classes to images; see `CapsuleDecoder`.

        Raises:
            ValueError: There is no decoder.
        """
        if not self.decoder:
            raise ValueError("decoder must be True for decode; got False")
        return self.reconstruction(capsules, label)

    def _primary(self, x: jax.Array) -> jax.Array:
        if min(x.shape[1:3]) < 17:
            raise ValueError(f"images must be at least 17x17 pixels; got {x.shape[1]}x{x.shape[2]}")
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
