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
