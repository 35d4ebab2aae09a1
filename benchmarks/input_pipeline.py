"""Times the batches of `flaxvision.data.train_batches` beside the same batches made by other libraries.

    pip install grain torch torchvision
    python -m benchmarks.input_pipeline --output benchmarks/results/input_pipeline.jsonl

Sources in memory: scikit-learn's digits (8x8x1) and 50,000 arrays of CIFAR-10's size. On disk: 500x375 JPEG files,
resized to 224x224 or randomly cropped to it. `sleeping`: examples that take 10 ms of sleep each, read by 16 threads,
which shows how well a pipeline keeps its threads busy. The pipelines:

* ours: `train_batches`.
* ours_workers: `train_batches` with a worker process for each core; for sleeping examples, two with 8 threads each.
* grain: `MapDataset.source(source).seed(0).shuffle().repeat().batch(B)`, read by Grain's threads, in another order.
* grain_indices: the same for the indices alone, with a `map` that gathers a batch; arrays only, in another order.
* grain_threads: our positions in a `MapDataset.map` that gathers a batch, read by Grain's threads, in the same order.
* torch: torchvision's `ImageFolder`, `RandomResizedCrop(224)` and `PILToTensor()` in a `DataLoader` with a worker
  process for each core, which draws from the files with replacement, so that it never waits for the end of an epoch.
* bare_threads: 16 threads that read examples in a loop and make no batches, the most that is possible.

A pipeline whose library is not installed is left out. The pipelines are interleaved. In each round a pipeline starts
at step 1,000,000, like a run that resumes. `first_ms` is the time to its first batch. After four further batches,
`images_per_s` is measured, and `cpu_ms`, the processor time per batch over all threads of this process. Nothing
consumes the batches. The figures are medians with quartiles over the rounds; `of_torch` and `of_bare_threads` are
ratios of `images_per_s` within a round.

The case `folder` makes 200,000 image files in 1,000 class folders and 1,000 validation images. It measures the seconds
until the first batch of a run (`start_s`: both parts listed, the fingerprint taken, 32 images decoded), the seconds
that `verify` takes, and how much memory each of the two adds at its peak.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import threading
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
from flaxvision.data import workers

START = 1_000_000
SKIPPED = 4  # batches before the first one that is timed
LATENCY = 0.01  # seconds
SLEEPERS = 16  # threads


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
    """A source, its batches, the number of batches timed in a round, and the pipelines."""

    name: str
    source: Any
    batch_size: int
    batches: int
    pipelines: tuple[str, ...]
    transform: Callable[..., Any] | None = None
    num_threads: int | None = None
    workers: tuple[int, int] = (1, 1)
    """Worker processes of `ours_workers` and threads in each of them."""


class Sleeping:
    """Photographs of one size that take `LATENCY` seconds each."""

    name, classes, fingerprint = "sleeping", ("a",), "sleeping"

    def __init__(self) -> None:
        self._image = np.zeros((224, 224, 3), np.uint8)

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        time.sleep(LATENCY)
        return {"image": self._image, "label": np.int32(0)}


def crop(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Crops the training images as ResNet's recipe does."""
    return {**example, "image": data.cropping.random_resized_crop(example["image"], rng, size=224)}


def cases(config: Config, folder: Path) -> Iterator[Case]:
    """Yields the sources."""
    rng, cores = np.random.default_rng(0), machine.cores()
    quick = config.quick
    in_memory = ("ours", "grain", "grain_indices", "grain_threads")
    yield Case("digits in memory", data.load("digits", "train"), 128, 20 if quick else 500, in_memory)
    length = 500 if quick else 50_000
    image = rng.integers(0, 256, (length, 32, 32, 3), np.uint8)
    arrays = data.ArraySource(image, rng.integers(0, 10, length), name="arrays")
    yield Case(f"{length:,} 32x32x3 in memory", arrays, 128, 20 if quick else 500, in_memory)
    photos = folder / "photos"
    write_photos(photos, 40 if quick else 640)
    on_disk = ("ours", "grain", "grain_threads")
    yield Case("folder of 500x375 JPEGs to 224", data.load(photos, "all"), 32, 4 if quick else 24, on_disk)
    stored = data.load(photos, "all", as_stored=True)
    pipelines = ("ours", "ours_workers", "torch")
    count = 2 if quick else 60
    yield Case("random crops of 500x375 JPEGs", stored, 32, count, pipelines, crop, cores, (cores, 1))
    for size, count in ((32, 100), (1024, 8)):
        pipelines = ("ours", "ours_workers", "bare_threads")
        name, batches = f"sleeping, batches of {size:,}", 1 if quick else count
        yield Case(name, Sleeping(), size, batches, pipelines, None, SLEEPERS, (2, SLEEPERS // 2))


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
    return _ours(case, num_threads=case.num_threads)


def ours_workers(case: Case) -> Iterator[Any]:
    """`train_batches` with worker processes."""
    return _ours(case, num_workers=case.workers[0], num_threads=case.workers[1])


def _ours(case: Case, **options: Any) -> Iterator[Any]:
    return data.train_batches(case.source, case.batch_size, seed=0, transform=case.transform, **options).from_step(
        START
    )


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
    pool = ThreadPoolExecutor(machine.cores())

    def read(step: int) -> Any:
        indices = batches._plan(int(step)).indices
        if hasattr(case.source, "gather"):
            return case.source.gather(indices)
        return workers.stack(list(pool.map(case.source.__getitem__, indices.tolist())))

    dataset = pg.MapDataset.range(2**40).map(read)
    return iter(dataset[START:].to_iter_dataset(pg.ReadOptions(num_threads=machine.cores(), prefetch_buffer_size=3)))


class Photos:
    """torchvision's `ImageFolder` of the files of a source; each process imports torchvision for itself."""

    def __init__(self, root: Path, length: int):
        self._root, self._length, self._images = root, length, None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if self._images is None:
            with contextlib.suppress(ImportError):
                import torchvision_on_cpu  # noqa: F401  # for a torch without CUDA
            from torchvision import datasets, transforms

            crop_to_tensor = transforms.Compose([transforms.RandomResizedCrop(224), transforms.PILToTensor()])
            self._images = datasets.ImageFolder(str(self._root), crop_to_tensor)
        return self._images[index]


def torch(case: Case) -> Iterator[Any]:
    """The files, decoder and crops of torchvision in torch's `DataLoader`."""
    from torch.utils.data import DataLoader, RandomSampler

    photos: Any = Photos(case.source.root, len(case.source))
    sampler = RandomSampler(photos, replacement=True, num_samples=10**8)
    options: Any = {"num_workers": machine.cores(), "multiprocessing_context": "spawn"}  # JAX's threads forbid to fork
    for image, label in DataLoader(photos, case.batch_size, sampler=sampler, **options):
        yield {"image": image, "label": label}


def bare_threads(case: Case) -> Iterator[Any]:
    """Threads that read examples in a loop; the batches are empty."""
    read, stopped = threading.Semaphore(0), threading.Event()

    def loop() -> None:
        while not stopped.is_set():
            case.source[0]
            read.release()

    threads = [threading.Thread(target=loop) for _ in range(SLEEPERS)]
    for thread in threads:
        thread.start()
    try:
        while True:
            for _ in range(case.batch_size):
                read.acquire()
            yield {"image": np.empty((case.batch_size, 0)), "label": np.empty(case.batch_size)}
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


PIPELINES: dict[str, Callable[[Case], Iterator[Any]]] = {
    function.__name__: function
    for function in (ours, ours_workers, grain, grain_indices, grain_threads, torch, bare_threads)
}


def is_installed(pipeline: str) -> bool:
    """Returns whether the library of a pipeline is there."""
    library = pipeline.split("_")[0]
    return library not in ("grain", "torch") or importlib.util.find_spec(library) is not None


def measure(pipeline: Callable[[Case], Iterator[Any]], case: Case) -> dict[str, float]:
    """Times one round of one pipeline."""
    start = time.perf_counter()
    batches = pipeline(case)
    batch = next(batches)
    first = time.perf_counter()
    assert batch["image"].shape[0] == batch["label"].shape[0] == case.batch_size
    for _ in range(SKIPPED):
        next(batches)
    begin, processor = time.perf_counter(), time.process_time()
    for _ in range(case.batches):
        next(batches)
    end, used = time.perf_counter(), time.process_time() - processor
    if hasattr(batches, "close"):
        batches.close()
    return {
        "images_per_s": case.batches * case.batch_size / (end - begin),
        "cpu_ms": 1e3 * used / case.batches,
        "first_ms": 1e3 * (first - start),
    }


def time_case(config: Config, case: Case) -> Iterator[dict[str, Any]]:
    """Yields a record for each pipeline of a case."""
    pipelines = [name for name in case.pipelines if is_installed(name)]
    for name in set(case.pipelines) - {*pipelines}:
        print(f"{case.name:32} {name:14} left out: the library is not installed", flush=True)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    for k in range(config.rounds + 1):
        for name in pipelines[k % len(pipelines) :] + pipelines[: k % len(pipelines)]:
            figures = measure(PIPELINES[name], case)
            if k:  # the first round imports, and reads files that are not cached yet
                rounds[name].append(figures)
    for name, found in rounds.items():
        line: dict[str, Any] = {"case": case.name, "pipeline": name}
        line |= {"batch_size": case.batch_size, "batches": case.batches, "rounds": config.rounds}
        for key in ("images_per_s", "cpu_ms", "first_ms"):
            line |= quartiles(key, [figure[key] for figure in found])
        for other in ("bare_threads", "torch"):
            if other in rounds and other != name:
                pairs = zip(found, rounds[other], strict=True)
                line |= quartiles(f"of_{other}", [a["images_per_s"] / b["images_per_s"] for a, b in pairs])
        text = "".join(f", {line[key]:.3f} {key}" for key in ("of_bare_threads", "of_torch") if key in line)
        print(
            f"{case.name:32} {name:14} {line['images_per_s']:10.0f} images/s "
            f"{line['cpu_ms']:8.3f} ms of processor time a batch, first after {line['first_ms']:.1f} ms{text}",
            flush=True,
        )
        yield line


def time_folder(root: Path, files: int) -> dict[str, Any]:
    """Measures how a run starts on a folder with many files, and the check of all files."""
    for part, count in {"train": files, "val": files // 200}.items():
        for k in range(min(1000, count // 10)):
            folder = root / part / f"n{k:08}"
            folder.mkdir(parents=True)
            first = folder / f"n{k:08}_0.png"
            Image.new("RGB", (2, 2), (k % 256, 0, 0)).save(first)
            for index in range(1, count // min(1000, count // 10)):
                os.link(first, folder / f"n{k:08}_{index}.png")
    before, start = rss(), time.perf_counter()
    train, val = (data.load(root, part, image_size=8) for part in ("train", "val"))
    batches = data.train_batches(train, 32, seed=0)
    assert batches.fingerprint["length"] == len(train)
    with batches.from_step(0) as iterator:
        next(iterator)
    started, listed = time.perf_counter(), rss()
    train.verify(progress=False)  # type: ignore[attr-defined]
    line = {"files": len(train) + len(val), "start_s": started - start, "start_mib": (listed - before) / 2**20}
    line |= {"verify_s": time.perf_counter() - started, "verify_mib": (rss() - listed) / 2**20}
    print("folder: " + ", ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
    return machine.rounded(line)


def rss() -> int:
    """Returns the peak of the memory of this process, in bytes, to which Linux allows to set it back."""
    Path("/proc/self/clear_refs").write_text("5")
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


def quartiles(name: str, values: list[float]) -> dict[str, float]:
    """Returns the median and the quartiles of one figure."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {key: float(f"{v:.4g}") for key, v in {name: median, f"{name}_q1": q1, f"{name}_q3": q3}.items()}


def main(config: Config) -> int:
    """Times every pipeline on every source; returns the process's exit status."""
    if config.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {config.rounds}")
    machine.check_output(config.output)
    where = machine.describe(jax.devices()[0])
    for library in ("grain", "pillow", "torch", "torchvision"):
        if importlib.util.find_spec("PIL" if library == "pillow" else library):
            where[library] = importlib.metadata.version(library)

    def write(line: dict[str, Any]) -> None:
        if config.output:
            line = {"benchmark": "input_pipeline", **line, **where, "load_after": round(os.getloadavg()[0], 2)}
            machine.append(config.output, line | {"quick": config.quick})

    with tempfile.TemporaryDirectory() as folder:
        if config.only in "folder":
            write({"case": "folder"} | time_folder(Path(folder) / "many", 2000 if config.quick else 200_000))
            shutil.rmtree(Path(folder) / "many")
        for case in cases(config, Path(folder)):
            if config.only in case.name:
                for line in time_case(config, case):
                    write(line)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__, prog="python -m benchmarks.input_pipeline")))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
