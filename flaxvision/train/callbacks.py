"""Callbacks of the loop: objects that are told what happens.

A callback has any of these methods; `fit` calls those that it has:

* `on_start(step, state)`: once, with the step and the state at which the run starts or resumes.
* `on_step(step, state, metrics)`: after each step, with the accumulators of that step.
* `on_evaluation(step, state, values)`: after each evaluation, with its values.
* `close()`: at the end of the run, also after an error.

The loop fetches nothing for them: states and metrics are on the devices, and may not be computed yet. The next step
donates the state, so copy what must outlive the call.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax


def caller(callbacks: Sequence[Any]) -> Callable[..., None]:
    """Returns `call(name, *args)`, which calls the method `name` of every callback that has one."""

    def call(name: str, *args: Any) -> None:
        for callback in callbacks:
            method = getattr(callback, name, None)
            if method is not None:
                method(*args)

    return call


def step_range(text: str) -> tuple[int, int]:
    """Reads a range of steps such as `"10:20"`, both ends included.

    Args:
        text: The range.

    Returns:
        The first and the last step.

    Raises:
        ValueError: It is not a range of steps from 1.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"a range of steps must be FIRST:LAST with 1 <= FIRST <= LAST, such as 10:20; got {text!r}")
    return first, last


class Profiler:
    """Records a trace of some steps with `jax.profiler`, for TensorBoard or Perfetto.

    The steps run as always, but the loop waits for the step before the first and for the last one, so that the trace
    holds just these steps. If the run resumes between the two, the trace starts there.

    Args:
        directory: Where the trace is written.
        first: First step of the trace, from 1.
        last: Last step of the trace.

    Raises:
        ValueError: The range is empty.
    """

    def __init__(self, directory: str | os.PathLike[str], first: int, last: int):
        if not 1 <= first <= last:
            raise ValueError(f"first and last must satisfy 1 <= first <= last; got {first} and {last}")
        self.directory, self.first, self.last = os.fspath(directory), first, last
        self._state: Any = None  # the newest one while the trace runs

    def on_start(self, step: int, state: Any) -> None:
        """Starts the trace if the next step belongs to it."""
        if self.first <= step + 1 <= self.last:
            self._start(state)

    def on_step(self, step: int, state: Any, metrics: Any) -> None:
        """Starts the trace before the first step, and ends it after the last one."""
        if self._state is not None:
            self._state = state
            if step == self.last:
                self.close()
        elif step + 1 == self.first:
            self._start(state)

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._state is not None:
            state, self._state = self._state, None
            try:
                jax.block_until_ready(state)
            finally:
                jax.profiler.stop_trace()

    def _start(self, state: Any) -> None:
        jax.block_until_ready(state)
        jax.profiler.start_trace(self.directory)
        self._state = state
