"""Writes checkpoints and deletes old ones. The methods of `Writer` run in a single thread.

With several processes, each has a writer. All writers run the same stages in the same order and exchange their results
after each stage, so an error in one process is raised in all. Only process 0 renames and deletes.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from flaxvision import atomic, manifest, processes
from flaxvision.checkpoint import folders, orbax, pieces
from flaxvision.checkpoint.folders import Entry
from flaxvision.manifest import Damage, brief

__all__ = ["Writer"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_writers: collections.Counter[str] = collections.Counter()
_lock = threading.Lock()


class Writer:
    """Writes the checkpoints of a run.

    Args:
        folder: The directory of the checkpoints.
        run: JSON values for the `run.json` of each checkpoint.
        timeout: Seconds to wait for other processes; None for `processes.stall_timeout()`.
    """

    def __init__(self, folder: folders.Folder, run: dict[str, Any], timeout: float | None):
        self.folder, self.directory, self.run, self.timeout = folder, folder.directory, run, timeout
        self._failed: set[int] = set()
        self._name: str | None = None

    def enroll(self) -> None:
        """Gives the writer the name of its exchanges. Called by the thread that uses the checkpoints.

        Directories of the same name differ by the order of their first use. The path may differ between processes.
        """
        if self._name is None:
            with _lock:
                _writers[self.directory.name] += 1
                self._name = f"checkpoints/{self.directory.name}-{_writers[self.directory.name]}"

    def prepare(self) -> None:
        """Makes the directory ready for a save.

        Raises:
            OSError: The directory cannot be created or written.
            ValueError: The processes do not share the directory.
        """
        first = jax.process_index() == 0
        self.agree("prepare", self.folder.open if first else lambda: None)
        if jax.process_count() == 1:
            return
        token = self.directory / self.agree("share", lambda: f".shared-{secrets.token_hex(8)}")[0]
        try:
            self.agree("write to", token.touch if first else lambda: None)
            seen = self.agree("see", lambda: folders.appears(token))
        finally:
            if first:
                token.unlink(missing_ok=True)
        if not all(seen):
            blind = [index for index, each in enumerate(seen) if not each]
            raise ValueError(
                f"directory must be on storage that all processes share; got {self.directory}, where processes {blind} "
                "do not see the files of process 0"
            )

    def save(self, record: dict[str, Any], arrays: pieces.Pieces) -> None:
        """Writes and verifies a checkpoint, then deletes old ones.

        Args:
            record: The record. Its leaves have no checksums yet.
            arrays: The arrays that this process writes. The dict is emptied to free the memory.

        Raises:
            OSError: A file cannot be written. No older checkpoint was deleted.
            ProcessError: Another process failed.
        """
        try:
            self._save(record, arrays)
        except BaseException:
            self._failed.add(record["step"])
            raise
        self._failed.discard(record["step"])

    def _save(self, record: dict[str, Any], arrays: pieces.Pieces) -> None:
        self.prepare()
        table, first = pieces.table_of(arrays), jax.process_index() == 0
        if jax.process_count() == 1:
            checksums = {row["leaf"]: row["crc32"] for row in table}
            for name, about in record["leaves"].items():
                about["crc32"] = checksums.get(name, 0)
        else:
            record["processes"] = jax.process_count()
        name, stored, unchanged = self._plan(record, table)
        plans = self.agree("plan", lambda: (name, unchanged))
        if record["metrics"] is None:
            record["metrics"] = stored.get("metrics")
        if all(unchanged for _, unchanged in plans):
            amendment = {key: record[key] for key in stored}
            if not all(self.agree("compare", lambda: manifest.same(amendment, stored))):
                self.amend(amendment)
            return
        self.agree("fill", lambda: self._check_space(record["step"], arrays))
        entry = folders.entry_of(self.directory / plans[0][0])
        staged = entry.path.with_name(entry.path.name + ".saving")
        try:
            self.agree("write", lambda: self._stage(staged, record, arrays, table))
            self.agree("complete", lambda: self._complete(staged, record, entry) if first else None)
        except Exception as error:
            if first:
                for path in self.directory.glob(staged.name + "*"):
                    shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, processes.ProcessError):
                raise
            number = orbax.errno_of(error)
            reason = f"checkpoint {entry.step} cannot be written: {os.strerror(number) if number else brief(error)}"
            raise OSError(number or errno.EIO, reason, str(entry.path)) from error
        self.folder.damaged.discard(entry.path)
        self._saved(entry, record["metrics"])

    def amend(self, amendment: dict[str, Any]) -> None:
        """Writes the amendment of a checkpoint, then deletes old checkpoints.

        Args:
            amendment: `step`, `progress` and `metrics`. It is ignored if saving the step has failed.

        Raises:
            OSError: The file cannot be written.
            ProcessError: Another process failed.
            ValueError: The step is not saved.
        """
        step = amendment["step"]
        if step in self._failed:
            return  # the error of the save is enough

        def write() -> str:
            entry = self.folder.newest().get(step)
            if entry is None:
                raise ValueError(f"step must be one of the saved {list(self.folder.newest())}; got {step}")
            manifest.amend(entry.path, amendment)
            return entry.path.name

        name = self.agree("amend", write if jax.process_index() == 0 else lambda: "")[0]
        self._saved(folders.entry_of(self.directory / name), amendment["metrics"])

    def agree(self, what: str, act: Callable[[], T]) -> list[T]:
        """Calls `act` in every process and returns all results. An error in one process is raised in all.

        Args:
            what: A verb for what `act` does to the directory, for the error message.
            act: Function of this process that returns a JSON value.

        Raises:
            Exception: `act` failed in this process.
            ProcessError: `act` failed in another process or did not finish in time.
        """
        self.enroll()
        failure = None
        try:
            outcome = {"value": act()}
        except Exception as error:
            failure, outcome = error, {"error": brief(error)}
        outcomes = processes.gather(f"{self._name}/{what}", outcome, self.timeout)
        if failure is not None:
            raise failure
        for index, other in enumerate(outcomes):
            if "error" in other:
                raise processes.ProcessError(f"process {index} could not {what} {self.directory}: {other['error']}")
        return [each["value"] for each in outcomes]

    def _saved(self, entry: Entry, metrics: dict[str, float] | None) -> None:
        self.folder.metrics[entry.path] = metrics
        first = jax.process_index() == 0
        self.agree("prune", lambda: self.folder.prune(entry) if first else None)  # all see the same from here on

    def _plan(self, record: dict[str, Any], table: list[dict[str, Any]]) -> tuple[str, dict[str, Any], bool]:
        """Returns the name of the new checkpoint, the stored values of its step, and whether the arrays are equal."""
        step, entries = record["step"], self.folder.entries()
        if any(entry.step > step for entry in entries):
            logger.warning("saving checkpoint %d, but restore will use the newer %d", step, entries[-1].step)
        revisions = [entry for entry in entries if entry.step == step]
        if not revisions:
            return folders.name_of(step), {}, False
        last, stored, unchanged = revisions[-1], {}, False
        with contextlib.suppress(Damage, OSError, MemoryError, RuntimeError):
            old = folders.read_record(last, files=True)
            stored = {key: old[key] for key in ("step", "progress", "metrics")}
            keys = "leaves", "manifest", "processes"
            unchanged = manifest.same([old.get(key) for key in keys], [record.get(key) for key in keys])
            if unchanged and "processes" in old:
                name = pieces.files_of(jax.process_index(), jax.process_count())[1]
                unchanged = manifest.same(pieces.read_table(last.path / name), table)
        return folders.name_of(step, last.revision + 1), stored, unchanged

    def _check_space(self, step: int, arrays: pieces.Pieces) -> None:
        need = sum(array.nbytes for some in arrays.values() for _, array in some)
        free = shutil.disk_usage(self.directory).free
        if need > free:  # Orbax reports a full disk with many messages
            reason = f"checkpoint {step} needs {need} bytes; the disk has {free} left"
            raise OSError(errno.ENOSPC, reason, str(self.directory))

    def _stage(self, staged: Path, record: dict[str, Any], arrays: pieces.Pieces, table: list[dict[str, Any]]) -> None:
        """Writes the arrays of this process and frees them."""
        if "processes" in record:
            staged.mkdir(exist_ok=True)
            pieces.write(staged, arrays, table, record["leaves"])
        else:
            whole = {name: array for name, ((_, array),) in arrays.items()}
            arrays.clear()
            orbax.save(staged, whole, manifest.seal(record))

    def _complete(self, staged: Path, record: dict[str, Any], entry: Entry) -> None:
        """Writes the other files, verifies what is not verified yet, and renames the directory."""
        leaves = record["leaves"]
        if "processes" in record:
            manifest.write_record(staged, record)
            pieces.Reader(staged, leaves, record["processes"])
        if self.run:
            manifest.write_json(staged / "run.json", self.run)
        manifest.write_checksums(staged)
        if "processes" not in record:
            stored = [name for name, about in leaves.items() if 0 not in about["shape"]]
            collections.deque(orbax.read_arrays(staged, leaves, stored), maxlen=0)
        atomic.move(staged, entry.path)
