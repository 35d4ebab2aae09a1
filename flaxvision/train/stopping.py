"""Stopping a run before its last step: early stopping, signals and a time budget.

A *unit of work* is a train step or a batch of an evaluation. A run stops between two units, so a long evaluation does
not delay it. With several processes, a request to any of them stops all of them before the same unit. For this, one
thread in each process looks for a key in the store of JAX's coordinator every second. The overhead for each unit is one
lock. If a process counts no unit for `processes.stall_timeout()` seconds, all of them exit; see `processes.Progress`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from flaxvision import processes

_ENDED = "ended"
_RUNS = itertools.count()
_current = threading.local()
_terminated = False  # SIGTERM arrived; it outlives the run


def requested() -> str | None:
    """Returns `"SIGTERM"` if this signal has stopped a run of this process since the last `clear`, or None."""
    return "SIGTERM" if _terminated else None


def clear() -> None:
    """Clears an earlier SIGTERM, so that `fit` trains again.

    SIGTERM asks the whole process to end, not only the current run. Every later `fit` therefore returns at once, until
    this function is called. SIGINT stops only the current run.
    """
    global _terminated
    _terminated = False


class Interrupted(Exception):
    """The run was asked to stop before the next unit of work.

    Attributes:
        reason: Name of a signal, or `"time_budget"`.
    """

    def __init__(self, reason: str):
        super().__init__(f"the run was stopped by {reason}")
        self.reason = reason


def claim() -> None:
    """Counts one unit of work of the current run of this thread. It does nothing if there is no run.

    Raises:
        Interrupted: The run was asked to stop.
    """
    if (stop := current()) is not None:
        stop.claim()


def current() -> Stop | None:
    """Returns the `Stop` of the current run of this thread, or None."""
    return getattr(_current, "stop", None)


class Stop:
    """Context manager that receives requests to stop during a run.

    In the main thread, it handles SIGTERM and SIGINT and restores the previous handlers at the end. A second SIGINT
    raises `KeyboardInterrupt` at once.

    Args:
        time_budget: Seconds from now after which the run stops; None for no limit.
    """

    def __init__(self, time_budget: float | None = None):
        self._deadline = math.inf if time_budget is None else time.monotonic() + time_budget
        self._interrupts = 0
        self._handlers: dict[int, Any] = {}
        self._outer: Stop | None = None
        self._agreement = _Agreement(self._asked) if jax.process_count() > 1 else None
        self._progress = processes.Progress("fit")

    def claim(self) -> None:
        """Counts one unit of work. Call it before each unit.

        Raises:
            Interrupted: The run must stop here. All processes raise it before the same unit.
            ProcessError: Another process failed or did not answer in time.
        """
        reason = self._agreement.claim() if self._agreement else self._asked()
        if reason is not None:
            raise Interrupted(reason)
        self._progress.advance()

    def due(self) -> str | None:
        """Returns the reason why the run must stop before the next unit of work, or None. It does not wait."""
        return self._agreement.due() if self._agreement else self._asked()

    def _asked(self) -> str | None:
        """Returns why this process wants to stop, or None."""
        if _terminated:
            return "SIGTERM"
        if self._interrupts:
            return "SIGINT"
        return "time_budget" if time.monotonic() >= self._deadline else None

    def _note(self, number: int, frame: Any) -> None:
        global _terminated
        if number == signal.SIGTERM:
            _terminated = True
            return
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def __enter__(self) -> Stop:
        self._outer, _current.stop = current(), self
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        if self._agreement:
            self._agreement.start()
        self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        _current.stop = self._outer
        self._progress.__exit__()
        if self._agreement:
            self._agreement.end()


class _Agreement:
    """Lets the processes of a run agree on the unit of work before which all of them stop.

    The first process that is asked to stop posts a request, which wakes a thread in every process. The threads exchange
    the numbers of units that their loops have claimed. All loops stop after the largest number. Between answer and
    decision, a loop claims no unit. The threads answer instead of the loops, because a loop may wait for a device that
    waits for another process. If a process has already finished its work, its answer says so and the others finish too.
    """

    def __init__(self, asked: Callable[[], str | None]):
        self._asked = asked
        self._key = f"flaxvision/stop/{next(_RUNS)}"  # all processes have the same runs
        self._lock = threading.Lock()
        self._units = 0
        self._answered = self._ended = False
        self._decided, self._wake = threading.Event(), threading.Event()
        self._last = math.inf  # the unit after which all processes stop
        self._reason: str | None = None
        self._error: processes.ProcessError | None = None
        # A daemon, because nothing must keep a process alive whose coordinator is gone.
        self._thread = threading.Thread(target=self._watch, name="flaxvision-stop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def claim(self) -> str | None:
        while True:
            with self._lock:
                decided = self._decided.is_set()
                reason = None if decided or self._answered else self._asked()
                if (decided and self._units < self._last) or not (decided or self._answered or reason):
                    self._units += 1
                    return None
            if decided:
                return self._result()
            if reason is not None:
                processes.post(f"{self._key}/request", reason)
                self._wake.set()
            if not self._decided.wait(processes.stall_timeout()):
                raise processes.ProcessError(f"the processes must agree to stop within {processes.stall_timeout():g} s")

    def due(self) -> str | None:
        return self._result() if self._decided.is_set() and self._units >= self._last else None

    def end(self) -> None:
        with self._lock:
            self._ended = True
        with contextlib.suppress(processes.ProcessError):
            processes.post(f"{self._key}/request", _ENDED)
        self._wake.set()
        self._thread.join(2.0)

    def _result(self) -> str | None:
        global _terminated
        if self._error is not None:
            raise self._error
        _terminated = _terminated or self._reason == "SIGTERM"
        return self._reason

    def _watch(self) -> None:
        try:
            while (request := processes.read(f"{self._key}/request", 0)) is None:
                self._wake.wait(1.0)
                if (reason := self._asked()) is not None:  # the loop may be waiting for something else
                    processes.post(f"{self._key}/request", reason)
            with self._lock:
                self._answered = True
                ended = self._ended or request == _ENDED
                answer = {"units": self._units, "reason": None if ended else request}
            processes.post(f"{self._key}/answer/{jax.process_index()}", answer)
            if not ended:
                self._decide([self._answer(index) for index in range(jax.process_count())])
        except processes.ProcessError as error:
            self._error, self._last = error, 0
        self._decided.set()

    def _answer(self, index: int) -> dict[str, Any]:
        limit = processes.stall_timeout()
        answer = processes.read(f"{self._key}/answer/{index}", limit)
        if answer is None:
            raise processes.ProcessError(f"process {index} must answer 'stop' within {limit:g} s")
        return answer

    def _decide(self, answers: list[dict[str, Any]]) -> None:
        if all(answer["reason"] for answer in answers):
            self._last, self._reason = max(answer["units"] for answer in answers), answers[0]["reason"]


@dataclasses.dataclass
class EarlyStopping:
    """Stops a run when a metric has not improved for several evaluations.

    `fit` accepts any object with the methods `update`, `to_json` and `from_json` and the property `stop`.

    Attributes:
        patience: Number of evaluations without improvement after which the run stops.
        metric: Name of the metric in the values of the evaluation.
        mode: `"max"` if a larger value is better, `"min"` if a smaller one is.
        min_delta: A value must be better than the best one by more than this to count as an improvement.
        best: Best value so far.
        waited: Number of evaluations since the best value.

    Raises:
        ValueError: `mode` is neither `"max"` nor `"min"`, or `patience` is below 1.
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
        """Updates the best value with the values of one evaluation.

        Args:
            metrics: The values of the evaluation.

        Raises:
            ValueError: `metrics` has no value for `metric`.
        """
        if self.metric not in metrics:
            near = difflib.get_close_matches(self.metric, metrics, n=3, cutoff=0.4) or list(metrics)
            raise ValueError(
                f"metric must be a value of the evaluation, such as {', '.join(near)}; got {self.metric!r}"
            )
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

    def to_json(self) -> dict[str, Any]:
        """Returns `best` and `waited` as JSON values for a checkpoint."""
        return {"best": self.best, "waited": self.waited}

    def from_json(self, stored: Mapping[str, Any]) -> EarlyStopping:
        """Returns a copy of this object with stored values of `best` and `waited`.

        Args:
            stored: The result of `to_json`.
        """
        return dataclasses.replace(self, best=stored["best"], waited=stored["waited"])
