"""Processes that agree, and processes that fail: the others leave with a message, in bounded time."""

import contextlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

import flaxvision as fv
from flaxvision import processes
from tests import multiprocess

# Steps with a collective operation until something happens; a line for each step.
STEPS = """
import ctypes, time
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import flaxvision as fv
mesh = fv.train.make_mesh()
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))
rows = jax.make_array_from_callback((jax.device_count(),), NamedSharding(mesh, P("data")), lambda i: jnp.ones(1))
stop = fv.train.stopping.Stop()
stop.__enter__()
for i in range(10**9):
    stop.claim()
    float(total(rows))
    print(i, flush=True)
    time.sleep(0.05)
    if sys.argv[1:] and jax.process_index() == int(sys.argv[1]) and i == 20:
        if sys.argv[2] == "raise":
            raise KeyError("no such thing")
        if sys.argv[2] == "fail":
            processes.fail("the disk is full")
            sys.exit("error: the disk is full")
        if sys.argv[2] == "hang":
            time.sleep(1000)
        if sys.argv[2] == "hang in C":
            ctypes.PyDLL(None).sleep(1000)  # no other thread of Python runs
        sys.exit(0)
"""


def wait_for_steps(process, count=10):
    for line in process.stdout:
        if line.strip().isdigit() and int(line) >= count:  # Gloo prints lines of its own
            return
    raise AssertionError(process.stderr.read())


def leave(started, within):
    """Waits for the processes; returns their exit statuses and what they wrote to stderr."""
    deadline, errors = time.monotonic() + within, []
    try:
        for process in started:
            _, error = process.communicate(timeout=max(1, deadline - time.monotonic()))
            errors.append(error)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [process.returncode for process in started], errors


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 2], ids=["coordinator", "worker"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_hangs_ends_the_others(killed, how):
    started = multiprocess.start(STEPS, 3)
    others = [process for index, process in enumerate(started) if index != killed]
    try:
        wait_for_steps(others[0])
        started[killed].send_signal(how)
        statuses, errors = leave(others, 60)  # the heartbeat time-out is 20 s
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert statuses == [1, 1], errors
    for error in errors:
        assert "another process ended, or cannot be reached" in error or "failed: " in error, error


@pytest.mark.slow
@pytest.mark.parametrize(("index", "what"), [(0, "raise"), (1, "raise"), (0, "fail"), (1, "fail")])
def test_a_process_that_fails_ends_the_others_at_once_and_says_why(index, what):
    started = multiprocess.start(STEPS, 2, arguments=[index, what])
    statuses, errors = leave(started, 60)
    assert statuses == [1, 1], errors
    reason = {"raise": "KeyError: 'no such thing'", "fail": "the disk is full"}[what]
    assert reason in errors[index]
    assert f"error: process {index} failed: {reason}" in errors[1 - index]


@pytest.mark.slow
@pytest.mark.parametrize(("index", "what"), [(0, "hang"), (1, "hang"), (1, "hang in C")])
def test_a_process_whose_main_thread_hangs_ends_all(index, what):
    """It still sends heartbeats."""
    started = multiprocess.start(STEPS, 2, arguments=[index, what], stall_timeout=8)
    statuses, errors = leave(started, 90)
    assert statuses == [1, 1], errors
    assert f"error: no progress of process {index} in 'fit' for 8 s" in errors[1 - index]
    assert "<string>" in errors[index]  # its stacks


EXPERIMENT = """
import threading, time
import flaxvision as fv

def main(config):
    print("ready", flush=True)
    if jax.process_index() == 0:
        processes.gather("never", 1)
    time.sleep(1000)
    return 0

fv.train.run_experiment(main, lambda: None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1], ids=["in an exchange", "in Python"])
def test_sigterm_outside_of_the_training_loop_ends_all_within_seconds(index):
    started = multiprocess.start(EXPERIMENT, 2)
    for process in started:
        assert "ready\n" in process.stdout
    started[index].send_signal(signal.SIGTERM)
    statuses, errors = leave(started, 30)
    assert statuses == [0, 0], errors
    for error in errors:
        assert error.endswith(f"process {index} was stopped by SIGTERM\n")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_while_the_other_process_has_not_started(number, status):
    # A shell starts a job in the background with SIGINT ignored, and Python keeps it so.
    program = """
import jax, signal, sys
import flaxvision as fv
signal.signal(signal.SIGINT, signal.default_int_handler)
def main(config):
    print("ready", flush=True)
    fv.train.initialize(sys.argv[1], 2, 0)
fv.train.run_experiment(main, lambda: None)
"""
    command = [sys.executable, "-c", program, f"127.0.0.1:{multiprocess.free_port()}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "ready\n" in process.stdout
    time.sleep(2)
    process.send_signal(number)
    statuses, errors = leave([process], 30)
    assert statuses == [status], errors
    assert "must all start" not in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [False, True])
def test_with_one_process_an_abort_says_nothing_of_others(cluster):
    port = next(port for port in range(61440, 65535) if is_free(port))
    start = "processes.initialize()" if cluster else f"processes.initialize('127.0.0.1:{port}', 1, 0)"
    environment = {
        "SLURM_JOB_ID": str(port - 61440),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    }
    (process,) = multiprocess.start(f"import os\n{start}\nos.abort()", 1, environment=environment if cluster else {})
    (status,), (error,) = leave([process], 60)
    assert status == -signal.SIGABRT
    assert "another process" not in error


@pytest.mark.slow
def test_processes_that_never_start():
    """One of two: it waits for the other as long as it was told to, says so and leaves."""
    for index in (0, 1):
        program = (
            "from flaxvision import processes\n"
            f"processes.initialize('127.0.0.1:{multiprocess.free_port()}', 2, {index}, start_timeout=3)"
        )
        begin = time.monotonic()
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert time.monotonic() - begin < 30
        assert ended.returncode == 1
        assert "the processes must all start within 3 s" in ended.stderr, ended.stderr


AGREE = """
import threading
i = jax.process_index()
assert processes.gather("a", {"x": i}) == [{"x": 0}, {"x": 1}, {"x": 2}]
assert processes.broadcast("b", [i, "y"]) == [0, "y"]
assert processes.gather("a", i) == [0, 1, 2]
processes.barrier("c")
try:
    if i == 0:
        processes.gather("d", 1, timeout=1)
    print("passed")
except processes.ProcessError as error:
    print(error)
processes.barrier("e")
for number in range(5):
    assert processes.gather("f", number) == [number] * 3
assert len(processes.exchange.client().key_value_dir_get("flaxvision/f/")) <= 2 * 3
processes.barrier("g")
try:
    processes.on_first("h", lambda: {}["x"])
except KeyError:
    assert i == 0
except RuntimeError as error:
    assert i > 0 and str(error) == "'x'"
assert processes.on_first("i", lambda: [i, 5]) == [0, 5]
"""


@pytest.mark.slow
def test_processes_agree_on_values():
    first, *others = multiprocess.run(AGREE, 3)
    assert first.startswith("process 1 must answer 'd' within 1 s; got")
    assert others == ["passed\n"] * 2


STALL = """
import time
import flaxvision as fv
if jax.process_index() == 0:
    for wait in (lambda: processes.gather("d", 1), fv.checkpoint.Checkpoints(sys.argv[1]).prepare):
        begin = time.monotonic()
        try:
            wait()
        except processes.ProcessError as error:
            print(error, round(time.monotonic() - begin))
processes.barrier("e", 60)
"""


@pytest.mark.slow
def test_one_time_out_for_all_exchanges(tmp_path):
    first, _ = multiprocess.run(STALL, 2, arguments=[tmp_path], stall_timeout=2)
    assert first.splitlines() == [
        "process 1 must answer 'd' within 2 s; got no answer 2",
        f"process 1 must answer 'checkpoints/{tmp_path.name}-1/prepare' within 2 s; got no answer 2",
    ]


WAITS = """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
if jax.process_index() == 0:
    processes.read("nothing", 0)
    before = resident()
    for _ in range(2000):
        assert processes.read("nothing", 0) is None
    print(resident() - before)
processes.barrier("end")
"""


@pytest.mark.slow
def test_waiting_takes_no_memory():
    first, _ = multiprocess.run(WAITS, 2)
    assert int(first) < 2e7


def test_one_process_agrees_with_itself():
    assert processes.gather("a", {"x": (1, 2)}) == [{"x": [1, 2]}]
    assert processes.broadcast("a", 0.1) == 0.1
    processes.barrier("a")
    processes.fail("nobody listens")
    processes.terminate("nobody listens")
    assert processes._status is None


def test_only_broken_communication_is_another_process(monkeypatch):
    error = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError), processes.failures():
        raise error  # there is only one process
    monkeypatch.setattr(processes.distributed.global_state, "num_processes", 2)
    ended = "another process ended, or cannot be reached: UNKNOWN: Gloo"
    with pytest.raises(processes.ProcessError, match=ended), processes.failures():
        raise error
    with pytest.raises(processes.ProcessError, match=ended), processes.failures():
        raise ValueError(str(error))  # from `float(array)`
    for other in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), ValueError("connection must be x")):
        with pytest.raises(type(other), match=str(other)), processes.failures():
            raise other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "host:1"}, "coordinator, num_processes and process_id must be given together"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "coordinator must be host:port; got 'host'"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id must be between 0 and num_processes"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout must be positive; got 0"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        processes.initialize(**options)


def test_the_settings_pass_every_time_out(monkeypatch):
    given = {}
    monkeypatch.setattr(processes, "initialize", lambda *args, **options: given.update(options))
    timeouts = {"start_timeout": 1.0, "heartbeat_timeout": 2.0, "shutdown_timeout": 3.0, "stall_timeout": 4.0}
    fv.train.RunSettings(**timeouts).start()
    assert given == timeouts
    assert timeouts.keys() <= set(fv.train.RunSettings.FREE)


def test_without_a_cluster_there_is_one_process(monkeypatch):
    monkeypatch.setattr(processes, "_in_cluster", lambda: False)
    processes.initialize()


def is_free(port):
    with socket.socket() as server, contextlib.suppress(OSError):
        server.bind(("127.0.0.1", port))
        return True
    return False


SLURM = """
import os
processes.initialize(start_timeout=60, heartbeat_timeout=20)
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


@pytest.mark.slow
def test_the_environment_of_slurm():
    """JAX derives the port of the coordinator from the number of the job."""
    port = next(port for port in range(61440, 65535) if is_free(port))
    started = []
    for index in range(2):
        environment = {
            "SLURM_JOB_ID": str(port - 61440),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
            "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        }
        started += multiprocess.start(SLURM, 1, environment=environment)
    assert multiprocess.finish(started) == ["0 2 2\n", "1 2 2\n"]
