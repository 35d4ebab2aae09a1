"""Losses that Optax lacks. Each returns one value per example; the objective applies masks and takes means."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lenet_map(logits: jax.Array, targets: jax.Array, *, rejection: float = 10.0) -> jax.Array:
    """Computes LeNet-5's maximum a posteriori criterion (LeCun et al. 1998, equation 9).

    It is the distance of the correct class plus a log-sum that increases the distances of the others. The term
    `exp(-j)` keeps classes that are already far away from being pushed further.

    Args:
        logits: Negative distances to the codes of the classes, `[N, K]`.
        targets: One-hot or soft targets `[N, K]`.
        rejection: The paper's `j`, the distance of the class "none of these". The paper does not give its value.

    Returns:
        Losses `[N]`.
    """
    none = jnp.full_like(logits[:, :1], -rejection)
    push = jax.nn.logsumexp(jnp.concatenate([logits, none], axis=-1), axis=-1)
    return push - jnp.sum(targets * logits, axis=-1)


def margin(
    lengths: jax.Array, targets: jax.Array, *, present: float = 0.9, absent: float = 0.1, absent_weight: float = 0.5
) -> jax.Array:
    """Computes CapsNet's margin loss (Sabour et al. 2017, equation 4). Any number of classes may be present.

    `sum_k T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2`.

    Args:
        lengths: Lengths of the capsules `[N, K]`, in [0, 1).
        targets: 1 for each class that is present, 0 for the others, `[N, K]`.
        present: The paper's m+: a present class contributes nothing above this length.
        absent: The paper's m-: an absent class contributes nothing below this length.
        absent_weight: The paper's lambda, which keeps the first steps from shrinking all capsules.

    Returns:
        Losses `[N]`.
    """
    short = jnp.square(jnp.maximum(present - lengths, 0))
    long = jnp.square(jnp.maximum(lengths - absent, 0))
    return jnp.sum(targets * short + absent_weight * (1 - targets) * long, axis=-1)
