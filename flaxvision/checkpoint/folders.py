"""Directories of checkpoints: names, records, incomplete saves and damaged checkpoints."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flaxvision import atomic, manifest
from flaxvision.checkpoint import orbax
from flaxvision.manifest import Damage, brief, retried

__all__ = ["Entry", "Folder", "appears", "entry_of", "local", "name_of", "read_record"]

logger = logging.getLogger(__name__)

# A step that is saved again gets a new revision. The old one is deleted once the new one is complete.
_NAME = re.compile(r"(\d{9,})(?:-r(\d+))?")
_LEFTOVER = re.compile(rf"(?:{_NAME.pattern})\.(?:saving.*|deleted)")
_DAMAGED = re.compile(rf"(?:{_NAME.pattern})\.damaged(?:-\d+)?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class Entry(NamedTuple):
    """A complete checkpoint. Entries sort from old to new."""

    step: int
    revision: int
    path: Path


def local(path: str | os.PathLike[str], name: str) -> Path:
    """Converts a path of the file system to a `Path`.

    Args:
        path: The path.
        name: Name of the argument in the error message.

    Raises:
        ValueError: `path` is a URL such as `gs://bucket/run`.
    """
    if _URL.match(os.fspath(path)):
        raise ValueError(f"{name} must be a local or mounted path, because object stores cannot rename; got {path}")
    return Path(path)


def name_of(step: int, revision: int = 0) -> str:
    """Returns the name of the directory of a checkpoint."""
    return f"{step:09d}" + (f"-r{revision}" if revision else "")


def entry_of(path: Path) -> Entry:
    """Returns the entry of a directory whose name `name_of` returned."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return Entry(int(match[1]), int(match[2] or 0), path)


def appears(path: Path, patience: float = 5.0) -> bool:
    """Waits up to `patience` seconds for a file of another process. Returns whether it is visible."""
    end = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def read_record(entry: Entry, files: bool = False) -> dict[str, Any]:
    """Returns the record of a checkpoint with its amendment.

    Args:
        entry: The checkpoint.
        files: Whether to read and verify the other files too.

    Raises:
        Damage: The content is wrong.
        OSError: A file cannot be read.
    """

    def read() -> dict[str, Any]:
        if files:
            manifest.check_files(entry.path)
        record = manifest.read_record(entry.path)
        if record is None:
            record = manifest.unseal(orbax.read_metadata(entry.path))
        if record["step"] != entry.step:
            raise Damage(f"record belongs to step {record['step']}")
        return manifest.amended(entry.path, record)

    return retried(read)


class Folder:
    """A directory of checkpoints. It caches their metrics and which of them are damaged.

    Args:
        directory: The directory.
        keep_latest: Number of newest checkpoints to keep.
        best_metric: Name of the metric that ranks checkpoints, or None.
        best_mode: `"max"` if a larger value is better, `"min"` if a smaller one is.
        keep_best: Number of best checkpoints to keep.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_latest: int,
        best_metric: str | None,
        best_mode: Literal["max", "min"],
        keep_best: int,
    ):
        self.directory = directory
        self.keep_latest, self.keep_best = keep_latest, keep_best
        self.best_metric, self.best_mode = best_metric, best_mode
        self.damaged: set[Path] = set()
        self.metrics: dict[Path, dict[str, float] | None] = {}  # of the checkpoints that were read or written

    def entries(self) -> list[Entry]:
        """Returns the complete checkpoints from old to new, including damaged ones."""
        return sorted(entry_of(self.directory / name) for name in self._names() if _NAME.fullmatch(name))

    def newest(self) -> dict[int, Entry]:
        """Returns for each step, in ascending order, its latest revision that is not known to be damaged."""
        return {entry.step: entry for entry in self.entries() if entry.path not in self.damaged}

    def ranked(self) -> list[Entry]:
        """Returns the checkpoints that have the metric, best first.

        Raises:
            OSError: A record cannot be read.
        """
        ranked = []
        for entry in self.newest().values():
            if self.metrics.get(entry.path) is None:  # the run that writes here may have added them
                try:
                    self.metrics[entry.path] = read_record(entry)["metrics"]
                except Damage as damage:
                    self.report(entry, str(damage))
                    continue
            value = (self.metrics[entry.path] or {}).get(self.best_metric or "", math.nan)
            if not math.isnan(value):
                ranked.append((-value if self.best_mode == "max" else value, entry))
        return [entry for _, entry in sorted(ranked)]

    def report(self, entry: Entry, damage: str) -> None:
        """Logs that a checkpoint is damaged and adds it to the damaged ones."""
        if entry.path.exists():  # the run that writes here has not deleted it
            logger.warning("checkpoint %d is damaged (%s): %s", entry.step, damage, entry.path)
            self.damaged.add(entry.path)

    def all_damaged(self) -> list[str]:
        """Returns the names of all damaged checkpoints, including renamed ones."""
        renamed = [name for name in self._names() if _DAMAGED.fullmatch(name)]
        return sorted(renamed + [path.name for path in self.damaged if path.exists()])

    def open(self) -> None:
        """Creates the directory, deletes incomplete saves and renames damaged checkpoints.

        Raises:
            OSError: The directory cannot be created or written.
        """
        try:
            atomic.make_directory(self.directory)
            tempfile.TemporaryFile(dir=self.directory).close()
            for name in self._names():
                if _LEFTOVER.fullmatch(name):
                    shutil.rmtree(self.directory / name, ignore_errors=True)
            for path in [path for path in self.damaged if path.exists()]:
                logger.warning("renamed the damaged checkpoint %s to %s", path.name, _set_aside(path).name)
            self.damaged.clear()
        except OSError as error:
            reason = f"directory of checkpoints cannot be written: {error.strerror}"
            raise OSError(error.errno, reason, str(self.directory)) from error

    def prune(self, saved: Entry) -> None:
        """Deletes old checkpoints, except those to be kept. Deletes none if one cannot be read."""
        try:
            best = self.ranked()[: self.keep_best]
        except (OSError, MemoryError, RuntimeError) as error:
            logger.warning("no checkpoint was deleted, because one cannot be read: %s", brief(error))
            return
        keep = {saved, *best, *list(self.newest().values())[-self.keep_latest :]}
        for entry in set(self.entries()) - keep:
            if entry.path in self.damaged:
                continue  # `open` renames it
            # Renamed first, so that a kill during the deletion leaves no incomplete checkpoint.
            doomed = entry.path.with_name(entry.path.name + ".deleted")
            try:
                atomic.move(entry.path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("checkpoint %d could not be deleted: %s", entry.step, error)

    def _names(self) -> list[str]:
        return os.listdir(self.directory) if self.directory.is_dir() else []


def _set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint to `<name>.damaged`, or `<name>.damaged-2` and so on if that is taken."""
    target, number = path.with_name(path.name + ".damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    atomic.move(path, target)
    return target
