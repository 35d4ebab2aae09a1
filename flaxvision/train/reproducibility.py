"""What makes a run repeat its results bit for bit on an accelerator."""

from __future__ import annotations

import os

from jax._src import xla_bridge  # the only way to ask whether a backend exists without making one

__all__ = ["FLAGS", "deterministic"]

FLAGS = ("--xla_gpu_deterministic_ops=true",)


def deterministic() -> None:
    """Makes XLA choose deterministic operations only. Call it before anything else uses JAX.

    On a CPU and a TPU, the same program gives the same bits without it. On a GPU, XLA otherwise times several
    algorithms and takes the fastest, and some of them add numbers in an order that changes from run to run. The flag
    turns off both; training becomes slower, and an operation without a deterministic implementation raises an error
    when it is compiled. The bits also depend on the kind of device, on the number of devices and processes, and on the
    versions.

    It sets `XLA_FLAGS` in the environment, so processes that this one starts inherit it. Calling it twice is harmless.

    Raises:
        RuntimeError: JAX has already started a backend, which has read its flags.
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
