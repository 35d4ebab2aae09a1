"""Runs a Python program in several processes on this machine, joined by JAX over the loopback address."""

import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import environment as environment_of

ROOT = Path(__file__).resolve().parents[1]
PRELUDE = """
import jax, sys
jax.config.update("jax_default_matmul_precision", "highest")
from flaxvision import processes
if {count} > 1:
    timeouts = dict(start_timeout={start_timeout}, heartbeat_timeout=20, stall_timeout={stall})
    processes.initialize({coordinator!r}, {count}, {index}, **timeouts)
"""


def start(
    program: str,
    count: int,
    devices: int = 1,
    *,
    arguments: Sequence[str] = (),
    stall_timeout: float = 600,
    environment: dict[str, str] | None = None,
    start_timeout: int = 120,
) -> list[subprocess.Popen]:
    """Starts `count` processes with `devices` virtual CPU devices each; the program follows `PRELUDE`."""
    coordinator = f"127.0.0.1:{free_port()}"
    started = []
    for index in range(count):
        prelude = PRELUDE.format(
            coordinator=coordinator,
            count=count,
            index=index,
            stall=stall_timeout,
            start_timeout=start_timeout,
        )
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", prelude + program, *map(str, arguments)],
                cwd=ROOT,
                env=environment_of(devices) | {"PYTHONPATH": str(ROOT)} | (environment or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started: list[subprocess.Popen], timeout: float = 240) -> list[str]:
    """Waits for the processes, checks that all of them succeeded, and returns what each one printed."""
    try:
        with ThreadPoolExecutor(len(started)) as pool:  # a process whose pipe is full would hold up the others
            outputs = list(pool.map(lambda process: process.communicate(timeout=timeout), started))
    finally:
        for process in started:
            process.kill()
    for process, (out, error) in zip(started, outputs, strict=True):
        assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{error[-4000:]}"
    return [out for out, _ in outputs]


def run(program: str, count: int, devices: int = 1, *, timeout: float = 240, **options) -> list[str]:
    """Starts the processes, waits for them, and returns what each one printed."""
    return finish(start(program, count, devices, **options), timeout)


def free_port() -> int:
    """Returns a port of the loopback address that nobody uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
