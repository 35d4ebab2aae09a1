"""Reads several batches at once in threads or worker processes.

A batch is split into chunks of rows. The chunks of all pending batches share one queue, so no thread is idle while
another one finishes a batch. `ThreadWorkers` reads the chunks in threads of this process. In `ProcessWorkers`, each
thread passes its chunks to a worker process, which writes the rows to shared memory.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import util
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]
Example = dict[str, Any]
ReadExample = Callable[[int, int], Example]

Tasks = queue.SimpleQueue
CLOSE_SECONDS = 5.0
_AHEAD, _AHEAD_BYTES = 3, 2**30  # batches that are read before they are needed


class Pending:
    """A batch that is being read."""

    def __init__(self, indices: np.ndarray, positions: np.ndarray, chunks: int, slot: int = 0):
        self.indices, self.positions, self.slot = indices, positions, slot
        self.result: Future[Batch] = Future()
        self.examples: list[Any] = [None] * len(indices)
        self._left, self._lock = chunks, threading.Lock()

    def is_last(self) -> bool:
        """Counts one chunk as read. Returns whether it was the last chunk."""
        with self._lock:
            self._left -= 1
            return not self._left

    def fail(self, error: BaseException) -> None:
        """Sets the error as the result of the batch. Later errors are ignored."""
        with self._lock:  # only the first error counts
            if not self.result.done():
                self.result.set_exception(error)


class ThreadWorkers:
    """Reads batches in threads of this process.

    The threads are daemons, so a read that hangs blocks neither `close` nor the exit of the program.

    Args:
        read: `read(index, position) -> example`, called from all threads. If `whole` is True,
            `read(indices [N], positions [N]) -> batch`.
        num_threads: Number of threads.
        whole: Whether `read` reads a batch at a time.
    """

    def __init__(self, read: Callable[..., Any], num_threads: int, *, whole: bool = False):
        self._whole, self._tasks = whole, Tasks()
        read_chunk = _read_whole if whole else _read_rows
        self._threads = [make_thread(k, self._tasks, read_chunk, read) for k in range(num_threads)]
        self._stop = util.Finalize(self, stop_threads, (self._tasks, num_threads), exitpriority=10)
        for thread in self._threads:
            thread.start()

    def submit(self, indices: np.ndarray, positions: np.ndarray) -> Future[Batch]:
        """Starts to read the batch of the examples at `indices` [N], for the `positions` [N] in the run."""
        size = len(indices) if self._whole else 1
        return submit(self._tasks, Pending(indices, positions, len(indices) // size), size)

    def close(self) -> None:
        """Ends the threads. Waits a few seconds for the examples that are being read."""
        self._stop()
        join(self._threads)


def batches_ahead(chunks: int, rows: int, nbytes: int | None) -> int:
    """Returns the number of batches to read at once.

    It is at least two, so that threads without rows left in one batch continue with the next one. It is larger if the
    workers can read more rows at once, and to hide short delays from training. About 1 GiB is the limit.

    Args:
        chunks: Number of chunks that the workers read at once.
        rows: Rows per batch.
        nbytes: Size of a batch; None if it is not known yet.
    """
    if nbytes is None:
        return 2
    return max(2, min(max(_AHEAD, -(-chunks // rows) + 1), _AHEAD_BYTES // max(1, nbytes)))


def bounded_map(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Maps items in threads and yields the results in order. Only a few items are in memory at a time."""
    count = default_threads()
    with ThreadPoolExecutor(count, thread_name_prefix="flaxvision-map") as pool:
        ahead: deque[Future[Any]] = deque()
        try:
            for item in items:
                if len(ahead) >= 4 * count:
                    yield ahead.popleft().result()
                ahead.append(pool.submit(function, item))
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def default_threads() -> int:
    """Returns the number of processors, at most 16."""
    return min(os.cpu_count() or 1, 16)


def stack(examples: Sequence[Example]) -> Batch:
    """Returns the examples as the rows of a batch."""
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def make_thread(number: int, tasks: Tasks, read_chunk: Callable[..., None], argument: Any) -> threading.Thread:
    """Returns a thread that calls `read_chunk(argument, pending, start, stop)` for each chunk, until it gets None."""
    arguments = (tasks, read_chunk, argument)
    return threading.Thread(target=_serve, args=arguments, name=f"flaxvision-decode-{number}", daemon=True)


def submit(tasks: Tasks, pending: Pending, size: int) -> Future[Batch]:
    """Puts the chunks of a batch, of `size` rows each, in the queue. Returns the future of the batch."""
    count = len(pending.indices)
    for start in range(0, count, size):
        tasks.put((pending, start, min(start + size, count)))
    return pending.result


def _serve(tasks: Tasks, read_chunk: Callable[..., None], argument: Any) -> None:
    while (task := tasks.get()) is not None:
        if not task[0].result.done():  # a batch that failed is not read to its end
            try:
                read_chunk(argument, *task)
            except BaseException as error:
                task[0].fail(error)
        del task  # a thread that waits keeps no batch alive


def _read_whole(read: Callable[..., Batch], pending: Pending, start: int, stop: int) -> None:
    pending.result.set_result(read(pending.indices, pending.positions))


def _read_rows(read: ReadExample, pending: Pending, start: int, stop: int) -> None:
    for row in range(start, stop):
        pending.examples[row] = read(int(pending.indices[row]), int(pending.positions[row]))
    if pending.is_last():
        pending.result.set_result(stack(pending.examples))


def stop_threads(tasks: Tasks, count: int) -> None:
    """Cancels the chunks in the queue. Each thread ends after its current chunk."""
    with contextlib.suppress(queue.Empty):
        while True:
            if (task := tasks.get_nowait()) is not None:
                task[0].result.cancel()
    for _ in range(count):
        tasks.put(None)


def join(threads: Iterable[threading.Thread]) -> None:
    """Waits a few seconds for threads to end."""
    deadline = time.monotonic() + CLOSE_SECONDS
    for thread in threads:
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join(max(0, deadline - time.monotonic()))
