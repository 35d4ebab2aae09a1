"""Several processes in one run: starting them, and exchanging small values between them.

JAX runs the same program in several processes, one per host or one per accelerator. The functions here exchange values
on the host, such as the step to restore or the step to stop at. They use the key-value store of JAX's coordinator and
no device. They can therefore be called from any thread and while a computation runs. Every wait has a time limit, and
Python handles signals meanwhile.

All processes must call `gather`, `broadcast`, `barrier` and `on_first` with the same names in the same order. With one
process, these return at once. `post` and `read` require several processes.

A run of several processes fails as a whole. When a process fails, is killed or hangs, the others cannot finish their
common computation. They print the reason and exit with status 1, even if they wait in a collective operation: see
`initialize`, `fail` and `Progress`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the only way to the key-value store

from flaxvision.processes import exchange, exits
from flaxvision.processes.exchange import (
    STALL_TIMEOUT,
    TIMEOUT,
    ProcessError,
    Progress,
    barrier,
    broadcast,
    gather,
    on_first,
    post,
    read,
    stall_timeout,
)

__all__ = [
    "STALL_TIMEOUT",
    "TIMEOUT",
    "ProcessError",
    "Progress",
    "barrier",
    "broadcast",
    "fail",
    "failures",
    "gather",
    "initialize",
    "on_first",
    "post",
    "read",
    "stall_timeout",
    "terminate",
]

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_NEWS = "flaxvision-ended"  # key of what ended the run
_POLL = 1.0  # seconds between two looks at that key
_ENDED = "another process ended, or cannot be reached"
# JAX raises them as `JaxRuntimeError`, or as `ValueError` when a value is fetched.
_COMMUNICATION = re.compile(
    r"[A-Z_]+: .*(gloo|nccl|connection|socket|heartbeat|coordination)", re.IGNORECASE | re.DOTALL
)

_connected = threading.Event()
_leaving = threading.Event()  # this process is about to exit
_status: int | None = None  # exit status of this process once the run has failed or was stopped


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: float = TIMEOUT,
    heartbeat_timeout: float = 60.0,
    shutdown_timeout: float = TIMEOUT,
    stall_timeout: float = STALL_TIMEOUT,
) -> None:
    """Connects the processes of a run. Call it before anything else uses JAX.

    Without arguments, it uses the cluster that `jax.distributed` detects, such as SLURM, Open MPI, Cloud TPU or GKE.
    Outside of a cluster it does nothing, and the run has one process.

    After this call, a failure of one process ends all of them. If a process is killed, stopped or loses the network,
    the others print a message and exit with status 1 within twice `heartbeat_timeout`. A process that runs but hangs
    still sends heartbeats, so all processes exit after `stall_timeout` if it hangs in `fit`, in an evaluation, or
    before an exchange of values. After an uncaught exception they exit within a few seconds. A program that catches its
    exceptions and exits must call `fail` first.

    Args:
        coordinator: Address `host:port` of process 0, which runs the coordinator.
        num_processes: Number of processes.
        process_id: Index of this process, from 0.
        start_timeout: Seconds to wait for the other processes to start.
        heartbeat_timeout: Seconds without a heartbeat after which a process counts as dead.
        shutdown_timeout: Seconds that a finished process waits for the others. It must be longer than the work that
            process 0 does alone at the end, such as plots.
        stall_timeout: Seconds that a process may take for one step, one batch of an evaluation or one answer in an
            exchange of values. It must be longer than the longest compilation. `math.inf` for no limit.

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
        "stall_timeout": stall_timeout,
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
    ended = f"{_ENDED}, unless the messages above give another reason"
    options |= {
        "initialization_timeout": max(1, round(start_timeout)),
        "heartbeat_timeout_seconds": max(1, round(heartbeat_timeout)),
        "shutdown_timeout_seconds": max(1, round(shutdown_timeout)),
    }
    global _status
    try:
        # Before it connects, JAX only knows in a cluster how many processes there are.
        guard = contextlib.nullcontext(lambda: None) if num_processes == 1 else exits.exit_on_abort(late, ended)
        with guard as undo, _client_options(shutdown_timeout=options["shutdown_timeout_seconds"]):
            _in_thread(functools.partial(jax.distributed.initialize, **options))
    except (jax.errors.JaxRuntimeError, KeyboardInterrupt) as error:
        _status = 1
        atexit.register(_at_exit)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ProcessError(f"{late}; got {_brief(error)}") from error
    if distributed.global_state.num_processes == 1:
        undo()
        return
    _connected.set()
    exchange.set_stall_timeout(stall_timeout)
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
    global _status
    if distributed.global_state.num_processes == 1 or _status is not None:
        return
    _status = 1
    news = {"reason": f"process {distributed.global_state.process_id} failed: {message}", "status": 1}
    first = _tell(news)
    _status = first["status"]
    if first != news:  # another process was first
        _print(first)


def terminate(reason: str) -> None:
    """Ends all processes of a run with status 0, within seconds, because this one was asked to end.

    It does not return. If the run has already failed, the status is 1. With one process the function does nothing.

    Args:
        reason: Name of the signal.
    """
    index = distributed.global_state.process_id
    if distributed.global_state.num_processes == 1:
        return
    news = {"reason": f"process {index} was stopped by {reason}", "status": _status or 0}
    _leave(_tell(news) if _connected.is_set() and _status is None else news)


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


def _in_thread(act: Callable[[], None]) -> None:
    """Calls a function in another thread, so that Python handles signals meanwhile."""
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="flaxvision-connect", daemon=True).start()
    while not done.wait(_POLL):
        pass
    if errors:
        raise errors[0]


def _watch() -> None:
    """Ends this process when another one has failed or none makes progress; runs in a thread of its own."""
    armed = -1.0
    while not _leaving.wait(_POLL):
        if _status is not None:  # the main thread is about to exit; if it hangs, the last `arm` ends it
            continue
        if time.monotonic() - armed > stall_timeout() / 10:
            armed = time.monotonic()
            exits.arm(1.25 * stall_timeout() + 2 * _POLL)  # later than the others, which name this process
        news = _news()
        if news is None and (stalled := exchange.stalled()):
            news = _tell(stalled)
        if news is not None:
            _leave(news)


def _tell(news: dict[str, Any]) -> dict[str, Any]:
    """Tells all processes why the run ends; returns what the first process told."""
    try:
        exchange.client().key_value_set(_NEWS, json.dumps(news))
    except jax.errors.JaxRuntimeError:  # another process was first, or the coordinator is gone
        return _news() or news
    return news


def _news() -> dict[str, Any] | None:
    """Returns why the run ends; None if it does not, or if the coordinator is gone (then JAX ends this process)."""
    try:
        return json.loads(exchange.client().key_value_try_get(_NEWS))
    except (jax.errors.JaxRuntimeError, AttributeError):
        return None


def _reason() -> str | None:
    return (_news() or {}).get("reason")


def _print(news: dict[str, Any]) -> None:
    exits.say(f"error: {news['reason']}" if news["status"] else news["reason"])


def _leave(news: dict[str, Any]) -> None:
    """Ends this process now."""
    global _status
    _status = news["status"]
    if distributed.global_state.process_id in news.get("stacks", ()):
        exits.stacks()
    _linger()
    exits.leave(news["reason"], news["status"])


def _linger() -> None:
    if distributed.global_state.process_id == 0 and _connected.is_set():
        time.sleep(2 * _POLL)  # the others read the reason from the coordinator, which ends with this process


def _is_communication(error: BaseException) -> bool:
    return distributed.global_state.num_processes > 1 and bool(_COMMUNICATION.match(str(error)))


def _excepthook(previous: Any, kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    previous(kind, error, traceback)
    if _is_communication(error):  # the traceback does not say that another process is the cause
        message = _reason() or f"{_ENDED}: {_brief(error)}"
        exits.say(f"error: {message}")
    else:
        message = f"{kind.__name__}: {_brief(error)}"
    fail(message)


def _at_exit() -> None:
    _leaving.set()
    exits.disarm()
    if _status is not None:
        _linger()
        exits.leave(None, _status)  # JAX would wait for the other processes


def _brief(error: Any) -> str:
    """Returns the first line of a message, at most 300 characters."""
    return str(error).strip().partition("\n")[0][:300]


def _in_cluster() -> bool:
    from jax._src.clusters import ClusterEnv

    return any(env.is_env_present() for env in ClusterEnv._cluster_types if not env.opt_in_only_method)
