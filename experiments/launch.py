"""Runs an experiment in several processes on this machine.

    python experiments/launch.py --num-processes 4 --devices 2 experiments/mnist.py --epochs 5

The processes connect over the loopback address. On CPU, each process gets `--devices` virtual devices. With `--platform
gpu`, process i gets GPUs `i * devices` to `(i + 1) * devices - 1`, of those in CUDA_VISIBLE_DEVICES if it is set.
Process 0 prints as usual. Lines from the other processes are prefixed with their index, such as [1]. SIGTERM and SIGINT
are forwarded to all processes.

When a process fails, the others exit by themselves. Any process that is still running after `--grace` seconds is
terminated. The exit status is that of the first process that failed. experiments/processes.md describes clusters.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

_PRINTING = threading.Lock()


def main(arguments: list[str] | None = None) -> int:
    """Starts the processes, waits for them and returns the exit status."""
    options = parse(arguments)
    address = f"127.0.0.1:{options.port or free_port()}"
    processes: list[subprocess.Popen[str]] = []
    asked: list[int] = []

    def send(number: int) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    def forward(number, frame):
        asked.append(number)
        send(number)

    for number in (signal.SIGTERM, signal.SIGINT):  # before the start, or a signal would leave processes behind
        signal.signal(number, forward)
    for index in range(options.num_processes):
        processes.append(start(options, address, index))
    for number in tuple(asked):  # for those that started after the signal
        send(number)
    printers = [
        threading.Thread(target=prefix, args=(stream, index, sink), daemon=True)
        for index, process in enumerate(processes)
        for stream, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        if stream is not None
    ]
    for printer in printers:
        printer.start()

    try:
        status = wait(processes, options.grace)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    for printer in printers:
        printer.join(5)  # a descendant that still runs may keep the pipe open
    return status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-processes", type=int, required=True, help="number of processes")
    parser.add_argument("--devices", type=int, default=1, help="devices of each process (default 1)")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu", help="type of the devices (default cpu)")
    parser.add_argument("--port", type=int, default=0, help="port of the coordinator (default: any free port)")
    grace = "seconds from a failure until the remaining processes are terminated (default 90)"
    parser.add_argument("--grace", type=float, default=90.0, help=grace)
    parser.add_argument("program", help="the experiment")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    for name in ("num_processes", "devices"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(options, name)}")
    need, visible = options.num_processes * options.devices, visible_gpus()
    if options.platform == "gpu" and visible is not None and len(visible) < need:
        parser.error(f"CUDA_VISIBLE_DEVICES must have {need} GPUs, --devices for each process; got {visible}")
    return options


def visible_gpus() -> list[str] | None:
    """Returns the GPUs that this program may use, such as those of an allocation; None if it may use all."""
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if inherited is None else [name.strip() for name in inherited.split(",") if name.strip()]


def start(options: argparse.Namespace, address: str, index: int) -> subprocess.Popen[str]:
    """Starts one process. Process 0 writes to the terminal directly, so that its progress bar works."""
    environment = dict(os.environ)
    if options.platform == "cpu":
        flags = environment.get("XLA_FLAGS", "")
        environment["JAX_PLATFORMS"] = "cpu"
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.devices}".strip()
    else:
        numbers = range(index * options.devices, (index + 1) * options.devices)
        visible = visible_gpus()
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(i) if visible is None else visible[i] for i in numbers)
    command = [
        *(sys.executable, options.program, *options.arguments),
        *("--coordinator", address, "--num-processes", str(options.num_processes), "--process-id", str(index)),
    ]
    output = None if index == 0 else subprocess.PIPE
    return subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=output,
        text=True,
        errors="replace",
        start_new_session=True,  # otherwise Ctrl-C would reach the processes twice
    )


def wait(processes: list[subprocess.Popen[str]], grace: float) -> int:
    """Waits for all processes. Returns the exit status of the first process that failed, or 0.

    The status of a process that was killed by a signal is 128 plus the number of the signal. `grace` seconds after a
    failure, the remaining processes get SIGTERM. 10 seconds later they get SIGKILL.
    """
    status, failed = 0, None
    while True:
        codes = [process.poll() for process in processes]
        if failed is None and any(codes):
            index, code = next((index, code) for index, code in enumerate(codes) if code)
            reason = f"exit status {code}" if code > 0 else signal.Signals(-code).name
            print(f"process {index} ended with {reason}", file=sys.stderr, flush=True)
            status, failed = code if code > 0 else 128 - code, time.monotonic()
        if None not in codes:
            return status
        late = 0 if failed is None else time.monotonic() - failed - grace
        if late > 0:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL if late > 10 else signal.SIGTERM)
        time.sleep(0.1)


def prefix(stream: IO[str], index: int, sink: IO[str]) -> None:
    """Copies the output of a process line by line, prefixed with the index of the process."""
    for line in stream:
        with _PRINTING:
            sink.write(f"[{index}] {line}")
            sink.flush()


def free_port() -> int:
    """Returns an unused port of the loopback address."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
