"""The JSON record of a checkpoint, with the shape, dtype and CRC-32 of every array.

A *record* is a dict of JSON values: `step`, `progress`, `metrics`, the `manifest` of the run and `leaves`. A *sealed*
record also has its format and its own CRC-32. *Leaves* map the path of each array (such as `params/conv1/kernel`) to a
dict with `shape`, `dtype` and `crc32`. For a PRNG key these describe its data, and the dict also has `key`, the dtype
of the key, and `impl`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = [
    "Damage",
    "Leaves",
    "brief",
    "check_files",
    "check_manifest",
    "json_value",
    "misfits",
    "place",
    "record_of",
    "seal",
    "to_host",
    "unseal",
    "verify",
    "write_checksums",
]

FORMAT = 1
CHECKSUMS = "checksums.json"  # CRC-32 of every other file in the directory of a checkpoint

Leaves = dict[str, dict[str, Any]]


class Damage(Exception):
    """A checkpoint is damaged; the message says how."""


def brief(error: BaseException) -> str:
    """Returns the type and the first line of an error, because the errors of Orbax have many lines."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _name_of(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    """Returns shape and dtype of a leaf; for a PRNG key, of its data, plus the dtype of the key."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(f"state must have arrays as leaves; got {type(leaf).__name__} at {name}")
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    about = {"shape": list(data.shape), "dtype": str(data.dtype)}
    return about | {"key": str(leaf.dtype)} if _is_key(leaf) else about


def to_host(state: Any) -> tuple[dict[str, np.ndarray], Leaves]:
    """Copies the arrays of a state to the host.

    Orbax accepts neither empty arrays nor empty trees: empty arrays are left out, and an empty tree gets a placeholder.

    Args:
        state: A tree of arrays.

    Returns:
        The arrays by path, and the leaves of the record.

    Raises:
        TypeError: A leaf is not an array.
        ValueError: Two leaves have the same path.
    """
    arrays, leaves = {}, {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = _name_of(path)
        if name in leaves:
            raise ValueError(f"state must have different paths for all leaves; got {name} twice")
        leaves[name] = _describe(name, leaf)
        if _is_key(leaf):
            leaves[name]["impl"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.array(leaf)  # a copy, because the buffer may be donated while the thread writes
        leaves[name]["crc32"] = _crc(array)
        if array.size:
            arrays[name] = array
    return arrays or {"(none)": np.zeros(1)}, leaves


def misfits(stored: Leaves, template: Any) -> str:
    """Describes how the stored leaves differ from those of a template; empty if they match."""
    named = ((_name_of(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(template)[0])
    wanted = {name: _describe(name, leaf) for name, leaf in named}
    faults = [f"{name} is missing from the checkpoint" for name in wanted if name not in stored]
    faults += [f"{name} is missing from the state" for name in stored if name not in wanted]
    for name in sorted(wanted.keys() & stored.keys()):
        old, new = (f"{about.get('key', about['dtype'])}{about['shape']}" for about in (stored[name], wanted[name]))
        if old != new:
            faults.append(f"{name} is {old} in the checkpoint but {new} in the state")
    return "; ".join(faults[:8]) + (f" and {len(faults) - 8} more" if len(faults) > 8 else "")


def verify(arrays: Mapping[str, Any], leaves: Leaves) -> dict[str, np.ndarray]:
    """Returns the arrays of all leaves, with the empty ones that Orbax does not store.

    Raises:
        Damage: An array is missing or differs from its record.
    """
    verified = {}
    for name, about in leaves.items():
        dtype = np.dtype(jax.numpy.dtype(about["dtype"]))
        array = np.zeros(about["shape"], dtype) if 0 in about["shape"] else arrays.get(name)
        if not isinstance(array, np.ndarray):
            raise Damage(f"{name} is missing")
        if (list(array.shape), array.dtype) != (about["shape"], dtype):
            raise Damage(f"{name} must be {about['dtype']}{about['shape']}; got {array.dtype}{list(array.shape)}")
        if _crc(array) != about["crc32"]:
            raise Damage(f"{name} must have the checksum {about['crc32']:08x}; got {_crc(array):08x}")
        verified[name] = array
    return verified


def place(arrays: Mapping[str, np.ndarray], leaves: Leaves, template: Any) -> Any:
    """Returns the arrays in the tree structure of the template, with the shardings of its leaves."""

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        name = _name_of(path)
        if isinstance(leaf, np.ndarray | np.generic):
            return arrays[name]
        sharding = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
        if _is_key(leaf):
            key = jax.random.wrap_key_data(jax.device_put(arrays[name]), impl=leaves[name]["impl"])
            return key if sharding is None else jax.device_put(key, sharding)
        placed = jax.device_put(arrays[name], sharding)
        if placed.dtype != leaf.dtype:
            raise ValueError(f"{name} is {leaf.dtype}, but JAX converts it to {placed.dtype}; set jax_enable_x64")
        return placed

    return jax.tree_util.tree_map_with_path(one, template)


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _crc_of_json(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def record_of(
    step: int,
    progress: Mapping[str, Any],
    metrics: Mapping[str, float] | None,
    manifest: Mapping[str, Any],
    leaves: Leaves,
) -> dict[str, Any]:
    """Returns the record of a checkpoint.

    Raises:
        TypeError: JSON cannot represent `progress`.
    """
    return {
        "step": step,
        "progress": json_value(dict(progress), "progress"),
        "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
        "manifest": manifest,
        "leaves": leaves,
    }


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """Adds the format and a checksum to a record."""
    record = record | {"format": FORMAT}
    return record | {"crc32": _crc_of_json(record)}


def unseal(sealed: dict[str, Any]) -> dict[str, Any]:
    """Removes the format and the checksum from a record.

    Raises:
        Damage: The checksum is missing or wrong.
        ValueError: The record has another format.
    """
    record = dict(sealed)
    if record.pop("crc32", None) != _crc_of_json(record):
        raise Damage("record has a wrong checksum")
    if (found := record.pop("format", None)) != FORMAT:
        raise ValueError(f"format of the checkpoint must be {FORMAT} for this version of flaxvision; got {found}")
    return record


def json_value(value: Any, name: str) -> Any:
    """Returns a value as JSON would restore it: tuples become lists and NumPy scalars become numbers.

    Args:
        value: The value.
        name: Name of the value in error messages.

    Raises:
        TypeError: JSON cannot represent the value.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [json_value(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: json_value(item, f"{name}.{key}") for key, item in value.items()}
    raise TypeError(f"{name} must be a JSON value; got {value!r} of type {type(value).__name__}")


def _differences(stored: Any, given: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields dotted name, stored value and given value of everything that differs."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted(stored.keys() | given.keys()):
            yield from _differences(stored.get(key), given.get(key), f"{name}.{key}")
    elif json.dumps(stored) != json.dumps(given):
        yield name, stored, given


def check_manifest(stored: dict[str, Any], given: dict[str, Any], named: str) -> str:
    """Compares the given keys of a manifest with the stored ones.

    Args:
        stored: The manifest of the checkpoint.
        given: The manifest of this run.
        named: Name of the checkpoint in error messages.

    Returns:
        The differences in `versions`, of packages that both have.

    Raises:
        ValueError: Another key differs.
    """
    notices = []
    for key, value in given.items():
        for name, old, new in _differences(stored.get(key), value, key):
            if key != "versions":
                raise ValueError(f"{name} must be {old!r} as in {named}, which belongs to another run; got {new!r}")
            if old is not None and new is not None:
                notices.append(f"{name} {old} (now {new})")
    return "; ".join(notices)


def _crc_of_files(directory: Path) -> dict[str, int]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / CHECKSUMS)
    return {path.relative_to(directory).as_posix(): zlib.crc32(path.read_bytes()) for path in paths}


def write_checksums(directory: Path) -> None:
    """Writes the file of checksums of a checkpoint directory."""
    (directory / CHECKSUMS).write_text(json.dumps(_crc_of_files(directory), indent=1))


def check_files(directory: Path) -> None:
    """Verifies the files of a checkpoint directory.

    Raises:
        Damage: A file, or the file of checksums, is missing, unreadable or changed.
    """
    try:
        wanted = dict(json.loads((directory / CHECKSUMS).read_bytes()))
        found = _crc_of_files(directory)
    except (OSError, ValueError, TypeError) as error:
        raise Damage(f"checksums cannot be read: {brief(error)}") from error
    for name, checksum in wanted.items():
        if name not in found:
            raise Damage(f"file {name} is missing")
        if found[name] != checksum:
            raise Damage(f"file {name} must have the checksum {checksum}; got {found[name]}")
