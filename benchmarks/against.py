"""Compares two checkouts of flaxvision in one interleaved run, for `--against` of `layers.py` and `throughput.py`.

Each checkout gets a worker process. Both run the benchmark code of this checkout; only the package `flaxvision` comes
from the checkout that is measured. One worker waits while the other one is timed. The workers do not return freed
memory to the system: whether the allocator does so changes from process to process, and the page faults that follow can
double the time of a layer.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.timing import Contender

# For glibc, in bytes; other allocators ignore the variables.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


class Worker:
    """A process that imports flaxvision from one checkout.

    Args:
        checkout: The root of the checkout.
        benchmark: The module of the benchmark, such as "benchmarks.layers". Its function `prepare(**arguments)` makes
            the `Contender` that the process times.

    Raises:
        ValueError: The checkout has no flaxvision.
        RuntimeError: The process failed.
    """

    def __init__(self, checkout: Path, benchmark: str):
        package = checkout.resolve() / "flaxvision"
        if not (package / "__init__.py").exists():
            raise ValueError(f"--against must be the root of a checkout of flaxvision; got {str(checkout)!r}")
        self._checkout, self._folder = checkout, tempfile.TemporaryDirectory()
        (Path(self._folder.name) / "flaxvision").symlink_to(package)
        path = [self._folder.name, str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.against", benchmark],
            env={**os.environ, **KEEP_MEMORY, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if (imported := Path(self.ask("where")).resolve()) != package:
            raise RuntimeError(f"worker for {checkout} imported another flaxvision: {imported}")

    def ask(self, request: str, **arguments: Any) -> Any:
        """Sends a request ("where", "prepare", "warm_up" or "measure") and waits for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([request, arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"worker for {self._checkout} failed in {request!r}: exit status {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()


class Remote(Contender):
    """A `Contender` in a `Worker`'s process."""

    def __init__(self, worker: Worker, **arguments: Any):
        super().__init__(run=lambda: None)
        self._worker = worker
        worker.ask("prepare", **arguments)

    def warm_up(self, steps: int) -> None:
        """Runs the first steps in the worker."""
        self.first = self._worker.ask("warm_up", steps=steps)

    def measure(self, count: int) -> None:
        """Appends `count` times, measured in the worker."""
        self.times += self._worker.ask("measure", count=count)


@contextlib.contextmanager
def workers(checkout: Path, benchmark: str) -> Iterator[dict[str, Worker]]:
    """Starts a worker for this checkout, "flaxvision", and one for another checkout, "against"."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name, root in (("flaxvision", ROOT), ("against", checkout)):
            found[name] = Worker(root, benchmark)
            stack.callback(found[name].close)
        yield found


def serve(benchmark: str) -> None:
    """Answers the requests of `Worker.ask` until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not mix with the answers
    module = importlib.import_module(benchmark)
    contender = Contender(run=lambda: None)
    for line in sys.stdin:
        request, arguments = json.loads(line)
        answer: Any = None
        if request == "where":
            answer = str(Path(sys.modules["flaxvision"].__file__ or "").parent)
        elif request == "prepare":
            contender = module.prepare(**arguments)
        elif request == "warm_up":
            contender.warm_up(**arguments)
            answer = contender.first
        else:
            contender.times = []
            contender.measure(**arguments)
            answer = contender.times
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
