"""What a layer cannot see of a batch: which rows are padding, which share a device, and the keys of the rows."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class BatchContext:
    """The batch that a model is applied to.

    Attributes:
        mask: `[N]`, above 0 for a real row and 0 for padding; None if all rows are real.
        axis_name: The mapped axis over which the rows of the batch are split, under `pmap` and `shard_map`.
        shards: Number of devices over which the N rows are split, under `jit` over a mesh. Each device has N / shards
            consecutive rows.
        row_keys: Keys `[N]`, one for each row, which depend on its place in the global batch and not on the devices;
            None outside of training.
    """

    mask: Any = None
    axis_name: str | None = None
    shards: int = 1
    row_keys: Any = None


_DEFAULT = BatchContext()
_current: contextvars.ContextVar[BatchContext] = contextvars.ContextVar("flaxvision_batch", default=_DEFAULT)
# JAX reuses the trace of a function that it has seen. This value is part of the key, so that a function traced in one
# context is traced again in another one.
_cache_key = jax.make_user_context(None)
_masks = itertools.count()


def current_batch() -> BatchContext:
    """Returns the context that was entered last."""
    return _current.get()


@contextlib.contextmanager
def batch_context(**changes: Any) -> Iterator[BatchContext]:
    """Describes the batch to the layers that are traced or called within the `with` block.

    `train_step` and `jit_step` enter it, so it is needed only in code that trains without them, and around a part of a
    model whose rows are not those of the batch. It changes what `BatchNorm` and the sampling of detectors compute in
    training, and nothing else.

    Args:
        **changes: Fields of `BatchContext` to set. The others stay as they are.

    Yields:
        The context.

    Raises:
        TypeError: There is no such field.

    Example:
        >>> with batch_context(axis_name="data"), batch_context(shards=4) as batch:
        ...     batch
        BatchContext(mask=None, axis_name='data', shards=4, row_keys=None)
    """
    batch = dataclasses.replace(_current.get(), **changes)
    # A mask and the keys of the rows belong to one trace, so each of them has a key of its own.
    mask = None if batch.mask is None and batch.row_keys is None else next(_masks)
    key = (batch.axis_name, batch.shards, mask)
    key = None if key == (None, 1, None) else key  # the default
    token = _current.set(batch)
    try:
        with _cache_key(key):
            yield batch
    finally:
        _current.reset(token)
