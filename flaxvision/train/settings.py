"""The settings of how a run is carried out, which all experiments share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from flaxvision import processes
from flaxvision.train import input as input_lib
from flaxvision.train.reproducibility import deterministic


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How a run is carried out: where, on which devices and processes, and what is kept of it.

    An experiment subclasses it with what is trained. The text below a field is the help text of its flag. `FREE` names
    the fields that may change when a run is resumed; see `flaxvision.train.open_workdir`.
    """

    FREE: ClassVar[tuple[str, ...]] = (
        *("workdir", "data_dir", "manual_dir", "progress", "log_every", "input_timeout", "time_budget"),
        *("profile_steps", "keep_latest", "keep_best", "allow_changes", "deterministic", "shard_state"),
        *("coordinator", "num_processes", "process_id", "start_timeout", "heartbeat_timeout", "shutdown_timeout"),
    )

    workdir: str | None = None
    """Work directory of the run; a run in the same directory is resumed. Default: a folder in runs/."""
    data_dir: str | None = None
    """TFDS directory with prepared data sets. Default: that of TFDS."""
    manual_dir: str | None = None
    """Directory with the original files of a data set."""
    seed: int = 0
    """Seed of the parameters, of the order of the data and of everything else."""
    bfloat16: bool = False
    """Compute in bfloat16, with float32 parameters; for GPUs and TPUs."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the steps are compiled for several devices."""
    shard_state: bool = False
    """Keep only a part of each large array of the state on each device; the results are the same."""
    batch_norm: Literal["sync", "local", "ghost", "frozen"] = "sync"
    """Statistics of BatchNorm in training: of the whole batch, of the rows on each device, of groups of --ghost-size
    rows, or the running statistics."""
    ghost_size: int | None = None
    """Rows in a group for --batch-norm ghost."""
    eval_every: float = 1.0
    """Epochs between evaluations."""
    log_every: int = 100
    """Steps between training records."""
    keep_latest: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 1
    """Number of best checkpoints to keep."""
    allow_changes: bool = False
    """Continue a run although its training data have changed. From there on the results are no longer those of a run
    without interruption."""
    time_budget: float | None = None
    """Seconds after which the run stops and saves. Default: no limit."""
    profile_steps: str | None = None
    """Steps to trace with the profiler, such as 10:20. Default: none."""
    input_timeout: float = input_lib.TIMEOUT
    """Seconds to wait for a batch before the run ends with an error."""
    deterministic: bool = False
    """Use only operations that give the same bits in every run, on GPUs."""
    coordinator: str | None = None
    """Address HOST:PORT of process 0, for several processes outside of a cluster; see experiments/processes.md."""
    num_processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """Index of this process, with --coordinator."""
    start_timeout: float = processes.TIMEOUT
    """Seconds to wait for the other processes to start."""
    heartbeat_timeout: float = 60.0
    """Seconds without a sign of life after which a process counts as dead and the others exit."""
    shutdown_timeout: float = processes.TIMEOUT
    """Seconds to wait for the other processes at the end."""
    progress: bool = True
    """Show the progress bar."""

    def start(self) -> None:
        """Sets the flags of XLA and joins the processes. Call it before anything else uses JAX.

        Raises:
            ValueError: See `flaxvision.train.initialize`.
            RuntimeError: JAX was used before.
        """
        if self.deterministic:
            deterministic()
        processes.initialize(
            self.coordinator,
            self.num_processes,
            self.process_id,
            start_timeout=self.start_timeout,
            heartbeat_timeout=self.heartbeat_timeout,
            shutdown_timeout=self.shutdown_timeout,
        )

    def model_overrides(self, fields: Collection[str], num_classes: int) -> dict[str, Any]:
        """Returns the fields of a model that the settings determine.

        Args:
            fields: Names of the fields that the model has, such as `flaxvision.model_fields(model)`.
            num_classes: Number of classes.

        Raises:
            ValueError: The model has no BatchNorm, and `batch_norm` or `ghost_size` is not the default.
        """
        overrides: dict[str, Any] = {"num_classes": num_classes, "dtype": jnp.bfloat16 if self.bfloat16 else None}
        for field, default in (("batch_norm", "sync"), ("ghost_size", None)):
            value = getattr(self, field)
            if value == default:
                continue
            if field not in fields:
                raise ValueError(f"--{field.replace('_', '-')} must be left out for a model without it; got {value}")
            overrides[field] = value
        return overrides

    @property
    def step_options(self) -> dict[str, Any]:
        """The options of `flaxvision.train.compile_steps`."""
        return {"parallel": self.parallel, "shard_state": self.shard_state}

    def fit_options(self, title: str) -> dict[str, Any]:
        """Returns options of `flaxvision.train.fit_in_workdir` for a classifier; the progress bar has the title."""
        names = ("keep_latest", "keep_best", "allow_changes", "time_budget", "profile_steps", "input_timeout")
        options = {name: getattr(self, name) for name in (*names, "log_every")}
        best = {"best_metric": "accuracy", "best_mode": "max"}
        return options | best | {"progress": title if self.progress else None}


def eval_batch_size(wanted: int) -> int:
    """Returns the smallest multiple of the number of devices that is at least `wanted`.

    The results of an evaluation do not depend on its batch size, because padded rows do not count.
    """
    return -(-wanted // jax.device_count()) * jax.device_count()
