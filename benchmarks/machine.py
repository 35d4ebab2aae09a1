"""Where a figure was measured (device, versions, commit, load), and the files of JSON lines that keep figures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = (
    RESULTS,
    ROOT / "parity" / "ledger.jsonl",
    ROOT / "parity" / "ledger.md",
    *(ROOT / "parity" / f"detection.{end}" for end in ("jsonl", "md")),
)
COMMIT_VARIABLE = "FLAXVISION_COMMIT"


def describe(device: Any, count: int = 1) -> dict[str, Any]:
    """Returns the fields that every recorded figure has.

    Args:
        device: The device that was measured.
        count: The number of devices.

    Returns:
        `time` (UTC), `commit` (see `commit`), `device` (its name), `devices`, `platform`, the host's `cpu` and `cores`,
        `load_before` (the one-minute load average: figures are reliable only when it is close to 0),
        `matmul_precision` (JAX's setting; "default" means TF32 for float32 on NVIDIA GPUs since Ampere), `xla_flags`
        and the versions of Python, JAX and Flax.
    """
    cpu = _cpu_name()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": cpu if device.platform == "cpu" else device.device_kind,
        "devices": count,
        "platform": device.platform,
        "cpu": cpu,
        "cores": cores(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "matmul_precision": str(jax.config.jax_default_matmul_precision or "default"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
    }


def commit(checkout: Path = ROOT) -> str | None:
    """Returns the commit of a checkout.

    Args:
        checkout: The root of the checkout.

    Returns:
        40 hexadecimal digits, followed by `+` if files other than recorded results differ from the commit. Where there
        is no git repository, the value of the environment variable `FLAXVISION_COMMIT`, or None if it is not set.
    """
    head = _git(checkout, "rev-parse", "HEAD")
    if head is None:
        return os.environ.get(COMMIT_VARIABLE)
    return head.strip() + ("+" if changed_files(checkout) else "")


def changed_files(checkout: Path = ROOT) -> list[str]:
    """Returns the files of a checkout that are not committed, except recorded results."""
    recorded = [f":(exclude){path.relative_to(ROOT)}" for path in COMMITTED]
    status = _git(checkout, "status", "--porcelain", "--", ".", *recorded) or ""
    return [line[3:] for line in status.splitlines()]


def check_output(path: Path | None) -> None:
    """Checks, before anything is measured, that `append` will accept the file.

    Args:
        path: The file of JSON lines, or None if nothing is written.

    Raises:
        ValueError: The file is one of the recorded results, and the commit is not known or not clean.
    """
    if path is not None and _is_committed(path):
        check_commit(commit())


def check_commit(found: str | None) -> None:
    """Checks the result of `commit`.

    Raises:
        ValueError: The commit is not known, or files differ from it.
    """
    if found is None:
        raise ValueError(f"commit is unknown: this is not a git repository; set {COMMIT_VARIABLE} to the commit's hash")
    if not re.fullmatch("[0-9a-f]{40}", found):
        problem = ", ".join(changed_files()) or f"{COMMIT_VARIABLE}={found}"
        raise ValueError(
            f"working tree differs from the commit: {problem}; commit first, or pass --output PATH to write a file "
            "outside of the recorded results"
        )


def append(path: Path, record: dict[str, Any]) -> None:
    """Appends a record to a file of JSON lines.

    Args:
        path: The file, created with its folder if necessary.
        record: The record, with the fields of `describe`.

    Raises:
        ValueError: The file is one of the recorded results, and the record's commit is not clean.
    """
    if _is_committed(path):
        check_commit(record["commit"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory(device: Any) -> tuple[int | None, str]:
    """Returns the peak memory so far, in bytes, and what it counts: the device's memory, or this process's RSS."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"]), "device peak_bytes_in_use"
    if sys.platform == "win32":
        return None, "unknown"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "process peak RSS"


def rounded(value: Any) -> Any:
    """Rounds every float of a record to six significant digits."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _is_committed(path: Path) -> bool:
    path = path.resolve()
    return any(path == kept or kept in path.parents for kept in COMMITTED)


def _git(checkout: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(checkout), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()
