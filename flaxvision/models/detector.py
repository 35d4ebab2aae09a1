"""`Detector`, the interface of networks that find boxes, and what their losses share.

A detector maps images to a dict of raw outputs of fixed shapes. `candidates` turns these into scored boxes, from which
`flaxvision.detect` chooses, and `losses` compares them with the boxes of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flaxvision.layers.batch_context import current_batch

if TYPE_CHECKING:
    from flaxvision.detection import Candidates


class Detector(nn.Module):
    """Base class of detectors.

    Images lie at the top left of a canvas `[H, W]`, and `sizes` gives the part that each of them fills. Boxes are xyxy
    in pixels of the canvas. Labels start at 0 and have no background class.
    """

    def __call__(self, images: jax.Array, sizes: jax.Array | None = None, *, train: bool = False) -> dict[str, Any]:
        """Maps images to the raw outputs of the heads.

        Args:
            images: Images `[N, H, W, C]`, normalized and padded.
            sizes: Valid height and width of each image, `[N, 2]`; None for the whole canvas.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            Arrays of fixed shapes by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    @nn.nowrap
    def candidates(self, outputs: dict[str, Any], sizes: jax.Array) -> Candidates:
        """Decodes raw outputs to scored boxes, without variables.

        Args:
            outputs: What `__call__` returns.
            sizes: Valid height and width of each image, `[N, 2]`.

        Returns:
            Boxes `[N, A, 4]` or `[N, A, K, 4]`, clipped to the images; scores `[N, A, K]`; and which of them exist,
            `[N, A]` bool.
        """
        raise NotImplementedError(f"{type(self).__name__} must define candidates")

    def losses(
        self, batch: Mapping[str, Any], rng: jax.Array | None = None, *, train: bool = True
    ) -> dict[str, jax.Array]:
        """Computes the named losses of every image, for `apply(..., method="losses")`.

        They are scaled such that the loss of the batch is the mean over its real rows, see `batch_mean`.

        Args:
            batch: `image [N, H, W, C]`, normalized; `boxes [N, M, 4]`; `labels [N, M]`; `valid [N, M]`, which of the
                boxes exist; optionally `size [N, 2]`, `crowd [N, M]` and `difficult [N, M]`, whose areas are ignored,
                and `mask [N]`, 0 for padded rows.
            rng: A key, or a key for each row, see `row_keys`.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            Losses `[N]` by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must define losses")

    @property
    def num_labels(self) -> int:
        """Number of labels that a detection can have, without the background."""
        raise NotImplementedError(f"{type(self).__name__} must define num_labels")


def valid_sizes(images: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """Returns `sizes`, or the size of the canvas for every image.

    Args:
        images: Images `[N, H, W, C]`.
        sizes: Valid height and width of each image, `[N, 2]`, or None.

    Returns:
        `[N, 2]`.

    Raises:
        ValueError: `images` is not of rank 4, or `sizes` has another shape.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have the shape [N, H, W, C] (images[None] for one image); got {images.shape}")
    rows, height, width, _ = images.shape
    if sizes is None:
        return jnp.broadcast_to(jnp.asarray([[height, width]], jnp.int32), (rows, 2))
    sizes = jnp.asarray(sizes)
    if sizes.shape != (rows, 2):
        raise ValueError(
            f"sizes must have the shape {(rows, 2)}, a height and a width for each image; got {sizes.shape}"
        )
    return sizes


def batch_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Averages a value over the real rows of the whole batch, on all devices.

    A loss that divides the sum over a batch by a count over the batch becomes a loss for each row if it divides the sum
    of the row by the mean count of the rows: its mean over the real rows is the loss of the batch. Under `pmap`, the
    mapped axis is that of `layers.batch_context`, which `train_step` enters.

    Args:
        values: `[N, ...]`.
        mask: `[N]`, above 0 for a real row; None for the mask of `layers.batch_context`.

    Returns:
        `[...]`, float32 or wider; 0 if no row is real.
    """
    batch = current_batch()
    mask = batch.mask if mask is None else mask
    real = jnp.ones(values.shape[0], bool) if mask is None else mask > 0
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    real = real.reshape((-1,) + (1,) * (values.ndim - 1))
    total = jnp.sum(jnp.where(real, values, jnp.zeros((), values.dtype)), axis=0)
    count = jnp.sum(real, dtype=values.dtype)
    if batch.axis_name is not None:
        total, count = lax.psum((total, count), batch.axis_name)
    return total / jnp.maximum(count, 1)


def row_keys(rng: jax.Array | None, rows: int) -> jax.Array:
    """Returns a key for each row of a batch, whatever the number of devices.

    Args:
        rng: A key, which gives `fold_in(rng, row)`; keys `[N]`, which are returned; or None for a constant key.
        rows: The number of rows N.

    Returns:
        Keys `[N]`.

    Raises:
        ValueError: `rng` is neither a key nor N keys.
    """
    rng = jax.random.key(0) if rng is None else rng
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.shape not in ((), (rows,)):
        raise ValueError(
            f"rng must be a key of jax.random.key or {rows} of them, one for each row; got {rng.dtype} {rng.shape}"
        )
    return rng if rng.ndim else jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))
