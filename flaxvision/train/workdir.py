"""A run's folder: `config.json` says what the run is, another run is refused there, and its records lie beside it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxvision import atomic, checkpoint
from flaxvision.train import loop, writers
from flaxvision.train.state import TrainState

PACKAGES = ("flaxvision", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


def commit() -> str | None:
    """The commit of the working tree that flaxvision is imported from, with `+` if files differ; None without git."""
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
    """Makes a run's folder, or opens it again for the same run.

    Args:
        path: The folder.
        config: A dataclass of JSON values: every setting of the run.
        free: Fields that may change when the run goes on, such as where the data lies.

    Returns:
        The folder. `config.json` in it holds the settings, the versions, the commit and the command.

    Raises:
        ValueError: The folder is a file, its `config.json` can't be read, or it holds a run with other settings that
            has records or checkpoints; the message names each setting with both values.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"the work directory {path} is a file")
    path.mkdir(parents=True, exist_ok=True)
    file = path / "config.json"
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if file.exists():
        try:
            old = json.loads(file.read_text())["config"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); move the folder away or give another --workdir") from error
        # A setting that is newer than the run had its default then.
        old = json.loads(json.dumps(_defaults(config))) | old
        differ = [
            f"{k} was {old.get(k)!r}, now {settings.get(k)!r}"
            for k in sorted(set(old) | set(settings))
            if k not in free and old.get(k) != settings.get(k)
        ]
        begun = any((path / "checkpoints").glob("*")) or any(p.stat().st_size for p in path.glob("metrics.jsonl"))
        if differ and begun:
            raise ValueError(f"{path} holds another run: {'; '.join(differ)}. Give another --workdir.")
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
    """Runs `flaxvision.train.fit` with the checkpoints and records in a folder, and says how it ended.

    Args:
        path: The folder, opened by `open_workdir`: `metrics.jsonl`, `tensorboard` and `checkpoints` come into it.
        state: As `fit` takes it.
        step: Likewise.
        data: Batches with a `fingerprint`, as of `flaxvision.data.train_batches`.
        model: The registered model, for the checkpoints' manifest.
        overrides: Its fields; JSON values, or a dtype.
        num_steps: As `fit` takes it.
        best_metric: What the best checkpoint is best in.
        best_mode: Whether more of it is better.
        progress: Shows a progress bar of this name.
        **options: More of `fit`'s.

    Returns:
        The `FitResult`; after early stopping its state is the best checkpoint's.

    Raises:
        OSError: Nothing can be written in the folder; before the first step.
        ValueError: As `fit` and `flaxvision.checkpoint.Checkpoints`.
        FloatingPointError: As `fit`.
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
        checkpoints.prepare()  # a folder that can't be written fails now, not after the first epoch
        result = loop.fit(state, step, data, num_steps=num_steps, checkpoints=checkpoints, writers=records, **options)
        if options.get("early_stopping") and (restored := checkpoints.restore_best(result.state)) is not None:
            result = dataclasses.replace(result, state=restored.state)
            print(f"the best of the evaluations was at step {restored.step}")
    if result.stopped in ("SIGTERM", "SIGINT"):
        print(f"stopped by {result.stopped} after step {int(result.state.step)}; the same command goes on from there")
    return result
