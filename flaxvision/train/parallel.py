"""Compiling a step for the devices at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxvision.train.objectives import Objective
from flaxvision.train.step import Transform, eval_step, train_step

AXIS = "data"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A one-dimensional mesh with the axis `"data"`.

    Args:
        devices: Defaults to all.

    Returns:
        The mesh, with axes of type Auto: Linen's Dropout fails under Explicit ones.
    """
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def jit_step(step: Callable[..., Any], mesh: Mesh | None = None) -> Callable[..., Any]:
    """Compiles a step with a global view: the batch is sharded over the mesh, everything else is on every device.

    BatchNorm is synchronised by construction, and the model's `axis_name` stays None.

    Args:
        step: `train_step` or `eval_step`, or any `(state, batch[, rng])`, its options bound by `partial`. The state is
            donated where a key is passed, as a train step takes one: use the state that comes back.
        mesh: Defaults to `make_mesh()`.

    Returns:
        The step. It raises ValueError for a batch that the devices do not divide. `.lower(state, batch, ...)` lowers it
        without running.
    """
    mesh = make_mesh() if mesh is None else mesh
    everywhere, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    train = jax.jit(step, in_shardings=(everywhere, sharded, everywhere), out_shardings=everywhere, donate_argnums=0)
    evaluate = jax.jit(step, in_shardings=(everywhere, sharded), out_shardings=everywhere)

    def call(state, batch, *rng):
        check_divides(batch, mesh.local_mesh.size)
        first = next(iter(jax.tree.leaves(state)), None)
        if getattr(first, "sharding", None) != everywhere:  # fresh, from pmap_step, another mesh or a checkpoint
            state = jax.device_put(state, everywhere)
        return (train if rng else evaluate)(state, _place(batch, sharded), *rng)

    def lower(state, batch, *rng, **options):
        return (train if rng else evaluate).trace(state, batch, *rng).lower(**options)

    call.lower = lower
    return call


def pmap_step(step: Callable[..., Any], devices: Sequence[Any] | None = None) -> Callable[..., Any]:
    """Compiles a step with a view per device, over the mapped axis `"data"`.

    Gradients and metrics are summed over the devices. BatchNorm normalises by each device's own rows, and the running
    statistics kept are the devices' mean, unless the model has `axis_name="data"`; then it is synchronised and agrees
    with `jit_step`. Dropout and augmentation draw other numbers on each device.

    Args:
        step: `train_step` or `eval_step` with options bound; called with `axis_name="data"`.
        devices: Defaults to this process's.

    Returns:
        The step. It takes the same global batch and the same state without a device axis as `jit_step`'s, so that a
        state passes freely between the two. It raises ValueError for a batch that the devices do not divide.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    count = len(devices)

    def per_device(state, batch, *rng):
        return step(state, batch, *rng, axis_name=AXIS)

    train = jax.pmap(per_device, AXIS, in_axes=(None, 0, None), out_axes=None, devices=devices)
    evaluate = jax.pmap(per_device, AXIS, in_axes=(None, 0), out_axes=None, devices=devices)

    def call(state, batch, *rng):
        check_divides(batch, count)
        batch = jax.tree.map(lambda x: x.reshape((count, x.shape[0] // count, *x.shape[1:])), batch)
        return (train if rng else evaluate)(state, batch, *rng)

    return call


def compile_steps(
    objective: Objective,
    *,
    augment: Transform | None = None,
    plain: Transform | None = None,
    accumulate: int = 1,
    use_ema: bool = False,
    parallel: Literal["jit", "pmap"] = "jit",
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compiles the pair of steps that a run needs.

    Args:
        objective: Of both.
        augment: The training's transform; see `train_step`.
        plain: The evaluation's.
        accumulate: As in `train_step`.
        use_ema: As in `eval_step`.
        parallel: `"jit"` for `jit_step`, `"pmap"` for `pmap_step`, over all devices.

    Returns:
        The train step and the eval step.
    """
    compile_step = {"jit": jit_step, "pmap": pmap_step}[parallel]
    return (
        compile_step(partial(train_step, objective=objective, transform=augment, accumulate=accumulate)),
        compile_step(partial(eval_step, objective=objective, transform=plain, use_ema=use_ema)),
    )


def check_divides(batch: dict[str, Any], devices: int) -> None:
    """Raises ValueError if the batch's rows can't be shared out evenly over the devices."""
    rows = {len(x) for x in jax.tree.leaves(batch)}
    if len(rows) != 1:
        raise ValueError(f"the arrays of a batch must have the same number of rows; got {sorted(rows)}")
    (n,) = rows
    if n % devices:
        raise ValueError(
            f"a batch of {n} rows can't be shared out over {devices} devices; "
            f"a multiple such as {max(n // devices, 1) * devices} can"
        )


def _place(batch: dict[str, Any], sharding: NamedSharding) -> dict[str, Any]:
    if jax.process_count() == 1:
        return batch
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
