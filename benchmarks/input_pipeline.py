"""Times the batches of `flaxvision.data.train_batches` beside the same batches made by Grain.

    pip install grain
    python -m benchmarks.input_pipeline --output benchmarks/results/input_pipeline.jsonl

There are three sources: scikit-learn's digits (8x8x1) and 50,000 arrays of CIFAR-10's size, both in memory, and a
folder of JPEG files that are decoded and resized to 224x224. There are four pipelines:

* ours: `train_batches`.
* grain: `MapDataset.source(source).seed(0).shuffle().repeat().batch(B)`, read by Grain's threads, in another order.
* grain_indices: the same for the indices alone, with a `map` that gathers a batch; arrays only, in another order.
* grain_threads: our positions in a `MapDataset.map` that gathers a batch, read by Grain's threads, in the same order.

The pipelines are interleaved. In each round a pipeline starts at step 1,000,000, like a run that resumes. `first_ms`
is the time to its first batch, `images_per_s` counts the batches after it, and `cpu_ms` is the processor time per batch
over all threads. Nothing consumes the batches. The figures are medians with quartiles over the rounds.
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
from flaxvision import data

START = 1_000_000


@dataclass(frozen=True)
class Config:
    """Time the input pipelines."""

    rounds: int = 9
    """Rounds; each pipeline starts once per round."""
    quick: bool = False
    """Few batches and files, to check that everything runs."""
    only: str = ""
    """Only time the sources with this text in their name."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """File of JSON lines that the records are appended to, one per source and pipeline."""


@dataclass(frozen=True)
class Case:
    """A source, its batch size and the number of batches timed in a round."""

    name: str
    source: data.Source
    batch_size: int
    batches: int


def cases(config: Config, folder: Path) -> Iterator[Case]:
    """Yields the three sources."""
    rng = np.random.default_rng(0)
    quick = config.quick
    yield Case("digits in memory", data.load("digits", "train"), 128, 20 if quick else 500)
    length = 500 if quick else 50_000
    image = rng.integers(0, 256, (length, 32, 32, 3), np.uint8)
    arrays = data.ArraySource(image, rng.integers(0, 10, length), name="arrays")
    yield Case(f"{length:,} 32x32x3 in memory", arrays, 128, 20 if quick else 500)
    photos = folder / "photos"
    write_photos(photos, 40 if quick else 640)
    yield Case("folder of 500x375 JPEGs to 224", data.load(photos, "all"), 32, 4 if quick else 24)


def write_photos(root: Path, count: int) -> None:
    """Writes JPEG files of 500x375 pixels in four class folders."""

    def write(number: int) -> None:
        path = root / str(number % 4) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)

    with ThreadPoolExecutor(machine.cores()) as pool:
        list(pool.map(write, range(count)))


def ours(case: Case) -> Iterator[Any]:
    """`train_batches` from step `START`."""
    return data.train_batches(case.source, case.batch_size, seed=0).from_step(START)


def grain(case: Case) -> Iterator[Any]:
    """Grain's shuffle, batches, threads and prefetching from step `START`."""
    import grain as pg

    source: Any = case.source  # Grain's protocol names the argument of __getitem__
    dataset = pg.MapDataset.source(source).seed(0).shuffle().repeat().batch(case.batch_size, drop_remainder=True)
    return iter(
        dataset[START:].to_iter_dataset(
            pg.ReadOptions(num_threads=machine.cores(), prefetch_buffer_size=4 * machine.cores())
        )
    )


def grain_indices(case: Case) -> Iterator[Any]:
    """Like `grain`, with one gather of a batch instead of one read per example."""
    import grain as pg

    dataset = pg.MapDataset.range(len(case.source)).seed(0).shuffle().repeat()
    dataset = dataset.batch(case.batch_size, drop_remainder=True).map(case.source.gather)  # type: ignore[attr-defined]
    return iter(
        dataset[START:].to_iter_dataset(
            pg.ReadOptions(num_threads=machine.cores(), prefetch_buffer_size=4 * machine.cores())
        )
    )


def grain_threads(case: Case) -> Iterator[Any]:
    """Our positions, Grain's threads and prefetching from step `START`: a thread makes a batch."""
    import grain as pg

    batches = data.train_batches(case.source, case.batch_size, seed=0)
    pool = ThreadPoolExecutor(machine.cores())  # idle for arrays
    dataset = pg.MapDataset.range(2**40).map(lambda step: batches._read(int(step), pool))
    return iter(dataset[START:].to_iter_dataset(pg.ReadOptions(num_threads=machine.cores(), prefetch_buffer_size=3)))


PIPELINES: dict[str, Callable[[Case], Iterator[Any]]] = {
    function.__name__: function for function in (ours, grain, grain_indices, grain_threads)
}


def measure(pipeline: Callable[[Case], Iterator[Any]], case: Case) -> dict[str, float]:
    """Times one round of one pipeline."""
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
    """Returns the median and the quartiles of one figure."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {key: float(f"{v:.4g}") for key, v in {name: median, f"{name}_q1": q1, f"{name}_q3": q3}.items()}


def main(config: Config) -> int:
    """Times every pipeline on every source; returns the process's exit status."""
    if config.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {config.rounds}")
    machine.check_output(config.output)
    try:
        import grain as pg
    except ImportError:
        raise ValueError("grain is not installed, and the benchmark compares with it; run pip install grain") from None
    where = machine.describe(jax.devices()[0])
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(config, Path(folder)):
            if config.only not in case.name:
                continue
            in_memory = hasattr(case.source, "gather")
            pipelines = [name for name in PIPELINES if in_memory or name != "grain_indices"]
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
            for k in range(config.rounds + 1):
                for name in pipelines:
                    figures = measure(PIPELINES[name], case)
                    if k:  # the first round imports, and reads files that are not cached yet
                        rounds[name].append(figures)
            for name, figures in rounds.items():
                line: dict[str, Any] = {"benchmark": "input_pipeline", "case": case.name, "pipeline": name}
                line |= {"batch_size": case.batch_size, "batches": case.batches, "rounds": config.rounds}
                for key in ("images_per_s", "cpu_ms", "first_ms"):
                    line |= quartiles(key, [figure[key] for figure in figures])
                print(
                    f"{case.name:32} {name:14} {line['images_per_s']:10.0f} images/s "
                    f"{line['cpu_ms']:8.3f} ms of processor time a batch, first after {line['first_ms']:.1f} ms",
                    flush=True,
                )
                if config.output:
                    line |= where | {"grain": pg.__version__, "load_after": round(os.getloadavg()[0], 2)}
                    machine.append(config.output, line | {"quick": config.quick})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__, prog="python -m benchmarks.input_pipeline")))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
