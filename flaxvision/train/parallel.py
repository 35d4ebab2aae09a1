"""Compiles steps for several devices, and copies batches to the devices ahead of time."""

from __future__ import annotations

import collections
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxvision.layers import batch_context
from flaxvision.train.objectives import Objective
from flaxvision.train.sharding import place, state_sharding
from flaxvision.train.step import Transform, eval_step, train_step

AXIS = "data"

logger = logging.getLogger(__name__)


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a one-dimensional mesh with the axis `"data"`.

    Args:
        devices: The devices; None for all devices of all processes.

    Returns:
        The mesh. The type of its axis is Auto, because Linen's Dropout fails under Explicit axes. The devices of a
        process are adjacent, so the row order of a global batch does not depend on the number of processes.

    Raises:
        ValueError: The processes have different numbers of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if jax.process_count() == 1:
        return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    counts = collections.Counter(device.process_index for device in devices)
    if len(counts) != jax.process_count() or len(set(counts.values())) != 1:
        raise ValueError(f"all processes must have the same number of devices; got {dict(counts)} by process")
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


class CompiledStep:
    """A step for several devices, compiled by `jit_step` or `pmap_step`.

    A call with a key is a train step and donates the state.

    With several processes, each process passes its own rows. The global batch is their concatenation in the order of
    the process indices. All processes must call the step the same number of times.

    The state may come from `create_state`, a checkpoint or a step with another layout. It is moved to the devices if
    necessary. With several processes, moving also checks that all of them have the same state.

    Attributes:
        mesh: The mesh of devices.
        batch_sharding: The sharding of the batches, to be passed to `prefetch`.
    """

    def __init__(
        self,
        mesh: Mesh,
        layout: Callable[[Any], Any],
        run: Callable[..., Any],
        lower: Callable[..., jax.stages.Lowered],
    ):
        self.mesh, self.batch_sharding = mesh, NamedSharding(mesh, P(AXIS))
        self._layout, self._run, self._lower = layout, run, lower
        self._layouts: dict[Any, list[Any]] = {}
        self._rng: tuple[Any, Any] = (None, None)

    def __call__(self, state: Any, batch: dict[str, Any], *rng: jax.Array) -> Any:
        """Runs the step: `(state, batch, rng) -> (state, metrics)`, or `(state, batch) -> metrics`.

        Raises:
            ValueError: The batch size is not a multiple of the number of devices, or the processes have different
                states.
        """
        check_divides(batch, self.batch_sharding)
        state = self.place(state, donate=bool(rng))
        if jax.process_count() > 1:
            batch = _place(batch, self.batch_sharding)
            if rng:
                rng = (self._global_rng(*rng),)
        return self._run(state, batch, *rng)

    def place(self, state: Any, *, donate: bool = False) -> Any:
        """Moves a state to the devices with the layout of the step.

        A call of the step does this too. To evaluate a state several times, place it once first.

        Args:
            state: A state. It is returned unchanged if it already has the layout.
            donate: Whether to free each array after it is copied.

        Raises:
            ValueError: The processes have different states.
        """
        leaves, structure = jax.tree.flatten(state)
        key = _signature(state)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = jax.tree.leaves(self._layout(state))
        if all(getattr(x, "sharding", None) == sharding for x, sharding in zip(leaves, layout, strict=True)):
            return state
        return place(state, jax.tree.unflatten(structure, layout), donate=donate)

    def state_sharding(self, state: Any) -> Any:
        """Returns the layout of a state in this step, as a tree of shardings."""
        return self._layout(state)

    def lower(self, state: Any, batch: dict[str, Any], *rng: Any, **options: Any) -> jax.stages.Lowered:
        """Lowers the step without running it. The arguments are arrays or `jax.ShapeDtypeStruct`."""
        return self._lower(state, batch, *rng, **options)

    def _global_rng(self, rng: jax.Array) -> jax.Array:
        if self._rng[0] is not rng:  # it is the same at every step
            self._rng = rng, place(rng, NamedSharding(self.mesh, P()))
        return self._rng[1]


def jit_step(step: Callable[..., Any], mesh: Mesh | None = None, *, shard_state: bool = False) -> CompiledStep:
    """Compiles a step with `jax.jit`. The batch is sharded over the mesh, and everything else is replicated.

    The step sees the global batch, so leave the `axis_name` of the model None. `layers.BatchNorm` computes the
    statistics of its mode. Linen's BatchNorm is always synchronized. Except for mode `"local"`, results do not depend
    on the number of devices or processes, up to the order of sums.

    Two options of a train step can send the whole batch to every device. Mixup and CutMix always do, because they
    combine rows of the global batch. `accumulate` does if `batch size / accumulate` is not a multiple of the number of
    devices. In this case a warning is logged.

    Args:
        step: `train_step`, `eval_step` or any function `(state, batch[, rng])`, with its options bound by `partial`. A
            call with a key is a train step. It donates the state, so use the returned state.
        mesh: The mesh; None for `make_mesh()`.
        shard_state: Whether to shard the large arrays of the state (parameters, optimizer state, moving average) over
            the devices; see `state_sharding`. Each device then holds about `1 / devices` of the state, and gathers the
            parameters of a layer when it computes the layer. The results are the same. A train step must return the
            state and the metrics.

    Returns:
        The compiled step.
    """
    mesh = make_mesh() if mesh is None else mesh
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    layout = partial(state_sharding, mesh=mesh) if shard_state else partial(_everywhere, replicated)
    programs: dict[Any, Any] = {}
    checked = _warn_of_gather(step, mesh)

    def body(*args):
        with batch_context(shards=mesh.shape[AXIS]):
            return checked(*args)

    def program(state: Any, train: bool) -> jax.stages.Wrapped:
        key = train, _signature(state) if shard_state else None
        if key not in programs:
            where = layout(state) if shard_state else replicated
            if train:
                out = (where, replicated) if shard_state else replicated
                options = {"in_shardings": (where, sharded, replicated), "out_shardings": out, "donate_argnums": 0}
            else:
                options = {"in_shardings": (where, sharded), "out_shardings": replicated}
            programs[key] = jax.jit(body, **options)
        return programs[key]

    return CompiledStep(
        mesh,
        layout,
        lambda state, batch, *rng: program(state, bool(rng))(state, batch, *rng),
        lambda state, batch, *rng, **options: program(state, bool(rng)).trace(state, batch, *rng).lower(**options),
    )


def pmap_step(step: Callable[..., Any], devices: Sequence[Any] | None = None) -> CompiledStep:
    """Compiles a step with `jax.pmap`. The step sees the rows of one device, and the mapped axis is `"data"`.

    Gradients and metrics are reduced over the devices of all processes. The modes of `layers.BatchNorm` mean the same
    as under `jit_step`, and the model needs no `axis_name`. Linen's BatchNorm without an `axis_name` normalizes by the
    rows of each device, and the running statistics are averaged over devices. Each device draws its own numbers for
    dropout and augmentation. Results therefore depend on the number of devices, but not on the number of processes.

    Args:
        step: `train_step` or `eval_step` with its options bound by `partial`. It is called with `axis_name="data"`.
        devices: The devices; None for all devices of all processes.

    Returns:
        The compiled step. Batches and states have no device axis, as for `jit_step`, so the two can share a state.
    """
    mesh = make_mesh(devices)
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    devices = list(mesh.devices.flat)

    def per_device(state, batch, *rng):
        return step(state, batch, *rng, axis_name=AXIS)

    train = jax.pmap(per_device, AXIS, in_axes=(None, 0, None), out_axes=None, devices=devices, donate_argnums=0)
    evaluate = jax.pmap(per_device, AXIS, in_axes=(None, 0), out_axes=None, devices=devices)
    split = jax.jit(partial(_split, len(devices)), in_shardings=(sharded,), out_shardings=sharded)

    def run(state, batch, *rng):
        out = (train if rng else evaluate)(state, split(batch), *rng)
        return out if jax.process_count() == 1 else jax.tree.map(partial(_join, replicated), out)

    def lower(state, batch, *rng):
        return (train if rng else evaluate).lower(state, jax.eval_shape(partial(_split, len(devices)), batch), *rng)

    return CompiledStep(mesh, partial(_everywhere, replicated), run, lower)


def compile_steps(
    objective: Objective,
    *,
    train_transform: Transform | None = None,
    eval_transform: Transform | None = None,
    accumulate: int = 1,
    use_ema: bool = False,
    parallel: Literal["jit", "pmap"] = "jit",
    mesh: Mesh | None = None,
    shard_state: bool = False,
) -> tuple[CompiledStep, CompiledStep]:
    """Compiles the train step and the eval step of a run.

    Args:
        objective: The objective of both steps.
        train_transform: The transform of training batches; see `train_step`.
        eval_transform: The transform of evaluation batches; see `eval_step`.
        accumulate: See `train_step`.
        use_ema: See `eval_step`.
        parallel: `"jit"` for `jit_step`, `"pmap"` for `pmap_step`.
        mesh: The devices; None for all.
        shard_state: See `jit_step`.

    Returns:
        The train step and the eval step.

    Raises:
        ValueError: `parallel` is neither `"jit"` nor `"pmap"`, or it is `"pmap"` and `shard_state` is True.
    """
    if parallel not in ("jit", "pmap"):
        raise ValueError(f"parallel must be 'jit' or 'pmap'; got {parallel!r}")
    if shard_state and parallel == "pmap":
        raise ValueError("shard_state must be False for parallel='pmap', which replicates the state; got True")
    mesh = make_mesh() if mesh is None else mesh
    compile_step = (
        partial(jit_step, mesh=mesh, shard_state=shard_state)
        if parallel == "jit"
        else partial(pmap_step, devices=list(mesh.devices.flat))
    )
    return (
        compile_step(partial(train_step, objective=objective, transform=train_transform, accumulate=accumulate)),
        compile_step(partial(eval_step, objective=objective, transform=eval_transform, use_ema=use_ema)),
    )


def prefetch(
    batches: Iterable[dict[str, Any]], sharding: NamedSharding | None, size: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Copies batches to the devices ahead of the step that uses them.

    The copies are asynchronous: while a step runs, the next `size` batches are already on the devices or being copied.
    If `batches` raises an error, the batches before the error are yielded first.

    Args:
        batches: Batches of host arrays. Do not write to an array after yielding it, since it may not be copied yet.
        sharding: The sharding of the batches, such as the `batch_sharding` of a compiled step. None only reads ahead,
            without copying.
        size: Number of batches ahead of the step, at least 1.

    Yields:
        The batches.

    Raises:
        ValueError: `size` is below 1, or a batch size is not a multiple of the number of devices.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    iterator, ahead, error = iter(batches), collections.deque(), None

    def fill(count: int) -> Exception | None:
        try:
            for _, batch in zip(range(count), iterator, strict=False):
                ahead.append(batch if sharding is None else _place(batch, sharding))
        except Exception as raised:
            return raised
        return None

    error = fill(size)
    while ahead:
        yield ahead.popleft()  # the caller starts its step, and then asks for the next batch
        error = error or fill(1)
    if error is not None:
        raise error


def check_divides(batch: dict[str, Any], sharding: NamedSharding) -> None:
    """Checks that the number of rows of a batch is a multiple of the number of devices of this process.

    Args:
        batch: The batch of this process, or a global batch that is already on the devices.
        sharding: The intended sharding of the batch.

    Raises:
        ValueError: The number of rows is not a multiple of the number of devices, or differs between the arrays.
    """
    rows = {len(x) for x in jax.tree.leaves(batch)}
    if len(rows) != 1:
        raise ValueError(f"the arrays of a batch must have the same number of rows; got {sorted(rows)}")
    (n,) = rows
    devices = len(sharding.addressable_devices)
    if n % devices:
        raise ValueError(
            f"the batch size must be a multiple of the {devices} devices, such as "
            f"{max(n // devices, 1) * devices}; got {n}"
        )


def _place(batch: dict[str, Any], sharding: NamedSharding) -> dict[str, Any]:
    """Starts the copy of a batch to the devices; arrays that are there already stay."""
    if all(isinstance(x, jax.Array) and x.sharding == sharding for x in jax.tree.leaves(batch)):
        return batch
    check_divides(batch, sharding)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def _everywhere(replicated: NamedSharding, state: Any) -> Any:
    return jax.tree.map(lambda _: replicated, state)


def _signature(state: Any) -> tuple[Any, ...]:
    """Returns what a layout depends on."""
    leaves, structure = jax.tree.flatten(state)
    return structure, tuple(map(np.shape, leaves))


def _split(count: int, batch: dict[str, Any]) -> dict[str, Any]:
    """Gives the rows [N, ...] of a batch the device axis of `jax.pmap`: [devices, N / devices, ...]."""
    return jax.tree.map(lambda x: x.reshape((count, x.shape[0] // count, *x.shape[1:])), batch)


def _join(replicated: NamedSharding, x: jax.Array) -> jax.Array:
    """Makes the result of `jax.pmap`, which belongs to this process, an array of all processes. Copies nothing."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_join(replicated, jax.random.key_data(x)), impl=jax.random.key_impl(x))
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, replicated, shards)


def _warn_of_gather(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Returns the step, which logs a warning while it is compiled if its parts cannot stay on their devices."""
    accumulate = (getattr(step, "keywords", None) or {}).get("accumulate", 1)
    if accumulate == 1:
        return step

    @functools.wraps(step)
    def warned(state, batch, *rng):
        rows = len(next(iter(jax.tree.leaves(batch))))
        if rows % accumulate == 0 and rows // accumulate % mesh.size:
            logger.warning(
                "accumulate=%d makes parts of %d rows, which is not a multiple of %d devices: each device receives the "
                "whole batch; use a batch size that is a multiple of %d",
                *(accumulate, rows // accumulate, mesh.size, accumulate * mesh.size),
            )
        return step(state, batch, *rng)

    return warned
