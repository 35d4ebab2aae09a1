"""Bit-identical results on accelerators."""

from __future__ import annotations

import os

from jax._src import xla_bridge  # the only way to ask whether a backend exists without making one

__all__ = ["FLAGS", "deterministic"]

FLAGS = ("--xla_gpu_deterministic_ops=true",)


def deterministic() -> None:
    """Makes XLA use only deterministic operations. Call it before anything else uses JAX.

    It is only needed on GPUs. CPUs and TPUs give bit-identical results without it. By default, XLA for GPUs times
    several algorithms and uses the fastest one. Some of these algorithms add numbers in an order that varies from run
    to run. The flag disables both. Training becomes slower, and compiling an operation without a deterministic
    implementation raises an error. Results still depend on the type of the device, on the number of devices and
    processes, and on the versions.

    It sets `XLA_FLAGS` in the environment, which child processes inherit. Calling it twice has no further effect.

    Raises:
        RuntimeError: JAX has already initialized a backend, which has read its flags.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    missing = [flag for flag in FLAGS if flag not in flags]
    if not missing:
        return
    if xla_bridge.backends_are_initialized():
        raise RuntimeError("deterministic() must be called before JAX is used; got a call after a backend was started")
    names = {flag.partition("=")[0] for flag in missing}
    kept = [flag for flag in flags if flag.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join([*kept, *missing])
