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
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import numpy as np

from flaxvision import atomic, checkpoint, plot
from flaxvision.train import loop, writers
from flaxvision.train.state import TrainState
from flaxvision.train.step import Transform

PACKAGES = ("flaxvision", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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


def _defaults(config: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}


def open_workdir(path: str | os.PathLike[str], config: Any, *, free: Collection[str] = ()) -> Path:
    """Creates the work directory of a run, or opens it again for the same run.

    Args:
        path: The directory.
        config: A dataclass of JSON values with all settings of the run.
        free: Fields that may change when the run is resumed, such as the location of the data.

    Returns:
        The directory. Its `config.json` holds the settings, the versions, the commit and the command.

    Raises:
        ValueError: The directory is a file, its `config.json` cannot be read, or it holds records or checkpoints of a
            run with other settings; the message names each setting with both values.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"the work directory must be a directory; got the file {path}")
    path.mkdir(parents=True, exist_ok=True)
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
            return path
    written = {"config": settings, "versions": versions(), "commit": commit(), "command": sys.argv}
    with atomic.replacing(file) as partial:
        partial.write_text(json.dumps(written, indent=2) + "\n")
    return path


def fit_in_workdir(
    path: str | os.PathLike[str],
    state: TrainState,
    step: Callable[..., Any],
    data: Any,
    *,
    model: str,
    overrides: dict[str, Any],
    num_steps: int,
    best_metric: str = "accuracy",
    best_mode: Literal["min", "max"] = "max",
    progress: str | None = None,
    **options: Any,
) -> loop.FitResult:
    """Runs `flaxvision.train.fit` with its checkpoints and records in a directory.

    Prints a line if the run ended early.

    Args:
        path: The directory, opened by `open_workdir`. It gets `metrics.jsonl`, `tensorboard` and `checkpoints`.
        state: See `fit`.
        step: See `fit`.
        data: Batches with a `fingerprint`, such as those of `flaxvision.data.train_batches`.
        model: Name of the registered model, for the manifest of the checkpoints.
        overrides: Its fields: JSON values, or a dtype.
        num_steps: See `fit`.
        best_metric: Metric of the evaluation by which the best checkpoint is chosen.
        best_mode: Whether a larger (`"max"`) or a smaller (`"min"`) value is better.
        progress: Title of a progress bar; None shows none.
        **options: Further options of `fit`.

    Returns:
        The `FitResult`. After early stopping its state is that of the best checkpoint.

    Raises:
        OSError: The directory cannot be written. It is raised before the first step.
        ValueError: See `fit` and `flaxvision.checkpoint.Checkpoints`.
        FloatingPointError: See `fit`.
    """
    path = Path(path)
    records: list[Any] = [
        writers.JsonlWriter(path / "metrics.jsonl"),
        writers.TensorBoardWriter(path / "tensorboard"),
    ]
    if progress is not None:
        records.append(writers.ProgressBar(num_steps, data.batch_size, desc=progress))
    manifest = {
        "model": model,
        "overrides": overrides | {"dtype": np.dtype(overrides.get("dtype") or "float32").name},
        "data": data.fingerprint,
        "versions": versions(),
    }
    with checkpoint.Checkpoints(
        path / "checkpoints", manifest=manifest, best_metric=best_metric, best_mode=best_mode
    ) as checkpoints:
        checkpoints.prepare()  # fails now, and not after the first epoch, if the directory cannot be written
        result = loop.fit(state, step, data, num_steps=num_steps, checkpoints=checkpoints, writers=records, **options)
        if options.get("early_stopping") and (restored := checkpoints.restore_best(result.state)) is not None:
            result = dataclasses.replace(result, state=restored.state)
            print(f"the best evaluation was at step {restored.step}")
    if result.stopped in ("SIGTERM", "SIGINT"):
        print(f"stopped by {result.stopped} after step {int(result.state.step)}; run the same command to resume")
    return result


def draw_samples(path: str | os.PathLike[str], batches: Any, transform: Transform, rng: jax.Array) -> None:
    """Draws up to 32 images of the first batch of a run after a transform.

    Args:
        path: The picture to write.
        batches: Batches with a `source`, such as those of `flaxvision.data.train_batches`.
        transform: `(rng, batch) -> batch` with images in [0, 1], such as the augmentations without standardization.
        rng: The key of the transform.
    """
    with batches.from_step(0) as iterator:
        first = {key: values[:32] for key, values in next(iterator).items()}
    images = np.asarray(jax.jit(transform)(rng, first)["image"])
    plot.image_grid(images, first["label"], batches.source.classes, path=path)


def run_experiment(main: Callable[[Any], int], parse: Callable[[], Any]) -> NoReturn:
    """Runs an experiment as a program: reads its flags, runs it and exits.

    SIGTERM ends the program with status 0. In the training loop, which has its own handler, the run is saved first.
    An expected error, such as a setting out of range, ends it with status 1 and a line instead of a traceback.

    Args:
        main: The experiment, which maps its settings to an exit status.
        parse: Reads the settings from the command line.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        sys.exit(main(parse()))
    except (ValueError, ArithmeticError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
