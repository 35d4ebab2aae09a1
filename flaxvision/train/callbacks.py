"""Callbacks of the training loop.

A callback is an object with any of these methods:

* `on_start(step, state)`: called once, with the step and the state at which the run starts or resumes.
* `on_step(step, state, metrics)`: called after each step, with the metric accumulators of that step.
* `on_evaluation(step, state, values)`: called after each evaluation, with its values.
* `close()`: called at the end of the run, also after an error.

States and metrics are on the devices and may not be computed yet. The next step donates the state, so copy the
arrays that you need after the call.
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
    """Parses a range of steps such as `"10:20"`, including both ends.

    Args:
        text: The range.

    Returns:
        The first and the last step.

    Raises:
        ValueError: `text` is not such a range, or its first step is below 1.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"a range of steps must be FIRST:LAST with 1 <= FIRST <= LAST, such as 10:20; got {text!r}")
    return first, last


class Profiler:
    """Records a trace of some steps with `jax.profiler`, for TensorBoard or Perfetto.

    So that the trace contains only these steps, the loop waits for the device before the first and after the last one.
    If the run resumes within the range, the trace starts there.

    Args:
        directory: Directory of the trace.
        first: First step of the trace, at least 1.
        last: Last step of the trace.

    Raises:
        ValueError: `first` is below 1 or above `last`.
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
