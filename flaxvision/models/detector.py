"""`Detector`, the interface of object detectors, and helpers for their losses.

A detector maps images to a dict of raw outputs of fixed shapes. `candidates` decodes them to scored boxes, from which
`flaxvision.detect` selects the detections. `losses` compares the raw outputs with the ground-truth boxes of a batch.
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

    All images of a batch are padded to one size, the canvas `[H, W]`. Each image lies at the top left of its canvas,
    and `sizes` gives its height and width there. Boxes are x1, y1, x2, y2 in pixels of the canvas. Labels start at 0
    and have no background class.
    """

    def __call__(self, images: jax.Array, sizes: jax.Array | None = None, *, train: bool = False) -> dict[str, Any]:
        """Maps images to the raw outputs of the heads.

        Args:
            images: Normalized and padded images `[N, H, W, C]`.
            sizes: Valid height and width of each image, `[N, 2]`; None for the whole canvas.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            Arrays of fixed shapes by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    @nn.nowrap
    def candidates(self, outputs: dict[str, Any], sizes: jax.Array) -> Candidates:
        """Decodes raw outputs to scored boxes. This needs no variables.

        Args:
            outputs: Result of `__call__`.
            sizes: Valid height and width of each image, `[N, 2]`.

        Returns:
            Boxes `[N, A, 4]` or `[N, A, K, 4]`, clipped to the images; scores `[N, A, K]`; and `[N, A]` bool, which
            candidates exist.
        """
        raise NotImplementedError(f"{type(self).__name__} must define candidates")

    def losses(
        self, batch: Mapping[str, Any], rng: jax.Array | None = None, *, train: bool = True
    ) -> dict[str, jax.Array]:
        """Computes the losses of each image by name. Call it with `apply(..., method="losses")`.

        The losses are scaled so that their mean over the real rows is the loss of the batch; see `batch_mean`.

        Args:
            batch: `image [N, H, W, C]`, normalized; `boxes [N, M, 4]`; `labels [N, M]`; `valid [N, M]`, which of the
                boxes exist; and optionally `size [N, 2]`, the valid height and width of each image, `crowd [N, M]` and
                `difficult [N, M]`, boxes whose area is ignored, and `mask [N]`, 0 for rows that are padding.
            rng: A PRNG key, or one key per row; see `row_keys`.
            train: Whether BatchNorm uses and updates the statistics of the batch.

        Returns:
            Losses `[N]` by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must define losses")

    @property
    def num_labels(self) -> int:
        """Number of classes, without the background."""
        raise NotImplementedError(f"{type(self).__name__} must define num_labels")


def valid_sizes(images: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """Returns `sizes`, or the size of the canvas for every image if `sizes` is None.

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
    """Averages values over the real rows of the whole batch, across all devices.

    Some losses are a sum over the batch divided by a count over the batch, such as the number of sampled anchors. To
    get one loss per row, divide the sum of each row by the mean count per row, which this function computes. The mean
    of these losses over the real rows is the loss of the batch. Under `pmap`, the mean runs over the mapped axis of
    `layers.batch_context`, which `train_step` sets.

    Args:
        values: `[N, ...]`.
        mask: `[N]`, above 0 for real rows and 0 for padding; None for the mask of `layers.batch_context`.

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
    """Returns one PRNG key per row of a batch.

    Args:
        rng: A key, into which the index of each row is folded; keys `[N]`, which are returned unchanged; or None for
            `jax.random.key(0)`. Under `pmap` the index counts the rows of one device, so pass keys `[N]` there.
        rows: The number of rows N.

    Returns:
        Keys `[N]`.

    Raises:
        ValueError: `rng` is neither a typed key, as from `jax.random.key`, nor N of them.
    """
    rng = jax.random.key(0) if rng is None else rng
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.shape not in ((), (rows,)):
        raise ValueError(
            f"rng must be a key of jax.random.key or {rows} of them, one for each row; got {rng.dtype} {rng.shape}"
        )
    return rng if rng.ndim else jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))
