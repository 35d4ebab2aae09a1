"""Batches: shuffled without end for training, padded and counted once for evaluation.

Which examples a step has is worked out from the step alone, over a `grain.MapDataset`, so that any step can be reached
at once: a run that resumes at step k sees exactly what the uninterrupted run saw. The order is shuffle, repeat, batch,
and last the part of this process; so one process and four see the same batches. Pixels are touched afterwards, with one
vectorised gather for a source in memory and with threads for one on disk.
"""

import functools
import operator
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from flaxvision.data.arrays import Source

Batch = dict[str, np.ndarray]
Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]

_PREFETCH = 3


def train_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool = True,
    transform: Transform | None = None,
    drop_remainder: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> "TrainBatches":
    """Returns the endless batches of a training run.

    Args:
        source: What to read.
        batch_size: Examples of one step over all processes together.
        seed: Seed of the order and of `transform`, 0 to 2**32 - 1.
        shuffle: Whether each epoch goes through the source in a new order.
        transform: `transform(example, rng) -> example` on the host, once per example, with a numpy generator that
            depends on the seed and the position in the run alone.
        drop_remainder: True ends each epoch at the last full batch, and the examples left over are others in each
            epoch. False lets batches run across the end of an epoch, so that every example is seen equally often.
        process_index: Which process this is.
        process_count: How many processes share a batch. Each takes `batch_size / process_count` rows in one piece, in
            the order of their indices: together they are the batch that a single process would see.
        num_threads: Threads that decode. None is the number of processors, at most 16. A source in memory without a
            transform needs none.

    Raises:
        ValueError: When the batch is larger than the source or not divided by the processes, or a number out of range.
    """
    return TrainBatches(
        source, batch_size, seed, shuffle, transform, drop_remainder, process_index, process_count, num_threads
    )


def eval_batches(
    source: Source,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> "EvalBatches":
    """Returns the batches of one pass over a source, in its order, every example exactly once.

    All batches have the same shape and a `mask` [N] float32: 1 for an example, 0 for padding. The last batch is padded
    with the source's first example.

    Args:
        source: What to read.
        batch_size: Rows of one batch over all processes together.
        process_index: Which process this is.
        process_count: How many processes share a batch, as in `train_batches`. All have equally many batches.
        num_threads: Threads that decode. None is the number of processors, at most 16.

    Raises:
        ValueError: When the source is empty, the processes do not divide the batch, or a number is out of range.
    """
    return EvalBatches(source, batch_size, process_index, process_count, num_threads)


class TrainBatches:
    """The batches of a training run; `train_batches` makes one.

    Attributes:
        source: What is read.
        batch_size: Rows of a batch over all processes together.
        steps_per_epoch: Batches in one pass over the source, rounded up when batches run across epochs.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        shuffle: bool,
        transform: Transform | None,
        drop_remainder: bool,
        process_index: int,
        process_count: int,
        num_threads: int | None,
    ):
        rows = _check(source, batch_size, process_index, process_count)
        if batch_size > len(source):
            raise ValueError(
                f"batch_size: received {batch_size}, but the source {source.name!r} has only {len(source)} examples; "
                f"it must be at most {len(source)}"
            )
        if not 0 <= operator.index(seed) < 2**32:
            raise ValueError(f"seed: received {seed}; it must lie between 0 and 2**32 - 1")
        self.source, self.batch_size = source, batch_size
        self._transform, self._threads = transform, _threads(num_threads)
        whole, rest = divmod(len(source), batch_size)
        self.steps_per_epoch = whole if drop_remainder else whole + bool(rest)
        self._used = whole * batch_size if drop_remainder else len(source)
        self._identity = {"seed": int(seed), "shuffle": bool(shuffle), "drop_remainder": bool(drop_remainder)}
        # Two epochs, for the batches that run across the end of one.
        self._permutation = functools.lru_cache(maxsize=2)(functools.partial(_permutation, int(seed), len(source)))

        import grain

        # An element is the positions of a whole batch in the endless sequence of examples, not one example: Grain's
        # shuffle takes 3 to 2000 µs per example (the more, the smaller the set), which a small model would wait for.
        blocks = grain.MapDataset.range(2**40).map(lambda block: block * rows + np.arange(rows))
        self._positions = blocks[process_index::process_count]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What determines the order of the data, as plain JSON values; the number of processes is no part of it."""
        return {
            **self._identity,
            "batch_size": self.batch_size,
            "length": len(self.source),
            "source": self.source.fingerprint,
        }

    def __iter__(self) -> "BatchIterator":
        return self.from_step(0)

    def from_step(self, step: int) -> "BatchIterator":
        """Returns an endless iterator whose first batch is that of `step`, at no cost for the steps before it.

        Raises:
            ValueError: When `step` is negative.
        """
        if operator.index(step) < 0:
            raise ValueError(f"step: received {step}; it must not be negative")
        return BatchIterator(self._read, int(step), None, self._threads)

    def _read(self, step: int, pool: ThreadPoolExecutor) -> Batch:
        positions = np.asarray(self._positions[step])
        indices = self._indices(positions)
        if self._transform is None:
            return _gather(self.source, indices, pool)
        return _stack(list(pool.map(self._read_one, indices.tolist(), positions.tolist())))

    def _indices(self, positions: np.ndarray) -> np.ndarray:
        """Returns the indices of the examples at `positions` of the endless sequence, epoch after epoch."""
        epochs, within = np.divmod(positions, self._used)
        if not self._identity["shuffle"]:
            return within
        indices = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._permutation(int(epoch))[within[here]]
        return indices

    def _read_one(self, index: int, position: int) -> dict[str, Any]:
        assert self._transform is not None
        # By the position, which no two processes share, and not by the process.
        rng = np.random.default_rng([self._identity["seed"], position])
        return self._transform(self.source[index], rng)


class EvalBatches:
    """The batches of one pass over a source; `eval_batches` makes one. It can be iterated over again and again."""

    def __init__(
        self, source: Source, batch_size: int, process_index: int, process_count: int, num_threads: int | None
    ):
        self.source, self.batch_size = source, batch_size
        self._rows = _check(source, batch_size, process_index, process_count)
        self._first, self._threads = process_index * self._rows, _threads(num_threads)

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._read, 0, len(self), self._threads)

    def _read(self, step: int, pool: ThreadPoolExecutor) -> Batch:
        indices = step * self.batch_size + self._first + np.arange(self._rows)
        real = indices < len(self.source)
        batch = _gather(self.source, np.where(real, indices, 0), pool)
        return {**batch, "mask": real.astype(np.float32)}


class BatchIterator(Iterator[Batch]):
    """Batches of consecutive steps, a few of them read ahead in the background.

    Close it, or leave its `with` block, and its threads have ended. It also closes at its last batch, and after an
    error in a source or a transform, which is raised here.
    """

    def __init__(
        self, read: Callable[[int, ThreadPoolExecutor], Batch], start: int, stop: int | None, num_threads: int
    ):
        self._read, self._next, self._stop = read, start, stop
        self._ahead: deque[Future[Batch]] = deque()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="flaxvision-batch")
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="flaxvision-decode")
        self._closed = False

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        self._fill()
        if not self._ahead:
            self.close()
            raise StopIteration
        try:
            batch = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self._fill()
        return batch

    def _fill(self) -> None:
        while len(self._ahead) < _PREFETCH and (self._stop is None or self._next < self._stop):
            self._ahead.append(self._reader.submit(self._read, self._next, self._pool))
            self._next += 1

    def close(self) -> None:
        """Ends the threads and waits for them; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._ahead.clear()
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _permutation(seed: int, length: int, epoch: int) -> np.ndarray:
    # numpy promises the raw numbers of a bit generator for all its versions, but not the result of `permutation`.
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(length)
    return np.argsort(raw, kind="stable")


def _gather(source: Source, indices: np.ndarray, pool: ThreadPoolExecutor) -> Batch:
    gather = getattr(source, "gather", None)
    if gather is not None:
        return gather(indices)
    return _stack(list(pool.map(source.__getitem__, indices.tolist())))


def _stack(examples: list[dict[str, Any]]) -> Batch:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _threads(num_threads: int | None) -> int:
    if num_threads is None:
        return min(os.cpu_count() or 1, 16)
    if operator.index(num_threads) < 1:
        raise ValueError(f"num_threads: received {num_threads}; it must be at least 1")
    return int(num_threads)


def _check(source: Source, batch_size: int, process_index: int, process_count: int) -> int:
    """Returns the rows of a batch that belong to one process."""
    if len(source) == 0:
        raise ValueError(f"source: {source.name!r} is empty; it must hold at least one example")
    if operator.index(batch_size) < 1:
        raise ValueError(f"batch_size: received {batch_size}; it must be at least 1")
    if operator.index(process_count) < 1 or not 0 <= operator.index(process_index) < process_count:
        raise ValueError(
            f"process_index, process_count: received {process_index}, {process_count}; "
            "the index must lie between 0 and the count"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size: received {batch_size}, which {process_count} processes do not divide; "
            f"it must be a multiple of {process_count}"
        )
    return batch_size // process_count
