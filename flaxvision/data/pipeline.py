"""Batches for training (shuffled and endless) and for evaluation (one pass, padded).

The examples of a step depend only on the seed and the step. Starting at any step is immediate, and a run that resumes
at step k sees the same batches as the uninterrupted run. The order of operations is shuffle, repeat, batch, split by
process, so the global batches are the same with one process and with four. A source in memory is read with one
vectorized gather per batch, a source on disk with threads or worker processes.
"""

import dataclasses
import functools
import operator
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np

from flaxvision.data import workers
from flaxvision.data.arrays import Source
from flaxvision.data.canvas import CanvasSource
from flaxvision.data.worker_processes import ProcessWorkers, chunks_ahead
from flaxvision.data.workers import Batch

Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]


def train_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool = True,
    transform: Transform | None = None,
    drop_remainder: bool = True,
    process_index: int | None = None,
    process_count: int | None = None,
    num_threads: int | None = None,
    num_workers: int = 0,
) -> "TrainBatches":
    """Returns the endless batches of a training run.

    Args:
        source: The examples. If it is one of `on_canvases`, all images of a batch lie on canvases of one size, and
            batches may span two epochs.
        batch_size: Examples per step, summed over all processes.
        seed: Seed of the order and of `transform`, from 0 to 2**32 - 1.
        shuffle: Whether to visit the examples in a new order in each epoch.
        transform: `transform(example, rng) -> example`, called on the host once per example. `rng` is a NumPy generator
            that depends only on the seed and the position in the run.
        drop_remainder: If True, an epoch ends at its last full batch; with shuffling, each epoch drops different
            examples. If False, batches may span two epochs, so that every example is seen equally often.
        process_index: Index of this process. None means that of JAX.
        process_count: Number of processes that share a batch. Process `i` gets the `i`-th contiguous slice of
            `batch_size / process_count` rows of the batch that a single process would get. None means that of JAX.
        num_threads: Number of decoding threads, in each worker process if there are any. None uses one per processor
            (shared among the worker processes), at most 16. A source in memory without a transform is read by one.
        num_workers: Number of worker processes that decode, for hosts where Python's global lock limits the threads of
            one process, at about 4,000 images per second. The batches are the same. Each worker process gets a copy
            of the source and of the transform, which must be picklable, and imports the main module of the program,
            which must start the run under `if __name__ == "__main__":`. Not on Windows.

    Returns:
        The batches. `from_step(k)` iterates from step `k` on; `fingerprint` identifies their order.

    Raises:
        ValueError: The batch is larger than the source or not divisible by the number of processes, the source is
            empty, or a number is out of range.
    """
    reading = _Reading(source, batch_size, process_index, process_count, num_threads, num_workers)
    if isinstance(source, CanvasSource):
        from flaxvision.data.buckets import CanvasTrainBatches

        return CanvasTrainBatches(reading, seed, shuffle, transform, drop_remainder)
    return TrainBatches(reading, seed, shuffle, transform, drop_remainder)


def eval_batches(
    source: Source,
    batch_size: int,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
    num_threads: int | None = None,
    num_workers: int = 0,
) -> "EvalBatches":
    """Returns the batches of one pass over a source, in order, with every example exactly once.

    All batches have the same shape and a `mask` [N] float32, which is 1 for an example and 0 for padding. The last
    batch is padded with the first example of the source. A source of `on_canvases` has a shape and a last batch for
    each canvas.

    Args:
        source: The examples.
        batch_size: Rows per batch, summed over all processes.
        process_index: As in `train_batches`.
        process_count: As in `train_batches`. All processes get equally many batches.
        num_threads: As in `train_batches`.
        num_workers: As in `train_batches`. The worker processes are started anew for each pass.

    Returns:
        The batches; iterating again starts another pass.

    Raises:
        ValueError: The source is empty, the batch is not divisible by the number of processes, or a number is out of
            range.
    """
    reading = _Reading(source, batch_size, process_index, process_count, num_threads, num_workers)
    if isinstance(source, CanvasSource):
        from flaxvision.data.buckets import CanvasEvalBatches

        return CanvasEvalBatches(reading)
    return EvalBatches(reading)


class TrainBatches:
    """The batches of a training run, created by `train_batches`.

    Attributes:
        source: The examples.
        batch_size: Rows per batch, summed over all processes.
        steps_per_epoch: Batches in one pass over the source, rounded up if batches may span two epochs.
    """

    def __init__(
        self, reading: "_Reading", seed: int, shuffle: bool, transform: Transform | None, drop_remainder: bool
    ):
        source, batch_size = reading.source, reading.batch_size
        if batch_size > len(source):
            raise ValueError(
                f"batch_size must be at most {len(source)}, the number of examples in {source.name!r}; got {batch_size}"
            )
        if not 0 <= operator.index(seed) < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1; got {seed}")
        self.source, self.batch_size = source, batch_size
        self._reading, self._transform = reading, transform
        whole, rest = divmod(len(source), batch_size)
        self.steps_per_epoch = whole if drop_remainder else whole + bool(rest)
        self._used = whole * batch_size if drop_remainder else len(source)
        self._identity = {"seed": int(seed), "shuffle": bool(shuffle), "drop_remainder": bool(drop_remainder)}
        # Two epochs, because a batch may span two.
        self._permutation = functools.lru_cache(maxsize=2)(functools.partial(_permutation, int(seed), len(source)))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the order of the data, as JSON values; independent of the number of processes."""
        contents = getattr(self.source, "contents", None)
        return {
            **self._identity,
            "batch_size": self.batch_size,
            "length": len(self.source),
            **({} if contents is None else {"contents": contents}),
            "source": self.source.fingerprint,
        }

    def __iter__(self) -> "BatchIterator":
        return self.from_step(0)

    def from_step(self, step: int) -> "BatchIterator":
        """Returns an endless iterator that starts with the batch of `step`. The steps before it cost nothing.

        Raises:
            ValueError: `step` is negative.
        """
        if operator.index(step) < 0:
            raise ValueError(f"step must be at least 0; got {step}")
        return BatchIterator(self._reading, self._plan, int(step), None, self._transform, self._identity["seed"])

    def _plan(self, step: int) -> "_Plan":
        positions = self._reading.positions(step)
        return _Plan(self._indices(positions), positions, {})

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

    def changes_since(self, fingerprint: Mapping[str, Any]) -> list[str]:
        """Says how these batches differ from those of another fingerprint; see `describe_changes`."""
        return describe_changes(fingerprint, self.fingerprint)


class EvalBatches:
    """The batches of one pass over a source, created by `eval_batches`. Each iteration is a new pass.

    Attributes:
        source: The examples.
        batch_size: Rows per batch, summed over all processes.
    """

    def __init__(self, reading: "_Reading"):
        self.source, self.batch_size = reading.source, reading.batch_size
        self._reading = reading

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._reading, self._plan, 0, len(self))

    def _plan(self, step: int) -> "_Plan":
        indices = self._reading.positions(step)
        real = indices < len(self.source)
        return _Plan(np.where(real, indices, 0), indices, {"mask": real.astype(np.float32)})


class BatchIterator(Iterator[Batch]):
    """Iterates over the batches of consecutive steps and reads a few batches ahead in the background.

    It reads at most as many batches ahead as fit into 1 GiB, but at least two. `close`, or leaving the `with` block,
    ends its threads and worker processes. It closes itself after its last batch and after an error in the source or the
    transform, which `next` raises.
    """

    def __init__(
        self,
        reading: "_Reading",
        plan: "Callable[[int], _Plan]",
        start: int,
        stop: int | None,
        transform: Transform | None = None,
        seed: int = 0,
    ):
        self._plan, self._next, self._stop = plan, start, stop
        self._ahead: deque[tuple[Future[Batch], Batch]] = deque()
        self._nbytes: int | None = None
        self._rows, self._chunks = reading.rows, reading.chunks
        self._workers = reading.start(plan(start), transform, seed)
        self._closed = False

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            self._fill()
            if not self._ahead:
                self.close()
                raise StopIteration
            result, more = self._ahead.popleft()
            batch = {**result.result(), **more}
            self._nbytes = sum(value.nbytes for value in batch.values())
            self._fill()
        except BaseException:
            self.close()
            raise
        return batch

    def _fill(self) -> None:
        limit = workers.batches_ahead(self._chunks, self._rows, self._nbytes)
        while len(self._ahead) < limit and (self._stop is None or self._next < self._stop):
            plan = self._plan(self._next)
            self._ahead.append((self._workers.submit(plan.indices, plan.positions), plan.more))
            self._next += 1

    def close(self) -> None:
        """Ends the threads and the worker processes. A second call does nothing.

        It waits for what the threads are reading, but only for a few seconds.
        """
        if not self._closed:
            self._closed = True
            self._ahead.clear()
            self._workers.close()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Says how two fingerprints of `TrainBatches` differ.

    Args:
        old: A fingerprint, such as the one in the manifest of a checkpoint.
        new: Another one, such as that of the current run.

    Returns:
        A short sentence for each setting and each class of a folder that differs; empty if nothing does.
    """
    settings = [key for key in {**old, **new} if key not in ("contents", "source")]
    changes = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in settings if old.get(key) != new.get(key)]
    if old.get("source") == new.get("source"):
        return changes
    then, now = (dict(fingerprint.get("contents", {})) for fingerprint in (old, new))
    before, after = (contents.pop("classes", {}) for contents in (then, now))
    found = [
        f"{key} was {then.get(key)}, is {now.get(key)}" for key in {**then, **now} if then.get(key) != now.get(key)
    ]
    for name in sorted({**before, **after}) if before and after else ():
        (had, _, _), (has, _, _) = (classes.get(name, "0").partition(" ") for classes in (before, after))
        if had != has:
            found.append(f"class {name!r} had {had} images, has {has}")
        elif before[name] != after[name]:
            found.append(f"class {name!r} has images of other names or sizes")
    return changes + (found or ["the examples of the source differ"])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What to read for a batch: indices [N] of the examples, their positions [N] in the run, and arrays to add."""

    indices: np.ndarray
    positions: np.ndarray
    more: Batch


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads and transforms an example, in any thread or process."""

    source: Source
    transform: Transform | None
    seed: int

    def __call__(self, index: int, position: int) -> dict[str, Any]:
        example = self.source[index]
        if self.transform is None:
            return example
        # The position is unique across processes, so the number of processes does not change the result.
        return self.transform(example, np.random.default_rng([self.seed, position]))


class _Reading:
    """The part of a batch that this process reads, and its threads and worker processes."""

    def __init__(
        self,
        source: Source,
        batch_size: int,
        process_index: int | None,
        process_count: int | None,
        num_threads: int | None,
        num_workers: int,
    ):
        if process_index is None or process_count is None:
            import jax

            process_index = jax.process_index() if process_index is None else process_index
            process_count = jax.process_count() if process_count is None else process_count
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
        if num_threads is not None and operator.index(num_threads) < 1:
            raise ValueError(f"num_threads must be at least 1; got {num_threads}")
        if operator.index(num_workers) < 0:
            raise ValueError(f"num_workers must be at least 0; got {num_workers}")
        self.source, self.batch_size, self.rows = source, batch_size, batch_size // process_count
        self.num_workers = int(num_workers)
        share = (os.cpu_count() or 1) // max(1, self.num_workers)
        self.num_threads = int(num_threads or min(max(1, share), 16))
        self._first = process_index * self.rows

    @property
    def chunks(self) -> int:
        """The number of chunks that can be read at once."""
        return chunks_ahead(self.num_workers, self.num_threads) if self.num_workers else self.num_threads

    def positions(self, step: int) -> np.ndarray:
        """Returns the positions [N] of the rows of this process in the sequence of all examples of the run."""
        return step * self.batch_size + self._first + np.arange(self.rows)

    def start(self, first: _Plan, transform: Transform | None, seed: int) -> Any:
        """Starts the threads or worker processes."""
        gather = getattr(self.source, "gather", None)
        if gather is not None and transform is None:
            return workers.ThreadWorkers(lambda indices, positions: gather(indices), 1, whole=True)
        read = _Reader(self.source, transform, seed)
        if not self.num_workers:
            return workers.ThreadWorkers(read, self.num_threads)
        example = int(first.indices[0]), int(first.positions[0])
        return ProcessWorkers(read, example, self.rows, self.num_workers, self.num_threads)


def _permutation(seed: int, length: int, epoch: int) -> np.ndarray:
    # NumPy guarantees the raw output of a bit generator across versions, but not the result of `permutation`.
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(length)
    return np.argsort(raw, kind="stable")
