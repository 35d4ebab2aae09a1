"""The launcher of several processes, with a program that does not use JAX."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "experiments" / "launch.py"
PROGRAM = """
import os, signal, sys, time
arguments = sys.argv[1:]
index = int(arguments[arguments.index("--process-id") + 1])
what = arguments[0]

def say(*words, stream=sys.stdout):
    stream.write(" ".join(map(str, words)) + "\\n")  # one write, or lines of the processes mix
    stream.flush()

if what == "print":
    say(index, arguments[1:], os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"].split()[-1])
    say("problem", stream=sys.stderr)
elif what == "gpus":
    say(os.environ["CUDA_VISIBLE_DEVICES"])
elif what == "fail":
    if index == 1:
        sys.exit(7)
    time.sleep(100 if index == 2 else 0)
elif what == "kill":
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
elif what == "wait":
    def stop(number, frame):
        say("stopped by", signal.Signals(number).name)
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    say("ready")
    time.sleep(100)
"""


@pytest.fixture
def launch(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    started = []

    def start(*arguments, options=()):
        command = [sys.executable, str(LAUNCH), "--num-processes", "3", *options, str(program), *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate()


def test_the_flags_and_the_prefixes(launch):
    out, error = launch("print", "--epochs", "2", options=("--devices", "4", "--port", "12345")).communicate(timeout=60)
    lines = sorted(out.splitlines())
    for index, line in enumerate(sorted(lines, key=lambda line: line.removeprefix("[1] ").removeprefix("[2] "))):
        assert line.startswith(f"[{index}] {index} " if index else "0 "), lines
        assert (
            f"'--epochs', '2', '--coordinator', '127.0.0.1:12345', '--num-processes', '3', '--process-id', '{index}'"
            in line
        )
        assert line.endswith("cpu --xla_force_host_platform_device_count=4")
    assert sorted(error.splitlines()) == ["[1] problem", "[2] problem", "problem"]


def test_the_first_failure_ends_all_and_is_the_status(launch):
    begin = time.monotonic()
    process = launch("fail", options=("--grace", "1"))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "process 1 ended with exit status 7" in error
    assert time.monotonic() - begin < 30


def test_a_killed_process(launch):
    process = launch("kill")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "process 1 ended with SIGKILL" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all(launch, number):
    process = launch("wait")
    lines = [process.stdout.readline() for _ in range(3)]
    assert sorted(line.split()[-1] for line in lines) == ["ready"] * 3
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.count(f"stopped by {signal.Signals(number).name}") == 3


@pytest.mark.parametrize(("inherited", "got"), [
    (None, ["0,1", "2,3", "4,5"]),
    ("4,5, 6,GPU-7,0,1", ["0,1", "4,5", "6,GPU-7"]),
    ("4,5", "CUDA_VISIBLE_DEVICES must have 6 GPUs, --devices for each process; got ['4', '5']"),
])  # fmt: skip
def test_gpus_are_those_of_the_allocation(launch, monkeypatch, inherited, got):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if inherited is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    out, error = launch("gpus", options=("--platform", "gpu", "--devices", "2")).communicate(timeout=60)
    assert got in error if isinstance(got, str) else sorted(line.split()[-1] for line in out.splitlines()) == got


def test_arguments_are_checked():
    ended = subprocess.run(
        [sys.executable, str(LAUNCH), "--num-processes", "0", "x.py"], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "--num-processes must be at least 1; got 0" in ended.stderr
