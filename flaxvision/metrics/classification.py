"""Counts of right answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1.0 where the largest logit is the label's, else 0.0.

    Args:
        logits: `[N, K]`.
        labels: Integers `[N]`.

    Returns:
        `[N]` float32. A row with a NaN logit counts as wrong.
    """
    return top_k_correct(logits, labels, 1)


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """1.0 where the label is among the `k` largest logits, else 0.0; between equal logits the lower index wins.

    Args:
        logits: `[N, K]`.
        labels: Integers `[N]`.
        k: How many.

    Returns:
        `[N]` float32. A row with a NaN logit, or with a label that is no class, counts as wrong.
    """
    known = (labels >= 0) & (labels < logits.shape[-1])
    own = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[:, None], axis=-1)
    lower = jnp.arange(logits.shape[-1])[None, :] < labels[:, None]
    ahead = jnp.sum((logits > own) | ((logits == own) & lower), axis=-1)
    return ((ahead < k) & known & ~jnp.any(jnp.isnan(logits), axis=-1)).astype(jnp.float32)


def confusion_matrix(
    predictions: jax.Array, labels: jax.Array, num_classes: int, mask: jax.Array | None = None
) -> jax.Array:
    """Counts `[K, K]` float32 of examples by label (row) and prediction (column).

    Args:
        predictions: Integers `[N]`.
        labels: Integers `[N]`; a row whose label is no class counts nowhere.
        num_classes: K.
        mask: `[N]`, the weight of each example; None counts every one once.

    Returns:
        The counts, as sums that add up over batches.
    """
    weight = jnp.ones(labels.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    weight = jnp.where((labels >= 0) & (labels < num_classes), weight, 0.0)
    return jnp.zeros((num_classes, num_classes), jnp.float32).at[labels, predictions].add(weight)
