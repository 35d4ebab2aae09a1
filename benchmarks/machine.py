"""What a figure was measured on: device, versions, commit, time."""

from __future__ import annotations

import datetime
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib

from flaxvision.train.workdir import commit


def describe(device: Any, count: int = 1) -> dict[str, Any]:
    """The fields that every line in `benchmarks/results` has.

    Args:
        device: What was measured on.
        count: How many of them.

    Returns:
        `time` (UTC), `commit` (with `+` where files differ), `device` (its name), `devices`, `platform`, the host's
        `cpu` and `cores`, `load_before` (the processes that ran in the last minute: much above 0 spoils figures),
        `matmul_precision` (JAX's; "default" means TF32 for float32 on NVIDIA GPUs since Ampere) and the versions.
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
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
    }


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory(device: Any) -> tuple[int | None, str]:
    """The most memory so far, in bytes, and whose it is: the device's where it keeps count, else this process's RSS."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"]), "device peak_bytes_in_use"
    if sys.platform == "win32":
        return None, "unknown"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "process peak RSS"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()
