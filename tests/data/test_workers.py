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

from flaxvision import data
from flaxvision.data import workers

WORKERS = {"num_workers": 2, "num_threads": 2}


class Numbers:
    """A source that is read example by example: an image of the index, and what `read` does with the index before."""

    name, classes, fingerprint = "numbers", ("a", "b"), "numbers"

    def __init__(self, length, read=None, shape=(2, 2, 1)):
        self.length, self.read, self.shape = length, read, shape

    def __len__(self):
        return self.length

    def __getitem__(self, index, /):
        if self.read is not None:
            self.read(index)
        return {"image": np.full(self.shape, index % 256, np.uint8), "label": np.int32(index % 2)}


def jitter(example, rng):
    return {**example, "noise": rng.normal(size=3).astype(np.float32)}


def nap(index, seconds=0.01):
    time.sleep(seconds)


def fail_at(index, wrong):
    if index == wrong:
        raise KeyError(f"example {index}")


def ragged(example, rng):
    return {**example, "image": example["image"][: 1 + example["label"]]}


def kill(index, wrong, number):
    if index == wrong:
        os.kill(os.getpid(), number)


def hang(index, wrong):
    if index >= wrong:
        time.sleep(1000)


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
    batches = data.train_batches(Numbers(64, functools.partial(nap, seconds=0.02)), 8, seed=0, num_threads=4)
    with batches.from_step(0) as iterator:
        next(iterator)
        start = time.perf_counter()
        for _ in range(12):
            next(iterator)
        seconds = time.perf_counter() - start
    assert 12 * 8 * 0.02 / 4 / seconds > 0.75  # 1 is perfect; benchmarks/input_pipeline.py measures it


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
    program = (
        "from tests.data.test_workers import *\n"
        "iterator = data.train_batches(Numbers(8, functools.partial(hang, wrong=4)), 4, seed=0, shuffle=False)\n"
        "next(iter(iterator)); print('read')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
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


def test_a_program_error_is_named_before_a_process_starts():
    with pytest.raises(ValueError, match=r"source and transform must be picklable with num_workers=2.*lambda"):
        data.train_batches(Numbers(8), 4, seed=0, transform=lambda example, rng: example, **WORKERS).from_step(0)
    with pytest.raises(ValueError, match="num_workers must be at least 0; got -1"):
        data.eval_batches(Numbers(8), 4, num_workers=-1)
    with pytest.raises(ValueError, match=r"must hold only numbers with num_workers; got 'text' of object"):
        next(iter(data.train_batches(Numbers(8), 4, seed=0, transform=with_text, **WORKERS)))
    assert not children()
    assert not threads()


def with_text(example, rng):
    return {**example, "text": np.array(["a"], object)}


@pytest.mark.slow
def test_worker_processes_read_the_batches_of_threads():
    before = descriptors()
    for batch_size, drop in ((8, True), (5, False)):
        options = {"seed": 3, "transform": jitter, "drop_remainder": drop}
        expected = take(data.train_batches(Numbers(37), batch_size, **options), 9, start=2)
        found = take(data.train_batches(Numbers(37), batch_size, **options, **WORKERS), 9, start=2)
        chex.assert_trees_all_equal(found, expected)
        assert all(value.dtype == expected[0][key].dtype for key, value in found[0].items())
        # The batches are the caller's own: they outlive the memory of the worker processes.
        assert all(value.flags.owndata and value.flags.writeable for value in found[0].values())
    chex.assert_trees_all_equal(
        list(data.eval_batches(Numbers(21), 8, **WORKERS)), list(data.eval_batches(Numbers(21), 8))
    )
    arrays = data.ArraySource(np.zeros((8, 2, 2, 1), np.uint8), np.arange(8) % 2)
    assert next(iter(data.eval_batches(arrays, 4, **WORKERS)))["image"].shape == (4, 2, 2, 1)  # needs no process
    assert not children()
    assert not threads()
    left = descriptors()
    assert not [name for name in left if "flaxvision" in name]
    assert len(left) <= len(before) + 2  # Python's resource tracker


@pytest.mark.slow
def test_errors_of_worker_processes_arrive():
    batches = data.train_batches(Numbers(32, functools.partial(fail_at, wrong=20)), 8, seed=0, shuffle=False, **WORKERS)
    with pytest.raises(KeyError, match="example 20") as caught:
        take(batches, 4)
    assert "in fail_at" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match=r"examples must all be .*uint8\[1, 2, 1\].*; got .*uint8\[2, 2, 1\]"):
        take(data.train_batches(Numbers(8), 4, seed=0, shuffle=False, transform=ragged, **WORKERS), 1)
    assert not children()
    assert not threads()


@pytest.mark.slow
def test_a_killed_worker_process_is_one_error_and_leaves_nothing():
    dead = functools.partial(kill, wrong=20, number=signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a worker process .* must not end; got exit status -9.*memory"):
        take(data.train_batches(Numbers(64, dead), 8, seed=0, shuffle=False, **WORKERS), 8)
    assert not children()
    assert not threads()
    # A cluster or a terminal sends these to all processes; the one that trains decides.
    for number in (signal.SIGTERM, signal.SIGINT):
        ignored = functools.partial(kill, wrong=20, number=number)
        assert len(take(data.train_batches(Numbers(64, ignored), 8, seed=0, shuffle=False, **WORKERS), 8)) == 8


@pytest.mark.slow
def test_closing_ends_worker_processes_that_hang():
    batches = data.train_batches(Numbers(16, functools.partial(hang, wrong=8)), 8, seed=0, shuffle=False, **WORKERS)
    iterator = batches.from_step(0)
    next(iterator)
    assert len(children()) == 2
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
    program = (
        "from tests.data.test_workers import *\n"
        "source = Numbers(16, functools.partial(hang, wrong=8))\n"
        "iterator = iter(data.train_batches(source, 8, seed=0, shuffle=False, **WORKERS))\n"
        "next(iterator); print(*children(), flush=True)\n" + end
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == (-signal.SIGKILL if end else 0), done.stderr
    pids = done.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.slow
def test_a_folder_with_worker_processes(tmp_path):
    from PIL import Image

    for index in range(30):
        path = tmp_path / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (40 + index, 50, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    source = data.load(tmp_path, "all", as_stored=True)
    options = {"seed": 1, "transform": crop}
    expected = take(data.train_batches(source, 10, **options), 6)
    chex.assert_trees_all_equal(take(data.train_batches(source, 10, **options, **WORKERS), 6), expected)


def crop(example, rng):
    return {**example, "image": data.cropping.random_resized_crop(example["image"], rng, size=16)}
