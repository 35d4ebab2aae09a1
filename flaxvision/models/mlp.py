"""The multilayer perceptron.

D. Rumelhart, G. Hinton, R. Williams, "Learning representations by back-propagating errors", 1986. The defaults are the
two hidden layers of 300 and 100 units of LeCun et al. 1998, section III.C.4, with ReLU in place of their sigmoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.registry import register

Dtype = Any

ACTIVATIONS = {"relu": nn.relu, "selu": nn.selu, "tanh": nn.tanh, "logistic": nn.sigmoid}
# The initial weights keep the variance of what flows through: He 2015, Klambauer 2017, Glorot 2010.
INITIALIZERS = {
    "relu": nn.initializers.he_normal(),
    "selu": nn.initializers.lecun_normal(),
    "tanh": nn.initializers.glorot_normal(),
    "logistic": nn.initializers.glorot_normal(),
}


class MLP(nn.Module):
    """A stack of dense layers.

    The head is one linear layer. Which task it serves is the objective's choice: `num_classes` logits for multiclass
    and multilabel, one for binary, the targets' number for regression.

    Attributes:
        features: Units of each hidden layer.
        num_classes: Outputs; 0 gives the last hidden layer's features.
        activation: `"relu"`, `"selu"`, `"tanh"` or `"logistic"`.
        dropout_rate: After every hidden layer.
        dtype: Of the computation.
        param_dtype: Of the parameters.

    Raises:
        ValueError: The activation is none of these (when called).
    """

    features: Sequence[int] = (300, 100)
    num_classes: int = 10
    activation: str = "relu"
    dropout_rate: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `x [N, ...]`, flattened, to `[N, num_classes]` float32."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")
        activation, init = ACTIVATIONS[self.activation], INITIALIZERS[self.activation]
        policy = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = x.reshape((x.shape[0], -1))
        for i, features in enumerate(self.features, 1):
            x = activation(nn.Dense(features, kernel_init=init, name=f"hidden{i}", **policy)(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if self.num_classes:
            x = nn.Dense(self.num_classes, name="head", **policy)(x)
        return x.astype(jnp.float32)


register(
    MLP,
    "mlp",
    task="classification",
    paper="Rumelhart et al. 1986, Learning representations by back-propagating errors",
    year=1986,
    input_size=(28, 28),
    channels=1,
    params=266_610,
)
