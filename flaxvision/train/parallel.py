"""Compiling a step for several devices, and moving batches to them ahead of the step."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxvision.layers import batch_context
from flaxvision.train.objectives import Objective
from flaxvision.train.step import Transform, eval_step, train_step

AXIS = "data"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a one-dimensional mesh with the axis `"data"`.

    Args:
        devices: The devices; None for all.

    Returns:
        The mesh. Its axis has the type Auto, because Linen's Dropout fails under Explicit axes.
    """
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def jit_step(step: Callable[..., Any], mesh: Mesh | None = None) -> Callable[..., Any]:
    """Compiles a step with a global view: the batch is sharded over the mesh, everything else is replicated.

    `layers.BatchNorm` knows from its mode whose statistics to use and from this function how many devices there are;
    Linen's is synchronised by construction. The `axis_name` of the model stays None.

    Args:
        step: `train_step`, `eval_step` or any `(state, batch[, rng])`, with its options bound by `partial`. A call with
            a key is a train step: it donates the state, so use the state that it returns.
        mesh: The mesh; None for `make_mesh()`.

    Returns:
        The compiled step. It raises ValueError for a batch that the devices do not divide. `.batch_sharding` is the
        sharding of its batches, for `prefetch`; `.lower(state, batch, ...)` lowers it without running it.
    """
    mesh = make_mesh() if mesh is None else mesh
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    shards = mesh.shape[AXIS]

    def over_shards(*args):
        with batch_context(shards=shards):
            return step(*args)

    train = jax.jit(
        over_shards, in_shardings=(replicated, sharded, replicated), out_shardings=replicated, donate_argnums=0
    )
    evaluate = jax.jit(over_shards, in_shardings=(replicated, sharded), out_shardings=replicated)

    def call(state, batch, *rng):
        check_divides(batch, sharded)
        first = next(iter(jax.tree.leaves(state)), None)
        if getattr(first, "sharding", None) != replicated:  # fresh, from pmap_step, another mesh or a checkpoint
            state = jax.device_put(state, replicated)
        if jax.process_count() > 1:
            batch = _place(batch, sharded)
        return (train if rng else evaluate)(state, batch, *rng)

    def lower(state, batch, *rng, **options):
        return (train if rng else evaluate).trace(state, batch, *rng).lower(**options)

    call.lower, call.batch_sharding = lower, sharded
    return call


def pmap_step(step: Callable[..., Any], devices: Sequence[Any] | None = None) -> Callable[..., Any]:
    """Compiles a step with a per-device view, over the mapped axis `"data"`.

    Gradients and metrics are merged over the devices. The modes of `layers.BatchNorm` mean the same as under
    `jit_step`, and the model needs no `axis_name`. Linen's BatchNorm without one normalizes by the rows of each device,
    and the mean of the devices' running statistics is kept. Dropout and augmentation draw different numbers on each
    device.

    Args:
        step: `train_step` or `eval_step` with its options bound; it is called with `axis_name="data"`.
        devices: The devices; None for those of this process.

    Returns:
        The compiled step. It takes the same global batch and the same state without a device axis as that of
        `jit_step`, so a state passes freely between the two. It raises ValueError for a batch that the devices do not
        divide. `.batch_sharding` is the sharding of its batches, for `prefetch`.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    count = len(devices)
    sharded = NamedSharding(make_mesh(devices), P(AXIS))

    def per_device(state, batch, *rng):
        return step(state, batch, *rng, axis_name=AXIS)

    train = jax.pmap(per_device, AXIS, in_axes=(None, 0, None), out_axes=None, devices=devices)
    evaluate = jax.pmap(per_device, AXIS, in_axes=(None, 0), out_axes=None, devices=devices)

    def call(state, batch, *rng):
        check_divides(batch, sharded)
        batch = jax.tree.map(lambda x: x.reshape((count, x.shape[0] // count, *x.shape[1:])), batch)
        return (train if rng else evaluate)(state, batch, *rng)

    call.batch_sharding = sharded
    return call


def compile_steps(
    objective: Objective,
    *,
    train_transform: Transform | None = None,
    eval_transform: Transform | None = None,
    accumulate: int = 1,
    use_ema: bool = False,
    parallel: Literal["jit", "pmap"] = "jit",
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compiles the train step and the eval step of a run, over all devices.

    Args:
        objective: The objective of both steps.
        train_transform: The transform of training batches; see `train_step`.
        eval_transform: The transform of evaluation batches; see `eval_step`.
        accumulate: See `train_step`.
        use_ema: See `eval_step`.
        parallel: `"jit"` for `jit_step`, `"pmap"` for `pmap_step`.

    Returns:
        The train step and the eval step.

    Raises:
        ValueError: `parallel` is neither of the two.
    """
    compilers = {"jit": jit_step, "pmap": pmap_step}
    if parallel not in compilers:
        raise ValueError(f"parallel must be 'jit' or 'pmap'; got {parallel!r}")
    compile_step = compilers[parallel]
    return (
        compile_step(partial(train_step, objective=objective, transform=train_transform, accumulate=accumulate)),
        compile_step(partial(eval_step, objective=objective, transform=eval_transform, use_ema=use_ema)),
    )


def prefetch(
    batches: Iterable[dict[str, Any]], sharding: NamedSharding | None, size: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Copies batches to the devices ahead of the step that uses them.

    While a step runs, the next `size` batches are on the devices or on their way. The copies are asynchronous. An error
    in `batches` is raised when its batch is due, after the batches before it.

    Args:
        batches: Batches of host arrays. Do not write to an array after yielding it: it may not have been copied yet.
        sharding: Where the batches go, such as the `batch_sharding` of a compiled step. None leaves them where they
            are and only reads ahead.
        size: Number of batches ahead of the step, at least 1.

    Yields:
        The batches.

    Raises:
        ValueError: `size` is below 1, or the devices do not divide a batch.
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
    """Checks that the rows of a batch can be shared out evenly over the devices of this process.

    Args:
        batch: A batch of this process, or a global one that is already on the devices.
        sharding: The sharding that the batch is to have.

    Raises:
        ValueError: The devices do not divide the rows, or the arrays differ in their number of rows.
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
