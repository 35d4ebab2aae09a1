"""Checkpoints that survive kills, full disks and rotten bits; the only file that imports Orbax.

A checkpoint is one Orbax directory `<step>` with every array of a state by its path (`params/conv1/kernel`), the record
of `flaxvision.manifest` as custom metadata, and the checksums of all its files. Orbax loads flipped bits without a word
and chokes noisily on others, so the files are checked before it sees them and the arrays after.

Saving copies the state to the host and leaves the rest to a thread, which writes to a temporary directory, reads back
what it wrote, renames the directory, and only then deletes older checkpoints: one is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from flaxvision import atomic
from flaxvision import manifest as notes
from flaxvision.manifest import Damage, brief

__all__ = ["Checkpoints", "DamagedCheckpointError", "Restored"]

logger = logging.getLogger(__name__)

# A step saved twice gets a revision, so that the first is deleted only when the second is safe.
_NAME = re.compile(r"(\d{9,})(?:-r(\d+))?")
_LEFTOVER = re.compile(_NAME.pattern + r"\.(?:saving.*|deleted)")
_ORBAX = threading.Lock()
_UNSEEN: set[Future[None]] = set()  # saves whose end nobody has waited for


class DamagedCheckpointError(RuntimeError):
    """There are checkpoints, and none of them can be restored."""


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


class _Entry(NamedTuple):  # sorts by age
    step: int
    revision: int
    path: Path


class Checkpoints:
    """The checkpoints of one run in one directory: the latest few and the best few by a metric.

    Use it as a context manager, or call `close`; otherwise an error of the last save is only logged when Python exits.
    From Python 3.12 on a save outside of a `with` waits, since Python can finish none as it exits.
    One process writes to a directory at a time; any number may read.

    Args:
        directory: Where the checkpoints lie; made by `prepare` or the first save.
        manifest: What makes this run this run (model, overrides, config, data fingerprint), JSON values by name.
            `restore` wants every key given here to agree with the checkpoint's, except `versions`, which is stored
            and whose differences are only logged.
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
            raise ValueError(f"best_mode must be 'max' or 'min', got {best_mode!r}")
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "checkpoints need a directory, this is a file", str(directory))
        self.manifest = notes.plain(dict(manifest or {}), "manifest")
        self.keep_latest, self.keep_best = keep_latest, keep_best
        self.best_metric, self.best_mode = best_metric, best_mode
        self._damaged: set[Path] = set()
        self._metrics: dict[Path, dict[str, float] | None] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="flaxvision-checkpoint")
        self._pending: Future[None] | None = None
        self._entered = False

    def prepare(self) -> None:
        """Makes the directory, removes what a killed save left there and proves that it can be written.

        `save` does this too; call it to fail before the training and not after an hour of it.

        Raises:
            OSError: The directory cannot be made or written (PermissionError and the like), or `wait` has an error.
        """
        self.wait()
        self._prepare()

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
        step = int(step)
        arrays, leaves = notes.to_host(state)
        record = {
            "step": step,
            "progress": notes.plain(dict(progress), "progress"),
            "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
            "manifest": self.manifest,
            "leaves": leaves,
        }
        entries = self._entries()
        if any(entry.step > step and entry.path not in self._damaged for entry in entries):
            logger.warning("saving checkpoint %d below %d, which a restore would use", step, entries[-1].step)
        same = [entry for entry in entries if entry.step == step]
        if same and same[-1].path not in self._damaged:
            with contextlib.suppress(Damage):
                stored = _read_record(same[-1])
                if record["metrics"] is None:
                    record["metrics"] = stored["metrics"]
                if notes.seal(stored)["crc32"] == notes.seal(record)["crc32"]:
                    return
        revision = same[-1].revision + 1 if same else 0
        path = self.directory / (f"{step:09d}" + (f"-r{revision}" if revision else ""))
        self._pending = self._writer.submit(self._write, _Entry(step, revision, path), arrays, record)
        _UNSEEN.add(self._pending)
        if wait or not (self._entered or _AT_EXIT):
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
        return self._restore(self._entries()[::-1], template)

    def restore_best(self, template: Any) -> Restored | None:
        """Restores the best checkpoint by the metric, or the next best if it is damaged; None if none has the metric.

        Args and errors are those of `restore`.
        """
        self.wait()
        return self._restore(self._ranked(), template)

    def steps(self) -> tuple[int, ...]:
        """The steps that have a checkpoint, ascending, as far as known undamaged."""
        if self._pending is not None:
            self._pending.exception()  # waits; the error is left to `wait`
        return tuple(self._newest())

    @property
    def latest_step(self) -> int | None:
        """The newest step that has a checkpoint, or None."""
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint by the metric, or None."""
        return next((entry.step for entry in self._ranked()), None) if self.steps() else None

    def wait(self) -> None:
        """Waits until the last save is safe; raises its error, once."""
        if (pending := self._pending) is None:
            return
        pending.exception()  # waits, and an interrupt here loses nothing
        self._pending = None
        _UNSEEN.discard(pending)
        pending.result()

    def close(self) -> None:
        """Waits for the last save, ends the writing thread and raises the save's error if that is still due."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def __enter__(self) -> Checkpoints:
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entries(self) -> list[_Entry]:
        found = ((_NAME.fullmatch(path.name), path) for path in self.directory.glob("*"))
        return sorted(_Entry(int(match[1]), int(match[2] or 0), path) for match, path in found if match)

    def _newest(self) -> dict[int, _Entry]:
        """The latest revision of every step that is not known to be damaged, ascending."""
        return {entry.step: entry for entry in self._entries() if entry.path not in self._damaged}

    def _ranked(self) -> list[_Entry]:
        """Those that have the metric, best first."""
        ranked = []
        for entry in self._newest().values():
            if entry.path not in self._metrics:
                try:
                    self._metrics[entry.path] = _read_record(entry)["metrics"]
                except Damage as damage:
                    self._report(entry, damage)
                    continue
            value = (self._metrics[entry.path] or {}).get(self.best_metric or "", math.nan)
            if not math.isnan(value):
                ranked.append((-value if self.best_mode == "max" else value, entry))
        return [entry for _, entry in sorted(ranked)]

    def _report(self, entry: _Entry, damage: Damage) -> None:
        logger.warning("checkpoint %d is damaged (%s): %s", entry.step, damage, entry.path)
        self._damaged.add(entry.path)

    def _restore(self, entries: list[_Entry], template: Any) -> Restored | None:
        for entry in entries:
            try:
                record = _read_record(entry)
                named = f"checkpoint {entry.step} ({entry.path})"
                if notice := notes.check_manifest(record["manifest"], self.manifest, named):
                    logger.warning("checkpoint %d was saved with %s", entry.step, notice)
                if faults := notes.misfits(record["leaves"], template):
                    raise ValueError(f"{named} does not fit the state: {faults}")
                arrays = _read_arrays(entry, record)
            except Damage as damage:
                self._report(entry, damage)
                continue
            self._damaged.discard(entry.path)
            if entry is not entries[0]:
                logger.warning("using checkpoint %d instead of %d", entry.step, entries[0].step)
            state = notes.place(arrays, record["leaves"], template)
            return Restored(state, entry.step, record["progress"], record["metrics"])
        if damaged := [path.name for path in sorted(self._damaged) if path.exists()]:
            raise DamagedCheckpointError(
                f"no checkpoint in {self.directory} is usable, damaged: {', '.join(damaged)}; delete to start anew"
            )
        return None

    def _prepare(self) -> None:
        if jax.process_index() != 0:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            tempfile.TemporaryFile(dir=self.directory).close()
        except OSError as error:
            reason = f"checkpoints cannot be written here ({error.strerror})"
            raise OSError(error.errno, reason, str(self.directory)) from error

    def _write(self, entry: _Entry, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        """Writes, reads back, prunes; on the writing thread."""
        self._prepare()
        need = sum(array.nbytes for array in arrays.values())
        free = shutil.disk_usage(self.directory).free
        if need > free:  # asked first, since Orbax tears down a failed save noisily
            reason = f"checkpoint {entry.step} needs {need} bytes, the disk has {free} left"
            raise OSError(errno.ENOSPC, reason, str(self.directory))
        staged = entry._replace(path=entry.path.with_name(entry.path.name + ".saving"))
        try:
            with _orbax() as ocp:
                ocp.save_checkpointables(staged.path, {"state": arrays}, custom_metadata=notes.seal(record))
            if jax.process_index() != 0:
                return
            notes.write_checksums(staged.path)
            _read_arrays(staged, _read_record(staged))
            atomic.move(staged.path, entry.path)
        except Exception as error:
            for path in self.directory.glob(staged.path.name + "*"):
                shutil.rmtree(path, ignore_errors=True)
            code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's way of saying it
            number = int(code[1]) if code else getattr(error, "errno", None)
            reason = f"checkpoint {entry.step} could not be written ({os.strerror(number) if number else brief(error)})"
            raise OSError(number or errno.EIO, reason, str(entry.path)) from error
        self._damaged.discard(entry.path)
        self._metrics[entry.path] = record["metrics"]
        self._prune(entry)

    def _prune(self, saved: _Entry) -> None:
        keep = {saved, *self._ranked()[: self.keep_best], *list(self._newest().values())[-self.keep_latest :]}
        for entry in set(self._entries()) - keep:
            # The rename takes it out of sight at once; a kill during the removal leaves no half a checkpoint.
            doomed = entry.path.with_name(entry.path.name + ".deleted")
            try:
                atomic.move(entry.path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("checkpoint %d could not be deleted: %s", entry.step, error)


def _finish_saves() -> None:
    for error in filter(None, [future.exception() for future in tuple(_UNSEEN)]):
        logger.error("%s", error)


# An exiting Python closes its thread pools first, and an Orbax save in flight then waits for ever. This hook runs
# before that; it is private, and from Python 3.12 on no thread can start by then, which Orbax wants: then saves wait.
_AT_EXIT = getattr(threading, "_register_atexit", None) if sys.version_info < (3, 12) else None
if _AT_EXIT:
    _AT_EXIT(_finish_saves)


@contextlib.contextmanager
def _orbax(reading: str = "") -> Iterator[Any]:
    """Orbax v1: one thread at a time (it mixes up saves), without its log (it raises the same), errors as `Damage`."""
    from orbax.checkpoint import v1

    def foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    absl = logging.getLogger("absl")
    with _ORBAX:
        absl.addFilter(foreign)
        try:
            yield v1
        except Exception as error:
            if reading:
                raise Damage(f"its {reading} cannot be read: {brief(error)}") from error
            raise
        finally:
            absl.removeFilter(foreign)


def _read_record(entry: _Entry) -> dict[str, Any]:
    notes.check_files(entry.path)
    with _orbax("record") as ocp:
        sealed = dict(ocp.checkpointables_metadata(entry.path).custom_metadata)
    record = notes.unseal(sealed)
    if record["step"] != entry.step:
        raise Damage(f"its record says step {record['step']}")
    return record


def _read_arrays(entry: _Entry, record: dict[str, Any]) -> dict[str, np.ndarray]:
    with _orbax("arrays") as ocp:
        arrays = ocp.load_checkpointables(entry.path, {"state": None})["state"]
    return notes.verify(arrays, record["leaves"])
