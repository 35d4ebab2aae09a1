"""The training loop: resume, step, log, evaluate, checkpoint, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from flaxvision import metrics as fm
from flaxvision.train import callbacks as callbacks_lib
from flaxvision.train import input as input_lib
from flaxvision.train import monitor, stopping
from flaxvision.train.evaluation import check_batch_size
from flaxvision.train.parallel import prefetch
from flaxvision.train.state import TrainState

_LONGEST = 1000  # steps between checkpoints, unless the caller chooses
_IN_FLIGHT = 4  # steps that the host may be ahead of the device


class TrainData(Protocol):
    """Training batches that can start at any step."""

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """Returns an endless iterator over the batches of steps `step`, `step + 1` and so on."""
        ...


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        state: The last state.
        metrics: The values of the last evaluation; empty without one.
        stopped: None for a run that did all its steps, `"early_stopping"`, `"time_budget"`, or the name of a signal.
    """

    state: TrainState
    metrics: dict[str, float]
    stopped: str | None

    @property
    def exit_status(self) -> int | None:
        """Exit status of a program whose run was interrupted; None if the run is complete."""
        return {None: None, "early_stopping": None, "SIGINT": 130}.get(self.stopped, 0)


def fit(
    state: TrainState,
    step: Callable[..., tuple[TrainState, dict[str, fm.Accumulator]]],
    data: TrainData,
    *,
    num_steps: int,
    rng: jax.Array,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    eval_every: int | None = None,
    log_every: int = 50,
    checkpoints: Any = None,
    checkpoint_every: int | None = None,
    early_stopping: Any = None,
    learning_rate: Callable[[int], Any] | None = None,
    writers: Sequence[Any] = (),
    callbacks: Sequence[Any] = (),
    time_budget: float | None = None,
    input_timeout: float | None = input_lib.TIMEOUT,
) -> FitResult:
    """Trains until `num_steps`, resuming from the newest checkpoint if there is one.

    On SIGTERM or SIGINT it finishes the current step, or leaves the current evaluation, saves and returns. After
    SIGTERM every later `fit` of the process returns at once; see `flaxvision.train.stopping.clear`. A run that is
    killed and resumed gives bit-identical results: data and randomness are functions of the step, and the metrics of
    the current window are in the checkpoint.

    At an evaluation the state is saved first and the values are added to the checkpoint afterwards. A run that resumes
    before they were added evaluates first. If a run of one process ends with an error that leaves the state whole,
    such as one in the data or in an evaluation, the state is saved too.

    The loop does not wait for the values of a record. It writes the record once they are available, at the latest
    before the next record, an evaluation, a checkpoint or the end of the run, even if the run ends with an error. A
    non-finite loss is reported with its record: up to one record late, but always before a checkpoint. The loop is at
    most four steps ahead of the device, so that no more batches than that wait in its memory.

    With several processes, all of them call `fit` with the same arguments, apart from `writers`. A request to stop to
    any of them stops all of them after the same step.

    Args:
        state: The state to start from. The loop donates its buffers, so do not use it afterwards.
        step: A compiled train step. Its metrics must include `"loss"`, a `Mean`, and keep their names and shapes from
            step to step and when they are merged. The metrics of `evaluate` may grow, since they are merged on the
            host. Batches are copied two steps ahead, to the `batch_sharding` of the step if it has one.
        data: The batches, such as `flaxvision.data.train_batches`. A `batch_size` that the devices do not divide is
            refused before the first step.
        num_steps: Total number of steps of the run.
        rng: The key of the run.
        evaluate: `state -> values`, such as an `Evaluation`. If it has a method `check(state)`, that is called before
            the first step.
        eval_every: Steps between evaluations; None for one at the end.
        log_every: Steps between training records. A record holds the metrics since the last record. One is
            written at every evaluation too.
        checkpoints: A `flaxvision.checkpoint.Checkpoints`.
        checkpoint_every: Steps between checkpoints; None for one at every evaluation and every 1,000 steps. There is
            always one after the last step. Only a checkpoint at an evaluation can be the best one.
        early_stopping: When to stop early, such as an `EarlyStopping`: an object with `update(values)`, called after
            each evaluation, a property `stop`, and `to_json()` and `from_json(stored)`, which carry what it remembers
            to the next process.
        learning_rate: A schedule to record.
        writers: Writers of records; see `flaxvision.train.writers`.
        callbacks: Objects that are told about steps and evaluations; see `flaxvision.train.callbacks`.
        time_budget: Seconds after which the run stops and saves, as after a signal.
        input_timeout: Seconds to wait for a batch; None waits forever.

    Returns:
        The `FitResult`.

    Raises:
        FloatingPointError: A loss or a part of the state was not finite. The message names the step and the last
            checkpoint; no state that is not finite was saved.
        InputTimeoutError: The data gave no batch in time.
        OSError: A checkpoint or a record could not be written. An error of a checkpoint is raised at the next step.
        ValueError: A number is out of range, the devices do not divide a batch, the data end before `num_steps`, the
            training metrics lack a loss or change their shapes, or an evaluation lacks the metric of `early_stopping`.
    """
    intervals = {"eval_every": eval_every, "log_every": log_every, "checkpoint_every": checkpoint_every}
    for name, every in intervals.items():
        if every is not None and every < 1:
            raise ValueError(f"{name} must be at least 1; got {every}")
    for name, seconds in {"time_budget": time_budget, "input_timeout": input_timeout}.items():
        if seconds is not None and not seconds > 0:
            raise ValueError(f"{name} must be positive; got {seconds}")
    check_batch_size("the batch size", getattr(data, "batch_size", None), step)
    if hasattr(evaluate, "check"):
        evaluate.check(state)  # type: ignore[union-attr]
    reason = stopping.requested()
    if reason and jax.process_count() == 1:  # several processes agree at the first step
        return FitResult(state, {}, reason)
    eval_every = eval_every or num_steps
    window, metrics, shapes = monitor.Window(), {}, None
    due = False  # whether the state has still to be evaluated
    if early_stopping is not None:  # a copy, because the caller's is a setting and not the memory of the run
        early_stopping = early_stopping.from_json(early_stopping.to_json())
    saved = None
    if checkpoints and (restored := checkpoints.restore(_describe(state, step, checkpoints))) is not None:
        state, saved, metrics = restored.state, restored.step, dict(restored.metrics or {})
        window.stored = restored.progress.get("window") or None
        due = evaluate is not None and bool(restored.progress.get("evaluation_due"))
        if early_stopping is not None and (stored := restored.progress.get("early_stopping")):
            early_stopping = early_stopping.from_json(stored)
    at = start = int(state.step)
    whole = True  # False while a step may have donated the state
    bars = [w for w in writers if hasattr(w, "advance")]
    call = callbacks_lib.caller(callbacks)

    def write(record: dict[str, Any]) -> None:
        for writer in writers:
            writer.write(record)

    def save(values: dict[str, float] | None = None) -> None:
        nonlocal saved
        if not checkpoints or saved != at == start:  # a run without a step leaves nothing
            return
        log.settle(saved)
        window.check(saved)
        memory = early_stopping.to_json() if early_stopping is not None else {}
        progress = {"window": window.to_json(), "early_stopping": memory, "evaluation_due": due}
        if at != saved:
            monitor.check_state(state, at, saved)
            checkpoints.save(at, state, progress=progress, metrics=values)
            saved = at
        elif values is not None:
            checkpoints.amend(at, progress=progress, metrics=values)

    def rescue(kind: Any, error: BaseException | None, traceback: Any) -> None:
        # Several processes cannot save unless all of them failed at this step.
        alone = jax.process_count() == 1
        if checkpoints and whole and alone and isinstance(error, Exception) and not isinstance(error, ArithmeticError):
            try:
                save()
                checkpoints.wait()
            except Exception as failure:
                if failure is not error:
                    error.add_note(f"the state of step {at} was not saved: {failure!r}")

    stopped = "early_stopping" if early_stopping is not None and early_stopping.stop else None
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
            writer.start(start)
        stop = stack.enter_context(stopping.Stop(time_budget))
        log = monitor.Log(write, stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="flaxvision-metrics")))
        stack.push(lambda kind, error, traceback: log.close(error, saved))
        stack.callback(call, "close")
        source = input_lib.Reader(data.from_step(start), input_timeout, stop.due)
        stack.callback(source.close)
        stack.push(rescue)
        needed = itertools.islice(source, max(num_steps - start, 0))
        batches = prefetch(needed, getattr(step, "batch_sharding", None))
        in_flight: deque[Any] = deque()
        call("on_start", at, state)
        while not stopped and (due or at < num_steps):
            if not due:
                try:
                    batch = next(batches, None)
                    stop.claim()
                except stopping.Interrupted as interrupted:
                    stopped = interrupted.reason
                    break
                if batch is None:
                    raise ValueError(f"data must give batches for {num_steps} steps; got {at}")
                whole = False
                state, step_metrics = step(state, batch, rng)
                whole, at = True, at + 1
                shapes = monitor.check_metrics(step_metrics, shapes)
                window.add(step_metrics, at, len(batch["image"]))
                in_flight.append(window.bad)
                if len(in_flight) > _IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft())
                for bar in bars:
                    bar.advance(len(batch["image"]))
                call("on_step", at, state, step_metrics)
                log.settle(saved, wait=False)
                if checkpoints:
                    checkpoints.check()
                last = at == num_steps
                if at % log_every == 0 or at % eval_every == 0 or last:
                    log.settle(saved)
                    log.begin(at, window, learning_rate(at - 1) if learning_rate is not None else None)
                    window = monitor.Window()
                due = evaluate is not None and (at % eval_every == 0 or last)
                often = at % checkpoint_every == 0 if checkpoint_every else at % _LONGEST == 0 or at % eval_every == 0
                if often or last:
                    save()
            if due and evaluate is not None:
                log.settle(saved)
                pause = time.perf_counter()
                try:
                    values = evaluate(state)
                except stopping.Interrupted as interrupted:
                    stopped = interrupted.reason
                    break
                log.clock += time.perf_counter() - pause
                write({"step": at, "split": "validation", **values})
                call("on_evaluation", at, state, values)
                if early_stopping is not None:
                    early_stopping.update(values)
                    stopped = "early_stopping" if early_stopping.stop else None
                metrics, due = values, False
                if stopped or saved == at:
                    save(values)
        if stopped:
            save()
        log.settle(saved)
        if checkpoints:
            checkpoints.wait()
    return FitResult(state, metrics, stopped)


def _describe(state: TrainState, step: Callable[..., Any], checkpoints: Any) -> Any:
    """Returns the template for `restore`. If there is a checkpoint, frees the state: a resumed run holds only one.

    The arrays go straight to where the step wants them, if it says so.
    """
    if checkpoints.latest_step is None:
        return state
    leaves, structure = jax.tree.flatten(state)
    wanted = getattr(step, "state_sharding", None)
    if wanted is not None:
        shardings = jax.tree.leaves(wanted(state))
    else:
        shardings = [x.sharding if getattr(x, "committed", False) else None for x in leaves]
    template = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if isinstance(x, jax.Array) else x
        for x, sharding in zip(leaves, shardings, strict=True)
    ]
    for x in leaves:
        if isinstance(x, jax.Array):
            x.delete()
    return jax.tree.unflatten(structure, template)
