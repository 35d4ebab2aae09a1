"""Draws weights for comparisons: each tensor of a library's state from its name alone, with numpy alone.

The same names and shapes give the same values, whatever the library, the process and the order. The values are uniform
and well conditioned: in float32, two correct implementations agree to about 1e-5, and a mistake stands out.

* Kernels are centred over their inputs, so that the common mean of the activations does not hide their variation.
* Biases and shifts lie around 1. Around 0, a deep network of ReLUs amplifies rounding errors 1.2 times per layer.
* Running statistics are drawn around those of the network itself, one pair of numbers for each layer (`Statistics`).
  Unrelated statistics would make the activations of a deep network vanish or explode.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
Statistics = Mapping[str, tuple[float, float]]
Tensors = dict[str, np.ndarray]

_MEANS = ("running_mean", "moving_mean")
_VARIANCES = ("running_var", "moving_variance")


def draw(shapes: Shapes, statistics: Statistics | None = None, dtype: type = np.float32) -> Tensors:
    """Draws a whole state.

    Args:
        shapes: Shape of each tensor, by the library's name: torch's (`NAME.weight`, OIHW) or Keras' (`NAME/kernel`,
            HWIO).
        statistics: Mean and variance around which the statistics of each BatchNorm are drawn, by its name; 0 and 1 for
            those that are missing.
        dtype: Dtype of the result. The values are always float32 numbers.

    Returns:
        The tensors by name.

    Raises:
        ValueError: The name of a tensor is of no known kind.
    """
    return {name: _tensor(name, shape, shapes, statistics or {}).astype(dtype) for name, shape in shapes.items()}


def norms(names: Iterable[str]) -> list[str]:
    """Returns the names of the BatchNorms in a state, in its order."""
    return [_split(name)[0] for name in names if _split(name)[1] in _VARIANCES]


def statistics_of(
    means: Mapping[str, np.ndarray], variances: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Reduces batch statistics to a pair of numbers for each BatchNorm.

    Args:
        means: Mean of each BatchNorm's input over batch and space, `[C]`, by name.
        variances: The variance likewise.

    Returns:
        The mean over the channels, and the mean squared distance from it, by name.
    """
    result = {}
    for name, mean in means.items():
        centre = float(np.mean(mean, dtype=np.float64))
        spread = float(np.mean(variances[name] + np.square(mean - centre), dtype=np.float64))
        result[name] = (float(np.float32(centre)), float(np.float32(spread)))
    return result


def draw_images(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws images `[N, H, W, C]` float32 of mean 0 and variance 1."""
    return math.sqrt(3) * _uniform(name, shape)


def draw_labels(name: str, shape: tuple[int, ...], classes: int) -> np.ndarray:
    """Draws labels int32 below `classes`, one per image or one per pixel."""
    return np.floor((_uniform(name, shape) + 1) / 2 * classes).astype(np.int32).clip(0, classes - 1)


def _tensor(name: str, shape: tuple[int, ...], shapes: Shapes, statistics: Statistics) -> np.ndarray:
    module, leaf = _split(name)
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.float32)
    value = _uniform(name, shape)
    if leaf in _MEANS:
        mean, variance = statistics.get(module, (0.0, 1.0))
        return np.float32(mean) + np.float32(0.5 * math.sqrt(variance)) * value
    if leaf in _VARIANCES:
        # The layer multiplies by the inverse, which has mean 1.
        return np.float32(statistics.get(module, (0.0, 1.0))[1]) / (1 + np.float32(0.5) * value)
    if leaf == "gamma" or (leaf == "weight" and len(shape) == 1):
        return 1 + np.float32(0.5) * value
    if leaf in ("bias", "beta"):
        return 1 + np.float32(0.5) * value
    if leaf in ("weight", "kernel", "depthwise_kernel", "pointwise_kernel") and len(shape) > 1:
        return _kernel(value, torch_axes=leaf == "weight")
    raise ValueError(f"shapes must name tensors of torch or Keras; got {name!r} with shape {shape}")


def _kernel(value: np.ndarray, torch_axes: bool) -> np.ndarray:
    """Centres and scales a kernel so that a layer followed by `relu(1 + x)` keeps unit variance."""
    if torch_axes:
        inputs = tuple(range(1, value.ndim))
    elif value.ndim == 4 and value.shape[-1] == 1:
        inputs = (0, 1)  # Keras' depthwise kernel [kh, kw, C, 1]
    else:
        inputs = tuple(range(value.ndim - 1))
    fan_in = math.prod(value.shape[i] for i in inputs)
    # A depthwise window has few inputs. Fully centred, it would map a constant input to zero.
    share = 0.6 if fan_in < 27 and value.ndim == 4 else 1.0
    value -= np.float32(share) * value.mean(inputs, keepdims=True)
    value *= np.float32(math.sqrt(4 / fan_in))
    return value


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws uniform float32 numbers between -1 and 1 from a name."""
    value = np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32)
    value *= 2
    value -= 1
    return value


def _split(name: str) -> tuple[str, str]:
    cut = max(name.rfind("."), name.rfind("/"))
    return name[: max(cut, 0)], name[cut + 1 :]
