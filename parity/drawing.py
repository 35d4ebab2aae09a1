"""Weights for comparisons: every tensor of a library's state drawn by its name alone, with numpy alone.

Two networks given the same names and shapes get the same values, whatever the library, the process and the order. The
values are uniform, since numpy's uniform float32 stream is simple and quick, and they are well conditioned: in float32
two right implementations agree to about 1e-5 and a mistake stands out.

* Kernels are centred over their inputs, so that the activations' common mean does not drown what varies.
* Shifts lie around 1: around 0 a deep network of ReLUs amplifies rounding by 1.2 a layer.
* Running statistics are those that the network has of itself, one pair of numbers for each layer (`Statistics`),
  disturbed for each channel: taken from the air they would make deep networks vanish or explode.
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
        shapes: Of every tensor, by the library's name for it: torch's (`NAME.weight`, OIHW) or Keras' (`NAME/kernel`,
            HWIO).
        statistics: For each BatchNorm, by name, the mean and the variance around which its statistics are drawn; 0 and
            1 for those that are missing.
        dtype: Of the result. The numbers drawn are float32 numbers in any case.

    Returns:
        The tensors by name.

    Raises:
        ValueError: A name says nothing about what the tensor is.
    """
    return {name: _tensor(name, shape, shapes, statistics or {}).astype(dtype) for name, shape in shapes.items()}


def norms(names: Iterable[str]) -> list[str]:
    """The names of the BatchNorms in a state, in its order."""
    return [_split(name)[0] for name in names if _split(name)[1] in _VARIANCES]


def statistics_of(
    means: Mapping[str, np.ndarray], variances: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Sums a network's batch statistics up to a pair for each layer.

    Args:
        means: By BatchNorm, of its input over batch and space, `[C]`.
        variances: Likewise.

    Returns:
        By BatchNorm, the mean over the channels, and the mean squared distance from it.
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


def draw_labels(name: str, count: int, classes: int) -> np.ndarray:
    """Draws `count` labels int32 below `classes`."""
    return np.floor((_uniform(name, (count,)) + 1) / 2 * classes).astype(np.int32).clip(0, classes - 1)


def _tensor(name: str, shape: tuple[int, ...], shapes: Shapes, statistics: Statistics) -> np.ndarray:
    module, leaf = _split(name)
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.float32)
    value = _uniform(name, shape)
    if leaf in _MEANS:
        mean, variance = statistics.get(module, (0.0, 1.0))
        return np.float32(mean) + np.float32(0.5 * math.sqrt(variance)) * value
    if leaf in _VARIANCES:
        # One over it is what a layer multiplies by: that has the mean 1.
        return np.float32(statistics.get(module, (0.0, 1.0))[1]) / (1 + np.float32(0.5) * value)
    if leaf == "gamma" or (leaf == "weight" and len(shape) == 1):
        return 1 + np.float32(0.5) * value
    if leaf in ("bias", "beta"):
        return 1 + np.float32(0.5) * value
    if leaf in ("weight", "kernel", "depthwise_kernel", "pointwise_kernel") and len(shape) > 1:
        return _kernel(value, torch_axes=leaf == "weight")
    raise ValueError(f"the name {name!r} with shape {shape} is of no kind known here")


def _kernel(value: np.ndarray, torch_axes: bool) -> np.ndarray:
    """Centres and scales a kernel so that `relu(1 + x)` of unit variance before keeps unit variance behind."""
    if torch_axes:
        inputs = tuple(range(1, value.ndim))
    elif value.ndim == 4 and value.shape[-1] == 1:
        inputs = (0, 1)  # Keras' depthwise kernel [kh, kw, C, 1]
    else:
        inputs = tuple(range(value.ndim - 1))
    fan_in = math.prod(value.shape[i] for i in inputs)
    # A depthwise window has few inputs, and centred wholly it would see nothing of an even map.
    share = 0.6 if fan_in < 27 and value.ndim == 4 else 1.0
    value -= np.float32(share) * value.mean(inputs, keepdims=True)
    value *= np.float32(math.sqrt(4 / fan_in))
    return value


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform float32 numbers between -1 and 1, by name."""
    value = np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32)
    value *= 2
    value -= 1
    return value


def _split(name: str) -> tuple[str, str]:
    cut = max(name.rfind("."), name.rfind("/"))
    return name[: max(cut, 0)], name[cut + 1 :]
