"""Reads the tensor files of other libraries without executing any code in them."""

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

# The variables of a Keras layer in the order of their creation, by their ranks.
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
    * `.h5`, `.hdf5`, `.keras.h5`, `.weights.h5`: the weights of a Keras 2 or Keras 3 model, alone or within a saved
      model. The tensors are named `LAYER/kernel`, `LAYER/gamma`, ...
    * `.pth`, `.pt`, `.th`, `.bin`: a torch `state_dict`, alone or as the entry `state_dict` or `model`. The prefix
      `module.` of `DataParallel` is removed. torch reads the file with `weights_only=True`, so code in it never runs.

    Args:
        path: The file.

    Returns:
        Arrays by their names in the file.

    Raises:
        ValueError: The file is damaged, holds something other than tensors, or has another ending.
        FileNotFoundError: There is no such file.
        ImportError: The file needs torch (extra `reference`), which is not installed.
    """
    path = Path(path)
    readers = {".safetensors": _safetensors, ".npz": _npz, ".h5": _h5, ".hdf5": _h5}
    readers |= dict.fromkeys((".pth", ".pt", ".th", ".bin"), _torch)
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"path must end in one of {', '.join(readers)}; got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"path must be an existing file; got {path}")
    tensors = reader(path)
    if not tensors:
        raise ValueError(f"{path} holds no tensors; give a file with at least one")
    return tensors


@contextlib.contextmanager
def _reading(path: Path, kind: str, *errors: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        brief = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{path} is damaged or not a valid {kind} file: {type(error).__name__} {brief}; get it again"
        ) from error


def _safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    with (
        _reading(path, "safetensors", SafetensorError, OSError, ValueError, TypeError, AttributeError),
        safe_open(path, "numpy") as file,
    ):
        return {name: file.get_tensor(name) for name in list(file.keys())}


def _npz(path: Path) -> Tensors:
    # Corrupt files can fail anywhere: zip, decompression, header parsing, memory.
    with _reading(path, "npz", Exception), open(path, "rb") as file:
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array without a name")
        tensors = {name: stored[name] for name in stored.files}
        # NumPy returns members that are not arrays as bytes.
        if others := [name for name, tensor in tensors.items() if not isinstance(tensor, np.ndarray)]:
            raise ValueError(f"{', '.join(others)} are not arrays")
        return tensors


def _torch(path: Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path} cannot be read without torch; pip install 'flaxvision[reference]'") from error
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), error)
        raise ValueError(f"{path} is damaged or holds more than tensors: {reason}; save a state_dict") from error
    except Exception as error:  # torch raises errors of many types
        brief = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{path} is damaged or not a valid torch file: {type(error).__name__} {brief}; get it again"
        ) from error
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
        raise ValueError(
            f"{path} is not a state_dict: {', '.join(others)} are not dense tensors with names; save a state_dict"
        )
    prefix = "module." if tensors and all(name.startswith("module.") for name in tensors) else ""
    known = (torch.float16, torch.float32, torch.float64)  # NumPy has no other floating point types
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
                raise ValueError(f"{name} is not an array")
            if found.file.filename != file.filename or found.external or found.is_virtual:
                raise ValueError(f"{name} is stored in another file, which is never read")
            return np.asarray(found)

        if "layers" in file:
            return _keras3(file["layers"], array)
        return _keras2(file.get("model_weights", file), array)


def _keras2(file: Any, array: Callable[[Any, str], np.ndarray]) -> Tensors:
    if "layer_names" not in file.attrs:
        raise ValueError("the attribute layer_names is missing")
    tensors = {}
    for layer in _texts(file, "layer_names"):
        names = _texts(file[layer], "weight_names")
        arrays = [array(file[layer], name) for name in names]
        leaves = [name.rpartition("/")[2].removesuffix(":0") for name in names]
        if not _KERAS_LEAVES.issuperset(leaves):  # the oldest files have names like block1_conv1_W_1:0
            leaves = _leaves(layer, arrays)
        tensors |= {f"{layer}/{leaf}": array for leaf, array in zip(leaves, arrays, strict=True)}
    return tensors


def _texts(group: Any, attribute: str) -> list[str]:
    # Keras splits a list that is too long for one attribute into several, numbered from 0.
    parts = [attribute] if attribute in group.attrs else [f"{attribute}{i}" for i in range(len(group.attrs))]
    texts = [text for part in parts if part in group.attrs for text in group.attrs[part]]
    return [text.decode() if isinstance(text, bytes) else str(text) for text in texts]


def _keras3(layers: Any, array: Callable[[Any, str], np.ndarray]) -> Tensors:
    tensors = {}
    for key, group in layers.items():
        variables = group.get("vars", {})
        if "vars" not in group or set(group) - {"vars"}:
            raise ValueError(f"layer {key} has layers of its own, which no supported model has")
        arrays = [array(variables, str(i)) for i in range(len(variables))]
        name = variables.attrs.get("name", key)
        name = name.decode() if isinstance(name, bytes) else str(name)
        leaves = _leaves(name, arrays) if arrays else ()
        tensors |= {f"{name}/{leaf}": array for leaf, array in zip(leaves, arrays, strict=True)}
    return tensors


def _leaves(layer: str, arrays: list[np.ndarray]) -> tuple[str, ...]:
    ranks = tuple(array.ndim for array in arrays)
    if ranks not in _KERAS_VARIABLES:
        raise ValueError(f"ranks of the variables of layer {layer} must be those of a known layer; got {ranks}")
    return _KERAS_VARIABLES[ranks]


def sha256_of(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Returns the hexadecimal digest of a file, SHA-256 unless another algorithm is named."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
