"""The objective of regression."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from flaxvision.train.objectives.base import Objective, expect, from_losses


def regression(loss: str = "mse", *, huber_delta: float = 1.0) -> Objective:
    """Makes the objective of regression.

    The model returns `[N, K]`; `batch["label"]` is `[N, K]`, or `[N]` if K is 1. Losses are means over K. The metrics
    are `loss`, `mse` and `mae`.

    Args:
        loss: `"mse"`, `"mae"` or `"huber"` (Huber 1964).
        huber_delta: Error at which the Huber loss changes from quadratic to linear.

    Returns:
        The objective. When traced it raises ValueError if the labels and the outputs differ in shape.

    Raises:
        ValueError: `loss` is not one of the three.
    """
    functions = {
        "mse": jnp.square,
        "mae": jnp.abs,
        "huber": lambda error: optax.huber_loss(error, delta=huber_delta),
    }
    if loss not in functions:
        raise ValueError(f"loss must be one of {', '.join(functions)}; got {loss!r}")

    def error(outputs, batch):
        label = batch["label"].astype(jnp.float32)
        label = label[:, None] if label.ndim == 1 else label
        expect(outputs.shape == label.shape, "the shape of the outputs", outputs, label)
        return outputs - label

    def losses(outputs, batch):
        return jnp.mean(functions[loss](error(outputs, batch)), axis=-1)

    def measure(outputs, batch):
        e = error(outputs, batch)
        return {"mse": jnp.mean(jnp.square(e), axis=-1), "mae": jnp.mean(jnp.abs(e), axis=-1)}

    return from_losses(losses, measure)
