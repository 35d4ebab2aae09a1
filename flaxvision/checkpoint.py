"""Checkpoints that survive kills, full disks and bit rot. This is the only module that imports Orbax.

A checkpoint is an Orbax directory `<step>` with every array of a state under its path (`params/conv1/kernel`), the
record of `flaxvision.manifest` as custom metadata, and a file of checksums. Orbax loads some flipped bits silently and
crashes on others, so the files are verified before Orbax reads them and the arrays afterwards.

`save` copies the state to the host and returns. A thread writes a temporary directory, reads it back, renames it and
only then deletes older checkpoints, so a checkpoint is either complete or absent.
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
from flaxvision import manifest as manifest_lib
from flaxvision.manifest import Damage, brief

__all__ = ["Checkpoints", "DamagedCheckpointError", "Restored"]

logger = logging.getLogger(__name__)

# A step that is saved again gets a new revision. The old one is deleted once the new one is complete.
_NAME = re.compile(r"(\d{9,})(?:-r(\d+))?")
_LEFTOVER = re.compile(_NAME.pattern + r"\.(?:saving.*|deleted)")
_ORBAX = threading.Lock()
_UNSEEN: set[Future[None]] = set()  # saves that nobody has waited for


class DamagedCheckpointError(RuntimeError):
    """There are checkpoints, but all of them are damaged."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint.

    Attributes:
        state: The saved values in the tree structure of the template, with the shardings of its leaves.
        step: The step of the checkpoint.
        progress: The `progress` passed to `save`; tuples become lists.
        metrics: The `metrics` passed to `save`, or None.
    """

    state: Any
    step: int
    progress: dict[str, Any]
    metrics: dict[str, float] | None


class _Entry(NamedTuple):  # sorts from old to new
    step: int
    revision: int
    path: Path


class Checkpoints:
    """The checkpoints of one run in one directory: the latest ones and the best ones by a metric.

    Use it as a context manager or call `close`; otherwise an error of the last save is only logged when Python exits.
    On Python 3.12 and later, `save` outside a `with` block waits, because an exiting interpreter cannot finish it. Only
    one process at a time may write to a directory. Any number may read.

    Args:
        directory: The directory of the checkpoints. `prepare` and the first save create it.
        manifest: JSON values by name that identify the run (model, overrides, config, data fingerprint). `restore`
            compares each of them with the value in the checkpoint. Differences in `versions` are only logged.
        keep_latest: Number of newest checkpoints to keep, at least 1.
        best_metric: The key of `metrics` that ranks checkpoints, or None to keep no best checkpoints.
        best_mode: "max" if a larger metric is better, "min" if a smaller one is. On a tie the earlier one wins.
        keep_best: Number of best checkpoints to keep, at least 0. They may be among the latest.

    Raises:
        NotADirectoryError: `directory` is a file.
        TypeError: JSON cannot represent the manifest.
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
        for name, count, least in (("keep_latest", keep_latest, 1), ("keep_best", keep_best, 0)):
            if count < least:
                raise ValueError(f"{name} must be at least {least}; got {count}")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode must be 'max' or 'min'; got {best_mode!r}")
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "directory must not be a file", str(directory))
        self.manifest = manifest_lib.json_value(dict(manifest or {}), "manifest")
        self.keep_latest, self.keep_best = keep_latest, keep_best
        self.best_metric, self.best_mode = best_metric, best_mode
        self._damaged: set[Path] = set()
        self._metrics: dict[Path, dict[str, float] | None] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="flaxvision-checkpoint")
        self._pending: Future[None] | None = None
        self._entered = False

    def prepare(self) -> None:
        """Creates the directory, deletes the remains of killed saves and checks that files can be written.

        `save` does this too. Call it to fail before the training instead of at the first checkpoint.

        Raises:
            OSError: The directory cannot be created or written, or the previous save failed.
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
        """Saves a state. Returns once the state is copied to the host, so that its buffers may be donated.

        Nothing is written if the step is already saved with the same contents (`metrics=None` keeps its metrics).
        If the contents differ, the new ones replace the old ones once they are complete.

        Args:
            step: The step, at least 0.
            state: A tree of JAX arrays, PRNG keys and NumPy arrays of any shape and dtype.
            progress: JSON values by name for the caller's own use. Floats are restored exactly.
            metrics: Numbers by name, among them `best_metric`. NaN is never the best.
            wait: Whether to wait until the checkpoint is on the disk.

        Raises:
            OSError: The previous save, or with `wait` this one, could not be written. No older checkpoint was deleted.
            TypeError: A leaf is not an array, or JSON cannot represent `progress`.
            ValueError: `step` is negative or not an integer, or two leaves have the same path.
        """
        self.wait()
        if int(step) != step or step < 0:
            raise ValueError(f"step must be a non-negative integer; got {step!r}")
        step = int(step)
        arrays, leaves = manifest_lib.to_host(state)
        record = manifest_lib.record_of(step, progress, metrics, self.manifest, leaves)
        entries = self._entries()
        if any(entry.step > step and entry.path not in self._damaged for entry in entries):
            logger.warning("saving checkpoint %d, but restore will use the newer %d", step, entries[-1].step)
        same = [entry for entry in entries if entry.step == step]
        if same and same[-1].path not in self._damaged:
            with contextlib.suppress(Damage):
                stored = _read_record(same[-1])
                if record["metrics"] is None:
                    record["metrics"] = stored["metrics"]
                if manifest_lib.seal(stored)["crc32"] == manifest_lib.seal(record)["crc32"]:
                    return
        revision = same[-1].revision + 1 if same else 0
        path = self.directory / (f"{step:09d}" + (f"-r{revision}" if revision else ""))
        self._pending = self._writer.submit(self._write, _Entry(step, revision, path), arrays, record)
        _UNSEEN.add(self._pending)
        if wait or not (self._entered or _AT_EXIT):
            self.wait()

    def restore(self, template: Any) -> Restored | None:
        """Restores the newest undamaged checkpoint.

        Args:
            template: A state, or the result of `jax.eval_shape`, with the expected tree structure, shapes and dtypes.
                Each array gets the sharding of its leaf. If the leaf is uncommitted or has no sharding, the array is
                uncommitted on the default device. If the leaf is a NumPy array, so is the result.

        Returns:
            The contents of the checkpoint, or None if there is no checkpoint.

        Raises:
            DamagedCheckpointError: All checkpoints are damaged.
            ValueError: The checkpoint is from another run (see `manifest`) or does not match the template.
            OSError: The previous save could not be written.
        """
        self.wait()
        return self._restore(self._entries()[::-1], template)

    def restore_best(self, template: Any) -> Restored | None:
        """Like `restore`, but for the best checkpoint by the metric. Returns None if none has the metric."""
        self.wait()
        return self._restore(self._ranked(), template)

    def steps(self) -> tuple[int, ...]:
        """Returns the steps with a checkpoint that is not known to be damaged, in ascending order."""
        if self._pending is not None:
            self._pending.exception()  # waits; `wait` raises the error
        return tuple(self._newest())

    @property
    def latest_step(self) -> int | None:
        """The newest step with a checkpoint, or None."""
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint by the metric, or None."""
        return next((entry.step for entry in self._ranked()), None) if self.steps() else None

    def wait(self) -> None:
        """Waits until the last save is on the disk. Raises the error of a failed save once."""
        if (pending := self._pending) is None:
            return
        pending.exception()  # waits; an interrupt here loses nothing
        self._pending = None
        _UNSEEN.discard(pending)
        pending.result()

    def close(self) -> None:
        """Waits for the last save, ends the writing thread and raises the error of the save, if any."""
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
        """Returns the latest undamaged revision of every step, in ascending order."""
        return {entry.step: entry for entry in self._entries() if entry.path not in self._damaged}

    def _ranked(self) -> list[_Entry]:
        """Returns the checkpoints with the metric, best first."""
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
                if notice := manifest_lib.check_manifest(record["manifest"], self.manifest, named):
                    logger.warning("checkpoint %d was saved with %s", entry.step, notice)
                if faults := manifest_lib.misfits(record["leaves"], template):
                    raise ValueError(f"{named} does not match the state: {faults}")
                arrays = _read_arrays(entry, record)
            except Damage as damage:
                self._report(entry, damage)
                continue
            self._damaged.discard(entry.path)
            if entry is not entries[0]:
                logger.warning("using checkpoint %d instead of %d", entry.step, entries[0].step)
            state = manifest_lib.place(arrays, record["leaves"], template)
            return Restored(state, entry.step, record["progress"], record["metrics"])
        if damaged := [path.name for path in sorted(self._damaged) if path.exists()]:
            raise DamagedCheckpointError(
                f"all checkpoints in {self.directory} are damaged: {', '.join(damaged)}; delete them to start again"
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
            reason = f"directory of checkpoints cannot be written: {error.strerror}"
            raise OSError(error.errno, reason, str(self.directory)) from error

    def _write(self, entry: _Entry, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        """Writes, verifies and prunes checkpoints; runs on the writing thread."""
        self._prepare()
        need = sum(array.nbytes for array in arrays.values())
        free = shutil.disk_usage(self.directory).free
        if need > free:  # Orbax reports a full disk with many messages
            reason = f"checkpoint {entry.step} needs {need} bytes; the disk has {free} left"
            raise OSError(errno.ENOSPC, reason, str(self.directory))
        staged = entry._replace(path=entry.path.with_name(entry.path.name + ".saving"))
        try:
            with _orbax() as ocp:
                ocp.save_checkpointables(staged.path, {"state": arrays}, custom_metadata=manifest_lib.seal(record))
            if jax.process_index() != 0:
                return
            manifest_lib.write_checksums(staged.path)
            _read_arrays(staged, _read_record(staged))
            atomic.move(staged.path, entry.path)
        except Exception as error:
            for path in self.directory.glob(staged.path.name + "*"):
                shutil.rmtree(path, ignore_errors=True)
            code = re.search(r"os_error_code='(\d+)'", str(error))  # of an error of TensorStore
            number = int(code[1]) if code else getattr(error, "errno", None)
            reason = f"checkpoint {entry.step} cannot be written: {os.strerror(number) if number else brief(error)}"
            raise OSError(number or errno.EIO, reason, str(entry.path)) from error
        self._damaged.discard(entry.path)
        self._metrics[entry.path] = record["metrics"]
        self._prune(entry)

    def _prune(self, saved: _Entry) -> None:
        keep = {saved, *self._ranked()[: self.keep_best], *list(self._newest().values())[-self.keep_latest :]}
        for entry in set(self._entries()) - keep:
            # Renamed first, so that a kill during the deletion leaves no incomplete checkpoint.
            doomed = entry.path.with_name(entry.path.name + ".deleted")
            try:
                atomic.move(entry.path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("checkpoint %d could not be deleted: %s", entry.step, error)


def _finish_saves() -> None:
    for error in filter(None, [future.exception() for future in tuple(_UNSEEN)]):
        logger.error("%s", error)


# An exiting interpreter shuts down its thread pools first, and a running Orbax save would then wait forever. This
# private hook runs before that. On Python 3.12 and later Orbax cannot start threads there, so `save` waits instead.
_AT_EXIT = getattr(threading, "_register_atexit", None) if sys.version_info < (3, 12) else None
if _AT_EXIT:
    _AT_EXIT(_finish_saves)


@contextlib.contextmanager
def _orbax(reading: str = "") -> Iterator[Any]:
    """Yields Orbax v1 under a lock, since it confuses concurrent saves. With `reading`, errors become `Damage`."""
    from orbax.checkpoint import v1

    def foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    absl = logging.getLogger("absl")  # repeats the errors
    with _ORBAX:
        absl.addFilter(foreign)
        try:
            yield v1
        except Exception as error:
            if reading:
                raise Damage(f"{reading} cannot be read: {brief(error)}") from error
            raise
        finally:
            absl.removeFilter(foreign)


def _read_record(entry: _Entry) -> dict[str, Any]:
    manifest_lib.check_files(entry.path)
    with _orbax("record") as ocp:
        sealed = dict(ocp.checkpointables_metadata(entry.path).custom_metadata)
    record = manifest_lib.unseal(sealed)
    if record["step"] != entry.step:
        raise Damage(f"record belongs to step {record['step']}")
    return record


def _read_arrays(entry: _Entry, record: dict[str, Any]) -> dict[str, np.ndarray]:
    with _orbax("arrays") as ocp:
        arrays = ocp.load_checkpointables(entry.path, {"state": None})["state"]
    return manifest_lib.verify(arrays, record["leaves"])
