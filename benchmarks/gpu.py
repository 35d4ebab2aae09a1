"""Parts of `benchmarks/gpu.sh`: tests, agreement with the CPU, kernels, JPEG input and trainings.

    python -m benchmarks.gpu agreement --output results.jsonl
    python -m benchmarks.gpu kernels --model resnet50 --batch-size 256 --output results.jsonl

`benchmarks/gpu.sh` lists the stages and runs these commands. Each appends JSON lines with the device, the versions and
the commit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import flaxvision as fv
from benchmarks import input_pipeline, machine, throughput
from parity import comparison

# Memory bandwidth in bytes per second.
BANDWIDTH = {"NVIDIA H200": 4.8e12}
AGREEMENT_TOLERANCE = 1e-4

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a stage."""

    output: Path
    """File of JSON lines that the records are appended to."""
    name: str = ""
    """Name of the part in the records."""
    seconds: float = 500.0
    """Time limit of commands that this part starts."""

    def records(self) -> Iterator[Record]:
        """Yields what was measured."""
        raise NotImplementedError(f"{type(self).__name__} must define records")


@dataclasses.dataclass(frozen=True)
class Note(Part):
    """Record that a part was left out or failed."""

    problem: str = ""
    """What happened."""

    def records(self) -> Iterator[Record]:
        """Yields one record without a measurement."""
        yield {"problem": self.problem}


@dataclasses.dataclass(frozen=True)
class Tests(Part):
    """Run tests, and record how many passed and the names of those that failed."""

    arguments: str = "tests"
    """Arguments of pytest."""

    def records(self) -> Iterator[Record]:
        """Yields one record, also if the time limit ends the run."""
        command = [sys.executable, "-m", "pytest", "-vv", *shlex.split(self.arguments)]
        start, outcomes, failed, tail = time.perf_counter(), Counter(), [], []
        for line in _lines(command, self.seconds):
            tail = [*tail[-30:], line]
            if found := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line):
                outcome, test = found.group(1).lower(), re.search(r"tests/\S+::.*", line)
                if test and "%]" in line:
                    outcomes[outcome] += 1
                    failed += [test.group(0).partition(f" {found.group(1)}")[0]] * (outcome in ("failed", "error"))
        finished = tail[-1] in ("exit status 0", "exit status 1")
        record = {"outcomes": dict(outcomes), "failed": failed, "finished": finished}
        yield record | {"seconds": time.perf_counter() - start, "passed": finished and not failed and bool(outcomes)}
        print("\n".join(tail))


@dataclasses.dataclass(frozen=True)
class Agreement(Part):
    """Compare logits on this device and on the CPU in float32 with the highest matmul precision."""

    models: tuple[str, ...] = (
        "resnet50",
        "vgg16",
        "inception_v3",
        "xception",
        "se_resnet50",
        "mobilenet_v2",
        "capsnet",
    )
    """Models to compare with random variables."""
    trained: tuple[str, ...] = ()
    """Trained networks, each as MODEL:SOURCE:FILE."""
    batch_size: int = 2
    """Images to compare."""

    def records(self) -> Iterator[Record]:
        """Yields the relative error of each network."""
        for name in (*self.models, *self.trained):
            model_name, _, rest = name.partition(":")
            info = fv.model_info(model_name)
            shape = (*info.input_size, info.channels)
            if rest:
                source, _, file = rest.partition(":")
                model, variables = fv.weights.load_model(model_name, file, source=source)
            else:
                model = fv.create_model(model_name)
                variables = throughput.variables_of(model, shape)
            images = np.random.default_rng(0).standard_normal((self.batch_size, *shape), np.float32)
            logits = []
            with jax.default_matmul_precision("highest"):
                for device in (jax.devices()[0], jax.devices("cpu")[0]):
                    arguments = jax.device_put((variables, images), device)
                    logits.append(np.asarray(jax.jit(model.apply)(*arguments)))
            error = comparison.error(*logits)
            print(f"{model_name:20} {'trained' if rest else 'random':8} {error:.1e}", flush=True)
            record = {"model": model_name, "trained": bool(rest), "relative_error": error}
            yield record | {"tolerance": AGREEMENT_TOLERANCE, "passed": error <= AGREEMENT_TOLERANCE}


@dataclasses.dataclass(frozen=True)
class Kernels(Part):
    """Profile the train step of a model, and record its longest kernels and the bytes that it moves."""

    model: str = "resnet50"
    """Name of a registered classifier."""
    batch_size: int = 256
    """Images per step."""
    image_size: int | None = None
    """Height and width of the images. Default: the published size."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation."""
    steps: int = 5
    """Profiled steps."""
    top: int = 10
    """Number of kernels to record."""

    def records(self) -> Iterator[Record]:
        """Yields one record."""
        settings = {"model": self.model, "batch_size": self.batch_size, "dtype": self.dtype}
        work = throughput.Workload(throughput.Config(**settings, image_size=self.image_size, chain=self.steps))
        step, lower = work.train()
        step.warm_up(3)
        with profiled() as profile:
            step.measure(1)
        cost = lower().compile().cost_analysis() or {}
        bandwidth = BANDWIDTH.get(jax.devices()[0].device_kind)
        moved = float(cost.get("bytes accessed", 0)) or None
        record = settings | {"ms": 1e3 * step.times[0], "flops": throughput.flops_of(lower), "bytes_accessed": moved}
        record["share_of_bandwidth"] = moved / step.times[0] / bandwidth if moved and bandwidth else None
        yield record | summarize(profile, self.steps, self.top)


@dataclasses.dataclass(frozen=True)
class Folder(Part):
    """Read a folder of JPEG files, then train a model from it, and record images/s and the device's idle share."""

    model: str = "resnet50"
    """Name of a registered classifier."""
    batch_size: int = 256
    """Images per step."""
    image_size: int = 224
    """Height and width of the crops."""
    images: int = 4096
    """Number of files, 500x375 pixels each."""
    steps: int = 40
    """Timed batches of each measurement."""
    threads: int | None = None
    """Threads that decode. Default: that of flaxvision.data."""

    def records(self) -> Iterator[Record]:
        """Yields the rate of the batches alone, and that of the training."""
        with tempfile.TemporaryDirectory() as folder:
            input_pipeline.write_photos(Path(folder) / "train", self.images)
            crop = functools.partial(fv.data.cropping.random_resized_crop, size=self.image_size)
            batches = fv.data.train_batches(
                fv.data.load(folder, "train", as_stored=True),
                self.batch_size,
                seed=0,
                transform=lambda example, rng: {**example, "image": crop(example["image"], rng)},
                num_threads=self.threads,
            )
            common = {"batch_size": self.batch_size, "image_size": self.image_size, "threads": self.threads}
            with batches.from_step(0) as iterator:
                next(iterator)
                start = time.perf_counter()
                for _ in range(self.steps):
                    next(iterator)
                rate = self.steps * self.batch_size / (time.perf_counter() - start)
            print(f"batches alone: {rate:.0f} images/s", flush=True)
            yield common | {"what": "batches alone", "images_per_s": rate}
            yield common | {"what": "training", "model": self.model} | self._train(batches)

    def _train(self, batches: Any) -> Record:
        model = fv.create_model(self.model, dtype=jnp.bfloat16)
        sample = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.float32)
        variables = throughput.variables_of(model, sample.shape[1:])
        state = fv.train.create_state(
            model, optax.sgd(0.01, momentum=0.9), jax.random.key(0), sample, variables=variables
        )
        objective = fv.train.classification()

        def train_step(state, batch, rng):
            batch = {**batch, "image": batch["image"].astype(jnp.float32) / 127.5 - 1}
            return fv.train.train_step(state, batch, rng, objective=objective)

        step = fv.train.jit_step(train_step, fv.train.make_mesh(jax.devices()[:1]))
        fit = functools.partial(fv.train.fit, step=step, data=batches, rng=jax.random.key(1), log_every=10**6)
        state = fit(state, num_steps=3).state
        with profiled() as profile:
            start = time.perf_counter()
            jax.block_until_ready(fit(state, num_steps=3 + self.steps).state)
            seconds = time.perf_counter() - start
        rate = self.steps * self.batch_size / seconds
        found = summarize(profile, self.steps, top=0)
        print(f"training: {rate:.0f} images/s, device idle {100 * found['idle_share']:.0f} %", flush=True)
        return {"images_per_s": rate} | found


@dataclasses.dataclass(frozen=True)
class Training(Part):
    """Run an experiment, and record its last metrics and its time."""

    command: str = ""
    """The experiment and its flags, such as "experiments/cifar10.py --recipe fast"."""
    workdir: Path | None = None
    """Folder of the run. None for a command that keeps none."""

    def records(self) -> Iterator[Record]:
        """Yields one record, also if the time limit ends the run."""
        command = [sys.executable, *shlex.split(self.command)]
        if self.workdir is not None:
            command += ["--workdir", str(self.workdir)]
        metrics = None if self.workdir is None else self.workdir / "metrics.jsonl"
        start, tail = time.perf_counter(), []
        for line in _lines(command, self.seconds):
            tail = [*tail[-10:], line]
        seconds = time.perf_counter() - start
        records = fv.train.read_records(metrics) if metrics is not None and metrics.exists() else []
        measured = [r for r in records if r.get("split") != "train"]
        rates = [r["images_per_second"] for r in records if "images_per_second" in r]
        print("\n".join(tail))
        found = {
            "command": self.command,
            "seconds": seconds,
            "printed": tail[-4:],
            "passed": tail[-1] == "exit status 0",
        }
        yield found | {
            "metrics": measured[-1] if measured else None,
            "images_per_s": float(np.median(rates)) if rates else None,
        }


@contextlib.contextmanager
def profiled() -> Iterator[list[tuple[str, float, float]]]:
    """Profiles its body; afterwards the list holds name, start and duration in ns of every kernel on the device."""
    kernels: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield kernels
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                stream = plane.name.startswith("/device:GPU") and line.name.startswith("Stream")
                for event in line.events:
                    # On a CPU, operations are events of the host's threads.
                    operation = plane.name == "/host:CPU" and not event.name.startswith("end: ")
                    if stream or (operation and any(key == "hlo_op" for key, _ in event.stats)):
                        kernels.append((event.name, event.start_ns, event.duration_ns))


def summarize(kernels: list[tuple[str, float, float]], steps: int, top: int) -> Record:
    """Summarises profiled kernels.

    Args:
        kernels: Name, start and duration in ns of each.
        steps: Number of profiled steps.
        top: Number of kernels to list.

    Returns:
        `busy_ms` and `span_ms` per step, `idle_share` (the part of the span without a kernel), and `kernels`, the
        longest ones by their time per step.
    """
    times: dict[str, float] = {}
    counts = Counter(name for name, _, _ in kernels)
    begin = end = min((start for _, start, _ in kernels), default=0.0)
    busy = 0.0
    for name, start, duration in sorted(kernels, key=lambda kernel: kernel[1]):
        times[name] = times.get(name, 0.0) + duration
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    span, total = end - begin, sum(times.values())
    longest = [
        {"name": name, "ms": t / 1e6 / steps, "share": t / total, "count": counts[name] / steps}
        for name, t in sorted(times.items(), key=lambda item: -item[1])[:top]
    ]
    for kernel in longest:
        print(f"{kernel['ms']:9.3f} ms {100 * kernel['share']:5.1f} % {kernel['count']:6.1f}x  {kernel['name'][:90]}")
    found = {
        "busy_ms": busy / 1e6 / steps,
        "span_ms": span / 1e6 / steps,
        "idle_share": 1 - busy / span if span else 1.0,
    }
    return found | ({"kernels": longest} if top else {})


def _lines(command: list[str], seconds: float) -> Iterator[str]:
    """Runs a command and yields its lines. After the time limit it gets SIGTERM, and 30 s later SIGKILL."""
    limit = ["timeout", "--signal=TERM", "--kill-after=30", f"{max(1.0, seconds - 30)}"]
    with subprocess.Popen(
        [*limit, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=machine.ROOT
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield line.rstrip()
        except BaseException:
            process.terminate()
            raise
        yield f"exit status {process.wait()}"


def main(part: Part) -> int:
    """Appends the records of a part; returns 1 if one of them did not pass."""
    where = {"benchmark": "gpu", "part": type(part).__name__.lower(), "name": part.name}
    where |= machine.describe(jax.devices()[0])
    passed = True
    for record in part.records():
        machine.append(part.output, machine.rounded(where | record))
        passed &= record.get("passed", True)
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(
            main(
                tyro.cli(
                    Note | Tests | Agreement | Kernels | Folder | Training,
                    description=__doc__,
                    prog="python -m benchmarks.gpu",
                )
            )
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
