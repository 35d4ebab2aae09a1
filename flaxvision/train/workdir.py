"""Runs as programs: the work directory with settings, records and checkpoints, and the main function."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import numpy as np

from flaxvision import atomic, checkpoint, plot, processes
from flaxvision.checkpoint import folders
from flaxvision.train import callbacks as callbacks_lib
from flaxvision.train import input as input_lib
from flaxvision.train import lock, loop, writers
from flaxvision.train.state import TrainState
from flaxvision.train.step import Transform

PACKAGES = ("flaxvision", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
FLAGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    import flaxvision  # works without an installation too

    found = {p: importlib.metadata.version(p) for p in PACKAGES if p != "flaxvision"}
    return {"python": platform.python_version(), "flaxvision": flaxvision.__version__} | found


def commit() -> str | None:
    """Returns the commit of the checkout that flaxvision is imported from, or None without git.

    A `+` at the end means that tracked files differ from the commit.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def run_info(fingerprint: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns what the results of a run depend on, as JSON values; it is stored beside every checkpoint.

    Args:
        fingerprint: That of the training data.
    """
    flags = {name: getattr(jax.config, name, None) for name in FLAGS}
    flags |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {
        "versions": versions(),
        "commit": commit(),
        "command": sys.argv,
        "flags": flags,
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "seed": (fingerprint or {}).get("seed"),
        "data": fingerprint,
    }


def _defaults(config: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}


def open_workdir(path: str | os.PathLike[str], config: Any, *, free: Collection[str] = ()) -> Path:
    """Creates the work directory of a run, or opens it again for the same run, and locks it.

    The lock lasts until the process ends; `flaxvision.train.lock.release` gives it back before. With several processes,
    process 0 does all this, and its error is raised in all of them.

    Args:
        path: The directory, on storage that all processes share.
        config: A dataclass of JSON values with all settings of the run.
        free: Fields that may change when the run is resumed, such as the location of the data.

    Returns:
        The directory. Its `config.json` holds the settings, the versions, the commit and the command.

    Raises:
        ValueError: The directory is a file or a URL, its `config.json` cannot be read, or it holds records or
            checkpoints of a run with other settings; the message names each setting with both values.
        WorkdirInUseError: Another run uses the directory; the message names its process.
    """
    path = folders.local(path, "the work directory")
    processes.on_first("open the work directory", lambda: _open(path, config, free))
    return path


def _open(path: Path, config: Any, free: Collection[str]) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"the work directory must be a directory; got the file {path}")
    path.mkdir(parents=True, exist_ok=True)
    lock.acquire(path)
    file = path / "config.json"
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if file.exists():
        try:
            old = json.loads(file.read_text())["config"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}); move the directory away or choose another --workdir"
            ) from error
        # A setting that was added after the run began had its default value then.
        old = json.loads(json.dumps(_defaults(config))) | old
        differ = [
            f"{k} was {old.get(k)!r}, now {settings.get(k)!r}"
            for k in sorted(set(old) | set(settings))
            if k not in free and old.get(k) != settings.get(k)
        ]
        begun = any((path / "checkpoints").glob("*")) or any(p.stat().st_size for p in path.glob("metrics.jsonl"))
        if differ and begun:
            raise ValueError(f"{path} holds another run: {'; '.join(differ)}; choose another --workdir")
        if not differ:
            return
    written = {"config": settings, "versions": versions(), "commit": commit(), "command": sys.argv}
    with atomic.replacing(file) as partial:
        partial.write_text(json.dumps(written, indent=2) + "\n")


def fit_in_workdir(
    path: str | os.PathLike[str],
    state: TrainState,
    step: Callable[..., Any],
    data: Any,
    *,
    model: str,
    overrides: dict[str, Any],
    num_steps: int,
    best_metric: str | None = None,
    best_mode: Literal["min", "max"] = "min",
    keep_latest: int = 2,
    keep_best: int = 1,
    progress: str | None = None,
    profile_steps: str | None = None,
    allow_changes: bool = False,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> loop.FitResult:
    """Runs `flaxvision.train.fit` with its checkpoints and records in a directory.

    Prints a line if the run ended early. With several processes, records and lines are those of process 0, and all
    processes write the checkpoints.

    Args:
        path: The directory, opened by `open_workdir`. It gets `metrics.jsonl`, `tensorboard` and `checkpoints`.
        state: See `fit`.
        step: See `fit`.
        data: Batches with a `fingerprint`, such as those of `flaxvision.data.train_batches`.
        model: Name of the registered model, for the manifest of the checkpoints.
        overrides: Its fields: JSON values, or a dtype.
        num_steps: See `fit`.
        best_metric: Metric of the evaluation by which the best checkpoint is chosen. None takes metric and mode of
            `early_stopping`, or the lowest loss.
        best_mode: Whether a larger (`"max"`) or a smaller (`"min"`) value is better.
        keep_latest: Number of newest checkpoints to keep.
        keep_best: Number of best checkpoints to keep.
        progress: Title of a progress bar; None shows none.
        profile_steps: Steps to trace, such as `"10:20"`, into the directory `profile`; None traces none. With several
            processes, each one has a directory in it.
        allow_changes: Whether the run may continue with other training data than it began with, for example after a
            damaged file was replaced. What differs is logged; from there on the run is no longer the one that an
            uninterrupted run would have been.
        callbacks: See `fit`.
        **options: Further options of `fit`.

    Returns:
        The `FitResult`. After early stopping its state is that of the best checkpoint.

    Raises:
        OSError: The directory cannot be written. It is raised before the first step.
        ValueError: See `fit` and `flaxvision.checkpoint.Checkpoints`.
        FloatingPointError: See `fit`.
    """
    path = Path(path)
    fingerprints = processes.gather("training data", data.fingerprint)
    if any(fingerprint != fingerprints[0] for fingerprint in fingerprints):
        raise ValueError("data must be the same in all processes; got training data of different fingerprints")
    if best_metric is None:
        stopping = options.get("early_stopping")
        best_metric, best_mode = getattr(stopping, "metric", "loss"), getattr(stopping, "mode", "min")
    callbacks = list(callbacks)
    if profile_steps is not None:
        folder = path / "profile"
        if jax.process_count() > 1:  # processes on one host would write the same file
            folder = folder / f"process{jax.process_index()}"
        callbacks.append(callbacks_lib.Profiler(folder, *callbacks_lib.step_range(profile_steps)))
    records: list[Any] = []
    first = jax.process_index() == 0
    if first:
        records += [writers.JsonlWriter(path / "metrics.jsonl"), writers.TensorBoardWriter(path / "tensorboard")]
        if progress is not None:
            records.append(writers.ProgressBar(num_steps, data.batch_size, desc=progress))
    manifest = {
        "model": model,
        "overrides": overrides | {"dtype": np.dtype(overrides.get("dtype") or "float32").name},
        "data": data.fingerprint,
        "versions": versions(),
    }
    with checkpoint.Checkpoints(
        path / "checkpoints",
        manifest=manifest,
        run=run_info(data.fingerprint),
        allow=("data",) if allow_changes else (),
        describe={"data": lambda stored, _: data.changes_since(stored)} if hasattr(data, "changes_since") else None,
        keep_latest=keep_latest,
        keep_best=keep_best,
        best_metric=best_metric,
        best_mode=best_mode,
    ) as checkpoints:
        checkpoints.prepare()  # fails now, and not after the first epoch, if the directory cannot be written
        result = loop.fit(
            state,
            step,
            data,
            num_steps=num_steps,
            checkpoints=checkpoints,
            writers=records,
            callbacks=callbacks,
            **options,
        )
        finished = result.stopped in (None, "early_stopping")
        if finished and options.get("early_stopping") is not None:
            checkpoints.allow = checkpoints.allow | {"data"}  # the best one may be older than an allowed change
            restored = checkpoints.restore_best(result.state)
            if restored is not None:
                result = dataclasses.replace(result, state=restored.state)
                print_once(f"the best evaluation was at step {restored.step}")
    if not finished:
        cause = "the time budget" if result.stopped == "time_budget" else result.stopped
        print_once(f"stopped by {cause} after step {int(result.state.step)}; run the same command to resume")
    return result


def draw_samples(path: str | os.PathLike[str], batches: Any, transform: Transform, rng: jax.Array) -> None:
    """Draws up to 32 images of the first batch of a run after a transform. With several processes, process 0 does.

    Args:
        path: The picture to write.
        batches: Batches with a `source`, such as those of `flaxvision.data.train_batches`.
        transform: `(rng, batch) -> batch` with images in [0, 1], such as the augmentations without standardization.
        rng: The key of the transform.
    """
    if jax.process_index() != 0:
        return
    with batches.from_step(0) as iterator:
        first = {key: values[:32] for key, values in next(iterator).items()}
    images = np.asarray(jax.jit(transform)(rng, first)["image"])
    plot.image_grid(images, first["label"], batches.source.classes, path=path)


def print_once(*values: Any, **options: Any) -> None:
    """Prints on process 0 only; the arguments are those of `print`."""
    if jax.process_index() == 0:
        print(*values, **options)


def run_experiment(main: Callable[[Any], int], parse: Callable[[], Any]) -> NoReturn:
    """Runs an experiment as a program: reads its flags, runs it and exits.

    SIGTERM ends the program with status 0. In the training loop, which has its own handler, the run is saved first.
    With several processes, SIGTERM to any of them ends all of them with status 0, within seconds.
    An expected error, such as a setting out of range, ends it with status 1 and a line instead of a traceback.

    Args:
        main: The experiment, which maps its settings to an exit status.
        parse: Reads the settings from the command line.
    """

    def terminated(number: int, frame: Any) -> NoReturn:
        processes.terminate("SIGTERM")
        sys.exit(0)

    signal.signal(signal.SIGTERM, terminated)
    try:
        with processes.failures():
            status: int | str = main(parse())
    except (ValueError, ArithmeticError, OSError, RuntimeError) as error:
        status = "\n".join([f"error: {error}", *getattr(error, "__notes__", ())])
        processes.fail(str(error))
    if input_lib.hung():  # the interpreter would wait for the threads of the pipeline
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    sys.exit(status)
