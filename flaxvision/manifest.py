"""What a checkpoint says of itself: one JSON record with the shape, dtype and CRC-32 of every array.

A *record* is a dict of JSON values: step, progress, metrics, the manifest of the
run and the leaves; sealed, it carries its format and its own CRC-32. *Leaves* tell of the arrays: by path (as in
`params/conv1/kernel`) a dict of `shape`, `dtype`, `crc32` and, for a PRNG key, whose data these are, `key` (its dtype)
and `impl`.
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
    "misfits",
    "place",
    "plain",
    "seal",
    "to_host",
    "unseal",
    "verify",
    "write_checksums",
]

FORMAT = 1
CHECKSUMS = "checksums.json"  # in the directory of a checkpoint: CRC-32 of every other file

Leaves = dict[str, dict[str, Any]]


class Damage(Exception):
    """What is wrong with a checkpoint."""


def brief(error: BaseException) -> str:
    """The type and the first line of an error; Orbax's have many."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _name_of(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    """What the record says of a leaf; of a PRNG key, what it says of its data and which key it is."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(f"the state's leaf {name} is of type {type(leaf).__name__}, an array is needed")
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    about = {"shape": list(data.shape), "dtype": str(data.dtype)}
    return about | {"key": str(leaf.dtype)} if _is_key(leaf) else about


def to_host(state: Any) -> tuple[dict[str, np.ndarray], Leaves]:
    """Copies of the arrays by path, and what the record says of each.

    Orbax takes no array without elements and no tree without arrays.
    """
    arrays, leaves = {}, {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = _name_of(path)
        if name in leaves:
            raise ValueError(f"two leaves of the state have the path {name}")
        leaves[name] = _describe(name, leaf)
        if _is_key(leaf):
            leaves[name]["impl"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.array(leaf)  # a copy: the buffer may be donated while the thread writes
        leaves[name]["crc32"] = _crc(array)
        if array.size:
            arrays[name] = array
    return arrays or {"(none)": np.zeros(1)}, leaves


def misfits(stored: Leaves, template: Any) -> str:
    """What keeps the stored leaves from filling the template: missing, superfluous and misshapen ones, in words."""
    named = ((_name_of(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(template)[0])
    wanted = {name: _describe(name, leaf) for name, leaf in named}
    faults = [f"{name} is not in the checkpoint" for name in wanted if name not in stored]
    faults += [f"{name} is not in the state" for name in stored if name not in wanted]
    for name in sorted(wanted.keys() & stored.keys()):
        old, new = (f"{about.get('key', about['dtype'])}{about['shape']}" for about in (stored[name], wanted[name]))
        if old != new:
            faults.append(f"{name} is {old} in the checkpoint and {new} in the state")
    return "; ".join(faults[:8]) + (f" and {len(faults) - 8} more" if len(faults) > 8 else "")


def verify(arrays: Mapping[str, Any], leaves: Leaves) -> dict[str, np.ndarray]:
    """The arrays of the leaves, those without elements added.

    Raises:
        Damage: One is missing or not what the record says.
    """
    verified = {}
    for name, about in leaves.items():
        dtype = np.dtype(jax.numpy.dtype(about["dtype"]))
        array = np.zeros(about["shape"], dtype) if 0 in about["shape"] else arrays.get(name)
        if not isinstance(array, np.ndarray):
            raise Damage(f"{name}: missing")
        if (list(array.shape), array.dtype) != (about["shape"], dtype):
            raise Damage(f"{name}: {array.dtype}{list(array.shape)} instead of {about['dtype']}{about['shape']}")
        if _crc(array) != about["crc32"]:
            raise Damage(f"{name}: checksum {_crc(array):08x} instead of {about['crc32']:08x}")
        verified[name] = array
    return verified


def place(arrays: Mapping[str, np.ndarray], leaves: Leaves, template: Any) -> Any:
    """The template's tree filled with the arrays, each where the template's leaf is."""

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
            raise ValueError(f"{name} is {leaf.dtype}, which JAX makes {placed.dtype}: set jax_enable_x64")
        return placed

    return jax.tree_util.tree_map_with_path(one, template)


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _crc_of_json(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its format and its own checksum."""
    record = record | {"format": FORMAT}
    return record | {"crc32": _crc_of_json(record)}


def unseal(sealed: dict[str, Any]) -> dict[str, Any]:
    """The record without its format and checksum.

    Raises:
        Damage: The checksum is missing or another.
        ValueError: The record is of another format.
    """
    record = dict(sealed)
    if record.pop("crc32", None) != _crc_of_json(record):
        raise Damage("its record has a wrong checksum")
    if (found := record.pop("format", None)) != FORMAT:
        raise ValueError(f"the checkpoint has format {found}, this flaxvision reads format {FORMAT}")
    return record


def plain(value: Any, where: str) -> Any:
    """The value as JSON gives it back (lists for tuples).

    Raises:
        TypeError: Something in it would come back as something else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} is {value!r} of type {type(value).__name__}, which JSON cannot hold")


def _differences(stored: Any, given: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, stored and given value of everything that differs."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted(stored.keys() | given.keys()):
            yield from _differences(stored.get(key), given.get(key), f"{name}.{key}")
    elif json.dumps(stored) != json.dumps(given):
        yield name, stored, given


def check_manifest(stored: dict[str, Any], given: dict[str, Any], named: str) -> str:
    """Compares what is given of a run with what is stored; `versions` may differ, and how is what comes back.

    Raises:
        ValueError: Anything else that is given differs.
    """
    notices = []
    for key, value in given.items():
        for name, old, new in _differences(stored.get(key), value, key):
            if key != "versions":
                raise ValueError(f"{named} is of another run: its {name} is {old!r}, this run's is {new!r}")
            notices.append(f"{name} {old}, this is {new}")
    return "; ".join(notices)


def _crc_of_files(directory: Path) -> dict[str, int]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / CHECKSUMS)
    return {path.relative_to(directory).as_posix(): zlib.crc32(path.read_bytes()) for path in paths}


def write_checksums(directory: Path) -> None:
    """Adds the file of checksums to a checkpoint's directory."""
    (directory / CHECKSUMS).write_text(json.dumps(_crc_of_files(directory), indent=1))


def check_files(directory: Path) -> None:
    """Compares the files of a directory with its file of checksums.

    Raises:
        Damage: One is missing, cannot be read or is another, that of the checksums included.
    """
    try:
        wanted = dict(json.loads((directory / CHECKSUMS).read_bytes()))
        found = _crc_of_files(directory)
    except (OSError, ValueError, TypeError) as error:
        raise Damage(f"its checksums cannot be read: {brief(error)}") from error
    for name, checksum in wanted.items():
        if name not in found:
            raise Damage(f"file {name}: missing")
        if found[name] != checksum:
            raise Damage(f"file {name}: checksum {found[name]} instead of {checksum}")
