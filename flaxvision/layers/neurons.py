"""Units of early networks: threshold logic units and LeNet-5's radial basis function outputs."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_DIGITS = """
..###.. ...#... .#####. .#####. ....##. ####### ..####. ####### .#####. .#####.
.##.##. ..##... ##...## ##...## ...###. ##..... .##.... ##...## ##...## ##...##
##...## .###... ##...## .....## ...###. ##..... ##..... .....## ##...## ##...##
##...## ..##... .....## .....## ..####. ##..... ##..... .....## ##...## ##...##
##...## ..##... .....## .....## ..#.##. ##..... ##..... ....##. ##...## ##...##
##...## ..##... ....##. ..####. .##.##. ######. ######. ....##. .#####. .######
##...## ..##... ...##.. ..####. .#..##. ##...## ##...## ...##.. ##...## ..#####
##...## ..##... ..##... .....## ####### .....## ##...## ...##.. ##...## .....##
##...## ..##... .##.... .....## ####### .....## ##...## ..##... ##...## .....##
##...## ..##... ##..... .....## ....##. .....## ##...## ..##... ##...## .....##
.##.##. ..##... ##..... ##...## ....##. ##...## .##.##. .##.... ##...## ....##.
..###.. ######. ####### .#####. ....##. .#####. ..###.. .##.... .#####. .####..
"""


def heaviside(z: jax.Array) -> jax.Array:
    """Returns 0 where `z < 0` and 1 where `z >= 0`, the step function of Rosenblatt's perceptron (1958).

    The gradient is 0 everywhere. NaN stays NaN, as in NumPy. Integers give float32.

    Args:
        z: An array of any shape.

    Returns:
        An array of the shape of `z`.
    """
    z = jnp.asarray(z)
    z = z if jnp.issubdtype(z.dtype, jnp.inexact) else z.astype(jnp.float32)
    # Not jnp.heaviside: in jax 0.10.1 on a CPU it gives 1 for NaN.
    return jnp.where(jnp.isnan(z), jnp.nan, (z >= 0).astype(z.dtype))


def sign(z: jax.Array) -> jax.Array:
    """Returns -1 where `z < 0`, 0 where `z = 0` and 1 where `z > 0`.

    Equals `jnp.sign` and `tf.sign`. The gradient is 0 everywhere. NaN stays NaN.

    Args:
        z: An array of any shape.

    Returns:
        An array of the shape and dtype of `z`.
    """
    return jnp.sign(z)


class RBF(nn.Module):
    """Radial basis function outputs: the squared Euclidean distances from the input to the centres of the classes.

    `y_i = sum_j (x_j - w_ij)^2`, equation 7 of LeCun, Bottou, Bengio and Haffner 1998 (section II.B). A smaller
    distance means a more likely class, so `-y` can serve as logits.

    Attributes:
        features: Number of outputs K.
        codes: Constant centres `[K, D]`, as in the paper; None for a trainable parameter `centers [K, D]`.
        dtype: Dtype of the computation; None promotes the input and the centres.
        param_dtype: Dtype of the parameter.
        centers_init: Initializer of the parameter; by default -1 and +1 at random.
    """

    features: int
    codes: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    centers_init: Callable[..., jax.Array] = jax.random.rademacher

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, D]` to the distances `[N, K]`.

        Raises:
            ValueError: The shape of the codes is not `[features, D]`.
        """
        shape = (self.features, x.shape[-1])
        if self.codes is None:
            centers = self.param("centers", self.centers_init, shape, self.param_dtype)
        else:
            centers = jnp.asarray(self.codes, x.dtype if self.dtype is None else self.dtype)
            if centers.shape != shape:
                raise ValueError(f"codes must have the shape [features, D] = {shape}; got {centers.shape}")
        x, centers = nn.dtypes.promote_dtype(x, centers, dtype=self.dtype)
        # Differences, because |x|^2 - 2 x.w + |w|^2 cancels near a centre.
        return jnp.square(x[..., None, :] - centers.reshape((1,) * (x.ndim - 1) + shape)).sum(-1)


def digit_codes() -> np.ndarray:
    """Returns the ten digits as flattened bitmaps of 12 rows and 7 columns: `[10, 84]` float32, ink +1, ground -1.

    They replace LeNet-5's stylised bitmaps (LeCun 1998, section II.B, figure 3). 84 is the width of its layer F6. The
    drawings are this library's own.
    """
    rows = [line.split() for line in _DIGITS.split("\n") if line]
    pixels = np.array([["".join(row[digit] for row in rows)] for digit in range(10)])
    return np.array([[1.0 if p == "#" else -1.0 for p in text] for (text,) in pixels], np.float32)


def random_codes(features: int, inputs: int = 84, seed: int = 0) -> np.ndarray:
    """Draws distinct codes of -1 and +1 for an RBF output with any number of classes.

    Args:
        features: Number of codes.
        inputs: Number of components of each code.
        seed: Seed of NumPy's default generator. The same seed gives the same codes.

    Returns:
        `[features, inputs]` float32.

    Raises:
        ValueError: There are fewer distinct codes than `features`.
    """
    if features > 2**inputs:
        raise ValueError(f"features must be at most 2**inputs = {2**inputs}; got {features}")
    rng = np.random.default_rng(seed)
    codes: dict[bytes, np.ndarray] = {}
    while len(codes) < features:
        code = rng.choice(np.array([-1, 1], np.float32), inputs)
        codes.setdefault(code.tobytes(), code)
    return np.stack(list(codes.values()))
