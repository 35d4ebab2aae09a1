"""The JSON record of a checkpoint, and the checksums of its files.

A *record* is a dict of JSON values: `step`, `progress`, `metrics`, the `manifest` of the run and `leaves`. A *sealed*
record also has its format and its own CRC-32. *Leaves* map the path of each array (such as `params/conv1/kernel`) to a
dict with `shape`, `dtype` and, in a checkpoint of one process, `crc32`. For a PRNG key these describe its data, and the
dict also has `key`, the dtype of the key, and `impl`.

An *amendment* is a small sealed file beside the arrays. It replaces `progress` and `metrics` of the record, so that an
evaluation is added to a checkpoint without writing the arrays again.
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from flaxvision import atomic

__all__ = [
    "Damage",
    "Leaves",
    "amend",
    "amended",
    "brief",
    "check_files",
    "check_manifest",
    "describe",
    "is_key",
    "json_value",
    "misfits",
    "name_of",
    "read_record",
    "record_of",
    "retried",
    "same",
    "seal",
    "unseal",
    "write_checksums",
    "write_json",
    "write_record",
]

logger = logging.getLogger(__name__)

FORMAT = 1
CHECKSUMS = "checksums.json"  # CRC-32 of the other files of a checkpoint, except amendment and pieces
RECORD = "record.json"
AMENDMENT = "evaluation.json"
_PAUSES = (0.1, 1.0, 3.0)  # seconds between attempts to read

Leaves = dict[str, dict[str, Any]]
T = TypeVar("T")


class Damage(Exception):
    """The content of a checkpoint is wrong; the message says how. An error of the file system is no damage."""


def brief(error: BaseException) -> str:
    """Returns the type and the first line of an error, because the errors of Orbax have many lines."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def retried(read: Callable[[], T]) -> T:
    """Calls a function that reads files, again after a pause if the file system or the memory fails for a moment.

    Raises:
        OSError: The last attempt failed too.
        MemoryError: The last attempt failed too.
    """
    for pause in _PAUSES:
        try:
            return read()
        except (OSError, MemoryError) as error:
            logger.warning("reading again in %g s after an error: %s", pause, brief(error))
        time.sleep(pause)
    return read()


def name_of(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf, such as `params/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of PRNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(name: str, leaf: Any) -> dict[str, Any]:
    """Returns shape and dtype of a leaf; for a PRNG key, of its data, plus the dtype of the key."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(f"state must have arrays as leaves; got {type(leaf).__name__} at {name}")
    data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    about = {"shape": list(data.shape), "dtype": str(data.dtype)}
    return about | {"key": str(leaf.dtype)} if is_key(leaf) else about


def misfits(stored: Leaves, template: Any) -> str:
    """Describes how the stored leaves differ from those of a template; empty if they match."""
    named = ((name_of(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(template)[0])
    wanted = {name: describe(name, leaf) for name, leaf in named}
    faults = [f"{name} is missing from the checkpoint" for name in wanted if name not in stored]
    faults += [f"{name} is missing from the state" for name in stored if name not in wanted]
    for name in sorted(wanted.keys() & stored.keys()):
        old, new = (f"{about.get('key', about['dtype'])}{about['shape']}" for about in (stored[name], wanted[name]))
        if old != new:
            faults.append(f"{name} is {old} in the checkpoint but {new} in the state")
    return "; ".join(faults[:8]) + (f" and {len(faults) - 8} more" if len(faults) > 8 else "")


def _crc_of_json(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def record_of(
    step: int,
    progress: Mapping[str, Any],
    metrics: Mapping[str, float] | None,
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the record of a checkpoint, without its leaves.

    Raises:
        TypeError: JSON cannot represent `progress`.
    """
    return {
        "step": step,
        "progress": json_value(dict(progress), "progress"),
        "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
        "manifest": manifest,
    }


def same(one: Any, other: Any) -> bool:
    """Returns whether two JSON values are the same, NaN included."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


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


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Writes the record of a checkpoint of several processes."""
    write_json(directory / RECORD, seal(record))


def read_record(directory: Path) -> dict[str, Any] | None:
    """Returns the record of a checkpoint of several processes, or None if Orbax has stored the record.

    Raises:
        Damage: The record is wrong.
    """
    try:
        return unseal(json.loads((directory / RECORD).read_bytes()))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Damage(f"record cannot be read: {brief(error)}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value for people to read."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def amend(directory: Path, amendment: Mapping[str, Any]) -> None:
    """Writes the amendment of a checkpoint: its `step`, and new values for `progress` and `metrics`.

    Raises:
        OSError: The file cannot be written.
    """
    with atomic.replacing(directory / AMENDMENT) as partial:
        partial.write_text(json.dumps(seal(dict(amendment))))


def amended(directory: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record with the values of the amendment of the checkpoint, if there is a sound one."""
    try:
        amendment = unseal(json.loads((directory / AMENDMENT).read_bytes()))
        if amendment["step"] != record["step"]:
            raise Damage(f"amendment belongs to step {amendment['step']}")
    except FileNotFoundError:
        return record
    except (Damage, json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        logger.warning("checkpoint %d counts as not evaluated: %s", record["step"], brief(error))
        return record
    return record | {key: amendment[key] for key in ("progress", "metrics")}


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


def check_manifest(
    stored: dict[str, Any],
    given: dict[str, Any],
    named: str,
    allow: Collection[str] = (),
    describe: Mapping[str, Callable[[Any, Any], Sequence[str]]] | None = None,
) -> tuple[str, str]:
    """Compares the given keys of a manifest with the stored ones.

    Args:
        stored: The manifest of the checkpoint.
        given: The manifest of this run.
        named: Name of the checkpoint in error messages.
        allow: Keys that may differ.
        describe: Functions by key that say how the stored and the given value differ; without one the values are named.

    Returns:
        The differences in `versions`, of packages that both have, and the differences in the keys of `allow`.

    Raises:
        ValueError: Another key differs.
    """
    versions, allowed = [], []
    for key, value in given.items():
        differences = list(_differences(stored.get(key), value, key))
        say = (describe or {}).get(key)
        said = say(stored[key], value) if say and differences and stored.get(key) else ()
        if said and key not in allow:
            raise ValueError(
                f"{key} must be as in {named}, which belongs to another run; got differences: {'; '.join(said)}"
            )
        if said:
            allowed += said
            continue
        for name, old, new in differences:
            if key in allow:
                allowed.append(f"{name} {old!r} (now {new!r})")
            elif key != "versions":
                raise ValueError(f"{name} must be {old!r} as in {named}, which belongs to another run; got {new!r}")
            elif old is not None and new is not None:
                versions.append(f"{name} {old} (now {new})")
    return "; ".join(versions), "; ".join(allowed)


def _crc_of_file(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def write_checksums(directory: Path) -> None:
    """Writes the file of checksums of a checkpoint directory. Pieces have checksums of their own."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.suffix != ".pieces")
    found = {path.relative_to(directory).as_posix(): _crc_of_file(path) for path in paths}
    (directory / CHECKSUMS).write_text(json.dumps(found, indent=1))


def check_files(directory: Path) -> None:
    """Verifies the files of a checkpoint directory.

    Raises:
        Damage: A file, or the file of checksums, is missing or changed.
        OSError: A file cannot be read.
    """
    missing = FileNotFoundError, IsADirectoryError, NotADirectoryError
    try:
        wanted = dict(json.loads((directory / CHECKSUMS).read_bytes()))
    except (*missing, ValueError, TypeError) as error:
        raise Damage(f"checksums cannot be read: {brief(error)}") from error
    for name, checksum in wanted.items():
        try:
            found = _crc_of_file(directory / name)
        except missing as error:
            raise Damage(f"file {name} is missing") from error
        if found != checksum:
            raise Damage(f"file {name} must have the checksum {checksum}; got {found}")
