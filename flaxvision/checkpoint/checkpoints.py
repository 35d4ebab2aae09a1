"""Saves, restores and ranks the checkpoints of a run."""

from __future__ import annotations

import collections
import dataclasses
import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import jax

from flaxvision import manifest as manifest_lib
from flaxvision.checkpoint import folders, orbax, pieces, saving
from flaxvision.checkpoint.folders import Entry
from flaxvision.manifest import Damage

__all__ = ["Checkpoints", "DamagedCheckpointError", "Restored"]

logger = logging.getLogger(__name__)

_UNSEEN: set[Future[None]] = set()  # saves that nobody has waited for


class DamagedCheckpointError(RuntimeError):
    """There are checkpoints, but all of them are damaged."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint.

    Attributes:
        state: The saved values in the tree structure of the template, with the shardings of its leaves.
        step: The step of the checkpoint.
        progress: The `progress` passed to `save` or `amend`; tuples become lists.
        metrics: The `metrics` passed to `save` or `amend`, or None.
    """

    state: Any
    step: int
    progress: dict[str, Any]
    metrics: dict[str, float] | None


class Checkpoints:
    """The checkpoints of one run in one directory. It keeps the latest ones and the best ones by a metric.

    Use it as a context manager or call `close`. Otherwise, an error of the last save is only logged when Python exits.
    On Python 3.12 and later, `save` and `amend` outside a `with` block wait until the files are written, because an
    exiting interpreter cannot finish them. Only one run at a time may write to a directory. Any number may read.

    All processes of a run write a checkpoint together. They must call the same methods in the same order. If
    they use several directories of the same name, they must begin to use them in the same order. The directory must be
    on storage that they share. A checkpoint can be restored on any number of processes and devices.

    A checkpoint counts as damaged only if its content is wrong. A damaged checkpoint is never deleted. The next
    `prepare` or save renames it to `<name>.damaged`. If a file cannot be read, for example because network storage is
    unavailable, reading is retried a few times before the error is raised.

    Args:
        directory: The directory of the checkpoints, local or mounted. `prepare` and the first save create it.
        manifest: JSON values by name that identify the run (model, overrides, config, data fingerprint). `restore`
            compares each of them with the value in the checkpoint. Differences in `versions` are only logged.
        run: JSON values by name that describe the run (commit, flags, devices). They are written to `run.json` in each
            checkpoint, for information only.
        allow: Keys of `manifest` that may differ from those of the checkpoint. `restore` logs the differences.
        describe: Functions `(stored, given) -> differences` by key of `manifest`, for messages about values that
            differ. Without one, a message names both values.
        keep_latest: Number of newest checkpoints to keep, at least 1.
        best_metric: The key of `metrics` that ranks checkpoints, or None to keep no best checkpoints.
        best_mode: "max" if a larger metric is better, "min" if a smaller one is. In a tie, the earlier checkpoint wins.
        keep_best: Number of best checkpoints to keep, at least 0. They may overlap with the latest ones.
        timeout: Seconds to wait for the other processes when saving or restoring; None for the `stall_timeout` of
            `flaxvision.train.initialize`.

    Raises:
        NotADirectoryError: `directory` is a file.
        TypeError: JSON cannot represent the manifest or `run`.
        ValueError: An argument is out of range, or `directory` is a URL.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        manifest: Mapping[str, Any] | None = None,
        run: Mapping[str, Any] | None = None,
        allow: Collection[str] = (),
        describe: Mapping[str, Callable[[Any, Any], Sequence[str]]] | None = None,
        keep_latest: int = 2,
        best_metric: str | None = "accuracy",
        best_mode: Literal["max", "min"] = "max",
        keep_best: int = 1,
        timeout: float | None = None,
    ):
        for name, count, least in (("keep_latest", keep_latest, 1), ("keep_best", keep_best, 0)):
            if count < least:
                raise ValueError(f"{name} must be at least {least}; got {count}")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode must be 'max' or 'min'; got {best_mode!r}")
        self.directory = folders.local(directory, "directory").absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "directory must not be a file", str(directory))
        self.manifest = manifest_lib.json_value(dict(manifest or {}), "manifest")
        self.allow, self._describe = frozenset(allow), dict(describe or {})
        self._folder = folders.Folder(
            self.directory, keep_latest=keep_latest, best_metric=best_metric, best_mode=best_mode, keep_best=keep_best
        )
        self._writer = saving.Writer(self._folder, manifest_lib.json_value(dict(run or {}), "run"), timeout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flaxvision-checkpoint")
        self._pending: collections.deque[Future[None]] = collections.deque()
        self._entered = False

    def prepare(self) -> None:
        """Creates the directory, deletes incomplete saves and checks that files can be written.

        `save` does this too. Call `prepare` to detect errors before training instead of at the first checkpoint.

        Raises:
            OSError: The directory cannot be created or written, or the previous save failed.
            ValueError: The processes do not share the directory.
        """
        self.wait()
        self._writer.prepare()

    def save(
        self,
        step: int,
        state: Any,
        *,
        progress: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Saves a state. Waits for the previous save, copies the state to the host and returns.

        The buffers of the state may then be donated. If the step is already saved with the same contents, nothing is
        written. If the contents differ, the new checkpoint replaces the old one once it is complete. `metrics=None`
        keeps the stored metrics of the step.

        Args:
            step: The step, at least 0.
            state: A tree of JAX arrays, PRNG keys and NumPy arrays of any shape and dtype.
            progress: JSON values by name for the caller's own use. Floats are restored exactly.
            metrics: Numbers by name, including `best_metric`. A checkpoint whose metric is NaN is never the best.
            wait: Whether to wait until the checkpoint is on disk.

        Raises:
            OSError: The previous save, or with `wait` this one, could not be written. No older checkpoint was deleted.
            ProcessError: Another process failed or did not take part in time.
            TypeError: A leaf is not an array, or JSON cannot represent `progress`.
            ValueError: `step` is negative or not an integer, or two leaves have the same path.
        """
        self.wait()
        if int(step) != step or step < 0:
            raise ValueError(f"step must be a non-negative integer; got {step!r}")
        record = manifest_lib.record_of(int(step), progress, metrics, self.manifest)
        arrays, leaves = pieces.to_host(state)
        self._submit(self._writer.save, record | {"leaves": leaves}, arrays, wait=wait)

    def amend(self, step: int, *, progress: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Replaces the progress and metrics of a saved step, for example after its evaluation.

        The arrays are not written again. The best checkpoints are chosen by the new metrics. If the process is killed,
        either the old or the new values remain. In a `with` block `amend` does not wait, and the next call raises its
        error.

        Args:
            step: A step that was saved. Its save may still be in progress.
            progress: See `save`.
            metrics: See `save`.

        Raises:
            OSError: The file cannot be written.
            TypeError: JSON cannot represent `progress`.
            ValueError: The step is not saved.
        """
        record = manifest_lib.record_of(int(step), progress, metrics, self.manifest)
        self._submit(self._writer.amend, {key: record[key] for key in ("step", "progress", "metrics")})

    def restore(self, template: Any) -> Restored | None:
        """Restores the newest undamaged checkpoint.

        The host holds only a few arrays at a time, and the devices hold no second copy of the state.

        Args:
            template: A state, or the result of `jax.eval_shape`, with the expected tree structure, shapes and dtypes.
                Each array gets the sharding of its leaf. If the leaf is uncommitted or has no sharding, the array is
                uncommitted on the default device. If the leaf is a NumPy array, the result is one too.

        Returns:
            The contents of the checkpoint, or None if there is none. All processes restore the same step.

        Raises:
            DamagedCheckpointError: All checkpoints are damaged.
            ValueError: The checkpoint is from another run (see `manifest`) or does not match the template, or the
                processes do not share the directory.
            OSError: A file could not be read, or the previous save could not be written.
            ProcessError: Another process failed or did not take part in time.
        """
        self.wait()
        return self._restore(lambda: self._folder.entries()[::-1], template)

    def restore_best(self, template: Any) -> Restored | None:
        """Like `restore`, but for the best undamaged checkpoint. Returns None if no checkpoint has the metric."""
        self.wait()
        return self._restore(self._folder.ranked, template)

    def steps(self) -> tuple[int, ...]:
        """Returns the saved steps in ascending order, without those known to be damaged. Waits for pending saves."""
        for future in tuple(self._pending):
            future.exception()  # waits; `wait` raises the error
        return tuple(self._folder.newest())

    @property
    def latest_step(self) -> int | None:
        """The newest step with a checkpoint, or None."""
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint by the metric, or None."""
        return next((entry.step for entry in self._folder.ranked()), None) if self.steps() else None

    def check(self) -> None:
        """Raises the error of a save that has already failed. Each error is raised once. Never waits."""
        while self._pending and self._pending[0].done():
            self._settle()

    def wait(self) -> None:
        """Waits until all saves are on disk. Raises the error of a failed save once."""
        while self._pending:
            self._settle()

    def close(self) -> None:
        """Waits for pending saves and ends the writing thread. Raises the error of a failed save."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Checkpoints:
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, write: Callable[..., None], *args: Any, wait: bool = False) -> None:
        self._writer.enroll()
        self._pending.append(self._thread.submit(write, *args))
        _UNSEEN.add(self._pending[-1])
        if wait or not (self._entered or _AT_EXIT):
            self.wait()

    def _settle(self) -> None:
        error = self._pending[0].exception()  # waits; an interrupt here loses nothing
        _UNSEEN.discard(self._pending.popleft())
        if error is not None:
            raise error

    def _restore(self, candidates: Callable[[], list[Entry]], template: Any) -> Restored | None:
        elsewhere = ValueError(f"directory must be on storage that all processes share; got {self.directory}")
        found: list[Restored] = []

        def attempt(entry: Entry) -> str | None:
            try:
                if entry.path.exists():
                    found.append(self._load(entry, template))
                    return None
            except Damage as damage:
                if entry.path.exists():
                    return str(damage)
            return "missing"  # the run that writes here deleted it, or this process sees another directory

        listed = candidates if jax.process_index() == 0 else self._folder.entries
        names = self._writer.agree("list", lambda: [entry.path.name for entry in listed()])
        if not names[0] and any(names):
            raise elsewhere
        entries = [folders.entry_of(self.directory / name) for name in names[0]]
        for entry in entries:
            outcomes = self._writer.agree("restore", partial(attempt, entry))
            if outcomes == [None] * len(outcomes):
                self._folder.damaged.discard(entry.path)
                if entry is not entries[0]:
                    logger.warning("using checkpoint %d instead of %d", entry.step, entries[0].step)
                return found[0]
            found.clear()
            if damage := [each for each in outcomes if each not in (None, "missing")]:
                self._folder.report(entry, damage[0])
            elif None in outcomes:
                raise elsewhere
        if (damaged := self._folder.all_damaged()) and not self._folder.newest():
            raise DamagedCheckpointError(
                f"all checkpoints in {self.directory} are damaged: {', '.join(damaged)}; move them away to start again"
            )
        return None

    def _load(self, entry: Entry, template: Any) -> Restored:
        record = folders.read_record(entry, files=True)
        named = f"checkpoint {entry.step} ({entry.path})"
        stored = record["manifest"]
        versions, allowed = manifest_lib.check_manifest(stored, self.manifest, named, self.allow, self._describe)
        if versions:
            logger.warning("checkpoint %d was saved with %s", entry.step, versions)
        if allowed:
            message = "checkpoint %d was saved with %s; a run that resumes from it differs from an uninterrupted one"
            logger.warning(message, entry.step, allowed)
        leaves = record["leaves"]
        if faults := manifest_lib.misfits(leaves, template):
            raise ValueError(f"{named} does not match the state: {faults}")
        if "processes" in record:
            read = pieces.Reader(entry.path, leaves, record["processes"])
        else:
            read = partial(orbax.read_arrays, entry.path, leaves)
        return Restored(pieces.place(template, leaves, read), entry.step, record["progress"], record["metrics"])


def _finish_saves() -> None:
    for error in filter(None, [future.exception() for future in tuple(_UNSEEN)]):
        logger.error("%s", error)


# An exiting interpreter shuts down its thread pools first, and a running Orbax save would then wait forever. This
# private hook runs before that. On Python 3.12 and later Orbax cannot start threads there, so `save` waits instead.
_AT_EXIT = getattr(threading, "_register_atexit", None) if sys.version_info < (3, 12) else None
if _AT_EXIT:
    _AT_EXIT(_finish_saves)
