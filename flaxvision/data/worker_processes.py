"""Reads several batches at once in worker processes; see `flaxvision.data.workers`."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing import connection, reduction, util
from typing import Any

import numpy as np

from flaxvision.data import workers

_ALIGNMENT = 64  # of arrays in shared memory, in bytes


class ProcessWorkers:
    """Reads batches in worker processes.

    This process also reads the first example. All other examples must have its keys, shapes and dtypes. The worker
    processes ignore SIGINT and SIGTERM, because a terminal or a cluster sends these signals to all processes of a run.
    They exit when this process closes their pipes or dies. The shared memory is anonymous, so none is left behind.

    Args:
        read: As in `ThreadWorkers`; must be picklable.
        first: Index and position of the example that gives the keys, shapes and dtypes.
        rows: Rows per batch.
        num_workers: Number of processes.
        num_threads: Number of threads per process.

    Raises:
        ValueError: `read` cannot be pickled, an example holds Python objects, or the platform is Windows.
    """

    def __init__(
        self, read: workers.ReadExample, first: tuple[int, int], rows: int, num_workers: int, num_threads: int
    ):
        if os.name == "nt":
            raise ValueError(f"num_workers must be 0 on Windows; got {num_workers}")
        layout = _Layout.of(read(*first), rows)
        slots = workers.batches_ahead(chunks_ahead(num_workers, num_threads), rows, layout.row_nbytes * rows)
        # Small enough to balance the load over the threads, large enough to amortize a message.
        self._chunk = max(1, min(16, rows // (2 * num_workers * num_threads)))
        self._tasks, self._free = workers.Tasks(), workers.Tasks()
        for slot in range(slots):
            self._free.put(slot)
        self._threads: list[threading.Thread] = []
        started: list[_Worker] = []
        self._stop = util.Finalize(self, _stop_all, (self._tasks, self._threads, started), exitpriority=10)
        memory = _SharedMemory(slots * layout.nbytes)
        try:
            for _ in range(num_workers):
                started.append(_Worker(read, layout, memory, slots, num_threads))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self._stop()
            raise ValueError(
                f"source and transform must be picklable with num_workers={num_workers}: define functions at the top "
                f"level of a module, not as a lambda or inside another function; got {error}"
            ) from error
        finally:
            memory.close()
        for worker in started:
            for pipe in worker.pipes:
                remote = (worker, pipe, layout, memory, self._free)
                self._threads.append(workers.make_thread(len(self._threads), self._tasks, _read_remotely, remote))
        for thread in self._threads:
            thread.start()

    def submit(self, indices: np.ndarray, positions: np.ndarray) -> Future[workers.Batch]:
        """Starts to read the batch of the examples at `indices` [N], for the `positions` [N] in the run."""
        chunks = -(-len(indices) // self._chunk)
        pending = workers.Pending(indices, positions, chunks, self._free.get_nowait())
        return workers.submit(self._tasks, pending, self._chunk)

    def close(self) -> None:
        """Ends the processes. Batches that are being read are lost."""
        self._stop()
        workers.join(self._threads)


def chunks_ahead(num_workers: int, num_threads: int) -> int:
    """Returns the number of chunks that the processes hold: two per thread, so that none waits for a message."""
    return 2 * num_workers * num_threads


def _read_remotely(remote: tuple[Any, ...], pending: workers.Pending, start: int, stop: int) -> None:
    worker, pipe, layout, memory, free = remote
    try:
        pipe.send((pending.slot, start, pending.indices[start:stop], pending.positions[start:stop]))
        error = pipe.recv()
    except (EOFError, OSError):
        error = RuntimeError(f"a worker process of the input pipeline must not end; got {worker.status()}")
    if error is not None:
        # Not raised here: its traceback would keep the shared memory alive.
        pending.fail(error)
    elif pending.is_last():
        # Copies, because JAX may read the memory of a batch for as long as the batch is alive.
        batch = {key: view.copy() for key, view in layout.views(memory.buffer, pending.slot).items()}
        free.put(pending.slot)
        pending.result.set_result(batch)


def _stop_all(tasks: workers.Tasks, threads: Sequence[threading.Thread], started: Sequence[_Worker]) -> None:
    workers.stop_threads(tasks, len(threads))
    for worker in started:
        worker.control.close()
    for worker in started:
        worker.end()


class _Worker:
    """A worker process, which ends when `control` is closed, and the pipes of the chunks that it has at once."""

    def __init__(self, read: workers.ReadExample, layout: _Layout, memory: _SharedMemory, slots: int, num_threads: int):
        context = multiprocessing.get_context("spawn")
        self._lock = threading.Lock()  # two threads must not wait for the same process at once
        (self.control, *self.pipes), theirs = zip(
            *(context.Pipe() for _ in range(chunks_ahead(1, num_threads) + 1)), strict=True
        )
        try:
            arguments = (theirs, read, layout, memory, slots, num_threads)
            self._process = context.Process(target=_work, args=arguments, name="flaxvision-worker", daemon=True)
            self._process.start()
        finally:
            for pipe in theirs:
                pipe.close()

    def status(self) -> str:
        """Waits for the end of the process and says how it ended."""
        with self._lock:
            self._process.join(workers.CLOSE_SECONDS)
            code = self._process.exitcode
        return f"exit status {code}" + (", possibly because memory ran out" if code == -signal.SIGKILL else "")

    def end(self) -> None:
        """Ends the process within a few seconds."""
        with self._lock:
            self._process.join(workers.CLOSE_SECONDS)
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join()


class _SharedMemory:
    """Memory without a name that is handed to a process as it starts."""

    def __init__(self, nbytes: int):
        if hasattr(os, "memfd_create"):  # unlike /dev/shm, limited only by the memory of the machine
            self._file = os.memfd_create("flaxvision")
        else:
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        os.ftruncate(self._file, nbytes)
        self.buffer = mmap.mmap(self._file, nbytes)

    def close(self) -> None:
        """Closes the file; the memory stays. No further process can be started with it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __getstate__(self) -> tuple[Any, int]:
        return reduction.DupFd(self._file), len(self.buffer)

    def __setstate__(self, state: tuple[Any, int]) -> None:
        self._file = state[0].detach()
        self.buffer = mmap.mmap(self._file, state[1])
        self.close()


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the arrays of a batch are in a slot of the shared memory.

    Attributes:
        fields: Of each array: its key, the shape and dtype of a row, and the offset in bytes.
        rows: Rows per batch.
        row_nbytes: Size of an example.
        nbytes: Size of a slot.
    """

    fields: tuple[tuple[str, tuple[int, ...], np.dtype, int], ...]
    rows: int
    row_nbytes: int
    nbytes: int

    @classmethod
    def of(cls, example: workers.Example, rows: int) -> _Layout:
        fields, row_nbytes, offset = [], 0, 0
        for key, value in example.items():
            value = np.asarray(value)
            if value.dtype.hasobject:
                raise ValueError(f"an example must not hold objects with num_workers; got {key!r} of {value.dtype}")
            fields.append((key, value.shape, value.dtype, offset))
            row_nbytes += value.nbytes
            offset += -(-rows * value.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(fields), rows, row_nbytes, max(offset, 1))

    def views(self, buffer: mmap.mmap, slot: int) -> workers.Batch:
        """Returns the arrays of a slot."""
        return {
            key: np.ndarray((self.rows, *shape), dtype, buffer, slot * self.nbytes + offset)
            for key, shape, dtype, offset in self.fields
        }

    def write(self, example: workers.Example, batch: workers.Batch, row: int) -> None:
        """Writes an example into a row of the arrays of a slot."""
        found = {key: np.asarray(value) for key, value in example.items()}
        expected = [(key, shape, dtype) for key, shape, dtype, _ in self.fields]
        if sorted(expected) != sorted((key, value.shape, value.dtype) for key, value in found.items()):
            received = {key: f"{value.dtype}{list(value.shape)}" for key, value in found.items()}
            wanted = {key: f"{dtype}{list(shape)}" for key, shape, dtype in expected}
            raise ValueError(f"with num_workers, all examples must be {wanted}; got {received}")
        for key, value in found.items():
            batch[key][row] = value


def _work(
    pipes: Sequence[Any],
    read: workers.ReadExample,
    layout: _Layout,
    memory: _SharedMemory,
    slots: int,
    num_threads: int,
) -> None:
    """Runs a worker process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_platforms", "cpu")  # the accelerators belong to the training
    tasks = workers.Tasks()
    batches = [layout.views(memory.buffer, slot) for slot in range(slots)]
    for _ in range(num_threads):
        threading.Thread(target=_answer, args=(tasks, read, layout, batches), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            for pipe in connection.wait(pipes):
                tasks.put((pipe, *pipe.recv()))  # type: ignore[union-attr]
    os._exit(0)  # without waiting for the threads


def _answer(tasks: workers.Tasks, read: workers.ReadExample, layout: _Layout, batches: Sequence[workers.Batch]) -> None:
    """Reads chunks, in the order in which they came, and answers each with its error or None."""
    with contextlib.suppress(OSError):
        while True:
            pipe, slot, start, indices, positions = tasks.get()
            error = None
            try:
                for row, pair in enumerate(zip(indices.tolist(), positions.tolist(), strict=True), start):
                    layout.write(read(*pair), batches[slot], row)
            except BaseException as raised:
                error = _portable(raised)
            pipe.send(error)


def _portable(error: BaseException) -> BaseException:
    """Returns the error, or a `RuntimeError` with its text if it cannot be pickled; its traceback becomes a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        same = pickle.loads(pickle.dumps(error))
        error = same if str(same) == str(error) else RuntimeError(f"{type(error).__name__}: {error}")
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker process:\n{trace}")
    return error
