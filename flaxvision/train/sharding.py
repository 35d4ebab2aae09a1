"""The layout of a state: replicated, or with its large arrays sharded over the devices (ZeRO stage 3, FSDP).

A sharded array is split along its largest dimension that is a multiple of the number of devices. The rule depends only
on shapes, so a parameter, its optimizer moments and its moving average have the same layout.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from flaxvision import processes

SMALL = 4096


def state_sharding(state: Any, mesh: Mesh, *, small: int = SMALL) -> Any:
    """Returns the layout that `jit_step(..., shard_state=True)` gives a state.

    To initialize a state that is too large for one device, compile its creation with this layout::

        create = partial(fv.train.create_state, model, tx, rng, sample)
        state = jax.jit(create, out_shardings=fv.train.state_sharding(jax.eval_shape(create), mesh))()

    Args:
        state: A state, or the result of `jax.eval_shape`.
        mesh: A one-dimensional mesh.
        small: Arrays with fewer elements are replicated, because sharding them saves little memory and costs time.

    Returns:
        A tree of `NamedSharding` with the structure of the state. An array is replicated if none of its dimensions is a
        multiple of the number of devices.
    """
    (axis,) = mesh.axis_names
    count = mesh.size

    def layout(leaf: Any) -> NamedSharding:
        shape = tuple(np.shape(leaf))
        extent, dimension = max(((n, i) for i, n in enumerate(shape) if n % count == 0), default=(0, -1))
        if count == 1 or extent == 0 or int(np.prod(shape)) < small:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*(axis if i == dimension else None for i in range(dimension + 1))))

    return jax.tree.map(layout, state)


def release(state: Any) -> None:
    """Frees the memory of a state at once, even if there are still references to it.

    Args:
        state: A state that is no longer used.
    """
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()


def place(state: Any, layout: Any, *, donate: bool = False) -> Any:
    """Moves a state to its devices, array by array.

    With several processes, arrays that belong to one process become global arrays. All processes must have the same
    values. This is checked by comparing checksums, because otherwise each process would train another model.

    Args:
        state: A tree of arrays.
        layout: A tree of shardings with the same structure.
        donate: Whether to free each array after it is copied, so that no device holds two states.

    Returns:
        The state with the new layout. Arrays that already have it are not copied.

    Raises:
        ValueError: The processes have different states.
    """
    checksums: dict[str, int] = {}

    def one(path: Any, leaf: Any, sharding: Sharding) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if sharding.is_fully_addressable or not local:
            placed = jax.device_put(leaf, sharding)
            if donate and isinstance(leaf, jax.Array) and not _share_memory(leaf, sharding):
                release(leaf)
            return placed
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            placed = one(path, jax.random.key_data(leaf), NamedSharding(_mesh_of(sharding), P()))
            return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        checksums[jax.tree_util.keystr(path, simple=True, separator="/")] = _crc(host)
        placed = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
        if donate:
            release(leaf)
        return placed

    placed = jax.tree_util.tree_map_with_path(one, state, layout)
    if checksums:
        check_same(checksums)
    return placed


def collect(tree: Any) -> Any:
    """Copies arrays to the host, including those sharded over several processes. All processes must call it.

    Args:
        tree: A tree of arrays, such as the variables of a trained state.

    Returns:
        The tree with NumPy arrays. They are the same in all processes.
    """

    def split(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)

    def one(leaf: Any) -> np.ndarray:
        if split(leaf):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    if any(map(split, jax.tree.leaves(tree))):
        processes.barrier("collect")  # it has a time limit, and the collective operation has none
    return jax.tree.map(one, tree)


def check_same(checksums: dict[str, int]) -> None:
    """Checks that all processes have the same values.

    Args:
        checksums: The checksum of each value by name.

    Raises:
        ValueError: The checksums differ between processes. The message names the first value that differs.
    """
    found = processes.gather("state", checksums)
    for index, other in enumerate(found):
        differ = [name for name in {**found[0], **other} if found[0].get(name) != other.get(name)]
        if differ:
            raise ValueError(
                f"the state must be the same in all processes; got different values of {differ[0]} and "
                f"{len(differ) - 1} other arrays in processes 0 and {index}: use the same seed and settings in both"
            )


def _share_memory(array: jax.Array, sharding: Sharding) -> bool:
    """Returns whether a device keeps its part of an array, which is then not copied but used again."""
    before, after = (s.devices_indices_map(array.shape) for s in (array.sharding, sharding))
    return any(before.get(device) == index for device, index in after.items())


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _mesh_of(sharding: Sharding) -> Mesh:
    assert isinstance(sharding, NamedSharding)
    return sharding.mesh  # pyright: ignore[reportReturnType]
