"""The multilayer perceptron.

D. Rumelhart, G. Hinton, R. Williams, "Learning representations by back-propagating errors", 1986. By default it has the
two hidden layers of 300 and 100 units of LeCun et al. 1998, section III.C.4, with ReLU instead of their sigmoid.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxvision.models.backbone import Dtype, as_float32
from flaxvision.registry import register

ACTIVATIONS = {"relu": nn.relu, "selu": nn.selu, "tanh": nn.tanh, "logistic": nn.sigmoid}
# These initializers preserve the variance of the activations: He 2015, Klambauer 2017, Glorot 2010.
INITIALIZERS = {
    "relu": nn.initializers.he_normal(),
    "selu": nn.initializers.lecun_normal(),
    "tanh": nn.initializers.glorot_normal(),
    "logistic": nn.initializers.glorot_normal(),
}


class MLP(nn.Module):
    """A stack of dense layers.

    The head is a linear layer, and the objective defines its task. `num_classes` is the number of classes for
    multiclass and multilabel classification, 1 for binary classification, and the number of targets for regression.

    Attributes:
        features: Units of each hidden layer.
        num_classes: Number of outputs; 0 returns the features of the last hidden layer.
        activation: `"relu"`, `"selu"`, `"tanh"` or `"logistic"`.
        dropout_rate: Rate of the dropout after every hidden layer.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.

    Raises:
        ValueError: `activation` has another value (when called).
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
        return as_float32(x)


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
