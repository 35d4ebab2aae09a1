"""The losses that optax lacks. All give one value per example; masks and means are the objective's."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lenet_map(logits: jax.Array, targets: jax.Array, *, rejection: float = 10.0) -> jax.Array:
    """LeNet-5's maximum a posteriori criterion (LeCun et al. 1998, equation 9).

    The distance of the right class, plus a log-sum that pushes the others away; `exp(-j)` keeps classes that are far
    already from being pushed further.

    Args:
        logits: Negative distances to the classes' codes `[N, K]`.
        targets: One-hot or soft targets `[N, K]`.
        rejection: The paper's `j`, the distance of the class "none of these". The paper leaves its value open.

    Returns:
        The loss of each example `[N]`.
    """
    none = jnp.full_like(logits[:, :1], -rejection)
    push = jax.nn.logsumexp(jnp.concatenate([logits, none], axis=-1), axis=-1)
    return push - jnp.sum(targets * logits, axis=-1)


def margin(
    lengths: jax.Array, targets: jax.Array, *, present: float = 0.9, absent: float = 0.1, absent_weight: float = 0.5
) -> jax.Array:
    """CapsNet's margin loss (Sabour et al. 2017, equation 4), in which any number of classes may be present.

    `sum_k T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2`.

    Args:
        lengths: Of the capsules `[N, K]`, in [0, 1).
        targets: 1 for each class that is present, 0 for the others `[N, K]`.
        present: The paper's m+, the length from which a present class costs nothing.
        absent: Its m-, the length up to which an absent class costs nothing.
        absent_weight: Its lambda, which keeps the first steps from shrinking all capsules.

    Returns:
        The loss of each example `[N]`.
    """
    short = jnp.square(jnp.maximum(present - lengths, 0))
    long = jnp.square(jnp.maximum(lengths - absent, 0))
    return jnp.sum(targets * short + absent_weight * (1 - targets) * long, axis=-1)
