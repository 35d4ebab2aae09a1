"""Batches for training (shuffled and endless) and for evaluation (one pass, padded).

The examples of a step depend only on the seed and the step. Starting at any step is immediate, and a run that resumes
at step k sees the same batches as the uninterrupted run. The order of operations is shuffle, repeat, batch, split by
process, so the global batches are the same with one process and with four. A source in memory is read with one
vectorized gather per batch, a source on disk with threads.
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
        source: The examples.
        batch_size: Examples per step, summed over all processes.
        seed: Seed of the order and of `transform`, from 0 to 2**32 - 1.
        shuffle: Whether to visit the examples in a new order in each epoch.
        transform: `transform(example, rng) -> example`, called on the host once per example. `rng` is a NumPy generator
            that depends only on the seed and the position in the run.
        drop_remainder: If True, an epoch ends at its last full batch; with shuffling, each epoch drops different
            examples. If False, batches may span two epochs, so that every example is seen equally often.
        process_index: Index of this process.
        process_count: Number of processes that share a batch. Process `i` gets the `i`-th contiguous slice of
            `batch_size / process_count` rows of the batch that a single process would get.
        num_threads: Number of decoding threads. None uses one per processor, at most 16. A source in memory without a
            transform uses none.

    Returns:
        The batches. `from_step(k)` iterates from step `k` on; `fingerprint` identifies their order.

    Raises:
        ValueError: The batch is larger than the source or not divisible by the number of processes, the source is
            empty, or a number is out of range.
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
    """Returns the batches of one pass over a source, in order, with every example exactly once.

    All batches have the same shape and a `mask` [N] float32, which is 1 for an example and 0 for padding. The last
    batch is padded with the first example of the source.

    Args:
        source: The examples.
        batch_size: Rows per batch, summed over all processes.
        process_index: Index of this process.
        process_count: Number of processes that share a batch, as in `train_batches`. All get equally many batches.
        num_threads: Number of decoding threads. None uses one per processor, at most 16.

    Returns:
        The batches; iterating again starts another pass.

    Raises:
        ValueError: The source is empty, the batch is not divisible by the number of processes, or a number is out of
            range.
    """
    return EvalBatches(source, batch_size, process_index, process_count, num_threads)


class TrainBatches:
    """The batches of a training run, created by `train_batches`.

    Attributes:
        source: The examples.
        batch_size: Rows per batch, summed over all processes.
        steps_per_epoch: Batches in one pass over the source, rounded up if batches may span two epochs.
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
                f"batch_size must be at most {len(source)}, the number of examples in {source.name!r}; got {batch_size}"
            )
        if not 0 <= operator.index(seed) < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1; got {seed}")
        self.source, self.batch_size = source, batch_size
        self._rows, self._process, self._processes = rows, process_index, process_count
        self._transform, self._threads = transform, _threads(num_threads)
        whole, rest = divmod(len(source), batch_size)
        self.steps_per_epoch = whole if drop_remainder else whole + bool(rest)
        self._used = whole * batch_size if drop_remainder else len(source)
        self._identity = {"seed": int(seed), "shuffle": bool(shuffle), "drop_remainder": bool(drop_remainder)}
        # Two epochs, because a batch may span two.
        self._permutation = functools.lru_cache(maxsize=2)(functools.partial(_permutation, int(seed), len(source)))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the order of the data, as JSON values; independent of the number of processes."""
        return {
            **self._identity,
            "batch_size": self.batch_size,
            "length": len(self.source),
            "source": self.source.fingerprint,
        }

    def __iter__(self) -> "BatchIterator":
        return self.from_step(0)

    def from_step(self, step: int) -> "BatchIterator":
        """Returns an endless iterator that starts with the batch of `step`. Earlier batches are not computed.

        Raises:
            ValueError: `step` is negative.
        """
        if operator.index(step) < 0:
            raise ValueError(f"step must be at least 0; got {step}")
        return BatchIterator(self._read, int(step), None, self._threads)

    def _read(self, step: int, pool: ThreadPoolExecutor) -> Batch:
        positions = (step * self._processes + self._process) * self._rows + np.arange(self._rows)
        indices = self._indices(positions)
        if self._transform is None:
            return _gather(self.source, indices, pool)
        return _stack(list(pool.map(self._read_one, indices.tolist(), positions.tolist())))

    def _indices(self, positions: np.ndarray) -> np.ndarray:
        """Returns the indices [N] of the examples at `positions` [N] of the endless sequence of epochs."""
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
        # The position is unique across processes, so the number of processes does not change the result.
        rng = np.random.default_rng([self._identity["seed"], position])
        return self._transform(self.source[index], rng)


class EvalBatches:
    """The batches of one pass over a source, created by `eval_batches`. Each iteration is a new pass."""

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
    """Iterates over the batches of consecutive steps and reads a few batches ahead in the background.

    `close`, or leaving the `with` block, ends its threads. It closes itself after its last batch and after an error in
    the source or the transform, which `next` raises.
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
        """Ends the threads and waits for them. A second call does nothing."""
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
    # NumPy guarantees the raw output of a bit generator across versions, but not the result of `permutation`.
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
        raise ValueError(f"num_threads must be at least 1; got {num_threads}")
    return int(num_threads)


def _check(source: Source, batch_size: int, process_index: int, process_count: int) -> int:
    """Returns the number of rows of a batch that one process reads."""
    if len(source) == 0:
        raise ValueError(f"source must have at least one example; got {source.name!r}, which is empty")
    if operator.index(batch_size) < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if operator.index(process_count) < 1:
        raise ValueError(f"process_count must be at least 1; got {process_count}")
    if not 0 <= operator.index(process_index) < process_count:
        raise ValueError(f"process_index must be between 0 and process_count - 1; got {process_index}")
    if batch_size % process_count:
        raise ValueError(f"batch_size must be a multiple of process_count={process_count}; got {batch_size}")
    return batch_size // process_count
