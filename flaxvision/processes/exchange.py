"""Exchanges of small values between the processes of a run, and the watch over their progress."""

from __future__ import annotations

import collections
import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the only way to the key-value store

T = TypeVar("T")

TIMEOUT = 300.0  # seconds
STALL_TIMEOUT = 1800.0  # seconds
_NEVER = 1e8  # seconds; locks of Python do not take `inf`
_POLL = 0.25  # seconds between two looks at a key, at most

_calls: collections.Counter[str] = collections.Counter()
_lock = threading.Lock()
_stall_timeout = STALL_TIMEOUT
_watched: list[Progress] = []


class ProcessError(RuntimeError):
    """Another process failed or did not answer in time."""


def stall_timeout() -> float:
    """Returns the `stall_timeout` of `initialize`: seconds to wait for a process that works."""
    return _stall_timeout


def gather(name: str, value: Any, timeout: float | None = None) -> list[Any]:
    """Returns the values of all processes, in the order of their indices.

    Args:
        name: Name of this exchange, the same in all processes.
        value: A JSON value.
        timeout: Seconds to wait for the other processes; None for `stall_timeout()`.

    Raises:
        ProcessError: A process did not call `gather` in time.
    """
    count = jax.process_count()
    if count == 1:
        return [json.loads(json.dumps(value))]
    key, before = _key(name)
    client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    values = [_get(f"{key}/{index}", name, index, timeout) for index in range(count)]
    # Each process has answered, so each one has read all answers to the previous call.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client().key_value_delete(f"{before}/{jax.process_index()}")
    return values


def broadcast(name: str, value: Any, timeout: float | None = None) -> Any:
    """Returns the value of process 0. The values of the other processes are ignored.

    Args:
        name: Name of this exchange, the same in all processes.
        value: A JSON value.
        timeout: Seconds to wait for process 0; None for `stall_timeout()`.

    Raises:
        ProcessError: Process 0 did not call `broadcast` in time.
    """
    if jax.process_count() == 1:
        return json.loads(json.dumps(value))
    key, _ = _key(name)
    if jax.process_index() == 0:
        client().key_value_set(key, json.dumps(value))
    return _get(key, name, 0, timeout)


def barrier(name: str, timeout: float | None = None) -> None:
    """Waits until all processes have reached this barrier.

    Args:
        name: Name of the barrier, the same in all processes.
        timeout: Seconds to wait for the other processes; None for `stall_timeout()`.

    Raises:
        ProcessError: A process did not reach it in time.
    """
    gather(name, None, timeout)  # JAX's own barrier is one call during which Python handles no signal


def on_first(name: str, act: Callable[[], T], timeout: float | None = None) -> T:
    """Calls a function in process 0 and returns its result in all processes. Its error is raised in all of them.

    Args:
        name: What the function does, the same in all processes.
        act: The function. With several processes, its result is a JSON value.
        timeout: Seconds to wait for process 0; None for `stall_timeout()`.

    Raises:
        ValueError: The function raised a ValueError.
        RuntimeError: The function raised another error in process 0, which itself raises that error unchanged.
        ProcessError: Process 0 did not answer in time.
    """
    failure, result = None, None
    if jax.process_index() == 0:
        try:
            result = act()
        except Exception as error:
            failure = error
    if failure is None and jax.process_count() == 1:
        return result  # type: ignore[return-value]
    told = {"result": result, "failure": failure and [isinstance(failure, ValueError), str(failure)]}
    told = broadcast(name, told, timeout)
    if failure is not None:
        raise failure
    if told["failure"]:
        raise (ValueError if told["failure"][0] else RuntimeError)(told["failure"][1])
    return told["result"]


class Progress:
    """Context manager for work that all processes do together. It ends the run when this process makes no progress.

    If `advance` is not called for `stall_timeout()` seconds, all processes exit with status 1. Their last line names
    the process with the fewest calls. It does nothing if there is one process.

    Args:
        name: Name of the work, the same in all processes.
        alone: Whether only this process does the work.
    """

    def __init__(self, name: str, *, alone: bool = False):
        self._name, self._alone = name, alone
        self._count = 0
        self._key, self._seen, self._since, self._posted = "", 0, 0.0, -1.0  # of the thread that watches

    def advance(self) -> None:
        """Counts one unit of work."""
        self._count += 1

    def __enter__(self) -> Progress:
        if distributed.global_state.num_processes > 1:
            self._key, before = _key(f"progress/{self._name}")
            self._since = time.monotonic()
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client().key_value_delete(f"{before}/{distributed.global_state.process_id}")
            _watched.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self in _watched:
            _watched.remove(self)
            with contextlib.suppress(ProcessError):
                post(f"{self._key}/{distributed.global_state.process_id}", None)

    def look(self) -> dict[str, Any] | None:
        """Returns what to tell the other processes if this one stands still, or None; called about every second."""
        now, index, total = (
            time.monotonic(),
            distributed.global_state.process_id,
            distributed.global_state.num_processes,
        )
        if self._count != self._seen:
            self._seen, self._since = self._count, now
        if now - self._since < _stall_timeout:
            if now - self._posted > _stall_timeout / 10:
                self._posted = now
                with contextlib.suppress(ProcessError):
                    post(f"{self._key}/{index}", self._count)
            return None
        counts = {index: self._count}
        if not self._alone:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                found = {
                    int(k.rpartition("/")[2]): json.loads(v) for k, v in client().key_value_dir_get(f"{self._key}/")
                }
                counts = {i: found.get(i, -1) for i in range(total)} | counts
        working = {i: count for i, count in counts.items() if count is not None}
        late = [i for i, count in working.items() if count == min(working.values())]
        who = "processes" if len(late) > 1 else "process"
        who = "all processes" if len(late) == total else f"{who} {', '.join(map(str, late))}"
        reason = f"no progress of {who} in {self._name!r} for {_stall_timeout:g} s"
        return {"reason": reason, "status": 1, "stacks": late}


def post(key: str, value: Any) -> None:
    """Stores a value for `read`. Any process may call it at any time. A later value replaces an earlier one.

    It requires several processes.

    Args:
        key: Name of the value.
        value: A JSON value.

    Raises:
        ProcessError: The coordinator cannot be reached.
    """
    try:
        client().key_value_set(key, json.dumps(value), allow_overwrite=True)
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(f"the coordinator must be reachable to store {key!r}; got {error}") from error


def read(key: str, timeout: float) -> Any:
    """Waits for a value that any process stores with `post`. It requires several processes.

    Args:
        key: Name of the value.
        timeout: Seconds to wait.

    Returns:
        The value, or None if no process stored one in time.

    Raises:
        ProcessError: The coordinator cannot be reached.
    """
    text = _wait(key, timeout)
    return None if text is None else json.loads(text)


def client() -> Any:
    """Returns the client of JAX's coordinator."""
    return distributed.global_state.client


def set_stall_timeout(seconds: float) -> None:
    """Sets the value of `stall_timeout`."""
    global _stall_timeout
    _stall_timeout = min(seconds, _NEVER)


def stalled() -> dict[str, Any] | None:
    """Returns what to tell the other processes if this one makes no progress, or None."""
    return next(filter(None, [each.look() for each in tuple(_watched)]), None)


def _key(name: str) -> tuple[str, str]:
    """Returns the key of this call and that of the previous one with this name; a key can be set only once."""
    with _lock:
        _calls[name] += 1
        return f"flaxvision/{name}/{_calls[name]}", f"flaxvision/{name}/{_calls[name] - 1}"


def _get(key: str, name: str, index: int, timeout: float | None) -> Any:
    timeout = _stall_timeout if timeout is None else timeout
    text = _wait(key, timeout)
    if text is None:
        raise ProcessError(f"process {index} must answer {name!r} within {timeout:g} s; got no answer")
    return json.loads(text)


def _wait(key: str, timeout: float) -> str | None:
    # JAX's blocking call handles no signal, and leaks 45 kB each time that it ends without a value.
    deadline, pause = time.monotonic() + timeout, 0.001
    while True:
        try:
            return client().key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                message = str(error).partition("\n")[0]
                raise ProcessError(f"the coordinator must be reachable to read {key!r}; got {message}") from error
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(pause, left))
        pause = min(1.5 * pause, _POLL)
