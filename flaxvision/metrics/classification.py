"""Correctness of single predictions, `[N]` values for a `Mean`."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns 1.0 where the largest logit is that of the label, else 0.0.

    Args:
        logits: `[N, K]`.
        labels: Integers `[N]`.

    Returns:
        `[N]` float32. A row with a NaN logit counts as wrong.
    """
    return top_k_correct(logits, labels, 1)


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Returns 1.0 where the label is among the `k` largest logits, else 0.0. Ties go to the lower index.

    Args:
        logits: `[N, K]`.
        labels: Integers `[N]`.
        k: Number of guesses.

    Returns:
        `[N]` float32. A row counts as wrong if a logit is NaN or the label is not in [0, K).
    """
    known = (labels >= 0) & (labels < logits.shape[-1])
    own = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[:, None], axis=-1)
    lower = jnp.arange(logits.shape[-1])[None, :] < labels[:, None]
    ahead = jnp.sum((logits > own) | ((logits == own) & lower), axis=-1)
    return ((ahead < k) & known & ~jnp.any(jnp.isnan(logits), axis=-1)).astype(jnp.float32)
