"""The state of a training run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """The state of a training run, a pytree.

    Attributes:
        step: Number of optimizer steps taken, int32 scalar.
        params: Trainable parameters.
        collections: All other Linen collections by name, such as `batch_stats`.
        opt_state: State of the optimizer.
        ema: Moving average of all variables, `{"params": ..., **collections}`, in float32 or wider; or None.
        apply_fn: The `apply` of the model.
        tx: The optimizer.
        ema_decay: Decay of the moving average; None for no average.
    """

    step: jax.Array
    params: Any
    collections: dict[str, Any]
    opt_state: optax.OptState
    ema: Any
    apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    ema_decay: float | None = struct.field(pytree_node=False, default=None)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables in the form that `apply_fn` takes."""
        return {"params": self.params, **self.collections}

    def apply_gradients(self, grads: Any, collections: dict[str, Any]) -> TrainState:
        """Takes one optimizer step.

        Args:
            grads: Gradients with the tree and the shapes of `params`.
            collections: The other collections after the forward pass.

        Returns:
            The next state.
        """
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema = self.ema
        if self.ema_decay is not None:
            ema = jax.tree.map(partial(self._average, self.ema_decay), ema, {"params": params, **collections})
        return self.replace(step=self.step + 1, params=params, collections=collections, opt_state=opt_state, ema=ema)

    def _average(self, limit: float, old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        # A lower decay in the first steps forgets the random start sooner, as in TensorFlow's
        # ExponentialMovingAverage(num_updates).
        step = self.step.astype(jnp.float32)
        decay = jnp.minimum(limit, (1 + step) / (10 + step)).astype(old.dtype)
        return decay * old + (1 - decay) * new.astype(old.dtype)


def create_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    rng: jax.Array,
    sample_input: Any,
    *,
    variables: dict[str, Any] | None = None,
    ema_decay: float | None = None,
) -> TrainState:
    """Initializes the model and the optimizer of a run.

    Args:
        model: A module with a `train` argument in its call.
        tx: An Optax optimizer.
        rng: A key made by `jax.random.key`.
        sample_input: An input, or a `jax.ShapeDtypeStruct`, with the shape of the model's input.
        variables: Variables to start from, which are copied; None initializes them.
        ema_decay: Decay of a moving average of the variables; None for no average. At step t the decay is at most
            `(1 + t) / (10 + t)`. The average is kept in float32 or wider: in half precision, the change of one step is
            rounded away.

    Returns:
        The state before the first step.

    Raises:
        ValueError: `ema_decay` is not in [0, 1).
    """
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1) or None; got {ema_decay}")
    if variables is None:
        params_rng, dropout_rng = jax.random.split(rng)
        sample = jnp.zeros(sample_input.shape, sample_input.dtype)
        init = jax.jit(lambda p, d, x: model.init({"params": p, "dropout": d}, x))
        collections = dict(init(params_rng, dropout_rng, sample))
    else:  # copied, because a train step donates the buffers of its state
        collections = dict(jax.tree.map(jnp.array, variables))
    params = collections.pop("params", {})
    collections = {k: v for k, v in collections.items() if k not in ("aux_logits", "intermediates")}
    ema = None
    if ema_decay is not None:
        ema = jax.tree.map(_wide_copy, {"params": params, **collections})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        collections=collections,
        opt_state=jax.jit(tx.init)(params),
        ema=ema,
        apply_fn=model.apply,
        tx=tx,
        ema_decay=ema_decay,
    )


def _wide_copy(x: jax.Array) -> jax.Array:
    """Copies an array, because a buffer cannot be donated twice; half precision becomes float32."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.array(x, jnp.promote_types(x.dtype, jnp.float32) if floating else x.dtype)
