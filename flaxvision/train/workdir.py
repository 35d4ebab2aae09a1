"""A run's folder: `config.json` says what the run is, and another run is refused there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

PACKAGES = ("flaxvision", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


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
    new = file.with_suffix(".new")
    new.write_text(json.dumps(written, indent=2) + "\n")
    os.replace(new, file)
    return path
