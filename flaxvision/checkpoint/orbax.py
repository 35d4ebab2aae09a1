"""Checkpoints of one process, stored with Orbax. No other module imports Orbax."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from flaxvision import manifest
from flaxvision.checkpoint import pieces
from flaxvision.manifest import Leaves, brief, retried

__all__ = ["errno_of", "read_arrays", "read_metadata", "save"]

_LOCK = threading.Lock()
_GROUP = 1 << 24  # bytes of arrays that Orbax reads at a time
T = TypeVar("T")


def save(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Writes a directory with arrays and JSON metadata."""
    arrays = arrays or {"(none)": np.zeros(1)}  # Orbax stores no empty tree
    with _orbax() as ocp:
        ocp.save_checkpointables(path, {"state": arrays}, custom_metadata=metadata)


def read_metadata(path: Path) -> dict[str, Any]:
    """Returns the JSON metadata of a directory.

    Raises:
        Damage: A file is missing or changed.
        OSError: A file cannot be read.
        RuntimeError: The files are intact, but Orbax cannot read them.
    """
    return dict(_read(path, lambda ocp: ocp.checkpointables_metadata(path).custom_metadata))


def read_arrays(path: Path, leaves: Leaves, names: Sequence[str]) -> Iterator[pieces.Part]:
    """Yields the arrays with these names. Orbax reads them in groups of about 16 MiB, to bound the memory.

    Raises:
        Damage: An array does not match its record. See also `read_metadata`.
    """
    group, size = [], 0
    for name in names:
        group.append(name)
        size += math.prod(leaves[name]["shape"]) * jax.numpy.dtype(leaves[name]["dtype"]).itemsize
        if size >= _GROUP or name == names[-1]:
            arrays = _read_group(path, group)
            for each in group:
                yield pieces.verified(each, arrays.pop(each, None), leaves[each]).__getitem__
            group, size = [], 0


def _read_group(path: Path, names: Sequence[str]) -> dict[str, Any]:
    wanted = {"state": dict.fromkeys(names, np.ndarray)}
    return dict(retried(lambda: _read(path, lambda ocp: ocp.load_checkpointables(path, wanted)["state"])))


def _read(path: Path, read: Callable[[Any], T]) -> T:
    """Reads with Orbax. Distinguishes errors of the system from wrong content."""
    try:
        with _orbax() as ocp:
            return read(ocp)
    except Exception as error:
        number = errno_of(error)
        if isinstance(error, MemoryError):
            raise
        if number not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise OSError(number, os.strerror(number), str(path)) from error
        manifest.check_files(path)
        raise RuntimeError(f"the installed Orbax must be able to read {path}; got {brief(error)}") from error


def errno_of(error: BaseException) -> int | None:
    """Returns the errno of a system error, also of one that TensorStore reports; None for other errors."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else getattr(error, "errno", None)


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """Yields Orbax v1, configured to use little memory, under a lock because concurrent saves interfere."""
    from orbax.checkpoint import v1

    def foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    context = v1.Context()
    index = jax.process_index()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = index, {index}
    context.pytree.loading.partial_load = True
    context.array.saving.use_compression = False  # parameters hardly shrink, and compressed copies need memory
    if hasattr(context.memory, "deepcopy_host_arrays"):
        context.memory.deepcopy_host_arrays = False
    absl = logging.getLogger("absl")  # repeats the errors
    with _LOCK, context:
        absl.addFilter(foreign)
        try:
            yield v1
        finally:
            absl.removeFilter(foreign)
