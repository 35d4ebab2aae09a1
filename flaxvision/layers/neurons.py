"""Units of the first networks: threshold logic units and LeNet-5's radial basis outputs."""

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
    """Gives 0 where `z < 0` and 1 where `z >= 0`, the step of Rosenblatt's perceptron (1958).

    The gradient is 0 everywhere; NaN stays NaN, as in numpy. Any shape; integers give floats.
    """
    z = jnp.asarray(z)
    z = z if jnp.issubdtype(z.dtype, jnp.inexact) else z.astype(jnp.float32)
    # Not jnp.heaviside: in jax 0.10.1 on a CPU it gives 1 for NaN.
    return jnp.where(jnp.isnan(z), jnp.nan, (z >= 0).astype(z.dtype))


def sign(z: jax.Array) -> jax.Array:
    """Gives -1 where `z < 0`, 0 where `z = 0` and 1 where `z > 0`.

    Equals `jnp.sign` and `tf.sign`. The gradient is 0 everywhere; NaN stays NaN. Any shape, the dtype of `z`.
    """
    return jnp.sign(z)


class RBF(nn.Module):
    """Radial basis outputs: the squared Euclidean distance from the input to each class's centre.

    `y_i = sum_j (x_j - w_ij)^2`, equation 7 of LeCun, Bottou, Bengio and Haffner 1998 (section II.B). The smaller the
    distance, the likelier the class: `-y` (scaled as one likes) serves as logits.

    Attributes:
        features: number of outputs K.
        codes: the centres `[K, D]`, constant as in the paper; None makes them the trainable parameter `centers [K, D]`.
        dtype: of the computation, by default promoted from the input and the centres.
        param_dtype: of the parameter.
        centers_init: initializer of the parameter, -1 and +1 at random by default.
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
            ValueError: the codes' shape is not `[features, D]`.
        """
        shape = (self.features, x.shape[-1])
        if self.codes is None:
            centers = self.param("centers", self.centers_init, shape, self.param_dtype)
        else:
            centers = jnp.asarray(self.codes, x.dtype if self.dtype is None else self.dtype)
            if centers.shape != shape:
                raise ValueError(f"codes must have the shape [features, inputs] = {shape}, got {centers.shape}")
        x, centers = nn.dtypes.promote_dtype(x, centers, dtype=self.dtype)
        # Differences, not |x|^2 - 2 x.w + |w|^2: that one cancels near a centre.
        return jnp.square(x[..., None, :] - centers.reshape((1,) * (x.ndim - 1) + shape)).sum(-1)


def digit_codes() -> np.ndarray:
    """Gives the ten digits as 12 rows of 7 pixels, flattened: `[10, 84]` float32, ink +1 and ground -1.

    They stand where LeNet-5 has its stylised bitmaps (LeCun 1998, section II.B, figure 3): 84 is the width of its
    layer F6. The drawings are this library's own.
    """
    rows = [line.split() for line in _DIGITS.split("\n") if line]
    pixels = np.array([["".join(row[digit] for row in rows)] for digit in range(10)])
    return np.array([[1.0 if p == "#" else -1.0 for p in text] for (text,) in pixels], np.float32)


def random_codes(features: int, inputs: int = 84, seed: int = 0) -> np.ndarray:
    """Draws distinct codes of -1 and +1, equally likely, for an RBF output of any number of classes.

    Args:
        features: number of codes.
        inputs: components of each.
        seed: of numpy's default generator; the same seed gives the same codes.

    Returns:
        `[features, inputs]` float32.

    Raises:
        ValueError: there are not that many distinct codes.
    """
    if features > 2**inputs:
        raise ValueError(f"features must be at most 2**inputs = {2**inputs}, got {features}")
    rng = np.random.default_rng(seed)
    codes: dict[bytes, np.ndarray] = {}
    while len(codes) < features:
        code = rng.choice(np.array([-1, 1], np.float32), inputs)
        codes.setdefault(code.tobytes(), code)
    return np.stack(list(codes.values()))
