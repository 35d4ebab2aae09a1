"""Several processes in one run: starting them, and exchanging small values between them.

JAX runs the same program in several processes, one per host or one per accelerator. The functions here exchange values
on the host, such as the step to restore or the step to stop at. They use the key-value store of JAX's coordinator and
no device. They can therefore be called from any thread and while a computation runs. Every wait has a time limit.

All processes must call `gather`, `broadcast` and `barrier` with the same names in the same order. With one process,
these three return at once. `post` and `read` require several processes.

A run of several processes fails as a whole. When a process fails, is killed or hangs, the others cannot finish their
common computation. They print the reason and exit with status 1, even if they wait in a collective operation: see
`initialize` and `fail`.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the only way to the key-value store

__all__ = [
    "TIMEOUT",
    "ProcessError",
    "barrier",
    "broadcast",
    "fail",
    "failures",
    "gather",
    "initialize",
    "post",
    "read",
]

TIMEOUT = 300.0  # seconds
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_FAILED = "flaxvision-failed"  # key of the first failure
_POLL = 1.0  # seconds between two looks at that key
_ENDED = "another process ended, or cannot be reached"
# JAX raises them as `JaxRuntimeError`, or as `ValueError` when a value is fetched.
_COMMUNICATION = re.compile(
    r"[A-Z_]+: .*(gloo|nccl|connection|socket|heartbeat|coordination)", re.IGNORECASE | re.DOTALL
)

_calls: collections.Counter[str] = collections.Counter()
_lock = threading.Lock()
_leaving = threading.Event()  # this process is about to exit
_failed = threading.Event()  # this process has failed
_handlers: list[Any] = []  # keeps the handler alive


class ProcessError(RuntimeError):
    """Another process failed or did not answer in time."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: float = TIMEOUT,
    heartbeat_timeout: float = 60.0,
    shutdown_timeout: float = TIMEOUT,
) -> None:
    """Connects the processes of a run. Call it before anything else uses JAX.

    Without arguments, it uses the cluster that `jax.distributed` detects, such as SLURM, Open MPI, Cloud TPU or GKE.
    Outside of a cluster it does nothing, and the run has one process.

    After this call, a failure of one process ends all of them. If a process is killed, hangs or loses the network, the
    others print a message and exit with status 1 within twice `heartbeat_timeout`. After an uncaught exception they
    exit within two seconds. A program that catches its exceptions and exits must call `fail` first.

    Args:
        coordinator: Address `host:port` of process 0, which runs the coordinator.
        num_processes: Number of processes.
        process_id: Index of this process, from 0.
        start_timeout: Seconds to wait for the other processes to start.
        heartbeat_timeout: Seconds without a heartbeat after which a process counts as dead.
        shutdown_timeout: Seconds that a finished process waits for the others. It must be longer than the work that
            process 0 does alone at the end, such as plots.

    Raises:
        ValueError: Only some of `coordinator`, `num_processes` and `process_id` are given, or a value is out of range.
        ProcessError: The processes did not connect in time.
        RuntimeError: JAX has already been used.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"coordinator, num_processes and process_id must be given together; got {given}")
    timeouts = {
        "start_timeout": start_timeout,
        "heartbeat_timeout": heartbeat_timeout,
        "shutdown_timeout": shutdown_timeout,
    }
    for name, seconds in timeouts.items():
        if not seconds > 0:
            raise ValueError(f"{name} must be positive; got {seconds}")
    if missing and not _in_cluster():
        return
    options: dict[str, Any] = {}
    if not missing:
        assert coordinator is not None
        assert num_processes is not None
        assert process_id is not None
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process_id must be between 0 and num_processes - 1; got {process_id} of {num_processes}")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"coordinator must be host:port; got {coordinator!r}")
        options = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
        if host in _LOOPBACK:
            options["coordinator_bind_address"] = coordinator
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the training loop
    late = f"the processes must all start within {start_timeout:g} s"
    try:
        with _exit_on_abort(late), _client_options(shutdown_timeout=max(1, round(shutdown_timeout))):
            jax.distributed.initialize(
                **options,
                initialization_timeout=max(1, round(start_timeout)),
                heartbeat_timeout_seconds=max(1, round(heartbeat_timeout)),
                shutdown_timeout_seconds=max(1, round(shutdown_timeout)),
            )
    except jax.errors.JaxRuntimeError as error:
        _failed.set()
        atexit.register(_at_exit)
        raise ProcessError(f"{late}; got {_brief(error)}") from error
    if distributed.global_state.num_processes > 1:
        atexit.register(_at_exit)  # runs before JAX's own, which waits for the other processes
        sys.excepthook = functools.partial(_excepthook, sys.excepthook)
        threading.Thread(target=_watch, name="flaxvision-processes", daemon=True).start()


def fail(message: str) -> None:
    """Tells the other processes that this one has failed, so that they exit instead of waiting for it.

    This process continues. When its interpreter ends, it exits with status 1 without waiting for the others. With one
    process the function does nothing. An uncaught exception calls it automatically.

    Args:
        message: The reason. The other processes print it as their last line.
    """
    if distributed.global_state.num_processes == 1 or _failed.is_set():
        return
    _failed.set()
    try:
        _client().key_value_set(_FAILED, f"process {distributed.global_state.process_id} failed: {message}")
    except jax.errors.JaxRuntimeError:  # another process was first, or the coordinator is gone
        if reason := _reason():
            _print(reason)


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Converts communication errors of JAX into `ProcessError`. Other errors are raised unchanged.

    Raises:
        ProcessError: Another process failed, ended or cannot be reached. If it failed, the message is its reason.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not _is_communication(error):
            raise
        raise ProcessError(_reason() or f"{_ENDED}: {_brief(error)}") from error


def gather(name: str, value: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Returns the values of all processes, in the order of their indices.

    Args:
        name: Name of this exchange, the same in all processes.
        value: A JSON value.
        timeout: Seconds to wait for the other processes.

    Raises:
        ProcessError: A process did not call `gather` in time.
    """
    count = jax.process_count()
    if count == 1:
        return [json.loads(json.dumps(value))]
    key = _key(name)
    _client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    return [_get(f"{key}/{index}", name, index, timeout) for index in range(count)]


def broadcast(name: str, value: Any, timeout: float = TIMEOUT) -> Any:
    """Returns the value of process 0. The values of the other processes are ignored.

    Args:
        name: Name of this exchange, the same in all processes.
        value: A JSON value.
        timeout: Seconds to wait for process 0.

    Raises:
        ProcessError: Process 0 did not call `broadcast` in time.
    """
    if jax.process_count() == 1:
        return json.loads(json.dumps(value))
    key = _key(name)
    if jax.process_index() == 0:
        _client().key_value_set(key, json.dumps(value))
    return _get(key, name, 0, timeout)


def barrier(name: str, timeout: float = TIMEOUT) -> None:
    """Waits until all processes have reached this barrier.

    Args:
        name: Name of the barrier, the same in all processes.
        timeout: Seconds to wait for the other processes.

    Raises:
        ProcessError: A process did not reach it in time.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(_key(name), _milliseconds(timeout))
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(f"all processes must reach {name!r} within {timeout:g} s; got {error}") from error


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
        _client().key_value_set(key, json.dumps(value), allow_overwrite=True)
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
    try:
        return json.loads(_client().blocking_key_value_get(key, _milliseconds(timeout)))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise ProcessError(f"the coordinator must be reachable to read {key!r}; got {error}") from error


@contextlib.contextmanager
def _client_options(**options: Any) -> Iterator[None]:
    """Adds options to the client that `jax.distributed.initialize` makes, which has no arguments for them."""
    library = distributed._jax
    original = library.get_distributed_runtime_client
    library.get_distributed_runtime_client = functools.partial(original, **options)
    try:
        yield
    finally:
        library.get_distributed_runtime_client = original


def _watch() -> None:
    """Ends this process when another one has failed; runs in a thread of its own."""
    while not _leaving.wait(_POLL):
        if (reason := _reason()) and not _failed.is_set():
            _leave(reason)


def _reason() -> str | None:
    """Returns why a process failed; None if none has, or if the coordinator is gone (then JAX ends this process)."""
    try:
        return _client().key_value_try_get(_FAILED)
    except (jax.errors.JaxRuntimeError, AttributeError):
        return None


def _is_communication(error: BaseException) -> bool:
    return distributed.global_state.num_processes > 1 and bool(_COMMUNICATION.match(str(error)))


@contextlib.contextmanager
def _exit_on_abort(message: str) -> Iterator[None]:
    """Turns JAX's crash into a message and exit status 1, when the coordinator is gone or reports a dead process.

    JAX calls C's `abort` in a thread of its own, while the main thread may wait forever. JAX's callback for this case
    crashes too, because it cannot pass the reason to Python. Python's signal handlers run only in the main thread, so
    the handler is installed with ctypes. It stays after the block, with another message.
    """
    messages = [f"{_ENDED}; see the messages above for the reason", message]

    def handler(number: int) -> None:
        _leave(messages[-1])

    prototype = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _handlers.append(prototype(handler))
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, prototype], ctypes.c_void_p
    libc.signal(signal.SIGABRT, _handlers[-1])
    yield
    messages.pop()


def _leave(message: str) -> None:
    """Ends this process now: its main thread may wait forever for a computation."""
    _print(message)
    _flush()
    os._exit(1)


def _print(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"error: {message}\n".encode())  # the main thread may hold the lock of `sys.stderr`


def _flush() -> None:
    # In a thread, because the main thread may hold the lock of a stream that nobody reads.
    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(1.0)


def _excepthook(previous: Any, kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    previous(kind, error, traceback)
    if _is_communication(error):  # the traceback does not say that another process is the cause
        message = _reason() or f"{_ENDED}: {_brief(error)}"
        _print(message)
    else:
        message = f"{kind.__name__}: {_brief(error)}"
    fail(message)


def _at_exit() -> None:
    _leaving.set()
    if _failed.is_set():
        if distributed.global_state.process_id == 0:
            threading.Event().wait(2 * _POLL)  # the others read the reason from the coordinator, which ends with it
        _flush()
        os._exit(1)  # JAX would wait for the other processes


def _brief(error: Any) -> str:
    """Returns the first line of a message, at most 300 characters."""
    return str(error).strip().partition("\n")[0][:300]


def _in_cluster() -> bool:
    from jax._src.clusters import ClusterEnv

    return any(env.is_env_present() for env in ClusterEnv._cluster_types if not env.opt_in_only_method)


def _client() -> Any:
    return distributed.global_state.client


def _key(name: str) -> str:
    with _lock:  # a key can be set only once
        _calls[name] += 1
        return f"flaxvision/{name}/{_calls[name]}"


def _get(key: str, name: str, index: int, timeout: float) -> Any:
    try:
        return json.loads(_client().blocking_key_value_get(key, _milliseconds(timeout)))
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(f"process {index} must answer {name!r} within {timeout:g} s; got {error}") from error


def _milliseconds(seconds: float) -> int:
    return max(1, round(1000 * seconds))
