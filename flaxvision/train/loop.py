"""The training loop: resume, step, log, evaluate, checkpoint, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flaxvision import metrics as fm
from flaxvision.train.state import TrainState


class TrainData(Protocol):
    """Training batches that can start anywhere."""

    def from_step(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """Iterates over the batches of steps `step`, `step + 1`, ... without end."""
        ...


@dataclasses.dataclass
class EarlyStopping:
    """Stops when a metric has not improved for some evaluations.

    Attributes:
        patience: Evaluations without improvement.
        metric: Its name in the evaluation's record.
        mode: `"max"` or `"min"`.
        min_delta: What counts as improvement.
        best: The best value so far.
        waited: Evaluations since then.
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
        """Takes in one evaluation.

        Raises:
            KeyError: The metric is not in it.
        """
        if self.metric not in metrics:
            raise KeyError(f"early stopping watches {self.metric!r}; the evaluation gave {', '.join(metrics)}")
        value = metrics[self.metric]
        sign = 1 if self.mode == "max" else -1
        if not math.isnan(value) and (self.best is None or sign * (value - self.best) > self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    @property
    def stop(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        state: The last state.
        metrics: The last evaluation's means, empty without one.
        stopped: None for a run that did all its steps, `"early_stopping"`, or the name of a signal.
    """

    state: TrainState
    metrics: dict[str, float]
    stopped: str | None


def evaluate(state: TrainState, eval_step: Callable[..., dict[str, Any]], batches: Iterable[Any]) -> dict[str, float]:
    """Measures a whole data set.

    Args:
        state: The run.
        eval_step: Compiled; gives metric sums.
        batches: Padded rows have mask 0, so that every example counts exactly once.

    Returns:
        The means.
    """
    total = None
    pending = []
    for batch in batches:
        pending.append(eval_step(state, batch))
        if len(pending) == 8:  # let the device run ahead, but not without bound
            total = fm.add(total, jax.device_get(pending.pop(0)))
    for sums in pending:
        total = fm.add(total, jax.device_get(sums))
    return fm.divide(total or {})


def fit(
    state: TrainState,
    step: Callable[..., tuple[TrainState, dict[str, Any]]],
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
    """Trains until `num_steps`, going on from the newest checkpoint if there is one.

    At SIGTERM or SIGINT it finishes the step, saves and returns. A run that was killed and started again ends in the
    bits of the uninterrupted one: data and randomness are functions of the step, and the open sums of the training
    metrics are in the checkpoint.

    Args:
        state: Where to start; its buffers are the loop's from here on.
        step: A compiled train step.
        data: See `flaxvision.data.train_batches`.
        num_steps: The run's steps in all.
        rng: The run's key.
        evaluate: `state -> means`, such as `partial(evaluate, eval_step=..., batches=...)`.
        eval_every: Steps between evaluations; None for one at the end.
        log_every: Steps between training records, each the mean since the last; each evaluation has one too.
        checkpoints: A `flaxvision.checkpoint.Checkpoints`.
        checkpoint_every: Steps between checkpoints; None for one after each evaluation. The last step always has one.
            Only a checkpoint at an evaluation can be the best one.
        early_stopping: Looked at after each evaluation.
        learning_rate: A schedule to record.
        writers: Of records; see `flaxvision.train.writers`.

    Returns:
        The `FitResult`.

    Raises:
        FloatingPointError: A loss or parameter was not finite; the message names the step and the last checkpoint, and
            no such state was saved.
        ValueError: An interval is not positive.
    """
    for name, every in {"eval_every": eval_every, "log_every": log_every, "checkpoint_every": checkpoint_every}.items():
        if every is not None and every < 1:
            raise ValueError(f"{name} must be at least 1; got {every}")
    eval_every = eval_every or num_steps
    checkpoint_every = checkpoint_every or eval_every
    window, metrics = _Window(), {}
    early_stopping = dataclasses.replace(early_stopping) if early_stopping else None  # the caller's keeps its start
    saved = None
    restored = checkpoints.restore(state) if checkpoints else None
    if restored is not None:
        state, saved, metrics = restored.state, restored.step, dict(restored.metrics or {})
        window.sums = restored.progress.get("window") or None
        if early_stopping:
            early_stopping = dataclasses.replace(early_stopping, **restored.progress.get("early_stopping", {}))
    start = int(state.step)

    def save(at: int, at_metrics: dict[str, float] | None) -> None:
        nonlocal saved
        if checkpoints and at != saved:
            window.check(saved)
            if not bool(_all_finite(state)):
                raise FloatingPointError(f"a parameter is not finite after step {at}; {_last_good(saved)}")
            stopping = {"best": early_stopping.best, "waited": early_stopping.waited} if early_stopping else {}
            progress = {"window": window.fetch(), "early_stopping": stopping}
            checkpoints.save(at, state, progress=progress, metrics=at_metrics)
            saved = at

    def write(record: dict[str, Any]) -> None:
        for writer in writers:
            writer.write(record)

    stopped = "early_stopping" if early_stopping and early_stopping.stop else None
    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
            writer.start(start)
        signals = stack.enter_context(_Signals())
        bars = [w for w in writers if hasattr(w, "advance")]
        batches = data.from_step(start)
        if hasattr(batches, "close"):
            stack.callback(batches.close)
        clock = time.perf_counter()
        at, seen = start, 0
        while at < num_steps and not stopped:
            batch = next(batches)
            state, sums = step(state, batch, rng)
            at += 1
            window.add(sums, at)
            seen += len(batch["image"])
            for bar in bars:
                bar.advance(len(batch["image"]))
            last = at == num_steps
            if at % log_every == 0 or at % eval_every == 0 or last:
                window.check(saved)
                record = {"step": at, "split": "train", **fm.divide(window.fetch())}
                if learning_rate is not None:
                    record["learning_rate"] = float(learning_rate(at - 1))
                now = time.perf_counter()
                record["images_per_second"] = seen / (now - clock)
                clock, seen = now, 0
                write(record)
                window = _Window()
            evaluated = None
            if evaluate is not None and (at % eval_every == 0 or last):
                window.check(saved)
                pause = time.perf_counter()
                evaluated = metrics = evaluate(state)
                clock += time.perf_counter() - pause
                write({"step": at, "split": "validation", **evaluated})
                if early_stopping:
                    early_stopping.update(evaluated)
                    stopped = "early_stopping" if early_stopping.stop else None
            if at % checkpoint_every == 0 or last or stopped:
                save(at, evaluated)
            if signals.caught and not last:
                stopped = signals.caught
                save(at, evaluated)
        if checkpoints:
            checkpoints.wait()
    return FitResult(state, metrics, stopped)


class _Window:
    """The training metrics since the last record, summed on the device, and the first step that was not finite."""

    def __init__(self):
        self.sums: dict[str, Any] | None = None
        self.bad: Any = None

    def add(self, sums: dict[str, Any], step: int) -> None:
        if self.sums is None:
            self.sums = {k: np.float32(0) for k in sums}
        else:  # restored from JSON: the same bits as float32
            self.sums = {k: v if isinstance(v, jax.Array) else np.float32(v) for k, v in self.sums.items()}
        self.bad = np.int32(np.iinfo(np.int32).max) if self.bad is None else self.bad
        self.sums, self.bad = _add(self.sums, self.bad, sums, np.int32(step))

    def fetch(self) -> dict[str, float]:
        return {k: float(v) for k, v in jax.device_get(self.sums or {}).items()}

    def check(self, saved: int | None) -> None:
        if self.bad is not None and int(self.bad) != np.iinfo(np.int32).max:
            raise FloatingPointError(f"the loss is not finite at step {int(self.bad)}; {_last_good(saved)}")


@jax.jit
def _add(total, bad, sums, step):
    bad = jnp.minimum(bad, jnp.where(jnp.isfinite(sums["loss"]), bad, step))
    return {k: total[k] + v for k, v in sums.items()}, bad


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    leaves = [x for x in jax.tree.leaves((state.params, state.collections)) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _last_good(saved: int | None) -> str:
    return "there is no checkpoint yet" if saved is None else f"the last checkpoint is step {saved}"


class _Signals:
    """Notes SIGTERM and SIGINT instead of dying; a second SIGINT interrupts at once."""

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
