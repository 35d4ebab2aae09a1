"""Measures the throughput of `flaxvision.data.train_batches` and of the same batches made by Grain.

    pip install grain
    python -m benchmarks.input_pipeline --output benchmarks/results/input_pipeline.jsonl

Three sources: scikit-learn's digits (8x8x1) and 50,000 arrays of CIFAR-10's size, both in memory, and a folder of JPEG
files that are decoded and resized to 224x224. Four pipelines:

* ours: `train_batches`.
* grain: `MapDataset.source(source).seed(0).shuffle().repeat().batch(B)`, read by the threads of Grain.
* grain_indices: the same for the indices only, with a `map` that gathers a batch. For arrays only.
* grain_threads: a `MapDataset.map` that reads a whole batch of `train_batches`, run by the threads of Grain.

The order of the examples is that of `train_batches` in `ours` and `grain_threads`, and Grain's in the other two.

The pipelines are interleaved. In each round a pipeline starts at step 1,000,000, as a run that resumes does. `first_ms`
is the time to its first batch, `images_per_s` counts the batches after it, and `cpu_ms` is the processor time of a
batch, summed over all threads. The batches are not used. The figures are medians with quartiles over the rounds.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from PIL import Image

from benchmarks import machine
from benchmarks.machine import cores
from flaxvision import data

START = 1_000_000


@dataclass(frozen=True)
class Config:
    """Time the input pipelines."""

    rounds: int = 9
    """Times that each pipeline is started and timed."""
    quick: bool = False
    """Few batches and files: a check that everything runs."""
    only: str = ""
    """Run only the sources whose name contains this."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A .jsonl file to which one line per source and pipeline is appended."""


@dataclass(frozen=True)
class Case:
    """A source, its batch size and how many batches are timed in a round."""

    name: str
    source: data.Source
    batch_size: int
    batches: int


def cases(config: Config, folder: Path) -> Iterator[Case]:
    """The three sources."""
    rng = np.random.default_rng(0)
    quick = config.quick
    yield Case("digits in memory", data.load("digits", "train"), 128, 20 if quick else 500)
    length = 500 if quick else 50_000
    image = rng.integers(0, 256, (length, 32, 32, 3), np.uint8)
    arrays = data.ArraySource(image, rng.integers(0, 10, length), name="arrays")
    yield Case(f"{length:,} 32x32x3 in memory", arrays, 128, 20 if quick else 500)
    count = 40 if quick else 640
    photos = folder / "photos"
    for k in range(count):
        path = photos / str(k % 4) / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    yield Case("folder of 500x375 JPEGs to 224", data.load(photos, "all"), 32, 4 if quick else 24)


def ours(case: Case) -> Iterator[Any]:
    """`train_batches` from step `START`."""
    return data.train_batches(case.source, case.batch_size, seed=0).from_step(START)


def grain(case: Case) -> Iterator[Any]:
    """Grain's shuffle, batches, threads and prefetching from step `START`."""
    import grain as pg

    source: Any = case.source  # Grain's protocol names the argument of __getitem__
    dataset = pg.MapDataset.source(source).seed(0).shuffle().repeat().batch(case.batch_size, drop_remainder=True)
    return iter(dataset[START:].to_iter_dataset(pg.ReadOptions(num_threads=cores(), prefetch_buffer_size=4 * cores())))


def grain_indices(case: Case) -> Iterator[Any]:
    """Like `grain`, with one gather of a batch instead of one read per example."""
    import grain as pg

    dataset = pg.MapDataset.range(len(case.source)).seed(0).shuffle().repeat()
    dataset = dataset.batch(case.batch_size, drop_remainder=True).map(case.source.gather)  # type: ignore[attr-defined]
    return iter(dataset[START:].to_iter_dataset(pg.ReadOptions(num_threads=cores(), prefetch_buffer_size=4 * cores())))


def grain_threads(case: Case) -> Iterator[Any]:
    """Our positions, Grain's threads and prefetching from step `START`: a thread makes a batch."""
    import grain as pg

    batches = data.train_batches(case.source, case.batch_size, seed=0)
    pool = ThreadPoolExecutor(cores())  # idle for arrays
    dataset = pg.MapDataset.range(2**40).map(lambda step: batches._read(int(step), pool))
    return iter(dataset[START:].to_iter_dataset(pg.ReadOptions(num_threads=cores(), prefetch_buffer_size=3)))


PIPELINES: dict[str, Callable[[Case], Iterator[Any]]] = {
    function.__name__: function for function in (ours, grain, grain_indices, grain_threads)
}


def measure(pipeline: Callable[[Case], Iterator[Any]], case: Case) -> dict[str, float]:
    """One round of one pipeline."""
    start = time.perf_counter()
    batches = pipeline(case)
    batch = next(batches)
    first = time.perf_counter()
    assert batch["image"].shape[0] == batch["label"].shape[0] == case.batch_size
    processor = time.process_time()
    for _ in range(case.batches):
        next(batches)
    end, used = time.perf_counter(), time.process_time() - processor
    if hasattr(batches, "close"):
        batches.close()
    return {
        "images_per_s": case.batches * case.batch_size / (end - first),
        "cpu_ms": 1e3 * used / case.batches,
        "first_ms": 1e3 * (first - start),
    }


def quartiles(name: str, values: list[float]) -> dict[str, float]:
    """Median and quartiles of one figure."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {key: float(f"{v:.4g}") for key, v in {name: median, f"{name}_q1": q1, f"{name}_q3": q3}.items()}


def compare(case: Case, rounds: int) -> Iterator[dict[str, Any]]:
    """Times all pipelines on one source, interleaved, and yields a record for each."""
    names = [name for name in PIPELINES if hasattr(case.source, "gather") or name != "grain_indices"]
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for k in range(rounds + 1):
        for name in names:
            figure = measure(PIPELINES[name], case)
            if k:  # the first round imports, and reads files that are not cached yet
                figures[name].append(figure)
    for name in names:
        record: dict[str, Any] = {"benchmark": "input_pipeline", "case": case.name, "pipeline": name}
        record |= {"batch_size": case.batch_size, "batches": case.batches, "rounds": rounds}
        for key in ("images_per_s", "cpu_ms", "first_ms"):
            record |= quartiles(key, [figure[key] for figure in figures[name]])
        yield record


def main(config: Config) -> int:
    """Times every pipeline on every source; returns the exit status of the process."""
    if config.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {config.rounds}")
    machine.check_output(config.output)
    try:
        import grain as pg
    except ImportError:
        raise ValueError("Grain is not installed; pip install grain") from None
    where = machine.describe(jax.devices()[0]) | {"grain": pg.__version__, "quick": config.quick}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(config, Path(folder)):
            for record in compare(case, config.rounds) if config.only in case.name else ():
                print(
                    f"{case.name:32} {record['pipeline']:14} {record['images_per_s']:10.0f} images/s, "
                    f"{record['cpu_ms']:.3f} ms of processor time per batch, first batch after "
                    f"{record['first_ms']:.1f} ms",
                    flush=True,
                )
                if config.output:
                    load = round(os.getloadavg()[0], 2)
                    machine.append(config.output, record | where | {"load_after": load})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
