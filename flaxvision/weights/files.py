"""Files of tensors: what other libraries write, read without executing any of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

# What a Keras layer's variables are, in the order in which it makes them, by their ranks.
_KERAS_VARIABLES = {
    (1, 1, 1): ("beta", "moving_mean", "moving_variance"),
    (1, 1, 1, 1): ("gamma", "beta", "moving_mean", "moving_variance"),
    (2,): ("kernel",),
    (4,): ("kernel",),
    (2, 1): ("kernel", "bias"),
    (4, 1): ("kernel", "bias"),
    (4, 4): ("depthwise_kernel", "pointwise_kernel"),
    (4, 4, 1): ("depthwise_kernel", "pointwise_kernel", "bias"),
}
_KERAS_LEAVES = frozenset(leaf for leaves in _KERAS_VARIABLES.values() for leaf in leaves)


def read(path: str | os.PathLike[str]) -> Tensors:
    """Reads a file of tensors.

    * `.safetensors`.
    * `.npz`, without pickles.
    * `.h5`, `.hdf5`, `.keras.h5`, `.weights.h5`: the weights of a Keras model as Keras 2 and its published files hold
      them, within a whole saved model or alone, or as Keras 3 does; named `LAYER/kernel`, `LAYER/gamma`, ...
    * `.pth`, `.pt`, `.th`, `.bin`: a torch `state_dict`, alone or as the entry `state_dict` or `model`, without the
      prefix `module.` of `DataParallel`. Read by torch with `weights_only=True`: code in the file is never run.

    Args:
        path: The file.

    Returns:
        Arrays by the names in the file.

    Raises:
        ValueError: The file is damaged, holds something else than tensors, or its ending is another.
        FileNotFoundError: There is no such file.
        ImportError: The file is torch's and torch, of the extra `reference`, is not installed.
    """
    path = Path(path)
    readers = {".safetensors": _safetensors, ".npz": _npz, ".h5": _h5, ".hdf5": _h5}
    readers |= dict.fromkeys((".pth", ".pt", ".th", ".bin"), _torch)
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} must end in one of {', '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    tensors = reader(path)
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return tensors


@contextlib.contextmanager
def _reading(path: Path, kind: str, *errors: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        brief = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path} is damaged or no {kind} file: {type(error).__name__} {brief}") from error


def _safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    with (
        _reading(path, "safetensors", SafetensorError, OSError, ValueError, TypeError, AttributeError),
        safe_open(path, "numpy") as file,
    ):
        return {name: file.get_tensor(name) for name in list(file.keys())}


def _npz(path: Path) -> Tensors:
    # Any error: of zip, of its compression, of tokens in a header, of the memory that a header's lie would take.
    with _reading(path, "npz", Exception), open(path, "rb") as file:
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        tensors = {name: stored[name] for name in stored.files}
        # What is no array in the archive comes as its bytes.
        if others := [name for name, tensor in tensors.items() if not isinstance(tensor, np.ndarray)]:
            raise ValueError(f"{', '.join(others)} are no arrays")
        return tensors


def _torch(path: Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"reading {path} takes torch: pip install 'flaxvision[reference]'") from error
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), error)
        raise ValueError(f"{path} is damaged or holds more than tensors, which is never read: {reason}") from error
    except Exception as error:  # torch raises what its reader happens to meet
        brief = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path} is damaged or no torch file: {type(error).__name__} {brief}") from error
    for entry in ("state_dict", "model"):
        if isinstance(stored, dict) and isinstance(stored.get(entry), dict):
            stored = stored[entry]
    tensors = dict(stored) if isinstance(stored, dict) else {type(stored).__name__: stored}
    others = [
        str(name)
        for name, tensor in tensors.items()
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided)
        or tensor.is_quantized
    ]
    if others:
        raise ValueError(f"{path} holds no state_dict: {', '.join(others)} are no plain tensors with names")
    prefix = "module." if tensors and all(name.startswith("module.") for name in tensors) else ""
    known = (torch.float16, torch.float32, torch.float64)  # NumPy has no other floats
    return {
        name.removeprefix(prefix): (
            tensor.float() if tensor.is_floating_point() and tensor.dtype not in known else tensor
        )
        .detach()
        .numpy()
        for name, tensor in tensors.items()
    }


def _h5(path: Path) -> Tensors:
    import h5py

    with _reading(path, "HDF5", Exception), h5py.File(path) as file:

        def array(group: Any, name: str) -> np.ndarray:
            found = group[name]
            if not isinstance(found, h5py.Dataset):
                raise ValueError(f"{name} is no array")
            if found.file.filename != file.filename or found.external or found.is_virtual:
                raise ValueError(f"{name} lies in another file, which is never read")
            return np.asarray(found)

        if "layers" in file:
            return _keras3(file["layers"], array)
        return _keras2(file.get("model_weights", file), array)


def _keras2(file: Any, array: Callable[[Any, str], np.ndarray]) -> Tensors:
    if "layer_names" not in file.attrs:
        raise ValueError("it lists no layer_names")
    tensors = {}
    for layer in _texts(file, "layer_names"):
        names = _texts(file[layer], "weight_names")
        arrays = [array(file[layer], name) for name in names]
        leaves = [name.rpartition("/")[2].removesuffix(":0") for name in names]
        if not _KERAS_LEAVES.issuperset(leaves):  # the oldest files have block1_conv1_W_1:0
            leaves = _leaves(layer, arrays)
        tensors |= {f"{layer}/{leaf}": array for leaf, array in zip(leaves, arrays, strict=True)}
    return tensors


def _texts(group: Any, attribute: str) -> list[str]:
    # A list too long for one attribute lies in several, numbered from 0.
    parts = [attribute] if attribute in group.attrs else [f"{attribute}{i}" for i in range(len(group.attrs))]
    texts = [text for part in parts if part in group.attrs for text in group.attrs[part]]
    return [text.decode() if isinstance(text, bytes) else str(text) for text in texts]


def _keras3(layers: Any, array: Callable[[Any, str], np.ndarray]) -> Tensors:
    tensors = {}
    for key, group in layers.items():
        variables = group.get("vars", {})
        if "vars" not in group or set(group) - {"vars"}:
            raise ValueError(f"its layer {key} has layers of its own, which no known model has")
        arrays = [array(variables, str(i)) for i in range(len(variables))]
        name = variables.attrs.get("name", key)
        name = name.decode() if isinstance(name, bytes) else str(name)
        leaves = _leaves(name, arrays) if arrays else ()
        tensors |= {f"{name}/{leaf}": array for leaf, array in zip(leaves, arrays, strict=True)}
    return tensors


def _leaves(layer: str, arrays: list[np.ndarray]) -> tuple[str, ...]:
    ranks = tuple(array.ndim for array in arrays)
    if ranks not in _KERAS_VARIABLES:
        raise ValueError(f"its layer {layer} has variables of the ranks {ranks}, as no known layer has")
    return _KERAS_VARIABLES[ranks]


def sha256_of(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
