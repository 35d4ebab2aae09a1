"""Moves the arrays of a checkpoint between devices and files.

A *piece* is an array or a part of one. Every process writes its own pieces. An array that all processes hold is one
piece, which process 0 writes. If an array is sharded over processes, each process writes the pieces that it holds, so
no process ever holds the whole array.

With one process, `flaxvision.checkpoint` stores the arrays with Orbax. With several processes it cannot, because Orbax
runs a collective operation on the devices while it saves. This would interfere with training. Instead, each process
writes two files:

* `process-1-of-4.pieces`: the bytes of its pieces, one after the other.
* `process-1-of-4.json`: a sealed table with leaf, index, offset and CRC-32 of every piece.

Any number of processes can read the files. Each process reads only the pieces that its devices need.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax
import numpy as np

from flaxvision.manifest import Damage, Leaves, describe, is_key, name_of, retried, seal, unseal

__all__ = ["Pieces", "Reader", "place", "table_of", "to_host", "verified", "write"]

Index = tuple[tuple[int, int], ...]  # start and stop along every axis
Pieces = dict[str, list[tuple[Index, np.ndarray]]]
Part = Callable[[tuple[slice, ...] | EllipsisType], np.ndarray]  # of one array, by index


def to_host(state: Any) -> tuple[Pieces, Leaves]:
    """Copies the pieces that this process writes to the host. Empty arrays have no pieces.

    Donating or freeing the state does not change the pieces.

    Args:
        state: A tree of arrays.

    Returns:
        The pieces by path, and the leaves of the record without checksums.

    Raises:
        TypeError: A leaf is not an array.
        ValueError: Two leaves have the same path.
    """
    leaves, parts = {}, {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = name_of(path)
        if name in leaves:
            raise ValueError(f"state must have different paths for all leaves; got {name} twice")
        leaves[name] = describe(name, leaf)
        if is_key(leaf):
            leaves[name]["impl"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if 0 not in leaf.shape:
            parts[name] = list(_parts(leaf))
    for part in (array for some in parts.values() for _, array in some):
        if isinstance(part, jax.Array):
            part.copy_to_host_async()  # all copies at once
    return {name: [(index, _on_host(array)) for index, array in some] for name, some in parts.items()}, leaves


def _parts(leaf: Any) -> Iterator[tuple[Index, Any]]:
    whole = tuple((0, size) for size in leaf.shape)
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        if jax.process_index() == 0:
            yield whole, leaf
    elif leaf.is_fully_replicated:
        if jax.process_index() == 0:
            yield whole, leaf.addressable_data(0)
    else:
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                yield _bounds(shard.index, leaf.shape), shard.data


def _bounds(index: tuple[slice, ...] | EllipsisType, shape: Sequence[int]) -> Index:
    slices = tuple(slice(None) for _ in shape) if index is ... else index
    return tuple(each.indices(size)[:2] for each, size in zip(slices, shape, strict=True))


def _on_host(array: Any) -> np.ndarray:
    # JAX neither donates nor frees a CPU buffer while NumPy has a view of it, so the loop need not wait for a copy.
    return np.asarray(array) if isinstance(array, jax.Array) else np.array(array)


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def table_of(pieces: Pieces) -> list[dict[str, Any]]:
    """Returns the table of the pieces in the order in which `write` stores them."""
    table, offset = [], 0
    for name, some in pieces.items():
        for index, array in some:
            checksum = zlib.crc32(_bytes_of(array))
            index = [list(bounds) for bounds in index]
            table.append({"leaf": name, "index": index, "offset": offset, "crc32": checksum})
            offset += array.nbytes
    return table


def files_of(process: int, count: int) -> tuple[str, str]:
    """Returns the names of the two files of a process: pieces and table."""
    return f"process-{process}-of-{count}.pieces", f"process-{process}-of-{count}.json"


def write(directory: Path, pieces: Pieces, table: list[dict[str, Any]], leaves: Leaves) -> None:
    """Writes the pieces of this process to disk, empties `pieces` to free the memory, and verifies the files.

    Raises:
        OSError: A file cannot be written.
        Damage: The content of a file differs from what was written.
    """
    names = files_of(jax.process_index(), jax.process_count())
    with (directory / names[0]).open("wb") as file:
        for array in (array for some in pieces.values() for _, array in some):
            file.write(_bytes_of(array))
        file.flush()
        os.fsync(file.fileno())  # the process that renames the directory may run on another machine
    pieces.clear()
    with (directory / names[1]).open("w") as file:
        json.dump(seal({"pieces": table}), file)
        file.flush()
        os.fsync(file.fileno())
    for row in table:
        _read(directory / names[0], row, leaves[row["leaf"]])


class Reader:
    """Reads arrays from the pieces of a checkpoint of several processes.

    Args:
        directory: The directory of the checkpoint.
        leaves: The leaves of its record.
        processes: Number of processes that wrote the checkpoint.

    Raises:
        Damage: A table is missing or wrong, or pieces are missing.
    """

    def __init__(self, directory: Path, leaves: Leaves, processes: int):
        self.leaves = leaves
        self._rows: dict[str, list[tuple[Path, dict[str, Any]]]] = {name: [] for name in leaves}
        for process in range(processes):
            names = files_of(process, processes)
            for row in read_table(directory / names[1]):
                self._rows[row["leaf"]].append((directory / names[0], row))
        for name, rows in self._rows.items():
            found = sum(math.prod(stop - start for start, stop in row["index"]) for _, row in rows)
            if found != math.prod(leaves[name]["shape"]):
                raise Damage(f"pieces of {name} are missing")

    def __call__(self, names: Sequence[str]) -> Iterator[Part]:
        """Returns an iterator over the arrays with these names, each as a function that reads the part at an index."""
        return iter([lambda index, name=name: self._part(name, index) for name in names])

    def _part(self, name: str, index: tuple[slice, ...] | EllipsisType) -> np.ndarray:
        about = self.leaves[name]
        wanted = _bounds(index, about["shape"])
        result = np.empty([stop - start for start, stop in wanted], jax.numpy.dtype(about["dtype"]))
        for path, row in self._rows[name]:
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, row["index"], strict=True)]
            if all(start < stop for start, stop in common):
                piece = retried(lambda path=path, row=row: _read(path, row, about))
                if [*map(list, wanted)] == row["index"]:
                    return piece
                result[_within(common, wanted)] = piece[_within(common, row["index"])]
        return result


def read_table(path: Path) -> list[dict[str, Any]]:
    """Returns the table of the pieces of one process.

    Raises:
        Damage: The file is missing or wrong.
    """
    try:
        return unseal(json.loads(retried(path.read_bytes)))["pieces"]
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Damage(f"table of pieces {path.name} cannot be read") from error


def _within(common: Sequence[tuple[int, int]], outer: Sequence[Sequence[int]]) -> tuple[slice, ...]:
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(common, outer, strict=True))


def _read(path: Path, row: dict[str, Any], about: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(jax.numpy.dtype(about["dtype"]))
    shape = [stop - start for start, stop in row["index"]]
    data = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    left = data.data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(row["offset"])
            while left and (count := file.readinto(left)):  # NumPy would take an error for the end of the file
                left = left[count:]
    except FileNotFoundError as error:
        raise Damage(f"file {path.name} is missing") from error
    if left:
        raise Damage(f"file {path.name} is too short")
    if (found := zlib.crc32(data.data)) != row["crc32"]:
        raise Damage(f"a piece of {row['leaf']} must have the checksum {row['crc32']:08x}; got {found:08x}")
    return data.view(dtype).reshape(shape)


def verified(name: str, array: Any, about: dict[str, Any]) -> np.ndarray:
    """Checks an array that was read and returns it.

    Raises:
        Damage: The array is missing or does not match its record.
    """
    dtype = np.dtype(jax.numpy.dtype(about["dtype"]))
    if not isinstance(array, np.ndarray):
        raise Damage(f"{name} is missing")
    if (list(array.shape), array.dtype) != (about["shape"], dtype):
        raise Damage(f"{name} must be {about['dtype']}{about['shape']}; got {array.dtype}{list(array.shape)}")
    if (found := zlib.crc32(_bytes_of(array))) != about["crc32"]:
        raise Damage(f"{name} must have the checksum {about['crc32']:08x}; got {found:08x}")
    return array


def place(template: Any, leaves: Leaves, read: Callable[[Sequence[str]], Iterator[Part]]) -> Any:
    """Reads arrays into the tree structure of a template, with the shardings of its leaves.

    Each array is copied to its devices before the next one is read, so the host never holds the whole state.

    Args:
        template: A tree of arrays or of `jax.ShapeDtypeStruct`.
        leaves: The leaves of the record.
        read: Function that returns the arrays with the given names, in order.

    Raises:
        Damage: An array does not match the record.
        ValueError: JAX would convert an array to another dtype.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(template)
    named = [(name_of(path), leaf) for path, leaf in flat]
    parts = read([name for name, leaf in named if 0 not in leaf.shape])
    return structure.unflatten(
        [_placed(name, leaf, leaves[name], next(parts) if 0 not in leaf.shape else None) for name, leaf in named]
    )


def _placed(name: str, leaf: Any, about: dict[str, Any], part: Part | None) -> Any:
    part = part or (lambda index: np.zeros(about["shape"], jax.numpy.dtype(about["dtype"])))
    if isinstance(leaf, np.ndarray | np.generic):
        return part(...)
    sharding = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
    everywhere = sharding is not None and not sharding.is_fully_addressable  # over several processes
    if sharding is not None and everywhere:
        read: dict[Index, np.ndarray] = {}  # replicas on the devices of this process need the same

        def piece(index: Any) -> np.ndarray:  # JAX's type includes None, which it never passes
            bounds = _bounds(index, about["shape"])
            if bounds not in read:
                read[bounds] = part(index)
            return read[bounds]

        placed = jax.make_array_from_callback(tuple(about["shape"]), sharding, piece)
    else:
        placed = jax.device_put(part(...), None if is_key(leaf) else sharding)
    if is_key(leaf):
        key = jax.random.wrap_key_data(placed, impl=about["impl"])
        return key if sharding is None or everywhere else jax.device_put(key, sharding)
    if placed.dtype != leaf.dtype:
        raise ValueError(f"{name} must stay {leaf.dtype}, which needs jax_enable_x64; got {placed.dtype}")
    return jax.block_until_ready(placed)
