"""Runs of several processes: how they start, and how they agree on small values.

JAX runs one program in several processes, one for each host or for each accelerator, and joins their devices. The
functions here are for what the processes must decide together on the host, such as the step to restore or the step to
stop at. They use the key-value store of JAX's coordinator and no device, so they work beside a computation and from any
thread, and every wait has a time limit. With one process they return at once.

All processes must make the same calls with the same names in the same order.
"""

from __future__ import annotations

import collections
import json
import threading
from typing import Any

import jax
from jax._src import distributed  # the only way to the key-value store

__all__ = ["TIMEOUT", "ProcessError", "barrier", "broadcast", "gather", "initialize", "post", "read"]

TIMEOUT = 300.0  # seconds
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_calls: collections.Counter[str] = collections.Counter()
_lock = threading.Lock()


class ProcessError(RuntimeError):
    """Another process did not answer in time, or failed."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: float = TIMEOUT,
    heartbeat_timeout: float = 60.0,
) -> None:
    """Joins the processes of a run. Call it before anything else uses JAX.

    Without arguments it reads the environment of the cluster (SLURM, Open MPI, Cloud TPU, GKE and whatever else
    `jax.distributed` detects). Outside of a cluster it does nothing, and the run has one process.

    Args:
        coordinator: Address `host:port` of process 0, which runs the coordinator.
        num_processes: Number of processes.
        process_id: Index of this process, from 0.
        start_timeout: Seconds to wait for the other processes to start.
        heartbeat_timeout: Seconds without a sign of life after which a process counts as dead and the others exit.

    Raises:
        ValueError: Only some of the three values are given, or one is out of range.
        ProcessError: The processes did not find each other in time.
        RuntimeError: JAX was used before.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"coordinator, num_processes and process_id must be given together; got {given}")
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
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=max(1, round(start_timeout)),
            heartbeat_timeout_seconds=max(1, round(heartbeat_timeout)),
        )
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(f"the processes must all start within {start_timeout:g} s; got {error}") from error


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
    """Returns the value of process 0 in all processes; the values of the others are ignored.

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
    """Waits until all processes have called it.

    Args:
        name: Name of the barrier, the same in all processes.
        timeout: Seconds to wait for the other processes.

    Raises:
        ProcessError: A process did not call it in time.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(_key(name), _milliseconds(timeout))
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(f"all processes must reach {name!r} within {timeout:g} s; got {error}") from error


def post(key: str, value: Any) -> None:
    """Stores a value for `read`. Unlike `gather`, any process may post, at any time, and the last value counts.

    Args:
        key: Name of the value.
        value: A JSON value.

    Raises:
        ProcessError: The coordinator cannot be reached.
    """
    try:
        _client().key_value_set(key, json.dumps(value), allow_overwrite=True)
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(f"the coordinator cannot be reached: {error}") from error


def read(key: str, timeout: float) -> Any:
    """Waits for a value that some process posts.

    Args:
        key: Name of the value.
        timeout: Seconds to wait.

    Returns:
        The value, or None if nobody posted it in time.

    Raises:
        ProcessError: The coordinator cannot be reached.
    """
    try:
        return json.loads(_client().blocking_key_value_get(key, _milliseconds(timeout)))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise ProcessError(f"the coordinator cannot be reached: {error}") from error


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
