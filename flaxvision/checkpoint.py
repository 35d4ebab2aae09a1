"""Checkpoints that survive kills, full disks and rotten bits; the only file that imports Orbax.

A checkpoint is one Orbax directory `<step>` that holds every array of a state by its path (`params/conv1/kernel`) and,
as the checkpoint's custom metadata, one JSON record: step, progress, metrics, the manifest of the run and the shape,
dtype and CRC-32 of each array. Orbax writes to a temporary directory and renames it, so a checkpoint is there whole or
not at all. It loads flipped bits without a word, so everything is compared with the record, whose own CRC-32 is in it.

Saving copies the state to the host and leaves the writing to a thread. The thread writes, reads back what it wrote,
and only then deletes older checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

__all__ = ["Checkpoints", "DamagedCheckpointError", "Restored"]

logger = logging.getLogger(__name__)

_FORMAT = 1
# A step saved twice gets a revision, so that the first is deleted only when the second is safe.
_NAME = re.compile(r"(\d{9,})(?:-r(\d+))?")
_LEFTOVER = re.compile(_NAME.pattern + r"\.(?:orbax-checkpoint-tmp.*|deleted)")
_NOTICE_ONLY = "versions"  # the manifest's key that may differ: resuming under other libraries is allowed


class DamagedCheckpointError(RuntimeError):
    """There are checkpoints, and none of them can be restored."""


class _Damage(Exception):
    """What is wrong with one checkpoint."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
        state: The tree of the template with the saved values, placed as the template's leaves are.
        step: The step under which it was saved.
        progress: The host's own record, as handed to `save` (tuples come back as lists).
        metrics: The metrics handed to `save`, or None.
    """

    state: Any
    step: int
    progress: dict[str, Any]
    metrics: dict[str, float] | None


class _Entry(NamedTuple):
    """A committed checkpoint; the natural order is by age."""

    step: int
    revision: int
    path: Path


class Checkpoints:
    """The checkpoints of one run in one directory: the latest few and the best few by a metric.

    Use it as a context manager or call `close`: an interpreter that exits while a save is being written abandons it.
    One process writes to a directory at a time; any number may read.

    Args:
        directory: Where the checkpoints lie; made by the first save.
        manifest: What makes this run this run (model, overrides, config, data fingerprint), JSON values by name.
            Every key given here must agree with the checkpoint's when one is restored. The key `versions` is the
            exception: it is stored and a difference is only logged.
        keep_latest: Number of newest checkpoints to keep, at least 1.
        best_metric: The key of `metrics` that ranks checkpoints, or None to keep no best ones.
        best_mode: Whether a larger ("max") or a smaller ("min") metric is better. Of equals the earlier is the better.
        keep_best: Number of best checkpoints to keep; they may be among the latest.

    Raises:
        NotADirectoryError: `directory` is a file.
        TypeError: The manifest holds something that JSON does not.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        manifest: Mapping[str, Any] | None = None,
        keep_latest: int = 2,
        best_metric: str | None = "accuracy",
        best_mode: Literal["max", "min"] = "max",
        keep_best: int = 1,
    ):
        if keep_latest < 1 or keep_best < 0:
            raise ValueError(f"keep_latest >= 1 and keep_best >= 0 are needed, got {keep_latest} and {keep_best}")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode is 'max' or 'min', got {best_mode!r}")
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, "a directory for checkpoints is needed, this is a file", str(directory)
            )
        self.manifest = _plain(dict(manifest or {}), "manifest")
        self.keep_latest, self.keep_best = keep_latest, keep_best
        self.best_metric, self.best_mode = best_metric, best_mode
        self._damaged: set[Path] = set()
        self._metrics: dict[Path, dict[str, float] | None] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="flaxvision-checkpoint")
        self._pending: Future[None] | None = None

    def prepare(self) -> None:
        """Makes the directory, removes what a killed save left there and proves that it can be written.

        `save` does this by itself; call it to fail before the training rather than after an hour of it.

        Raises:
            OSError: The directory cannot be made or written (PermissionError, FileExistsError and the like).
        """
        if jax.process_index() != 0:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            probe = self.directory / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = f"checkpoints cannot be written here: {error.strerror}"
            raise OSError(error.errno, reason, str(self.directory)) from error

    def save(
        self,
        step: int,
        state: Any,
        *,
        progress: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Saves a state; returns when the state is copied to the host and may be donated.

        A step that is already saved with the same contents is left alone (metrics included, if none are given now);
        with other contents it is replaced once the new one is safe.

        Args:
            step: Number of the step, at least 0.
            state: A tree of arrays (JAX arrays, PRNG keys, NumPy arrays) of any shape and dtype.
            progress: The host's own record, JSON values by name; floats come back exactly.
            metrics: Numbers by name; `best_metric` is looked up here. NaN is never the best.
            wait: Return only when the checkpoint is safe on the disk.

        Raises:
            OSError: This save (with `wait`) or the one before could not be written; nothing older was deleted.
            TypeError: A leaf is no array, or progress or metrics hold something that JSON does not.
            ValueError: `step` is negative, or two leaves have the same path.
        """
        self.wait()
        if int(step) != step or step < 0:
            raise ValueError(f"step must be an integer >= 0, got {step!r}")
        arrays, leaves = _to_host(state)
        record = {
            "format": _FORMAT,
            "step": int(step),
            "progress": _plain(dict(progress), "progress"),
            "metrics": None if metrics is None else {str(k): float(v) for k, v in metrics.items()},
            "manifest": self.manifest,
            "leaves": leaves,
        }
        entries = self._entries()
        if entries and entries[-1].step > step and entries[-1].path not in self._damaged:
            logger.warning("saving checkpoint %d below %d, which a restore would use", step, entries[-1].step)
        same = [entry for entry in entries if entry.step == step]
        if same and same[-1].path not in self._damaged:
            with contextlib.suppress(_Damage):
                stored = _read_record(same[-1])
                if record["metrics"] is None:
                    record["metrics"] = stored["metrics"]
                if _canonical(stored) == _canonical(record):
                    return
        revision = same[-1].revision + 1 if same else 0
        name = f"{step:09d}" + (f"-r{revision}" if revision else "")
        entry = _Entry(int(step), revision, self.directory / name)
        self._pending = self._writer.submit(self._write, entry, arrays, record)
        if wait:
            self.wait()

    def restore(self, template: Any) -> Restored | None:
        """Restores the newest checkpoint that is undamaged; None when there is none at all.

        Args:
            template: A state or its `jax.eval_shape`: the tree, the shapes and the dtypes to expect. Arrays go to the
                sharding of the template's leaf; to the default device, uncommitted, where it has none or is
                uncommitted; and stay NumPy arrays where it is one.

        Raises:
            DamagedCheckpointError: All checkpoints are damaged.
            ValueError: The checkpoint is of another run (see `manifest`) or its arrays are not those of the template.
            OSError: The save before could not be written.
        """
        self.wait()
        return self._restore(reversed(self._entries()), template)

    def restore_best(self, template: Any) -> Restored | None:
        """Restores the best checkpoint by the metric, or the next best if it is damaged; None if none has the metric.

        Args and errors are those of `restore`.
        """
        self.wait()
        return self._restore(self._ranked(self._entries()), template)

    def steps(self) -> tuple[int, ...]:
        """The steps that have a checkpoint, ascending, as far as known undamaged."""
        self._join()
        return tuple(sorted({entry.step for entry in self._entries() if entry.path not in self._damaged}))

    @property
    def latest_step(self) -> int | None:
        """The newest step that has a checkpoint, or None."""
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint by the metric, or None."""
        self._join()
        return next((entry.step for entry in self._ranked(self._entries())), None)

    def wait(self) -> None:
        """Waits until the last save is safe; raises its error, once."""
        pending = self._pending
        if pending is None:
            return
        try:
            pending.result()
        finally:
            if pending.done():
                self._pending = None

    def close(self) -> None:
        """Waits for the last save, ends the writing thread and raises the save's error if that is still due."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _join(self) -> None:
        if self._pending is not None:
            self._pending.exception()

    def _entries(self) -> list[_Entry]:
        if not self.directory.is_dir():
            return []
        found = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        return sorted(_Entry(int(match[1]), int(match[2] or 0), path) for match, path in found if match)

    def _ranked(self, entries: Iterable[_Entry]) -> list[_Entry]:
        """Those that have the metric, best first."""
        newest = {entry.step: entry for entry in entries if entry.path not in self._damaged}
        ranked = []
        for entry in newest.values():
            if entry.path not in self._metrics:
                try:
                    self._metrics[entry.path] = _read_record(entry)["metrics"]
                except _Damage as damage:
                    self._report(entry, damage)
                    continue
            value = (self._metrics[entry.path] or {}).get(self.best_metric or "", math.nan)
            if not math.isnan(value):
                ranked.append((-value if self.best_mode == "max" else value, entry))
        return [entry for _, entry in sorted(ranked)]

    def _report(self, entry: _Entry, damage: _Damage) -> None:
        if entry.path not in self._damaged:
            logger.warning("checkpoint %d is damaged (%s): %s", entry.step, damage, entry.path)
        self._damaged.add(entry.path)

    def _restore(self, entries: Iterable[_Entry], template: Any) -> Restored | None:
        faults = []
        for entry in entries:
            try:
                record = _read_record(entry)
                self._check_manifest(entry, record["manifest"])
                _check_fit(entry, record["leaves"], template)
                arrays = _read_arrays(entry, record["leaves"])
            except _Damage as damage:
                self._report(entry, damage)
                faults.append(f"{entry.path.name} ({damage})")
                continue
            if faults:
                logger.warning("using checkpoint %d", entry.step)
            leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
            placed = [_place(_name(path), arrays, record["leaves"], leaf) for path, leaf in leaves]
            state = jax.tree_util.tree_unflatten(treedef, placed)
            return Restored(state, entry.step, record["progress"], record["metrics"])
        if faults:
            raise DamagedCheckpointError(f"every checkpoint in {self.directory} is damaged: {'; '.join(faults)}")
        return None

    def _check_manifest(self, entry: _Entry, stored: dict[str, Any]) -> None:
        for key, given in self.manifest.items():
            for name, old, new in _differences(stored.get(key), given, key):
                if key != _NOTICE_ONLY:
                    raise ValueError(
                        f"checkpoint {entry.step} in {self.directory} is of another run: "
                        f"its {name} is {old!r}, this run's is {new!r}"
                    )
                logger.warning("checkpoint %d was saved with %s %s, this is %s", entry.step, name, old, new)

    def _write(self, entry: _Entry, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        """Writes, reads back, prunes; on the writing thread."""
        self.prepare()
        need = sum(array.nbytes for array in arrays.values()) + len(_canonical(record))
        free = shutil.disk_usage(self.directory).free
        if need > free:
            reason = f"checkpoint {entry.step} needs {need} bytes and the disk has {free} left"
            raise OSError(errno.ENOSPC, reason, str(self.directory))
        try:
            with _orbax() as ocp:
                ocp.save_checkpointables(entry.path, {"state": arrays}, custom_metadata=_sealed(record))
        except Exception as error:
            shutil.rmtree(entry.path.with_name(entry.path.name + ".orbax-checkpoint-tmp"), ignore_errors=True)
            code = re.search(r"os_error_code='(\d+)'", str(error))
            number = int(code[1]) if code else getattr(error, "errno", None) or errno.EIO
            reason = f"checkpoint {entry.step} could not be written: {os.strerror(number)}"
            raise OSError(number, reason, str(entry.path)) from error
        if jax.process_index() != 0:
            return
        try:
            _read_arrays(entry, _read_record(entry)["leaves"])
        except _Damage as damage:
            self._damaged.add(entry.path)
            reason = f"checkpoint {entry.step} does not read back as written ({damage})"
            raise OSError(errno.EIO, reason, str(entry.path)) from damage
        self._damaged.discard(entry.path)
        self._metrics[entry.path] = record["metrics"]
        self._prune(entry)

    def _prune(self, saved: _Entry) -> None:
        entries = self._entries()
        best = self._ranked(entries)[: self.keep_best]
        newest = {entry.step: entry for entry in entries if entry.path not in self._damaged}
        latest = [newest[step] for step in sorted(newest)[-self.keep_latest :]]
        for entry in set(entries) - {saved, *latest, *best}:
            # The rename takes it out of sight at once; a kill during the removal leaves no half a checkpoint.
            doomed = entry.path.with_name(entry.path.name + ".deleted")
            try:
                entry.path.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("checkpoint %d could not be deleted: %s", entry.step, error)


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """Orbax v1, without its log: what it reports is raised too, and this file words it."""
    from orbax.checkpoint import v1

    def foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    absl = logging.getLogger("absl")
    absl.addFilter(foreign)
    try:
        yield v1
    finally:
        absl.removeFilter(foreign)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(state: Any) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Copies of the arrays by path (those without elements left out), and what the record says of each."""
    arrays, leaves = {}, {}
    named = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]]
    for name, leaf in named:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"the state's leaf {name} is of type {type(leaf).__name__}, an array is needed")
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and not _is_key(leaf):
            leaf.copy_to_host_async()
    for name, leaf in named:
        if name in leaves:
            raise ValueError(f"two leaves of the state have the path {name}")
        about: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if _is_key(leaf):
            about["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.array(leaf)  # a copy: the buffer may be donated while the thread writes
        leaves[name] = about | {"crc32": _crc(array)}
        if array.size:
            arrays[name] = array
    return arrays, leaves


def _place(name: str, arrays: dict[str, np.ndarray], leaves: dict[str, dict[str, Any]], leaf: Any) -> Any:
    array: Any = arrays[name]
    if isinstance(leaf, np.ndarray | np.generic):
        return array
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.Array) and not leaf.committed:
        sharding = None
    if _is_key(leaf):
        array = jax.random.wrap_key_data(jax.device_put(array), impl=leaves[name]["key"])
        return array if sharding is None else jax.device_put(array, sharding)
    placed = jax.device_put(array, sharding)
    if placed.dtype != leaf.dtype:
        raise ValueError(f"{name} is {leaf.dtype}, which JAX makes {placed.dtype}: set jax_enable_x64")
    return placed


def _check_fit(entry: _Entry, stored: dict[str, dict[str, Any]], template: Any) -> None:
    wanted = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(template)[0]}
    faults = [f"{name} is not in the checkpoint" for name in wanted if name not in stored]
    faults += [f"{name} is not in the state" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        old, leaf = stored[name], wanted[name]
        for what, is_, should in (
            ("shape", old["shape"], list(np.shape(leaf))),
            ("dtype", old["dtype"], str(getattr(leaf, "dtype", type(leaf).__name__))),
        ):
            if is_ != should:
                faults.append(f"{name} has {what} {is_} in the checkpoint and {should} in the state")
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(
            f"checkpoint {entry.step} ({entry.path}) does not fit the state: {'; '.join(sorted(faults)[:8])}{more}"
        )


def _read_record(entry: _Entry) -> dict[str, Any]:
    try:
        with _orbax() as ocp:
            record = dict(ocp.checkpointables_metadata(entry.path).custom_metadata)
        seal = record.pop("crc32")
    except Exception as error:
        raise _Damage(f"its record cannot be read: {_first_line(error)}") from error
    if seal != zlib.crc32(_canonical(record).encode()):
        raise _Damage("its record has a wrong checksum")
    if record["format"] != _FORMAT:
        raise ValueError(f"{entry.path} has format {record['format']}, this flaxvision reads {_FORMAT}")
    if record["step"] != entry.step:
        raise _Damage(f"its record says step {record['step']}")
    return record


def _read_arrays(entry: _Entry, leaves: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    try:
        with _orbax() as ocp:
            arrays = dict(ocp.load_checkpointables(entry.path, {"state": None})["state"])
    except Exception as error:
        raise _Damage(f"its arrays cannot be read: {_first_line(error)}") from error
    for name, about in leaves.items():
        if 0 in about["shape"]:
            arrays[name] = np.zeros(about["shape"], jax.numpy.dtype(about["dtype"]))
        array = arrays.get(name)
        if not isinstance(array, np.ndarray):
            raise _Damage(f"{name}: missing")
        if "key" not in about and (list(array.shape), str(array.dtype)) != (about["shape"], about["dtype"]):
            raise _Damage(f"{name}: {array.dtype}{list(array.shape)} instead of {about['dtype']}{about['shape']}")
        if _crc(array) != about["crc32"]:
            raise _Damage(f"{name}: checksum {_crc(array):08x} instead of {about['crc32']:08x}")
    return arrays


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _canonical(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"crc32": zlib.crc32(_canonical(record).encode())}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _plain(value: Any, where: str) -> Any:
    """The value as JSON gives it back: refuses what would come back as something else."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} is {value!r} of type {type(value).__name__}, which JSON cannot hold")


def _differences(stored: Any, given: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted(stored.keys() | given.keys()):
            yield from _differences(stored.get(key), given.get(key), f"{name}.{key}")
    elif json.dumps(stored) != json.dumps(given):
        yield name, stored, given
