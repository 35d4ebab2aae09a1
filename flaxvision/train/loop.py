"""The training loop: resume, step, log, evaluate, checkpoint, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flaxvision import metrics as fm
from flaxvision.train.objectives import explain_loss
from flaxvision.train.parallel import prefetch
from flaxvision.train.state import TrainState
from flaxvision.train.step import check_loss


class TrainData(Protocol):
    """Training batches that can start at any step."""

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """Returns an endless iterator over the batches of steps `step`, `step + 1` and so on."""
        ...


@dataclasses.dataclass
class EarlyStopping:
    """Stops a run when a metric has not improved for several evaluations.

    Attributes:
        patience: Number of evaluations without improvement after which the run stops.
        metric: Name of the metric in the record of the evaluation.
        mode: `"max"` or `"min"`: whether a larger or a smaller value is better.
        min_delta: Smallest change that counts as an improvement.
        best: Best value so far.
        waited: Number of evaluations since the best value.

    Raises:
        ValueError: `mode` or `patience` is out of range.
    """

    patience: int
    metric: str = "loss"
    mode: str = "min"
    min_delta: float = 0.0
    best: float | None = None
    waited: int = 0

    def __post_init__(self):
        if self.mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min'; got {self.mode!r}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1; got {self.patience}")

    def update(self, metrics: dict[str, float]) -> None:
        """Takes one evaluation into account.

        Args:
            metrics: The values of the evaluation.

        Raises:
            ValueError: `metric` is not among them.
        """
        if self.metric not in metrics:
            raise ValueError(f"metric must be one of {', '.join(metrics)}; got {self.metric!r}")
        value = metrics[self.metric]
        sign = 1 if self.mode == "max" else -1
        if not math.isnan(value) and (self.best is None or sign * (value - self.best) > self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    @property
    def stop(self) -> bool:
        """Whether the run should stop."""
        return self.waited >= self.patience


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        state: The last state.
        metrics: The values of the last evaluation; empty without one.
        stopped: None for a run that did all its steps, `"early_stopping"`, or the name of a signal.
    """

    state: TrainState
    metrics: dict[str, float]
    stopped: str | None


def evaluate(
    state: TrainState, eval_step: Callable[..., dict[str, fm.Accumulator]], batches: Iterable[Any]
) -> dict[str, float]:
    """Evaluates a state on a whole data set.

    Args:
        state: The state.
        eval_step: A compiled eval step.
        batches: Batches; rows with mask 0 are padding, so that every example counts exactly once.

    Returns:
        The values of the metrics by name.

    Raises:
        ValueError: There are no batches.
    """
    total = None
    pending: deque[dict[str, fm.Accumulator]] = deque()
    for batch in prefetch(batches, getattr(eval_step, "batch_sharding", None)):
        pending.append(eval_step(state, batch))
        if len(pending) == 8:  # let the device run ahead, within bounds
            total = fm.merge(total, fm.to_host(pending.popleft()))
    for metrics in pending:
        total = fm.merge(total, fm.to_host(metrics))
    if total is None:
        raise ValueError("batches must hold at least one batch; got none")
    return fm.compute(total)


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
    early_stopping: EarlyStopping | None = None,
    learning_rate: Callable[[int], Any] | None = None,
    writers: Sequence[Any] = (),
) -> FitResult:
    """Trains until `num_steps`, resuming from the newest checkpoint if there is one.

    On SIGTERM or SIGINT it finishes the current step, saves and returns. A run that is killed and resumed gives
    bit-identical results: data and randomness are functions of the step, and the metrics of the current window are in
    the checkpoint.

    The loop does not wait for the values of a record. It writes the record once they are available, at the latest
    before the next record, an evaluation, a checkpoint or the end of the run, even if the run ends with an error. A
    non-finite loss is reported with its record: up to one record late, but always before a checkpoint.

    Args:
        state: The state to start from. The loop donates its buffers, so do not use it afterwards.
        step: A compiled train step. Its metrics must include `"loss"`, a `Mean`, and keep their names and shapes from
            step to step and when they are merged. The metrics of `evaluate` may grow, since they are merged on the
            host. Batches are copied two steps ahead, to the `batch_sharding` of the step if it has one.
        data: The batches, such as `flaxvision.data.train_batches`.
        num_steps: Total number of steps of the run.
        rng: The key of the run.
        evaluate: `state -> values`, such as `partial(evaluate, eval_step=..., batches=...)`.
        eval_every: Steps between evaluations; None for one at the end.
        log_every: Steps between training records. A record holds the metrics since the last record, and there is one
            at every evaluation too.
        checkpoints: A `flaxvision.checkpoint.Checkpoints`.
        checkpoint_every: Steps between checkpoints; None for one after each evaluation. There is always one after the
            last step. Only a checkpoint at an evaluation can be the best one.
        early_stopping: When to stop early; updated after each evaluation.
        learning_rate: A schedule to record.
        writers: Writers of records; see `flaxvision.train.writers`.

    Returns:
        The `FitResult`.

    Raises:
        FloatingPointError: A loss or a parameter was not finite. The message names the step and the last checkpoint;
            no state that is not finite was saved.
        ValueError: An interval is not positive, the data end before `num_steps`, the training metrics lack a loss or
            change their shapes, or an evaluation lacks the metric of `early_stopping`.
    """
    for name, every in {"eval_every": eval_every, "log_every": log_every, "checkpoint_every": checkpoint_every}.items():
        if every is not None and every < 1:
            raise ValueError(f"{name} must be at least 1; got {every}")
    eval_every = eval_every or num_steps
    checkpoint_every = checkpoint_every or eval_every
    window, metrics, shapes = _Window(), {}, None
    early_stopping = dataclasses.replace(early_stopping) if early_stopping else None  # leave the caller's unchanged
    saved = None
    restored = checkpoints.restore(state) if checkpoints else None
    if restored is not None:
        state, saved, metrics = restored.state, restored.step, dict(restored.metrics or {})
        window.stored = restored.progress.get("window") or None
        if early_stopping:
            early_stopping = dataclasses.replace(early_stopping, **restored.progress.get("early_stopping", {}))
    start = int(state.step)
    bars = [w for w in writers if hasattr(w, "advance")]

    def write(record: dict[str, Any]) -> None:
        for writer in writers:
            writer.write(record)

    def save(at: int, at_metrics: dict[str, float] | None) -> None:
        nonlocal saved
        if checkpoints and at != saved:
            log.settle(saved)
            window.check(saved)
            if not bool(_all_finite(state)):
                raise FloatingPointError(f"a parameter is not finite after step {at}; {_last_good(saved)}")
            stopping = {"best": early_stopping.best, "waited": early_stopping.waited} if early_stopping else {}
            progress = {"window": window.to_json(), "early_stopping": stopping}
            checkpoints.save(at, state, progress=progress, metrics=at_metrics)
            saved = at

    stopped = "early_stopping" if early_stopping and early_stopping.stop else None
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
            writer.start(start)
        signals = stack.enter_context(_Signals())
        log = _Log(write, stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="flaxvision-metrics")))
        stack.push(lambda kind, error, traceback: log.close(error, saved))
        source = data.from_step(start)
        if hasattr(source, "close"):
            stack.callback(source.close)
        needed = itertools.islice(source, max(num_steps - start, 0))
        batches = prefetch(needed, getattr(step, "batch_sharding", None))
        at = start
        while at < num_steps and not stopped:
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"data must give batches for {num_steps} steps; got {at}")
            state, step_metrics = step(state, batch, rng)
            at += 1
            shapes = _check_metrics(step_metrics, shapes)
            window.add(step_metrics, at, len(batch["image"]))
            for bar in bars:
                bar.advance(len(batch["image"]))
            log.settle(saved, wait=False)
            last = at == num_steps
            if at % log_every == 0 or at % eval_every == 0 or last:
                log.settle(saved)
                log.begin(at, window, learning_rate(at - 1) if learning_rate is not None else None)
                window = _Window()
            evaluated = None
            if evaluate is not None and (at % eval_every == 0 or last):
                log.settle(saved)
                pause = time.perf_counter()
                evaluated = metrics = evaluate(state)
                log.clock += time.perf_counter() - pause
                write({"step": at, "split": "validation", **evaluated})
                if early_stopping:
                    early_stopping.update(evaluated)
                    stopped = "early_stopping" if early_stopping.stop else None
            if at % checkpoint_every == 0 or last or stopped:
                save(at, evaluated)
            if signals.caught and not last:
                stopped = signals.caught
                save(at, evaluated)
        log.settle(saved)
        if checkpoints:
            checkpoints.wait()
    return FitResult(state, metrics, stopped)


class _Window:
    """The training metrics since the last record, merged on the device, and the first step that was not finite."""

    def __init__(self):
        self.metrics: dict[str, fm.Accumulator] | None = None
        self.stored: dict[str, Any] | None = None  # from a checkpoint; its types are known at the first step
        self.bad: Any = np.int32(np.iinfo(np.int32).max)
        self.images = 0

    def add(self, metrics: dict[str, fm.Accumulator], step: int, images: int) -> None:
        """Merges the metrics of one step without waiting for them."""
        if self.stored:
            self.metrics, self.stored = fm.from_json(self.stored, metrics), None
        self.metrics, self.bad = _merge(self.metrics, self.bad, metrics, np.int32(step))
        self.images += images

    def to_json(self) -> dict[str, Any]:
        return self.stored or fm.to_json(self.metrics)

    def check(self, saved: int | None) -> None:
        """Raises if a loss was not finite; waits for the last step."""
        if int(self.bad) != np.iinfo(np.int32).max:
            cause = explain_loss(self.metrics or {})
            raise FloatingPointError(f"the loss is not finite at step {int(self.bad)}{cause}; {_last_good(saved)}")


class _Log:
    """Writes training records without making the loop wait for the device.

    The loop would stand still at every record if it fetched the values at once, and the device would run out of work.
    So a thread fetches them, and the loop writes the record once they are available, at the latest before the next
    record, an evaluation, a checkpoint or the end. The records and their order are those of a loop that waits, and a
    checkpoint never precedes its records. The thread also notes when the device was done, so `images_per_second`
    stays exact.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None], thread: ThreadPoolExecutor):
        self.write, self.thread = write, thread
        self.clock = time.perf_counter()
        self._pending: tuple[int, _Window, Future[Any]] | None = None

    def begin(self, step: int, window: _Window, learning_rate: Any) -> None:
        """Starts to fetch the values of a window. The learning rate is fetched too: it is computed on the device."""
        self._pending = step, window, self.thread.submit(_fetch, window, learning_rate)

    def settle(self, saved: int | None, wait: bool = True) -> None:
        """Writes the open record, if there is one. Waits for its values, or returns if they are not there yet."""
        if self._pending is None or not (wait or self._pending[2].done()):
            return
        step, window, future = self._pending
        metrics, learning_rate, now = future.result()  # an interrupt here leaves the record open for `close`
        self._pending = None
        window.check(saved)
        record = {"step": step, "split": "train", **fm.compute(metrics)}
        if learning_rate is not None:
            record["learning_rate"] = float(learning_rate)
        record["images_per_second"] = window.images / (now - self.clock)
        self.clock = now
        self.write(record)

    def close(self, error: BaseException | None, saved: int | None) -> None:
        """Writes the pending record of a run that ends with an error. If that fails, it adds a note to the error."""
        try:
            self.settle(saved)
        except BaseException as failure:
            if error is None:
                raise
            if failure is not error:
                error.add_note(f"the last training record was not written: {failure!r}")


def _check_metrics(metrics: dict[str, fm.Accumulator], shapes: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the shapes of the metrics; raises if they are not those of the first step or if merging changes them."""
    # Otherwise `_merge` would compile at every step, and a checkpoint could not be resumed.

    def shapes_of(metrics: Any) -> dict[str, Any]:
        return {name: [np.shape(x) for x in jax.tree.leaves(metric)] for name, metric in metrics.items()}

    found = shapes_of(metrics)
    if shapes is None:
        check_loss(metrics)
        shapes, found = found, shapes_of(jax.eval_shape(fm.merge, metrics, metrics))
    if found != shapes:
        before, after = ({k: v for k, v in x.items() if v != y.get(k)} for x, y in ((shapes, found), (found, shapes)))
        raise ValueError(f"training metrics must keep their names and shapes; got {before} and then {after}")
    return shapes


def _fetch(window: _Window, learning_rate: Any) -> tuple[dict[str, Any], Any, float]:
    learning_rate, _ = jax.device_get((learning_rate, window.bad))
    return fm.to_host(window.metrics or {}), learning_rate, time.perf_counter()


@jax.jit
def _merge(total, bad, metrics, step):
    losses = [x for x in jax.tree.leaves(metrics["loss"]) if jnp.issubdtype(x.dtype, jnp.inexact)]
    finite = jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in losses]))
    return fm.merge(total, metrics), jnp.minimum(bad, jnp.where(finite, bad, step))


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    leaves = [x for x in jax.tree.leaves((state.params, state.collections)) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _last_good(saved: int | None) -> str:
    return "there is no checkpoint yet" if saved is None else f"the last checkpoint is step {saved}"


class _Signals:
    """Records SIGTERM and SIGINT instead of ending the process; a second SIGINT interrupts at once."""

    def __init__(self):
        self.caught: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.caught == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = signal.Signals(number).name

    def __exit__(self, *exc):
        for number, handler in self._old.items():
            signal.signal(number, handler)
