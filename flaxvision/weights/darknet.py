"""darknet's `.weights` files: a header, then the values of all layers in the order of computation.

Such a file has neither names nor shapes, so reading it needs the model. The layers are stored in the order in which the
model applies them:

* a convolution with BatchNorm: biases, scales, means, variances, kernel;
* any other convolution and a local layer: biases, kernel;
* a connected layer: biases, kernel, and with BatchNorm scales, means and variances.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxvision.atomic import replacing
from flaxvision.layers import BatchNorm
from flaxvision.layers.darknet import LocallyConnected
from flaxvision.weights.convert import Shape, Variables, check, flat, nested

ORIGINAL, FORK = (0, 2, 0), (0, 2, 5)  # the latter's BatchNorm has another epsilon


class DarknetFile(NamedTuple):
    """The content of a `.weights` file.

    Attributes:
        values: All values, float32 `[n]`.
        seen: Number of images that training has seen.
        version: Major, minor and revision of the format. From 0.2 on, the header has 20 bytes instead of 16. The fork
            of A. Bochkovskiy writes (0, 2, 5).
    """

    values: np.ndarray
    seen: int = 0
    version: tuple[int, int, int] = ORIGINAL


def read_darknet(path: str | os.PathLike[str]) -> DarknetFile:
    """Reads a `.weights` file.

    Args:
        path: The file.

    Returns:
        The values and the content of the header.

    Raises:
        ValueError: The file is not a `.weights` file, or it ends within the header or a value.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be an existing file; got {path}")
    data = path.read_bytes()
    version = struct.unpack_from("<3i", data) if len(data) >= 16 else (-1, -1, -1)
    if not (0 <= version[0] < 1000 and 0 <= version[1] < 1000 and 0 <= version[2] < 1000):
        raise ValueError(f"{path} is not a .weights file of darknet: its header is {data[:12].hex(' ') or 'empty'}")
    header = _header_size(version)
    if len(data) < header or (len(data) - header) % 4:
        raise ValueError(f"{path} must have a header of {header} bytes and 4 bytes per value; got {len(data)} bytes")
    (seen,) = struct.unpack_from("<Q" if header == 20 else "<I", data, 12)
    return DarknetFile(np.frombuffer(data, "<f4", offset=header).astype(np.float32), seen, version)


def write_darknet(path: str | os.PathLike[str], file: DarknetFile) -> None:
    """Writes a `.weights` file. Writing the result of `read_darknet` gives an identical file.

    Args:
        path: The file. An existing file is only replaced once the new one is complete.
        file: Values and header.

    Raises:
        ValueError: The header cannot hold the number of images or the version.
    """
    header = _header_size(file.version)
    if not (0 <= file.seen < 2 ** (64 if header == 20 else 32) and all(0 <= part < 1000 for part in file.version)):
        raise ValueError(
            f"seen must fit into a header of {header} bytes and version be three numbers from 0 to 999;"
            f" got {file.seen} and {file.version}"
        )
    start = struct.pack("<3iQ" if header == 20 else "<3iI", *file.version, file.seen)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(start + np.ascontiguousarray(file.values, "<f4").tobytes())


def load_darknet(model: nn.Module, path: str | os.PathLike[str], *, image_shape: Shape | None = None) -> Variables:
    """Reads a `.weights` file for a model.

    Args:
        model: A model from `weights.read_cfg`, or one that applies the same layers as darknet in the same order, such
            as `create_model("yolo_v3")`.
        path: The file.
        image_shape: Height, width and channels of the images. None for those of the cfg file, or else 416x416x3.

    Returns:
        The variables, a nested dict of NumPy arrays.

    Raises:
        ValueError: The file is not a `.weights` file, or has more or fewer values than the model. The message states
            the difference.
        FileNotFoundError: There is no such file.
    """
    tensors = split(model, read_darknet(path).values, path, image_shape)
    return nested({place.path: place.ours(tensors[place.name]) for place in _places(model, image_shape)})


def save_darknet(
    path: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    seen: int = 0,
    version: tuple[int, int, int] = ORIGINAL,
    image_shape: Shape | None = None,
) -> None:
    """Writes the variables of a model as a `.weights` file.

    darknet and OpenCV read it together with the `.cfg` file of the model.

    Args:
        path: The file.
        model: As for `load_darknet`.
        variables: The variables of the model.
        seen: Number of images that training has seen.
        version: Version of the format; (0, 1, 0) gives a header of 16 bytes.
        image_shape: As for `load_darknet`.

    Raises:
        ValueError: The variables are not those of the model, or the header cannot hold `seen` or `version`.
    """
    places, leaves = _places(model, image_shape), flat(variables)
    check("variables do not fit the model", leaves, {place.path: place.our_shape for place in places})
    parts = [np.asarray(place.theirs(np.asarray(leaves[place.path])), np.float32).ravel() for place in places]
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    write_darknet(path, DarknetFile(values, seen, version))


def values_of(model: nn.Module, image_shape: Shape | None = None) -> int:
    """Returns the number of values in the `.weights` file of a model."""
    return sum(place.size for place in _places(model, image_shape))


def split(
    model: nn.Module, values: np.ndarray, path: str | os.PathLike[str], image_shape: Shape | None = None
) -> dict[str, np.ndarray]:
    """Splits the values of a file into named tensors.

    Args:
        model: As for `load_darknet`.
        values: `[n]`.
        path: The file, for the error message.
        image_shape: As for `load_darknet`.

    Returns:
        Tensors with darknet's order of axes, named after our module paths: `backbone/stem/conv.weight`,
        `backbone/stem/bn.running_mean`, ...

    Raises:
        ValueError: There are more or fewer values than the model has.
    """
    places, tensors, start = _places(model, image_shape), {}, 0
    wanted = sum(place.size for place in places)
    if wanted != values.size:
        fault = f"{abs(wanted - values.size):,} too {'few' if values.size < wanted else 'many'}"
        raise ValueError(f"{path} must hold {wanted:,} values for this network; got {values.size:,}, {fault}")
    for place in places:
        tensors[place.name] = values[start : start + place.size].reshape(place.shape)
        start += place.size
    return tensors


@dataclasses.dataclass(frozen=True)
class _Place:
    """A variable: its path and shape in the model, and its name, shape and order of axes in the file."""

    path: str
    our_shape: Shape
    name: str
    axes: Shape

    @property
    def shape(self) -> Shape:
        return tuple(self.our_shape[axis] for axis in self.axes)

    @property
    def size(self) -> int:
        return int(np.prod(self.our_shape))

    def theirs(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.axes)

    def ours(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.transpose(np.argsort(self.axes)))


def _header_size(version: tuple[int, int, int]) -> int:
    return 20 if version[0] * 10 + version[1] >= 2 else 16


def _places(model: nn.Module, image_shape: Shape | None) -> tuple[_Place, ...]:
    if image_shape is None:
        image_shape = (*getattr(model, "input_size", (416, 416)), getattr(model, "channels", 3))
    return _traced_places(model, tuple(image_shape))


@functools.lru_cache(maxsize=32)
def _traced_places(model: nn.Module, image_shape: Shape) -> tuple[_Place, ...]:
    """Traces the model once to get the order of its layers and the shapes of its variables."""
    applied: list[tuple[type, str]] = []

    def watch(call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(
            module, nn.Conv | nn.Dense | nn.DenseGeneral | BatchNorm | LocallyConnected
        ):
            applied.append((type(module), "/".join(module.path)))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    leaves = {path: tuple(leaf.shape) for path, leaf in flat(shapes).items()}
    if len(set(applied)) < len(applied):
        raise ValueError("model must apply every layer only once to have a .weights file; got a shared layer")
    return tuple(_Place(*place) for place in _in_order(applied, leaves))


def _in_order(applied: list[tuple[type, str]], leaves: dict[str, Shape]) -> Iterator[tuple]:
    for number, (kind, path) in enumerate(applied):
        if kind is BatchNorm:
            continue
        after = applied[number + 1] if number + 1 < len(applied) else (None, "")
        norm = after[1] if after[0] is BatchNorm else None
        shape = leaves[f"params/{path}/kernel"]
        if kind is LocallyConnected:  # [H, W, size, size, C, F]; [H, W, F, C, size, size] in the file
            axes = (0, 1, 5, 4, 2, 3)
        else:  # [*window, I, O]; [O, I, *window] in the file
            axes = (len(shape) - 1, len(shape) - 2, *range(len(shape) - 2))
        kernel = (f"params/{path}/kernel", shape, f"{path}.weight", axes)
        if norm is None:
            bias = leaves[f"params/{path}/bias"]  # of a local layer, a map [H, W, F]; [F, H, W] in the file
            yield f"params/{path}/bias", bias, f"{path}.bias", ((2, 0, 1) if len(bias) == 3 else (0,))
            yield kernel
            continue
        vectors = [
            (f"{tree}/{norm}/{leaf}", leaves[f"{tree}/{norm}/{leaf}"], f"{norm}.{name}", (0,))
            for tree, leaf, name in (
                ("params", "bias", "bias"),
                ("params", "scale", "weight"),
                ("batch_stats", "mean", "running_mean"),
                ("batch_stats", "var", "running_var"),
            )
        ]
        connected = kind is not LocallyConnected and issubclass(kind, nn.DenseGeneral)
        yield from [vectors[0], kernel, *vectors[1:]] if connected else [*vectors, kernel]
