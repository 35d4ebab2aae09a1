"""Evaluation of a state on a whole data set."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from flaxvision import metrics as fm
from flaxvision import processes
from flaxvision.train import input as input_lib
from flaxvision.train import stopping
from flaxvision.train.parallel import CompiledStep, prefetch
from flaxvision.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A callable `state -> values` that evaluates a state for `fit`.

    Attributes:
        eval_step: A compiled eval step.
        batches: The batches of one pass, such as `flaxvision.data.eval_batches`. Each evaluation iterates over them
            from the start.
        input_timeout: Seconds to wait for a batch; None waits forever.

    Raises:
        ValueError: `batches` can be iterated only once, like a generator.
    """

    eval_step: Callable[..., dict[str, fm.Accumulator]]
    batches: Iterable[Any]
    input_timeout: float | None = input_lib.TIMEOUT

    def __post_init__(self):
        if isinstance(self.batches, Iterator):
            raise ValueError(
                "batches must be an object that every evaluation can iterate over, such as a list or the result of "
                f"flaxvision.data.eval_batches; got {type(self.batches).__name__}, which ends after one pass"
            )

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Evaluates a state; see `evaluate`."""
        return evaluate(state, self.eval_step, self.batches, self.input_timeout)

    def check(self, state: TrainState) -> None:
        """Checks that the batches fit the devices and the model, without running anything.

        It uses the `batch_size` of `batches` and the first example of their `source`. Without these it checks nothing.

        Args:
            state: A state of the run.

        Raises:
            ValueError: The batch size is not a multiple of the number of devices, or the eval step cannot be compiled
                for the shapes.
        """
        size = getattr(self.batches, "batch_size", None)
        check_batch_size("the batch size of the evaluation", size, self.eval_step)
        source = getattr(self.batches, "source", None)
        if size is None or source is None or not isinstance(self.eval_step, CompiledStep):
            return

        def shape_of(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

        rows, where = self.eval_step.batch_sharding, self.eval_step.state_sharding(state)
        batch = {name: _rows(size, np.asarray(value), rows) for name, value in source[0].items()}
        batch["mask"] = jax.ShapeDtypeStruct((size,), np.float32, sharding=rows)
        try:
            # Under jit the first evaluation uses what is traced here.
            self.eval_step.lower(jax.tree.map(shape_of, state, where), batch)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in batch.items())
            raise ValueError(f"the eval step must take batches of {shapes}; got {_brief(error)}") from error


def evaluate(
    state: TrainState,
    eval_step: Callable[..., dict[str, fm.Accumulator]],
    batches: Iterable[Any],
    input_timeout: float | None = input_lib.TIMEOUT,
) -> dict[str, float]:
    """Evaluates a state on a whole data set.

    During `fit`, a request to stop ends the evaluation before the next batch; see `flaxvision.train.stopping`.

    Args:
        state: The state.
        eval_step: A compiled eval step.
        batches: The batches. Rows with mask 0 are padding and do not count.
        input_timeout: Seconds to wait for a batch; None waits forever.

    Returns:
        The values of the metrics by name.

    Raises:
        ValueError: There are no batches.
        InputTimeoutError: `batches` did not give a batch in time.
        Interrupted: The current run of `fit` was asked to stop.
    """
    return fm.compute(accumulate(state, eval_step, batches, input_timeout))


def accumulate(
    state: TrainState,
    eval_step: Callable[..., dict[str, fm.Accumulator]],
    batches: Iterable[Any],
    input_timeout: float | None = input_lib.TIMEOUT,
) -> dict[str, Any]:
    """Merges the metrics of a whole data set and does not compute them.

    The host forms have more to say than their values, such as the figures of each class in `DetectionRecords`.

    Args:
        state: See `evaluate`.
        eval_step: See `evaluate`.
        batches: See `evaluate`.
        input_timeout: See `evaluate`.

    Returns:
        The host forms of the accumulators by name.

    Raises:
        ValueError: There are no batches.
        InputTimeoutError: `batches` gave none in time.
    """
    total = None
    pending: deque[dict[str, fm.Accumulator]] = deque()
    stop = stopping.current()
    reader = input_lib.Reader(iter(batches), input_timeout, *([stop.due] if stop else []))
    progress = processes.Progress("evaluation")
    if hasattr(eval_step, "place"):
        state = eval_step.place(state)  # type: ignore[attr-defined] # once, and not for each batch
    with contextlib.closing(reader), contextlib.nullcontext() if stop else progress:
        for batch in prefetch(reader, getattr(eval_step, "batch_sharding", None)):
            stopping.claim()
            progress.advance()
            pending.append(eval_step(state, batch))
            if len(pending) == 8:  # let the device run ahead, within bounds
                total = fm.merge(total, fm.to_host(pending.popleft()))
    for metrics in pending:
        total = fm.merge(total, fm.to_host(metrics))
    if total is None:
        once = " (a generator ends after one pass)" if isinstance(batches, Iterator) else ""
        raise ValueError(f"batches must hold at least one batch; got none{once}")
    return total


def check_batch_size(name: str, size: int | None, step: Callable[..., Any]) -> None:
    """Checks that a batch size is a multiple of the number of devices of a compiled step.

    Args:
        name: Name of the batch size in the error message.
        size: Number of rows of the global batch; None if unknown.
        step: The compiled step. If it has no `batch_sharding`, nothing is checked.

    Raises:
        ValueError: The batch size is not a multiple of the number of devices.
    """
    sharding = getattr(step, "batch_sharding", None)
    if size is None or sharding is None:
        return
    devices = len(sharding.device_set)
    if size % devices:
        nearest = max(size // devices, 1) * devices
        raise ValueError(f"{name} must be a multiple of the {devices} devices, such as {nearest}; got {size}")


def _rows(size: int, value: np.ndarray, sharding: Any) -> jax.ShapeDtypeStruct:
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    return jax.ShapeDtypeStruct((size, *value.shape), dtype, sharding=sharding)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
