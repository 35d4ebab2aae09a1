"""Threads that overlap batches, worker processes that read the same batches, and what is left of both."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

from flaxvision import data
from flaxvision.data import workers
from tests.data.examples import Numbers, crop, fail_at, hang, nap, ragged, send, with_text

ROOT = Path(__file__).parents[2]
# Reads one batch; the second one hangs.
HANGING = """
import functools, multiprocessing, os, signal
from flaxvision import data
from tests.data.examples import Numbers, hang
source = Numbers(16, functools.partial(hang, wrong=8))
iterator = iter(data.train_batches(source, 8, seed=0, shuffle=False, num_workers={workers}))
next(iterator)
"""


def take(batches, count, start=0):
    with batches.from_step(start) as iterator:
        return [next(iterator) for _ in range(count)]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("flaxvision")]


def children():
    """The worker processes of this process; Python's own resource tracker stays."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z" and "spawn_main" in (process / "cmdline").read_text():
                found.append(int(process.name))
    return found


def descriptors():
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(link))
    return found


# Threads


def test_a_slow_example_does_not_keep_the_threads_from_the_next_batch():
    """Example 0 of the first batch is read for as long as no example of the second batch is."""
    second, overlapped = threading.Event(), []

    def read(index):
        if index == 0 and not overlapped:
            overlapped.append(second.wait(5))
        elif index >= 4:
            second.set()

    batches = data.train_batches(Numbers(12, read), 4, seed=0, shuffle=False, num_threads=2)
    first = take(batches, 1)[0]
    assert first["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert overlapped == [True]


def test_sleeping_decoders_are_kept_busy():
    """Four threads that read batches of five one after the other are idle for three eighths of the time."""
    batches = data.train_batches(Numbers(64, functools.partial(nap, seconds=0.02)), 5, seed=0, num_threads=4)
    shares = []
    with batches.from_step(0) as iterator:
        next(iterator)
        for _ in range(3):  # the machine may be busy
            start = time.perf_counter()
            for _ in range(8):
                next(iterator)
            shares.append(8 * 5 * 0.02 / 4 / (time.perf_counter() - start))
    assert max(shares) > 0.75  # benchmarks/input_pipeline.py measures it


@pytest.mark.parametrize(("nbytes", "expected"), [(2**30, 5), (4 * 100, 5), (3 * 100, 4), (100, 3), (0, 3)])
def test_reading_ahead_is_bounded_in_batches_and_in_bytes(monkeypatch, nbytes, expected):
    """A batch has 100 bytes; with 3 threads, at most 4 rows are read ahead, and at least 2."""
    monkeypatch.setattr(workers, "_AHEAD_BYTES", nbytes)
    read = []
    source = Numbers(100, read.append, shape=(6, 4, 4))
    with data.train_batches(source, 1, seed=0, num_threads=3).from_step(0) as iterator:
        assert sum(value.nbytes for value in next(iterator).values()) == 100
        time.sleep(0.1)
        assert len(read) == expected
        next(iterator)
        time.sleep(0.1)
        assert len(read) == expected + 1


def test_closing_does_not_wait_for_a_read_that_hangs(monkeypatch):
    monkeypatch.setattr(workers, "CLOSE_SECONDS", 0.1)
    woken = threading.Event()
    source = Numbers(8, lambda index: index >= 4 and woken.wait(30))
    iterator = data.train_batches(source, 4, seed=0, shuffle=False, num_threads=2).from_step(0)
    next(iterator)
    start = time.monotonic()
    iterator.close()
    assert time.monotonic() - start < 5
    woken.set()
    workers.join(threads())
    assert not threads()


@pytest.mark.slow
def test_the_program_ends_while_a_read_hangs():
    program = HANGING.format(workers=0) + "print('read')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


def test_a_bounded_map_is_in_order_and_takes_few_items_ahead():
    taken = []

    def items():
        for item in range(2000):
            taken.append(item)
            yield item

    for k, result in enumerate(workers.bounded_map(lambda item: 2 * item, items())):
        assert result == 2 * k
        assert len(taken) - k <= 4 * workers.default_threads() + 1
    assert k == 1999
    with pytest.raises(ZeroDivisionError):
        list(workers.bounded_map(lambda item: 1 // (item - 5), range(100)))
    assert not threads()


# Worker processes


def test_faults_are_named_before_a_process_starts():
    with pytest.raises(ValueError, match=r"source and transform must be picklable with num_workers=2.*lambda"):
        data.train_batches(Numbers(8), 4, seed=0, transform=lambda example, rng: example, num_workers=2).from_step(0)
    with pytest.raises(ValueError, match="num_workers must be at least 0; got -1"):
        data.eval_batches(Numbers(8), 4, num_workers=-1)
    with pytest.raises(ValueError, match=r"must not hold objects with num_workers; got 'text' of object"):
        data.train_batches(Numbers(8), 4, seed=0, transform=with_text, num_workers=1).from_step(0)
    arrays = data.ArraySource(np.zeros((8, 2, 2, 1), np.uint8), np.arange(8) % 2)
    assert next(iter(data.eval_batches(arrays, 4, num_workers=2)))["image"].shape == (4, 2, 2, 1)  # needs no process
    assert not children()


@pytest.mark.slow
def test_worker_processes_read_the_batches_of_threads(tmp_path):
    for index in range(37):
        path = tmp_path / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (40 + index, 50, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    before = len(descriptors())
    options = {"seed": 3, "transform": crop, "drop_remainder": False}
    source = data.load(tmp_path, "all", as_stored=True)
    expected = take(data.train_batches(source, 10, **options), 9, start=2)
    found = take(data.train_batches(source, 10, **options, num_workers=2, num_threads=2), 9, start=2)
    chex.assert_trees_all_equal(found, expected)
    assert all(value.dtype == expected[0][key].dtype for key, value in found[0].items())
    # The batches are the caller's own: they outlive the memory of the worker processes.
    assert all(value.flags.owndata and value.flags.writeable for value in found[0].values())
    evaluation = list(data.eval_batches(Numbers(21), 8, num_workers=1))
    chex.assert_trees_all_equal(evaluation, list(data.eval_batches(Numbers(21), 8)))
    assert not children()
    assert not threads()
    assert not [name for name in descriptors() if "flaxvision" in name]
    assert len(descriptors()) <= before + 2  # Python's resource tracker


@pytest.mark.slow
def test_errors_of_worker_processes_arrive():
    options = {"seed": 0, "shuffle": False, "num_workers": 1}
    batches = data.train_batches(Numbers(32, functools.partial(fail_at, wrong=20)), 8, **options)
    with pytest.raises(KeyError, match="example 20") as caught:
        take(batches, 4)
    assert "in fail_at" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match=r"examples must be .*uint8\[1, 2, 1\].*; got .*uint8\[2, 2, 1\]"):
        take(data.train_batches(Numbers(8), 4, transform=ragged, **options), 1)
    assert not children()
    assert not threads()


@pytest.mark.slow
def test_a_killed_worker_process_is_one_error_and_leaves_nothing():
    """A cluster or a terminal sends the other two signals to all processes; the one that trains decides."""
    numbers = {3: signal.SIGTERM, 12: signal.SIGINT, 40: signal.SIGKILL}
    source = Numbers(64, functools.partial(send, numbers=numbers))
    iterator = data.train_batches(source, 8, seed=0, shuffle=False, num_workers=2).from_step(0)
    assert [next(iterator)["image"][0, 0, 0, 0] for _ in range(5)] == [0, 8, 16, 24, 32]
    with pytest.raises(RuntimeError, match=r"a worker process .* must not end; got exit status -9.*memory"):
        next(iterator)
    assert not children()
    assert not threads()


@pytest.mark.slow
def test_closing_ends_worker_processes_that_hang():
    source = Numbers(16, functools.partial(hang, wrong=8))
    batches = data.train_batches(source, 8, seed=0, shuffle=False, num_workers=1)
    iterator = batches.from_step(0)
    next(iterator)
    assert len(children()) == 1
    start = time.monotonic()
    iterator.close()
    assert time.monotonic() - start < workers.CLOSE_SECONDS
    assert not children()
    iterator = batches.from_step(0)
    next(iterator)
    del iterator
    assert not children()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_worker_processes_end_with_the_program(end):
    program = HANGING.format(workers=1) + "print(*multiprocessing.active_children(), flush=True)\n" + end
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == (-signal.SIGKILL if end else 0), done.stderr
    pid = done.stdout.partition("pid=")[2].partition(" ")[0]
    assert int(pid)
    deadline = time.monotonic() + 10
    while Path("/proc", pid).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path("/proc", pid).exists()
