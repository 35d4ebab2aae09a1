"""Metrics as accumulators: updated on the device, merged anywhere, and computed once on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
from flax import struct


@struct.dataclass
class Accumulator:
    """Base class of metrics: a frozen pytree that holds what has been seen so far.

    A subclass is a `flax.struct.dataclass` with a constructor of the empty accumulator (`init`), an `update` that
    returns a new accumulator, and `compute`. The other methods assume that the fields are sums. A metric that needs
    more, such as the average precision of a detector, overrides them. On the device it holds the arrays of one batch,
    and `all_reduce` gathers them. Its `to_host` returns another object with `merge` and `compute`, which keeps lists.
    Use such a metric in evaluation only: training metrics are merged on the device and must keep their shapes.
    """

    def merge(self, other: Self) -> Self:
        """Combines two accumulators of the same metric.

        Args:
            other: What another batch, device or process has seen.

        Returns:
            The accumulator of both. Here: the sum of each field.
        """
        return jax.tree.map(lambda a, b: a + b, self, other)

    def all_reduce(self, axis_name: str) -> Self:
        """Merges the accumulators of all devices under `pmap`.

        Args:
            axis_name: The mapped axis.

        Returns:
            The merged accumulator, the same on every device. Here: the sum of each field.
        """
        return jax.lax.psum(self, axis_name)

    def to_host(self) -> Any:
        """Copies the accumulator to the host, in a form that can be merged there.

        Returns:
            An object with `merge` and `compute`. Here: the same accumulator with float64 and int64 fields, so that a
            long evaluation loses no example to rounding.
        """

        def widen(x: Any) -> np.ndarray:
            x = np.asarray(x)
            return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)

        return jax.tree.map(widen, jax.device_get(self))

    def compute(self) -> float | dict[str, float]:
        """Computes the metric from everything seen. Call it on the host, on the result of `to_host`.

        Returns:
            A number, or several by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute()")


Metrics = Mapping[str, Any]


def merge(a: Metrics | None, b: Metrics) -> dict[str, Any]:
    """Merges two dicts of accumulators name by name.

    Args:
        a: Accumulators by name, or None for nothing seen yet.
        b: Accumulators of the same names.

    Returns:
        The merged accumulators by name.

    Raises:
        ValueError: The names differ.
    """
    if a is None:
        return dict(b)
    if set(a) != set(b):
        raise ValueError(f"metrics must have the same names to be merged; got {sorted(a)} and {sorted(b)}")
    return {name: a[name].merge(b[name]) for name in b}


def to_host(metrics: Metrics) -> dict[str, Any]:
    """Copies a dict of accumulators to the host; waits until the device has computed them.

    Args:
        metrics: Accumulators by name.

    Returns:
        Their host forms by name; see `Accumulator.to_host`.
    """
    metrics = jax.device_get(dict(metrics))  # all in one transfer
    return {name: m.to_host() if hasattr(m, "to_host") else m for name, m in metrics.items()}


def compute(metrics: Metrics) -> dict[str, float]:
    """Computes every metric of a dict.

    Args:
        metrics: Accumulators by name, on the device or on the host.

    Returns:
        The values by name. A metric `name` that computes several values gives one entry `name_key` for each `key`.

    Raises:
        ValueError: Two values have the same name.
    """
    values: dict[str, float] = {}
    for name, metric in to_host(metrics).items():
        value = metric.compute()
        found = {f"{name}_{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
        if repeated := set(found) & set(values):
            raise ValueError(f"metrics must compute values with different names; got {sorted(repeated)} twice")
        values |= {key: float(v) for key, v in found.items()}
    return values


def to_json(metrics: Metrics | None) -> dict[str, Any]:
    """Converts accumulators of arrays to JSON values that `from_json` reads back bit for bit.

    Args:
        metrics: Accumulators by name, or None for nothing seen yet.

    Returns:
        `{name: {field: number or nested lists}}`.
    """
    stored: dict[str, Any] = {}
    for name, metric in jax.device_get(dict(metrics or {})).items():
        leaves = jax.tree_util.tree_leaves_with_path(metric)
        stored[name] = {jax.tree_util.keystr(path, simple=True): np.asarray(x).tolist() for path, x in leaves}
    return stored


def from_json(stored: Mapping[str, Any], like: Metrics) -> dict[str, Any]:
    """Rebuilds accumulators that `to_json` converted.

    Also reads what checkpoints held before metrics were accumulators: one sum for each name, and one `"weight"`.

    Args:
        stored: The JSON values.
        like: Accumulators of the same metrics, which give the types, shapes and dtypes.

    Returns:
        Accumulators by name.

    Raises:
        ValueError: The stored metrics are not those of `like`.
    """
    if "weight" in stored and not isinstance(stored["weight"], Mapping):
        weight = stored["weight"]
        stored = {name: {"total": v, "weight": weight} for name, v in stored.items() if name != "weight"}
    if set(stored) != set(like):
        raise ValueError(f"the stored metrics must be {sorted(like)}; got {sorted(stored)}")

    def rebuild(name: str, metric: Any) -> Any:
        def leaf(path: Any, x: Any) -> np.ndarray:
            field = jax.tree_util.keystr(path, simple=True)
            value = np.asarray(stored[name].get(field), x.dtype) if field in stored[name] else None
            if value is None or value.shape != x.shape:
                raise ValueError(
                    f"the stored metric {name!r} must have a field {field!r} of shape {x.shape}; "
                    f"got {'none' if value is None else value.shape}"
                )
            return value

        return jax.tree_util.tree_map_with_path(leaf, metric)

    return {name: rebuild(name, metric) for name, metric in like.items()}
