"""The settings that the training experiments share."""

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
    """Settings of a run that do not depend on the model: directories, devices, processes, logging and checkpoints.

    An experiment subclasses it and adds its own settings. The text below a field is the help text of its flag. `FREE`
    contains the fields that may change when a run is resumed; see `flaxvision.train.open_workdir`.
    """

    FREE: ClassVar[tuple[str, ...]] = (
        *("workdir", "data_dir", "manual_dir", "progress", "log_every", "input_timeout", "time_budget"),
        *("dataset", "skip_broken"),  # the fingerprint in the checkpoints compares the examples themselves
        *("profile_steps", "keep_latest", "keep_best", "allow_changes", "deterministic", "shard_state"),
        *("coordinator", "num_processes", "process_id", "start_timeout", "heartbeat_timeout", "shutdown_timeout"),
        "stall_timeout",
    )

    workdir: str | None = None
    """Work directory of the run. A run that is already there is resumed. Default: a directory in runs/."""
    data_dir: str | None = None
    """Directory of prepared TFDS data sets. Default: that of TFDS."""
    manual_dir: str | None = None
    """Directory with the original files of a data set."""
    seed: int = 0
    """Seed of the parameters, the data order and all other randomness."""
    bfloat16: bool = False
    """Compute in bfloat16 with float32 parameters. Only useful on GPUs and TPUs."""
    parallel: Literal["jit", "pmap"] = "jit"
    """JAX transformation that compiles the steps for several devices."""
    shard_state: bool = False
    """Shard the large arrays of the state over the devices, to save memory. The results are the same."""
    batch_norm: Literal["sync", "local", "ghost", "frozen"] = "sync"
    """Statistics of BatchNorm in training. sync: of the whole batch; local: of the rows on each device; ghost: of
    groups of --ghost-size rows; frozen: the running statistics."""
    ghost_size: int | None = None
    """Rows per group for --batch-norm ghost."""
    eval_every: float = 1.0
    """Epochs between evaluations."""
    log_every: int = 100
    """Steps between training records."""
    keep_latest: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 1
    """Number of best checkpoints to keep."""
    allow_changes: bool = False
    """Resume a run although its training data have changed. Its results then differ from those of an uninterrupted
    run."""
    time_budget: float | None = None
    """Seconds after which the run saves and stops. Default: no limit."""
    profile_steps: str | None = None
    """First and last step to profile, such as 10:20. Default: none."""
    input_timeout: float = input_lib.TIMEOUT
    """Seconds to wait for a batch before the run fails."""
    deterministic: bool = False
    """Use only deterministic operations on GPUs, so that results are bit-identical in every run. Slower."""
    coordinator: str | None = None
    """Address HOST:PORT of process 0, for several processes without a cluster; see experiments/processes.md."""
    num_processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """Index of this process, with --coordinator."""
    start_timeout: float = processes.TIMEOUT
    """Seconds to wait for the other processes to start."""
    heartbeat_timeout: float = 60.0
    """Seconds without a heartbeat after which a process counts as dead and the others exit."""
    shutdown_timeout: float = processes.TIMEOUT
    """Seconds that a finished process waits for the others."""
    stall_timeout: float = processes.STALL_TIMEOUT
    """Seconds that a process may take for a step, a batch of an evaluation or an answer to the others, before all
    exit. Longer than the longest compilation."""
    progress: bool = True
    """Show the progress bar."""

    def start(self) -> None:
        """Sets the XLA flags and connects the processes. Call it before anything else uses JAX.

        Raises:
            ValueError: See `flaxvision.train.initialize`.
            ProcessError: See `flaxvision.train.initialize`.
            RuntimeError: JAX has already been used.
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
            stall_timeout=self.stall_timeout,
        )

    def model_overrides(self, fields: Collection[str], num_classes: int) -> dict[str, Any]:
        """Returns the model overrides that the settings determine.

        Args:
            fields: Names of the fields that the model has, such as `flaxvision.model_fields(model)`.
            num_classes: Number of classes.

        Raises:
            ValueError: `batch_norm` or `ghost_size` is set, but the model has no such field.
        """
        overrides: dict[str, Any] = {"num_classes": num_classes, "dtype": jnp.bfloat16 if self.bfloat16 else None}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for field in ("batch_norm", "ghost_size"):
            value = getattr(self, field)
            if value == defaults[field]:
                continue
            if field not in fields:
                raise ValueError(f"--{field.replace('_', '-')} must be left out for a model without it; got {value}")
            overrides[field] = value
        return overrides

    @property
    def step_options(self) -> dict[str, Any]:
        """Options for `flaxvision.train.compile_steps`."""
        return {"parallel": self.parallel, "shard_state": self.shard_state}

    def fit_options(self, title: str) -> dict[str, Any]:
        """Returns options for `fit_in_workdir` that suit a classifier. `title` is the title of the progress bar."""
        names = ("keep_latest", "keep_best", "allow_changes", "time_budget", "profile_steps", "input_timeout")
        options = {name: getattr(self, name) for name in (*names, "log_every")}
        best = {"best_metric": "accuracy", "best_mode": "max"}
        return options | best | {"progress": title if self.progress else None}


def eval_batch_size(wanted: int) -> int:
    """Returns the smallest multiple of the number of devices that is at least `wanted`.

    The batch size does not change the results of an evaluation, because padded rows do not count.
    """
    return -(-wanted // jax.device_count()) * jax.device_count()
