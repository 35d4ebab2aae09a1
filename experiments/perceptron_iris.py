"""Trains Rosenblatt's perceptron to separate one species of iris from the other two by its petals.

    python experiments/perceptron_iris.py                          # setosa: separable
    python experiments/perceptron_iris.py --species versicolor     # not separable: does not converge

It takes three seconds on 2 CPU cores and needs no download: the 150 flowers come with scikit-learn. It prints
"separates setosa without error" after two passes for most seeds (two to four passes over 500 seeds) and draws
decision_boundary.png. Versicolor lies between the other two species and is not separable by a straight line: dozens of
flowers stay misclassified. Virginica is not separable either, as one of its petals has the size of one of versicolor.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from sklearn.datasets import load_iris

import flaxvision as fv

SPECIES = ("setosa", "versicolor", "virginica")
PETAL = slice(2, 4)  # the columns of petal length and width


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a perceptron on iris and draw its decision boundary."""

    species: Literal["setosa", "versicolor", "virginica"] = "setosa"
    """The species to separate from the others."""
    learning_rate: float = 1.0
    """Learning rate. The weights start at zero, so it only scales them and does not change the decisions."""
    epochs: int = 50
    """Largest number of passes over the flowers; a pass without a mistake ends the training."""
    shuffle: bool = True
    """Whether each pass has a new order; otherwise the flowers come species by species."""
    seed: int = 0
    """Seed of the order of the flowers."""
    workdir: str = "runs/perceptron_iris"
    """Directory for decision_boundary.png."""


def main(config: Config) -> int:
    """Runs the experiment and returns the exit status of the process."""
    if config.epochs < 1:
        raise ValueError(f"--epochs must be at least 1; got {config.epochs}")
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"--learning-rate must be positive and finite; got {config.learning_rate}")

    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    features, species = load_iris(return_X_y=True)
    x = features[:, PETAL].astype(np.float32)
    y = (species == SPECIES.index(config.species)).astype(np.float32)[:, None]

    model = fv.create_model("perceptron")
    params = model.init(jax.random.key(0), jnp.asarray(x[:1]))["params"]
    update = jax.jit(fv.models.perceptron_update)
    orders = np.random.default_rng(config.seed)
    passes, mistakes = 0, len(x)
    while mistakes and passes < config.epochs:
        order = orders.permutation(len(x)) if config.shuffle else np.arange(len(x))
        params, wrong = update(params, x[order], y[order], config.learning_rate)
        passes, mistakes = passes + 1, int(wrong)
        print(f"pass {passes}: {count(mistakes, 'mistake')}")

    def predict(flowers: np.ndarray) -> np.ndarray:
        return np.asarray(model.apply({"params": params}, flowers, threshold=True))[:, 0].astype(int)

    errors = int(np.sum(predict(x) != y[:, 0]))
    if mistakes:
        print(f"did not converge: {count(mistakes, 'mistake')} in pass {passes}, the last one of --epochs")
    else:
        print(f"converged after {count(passes, 'pass', 'passes')}: no mistake in the last one")
    if errors:
        print(f"does not separate {config.species}: {errors} of {len(x)} flowers are wrong")
    else:
        print(f"separates {config.species} without error: 0 of {len(x)} flowers are wrong")
    (length, width), bias = np.asarray(params["units"]["kernel"])[:, 0], np.asarray(params["units"]["bias"]).item()
    print(f"{config.species} where {length:+.4g} length {width:+.4g} width {bias:+.4g} >= 0")

    picture = workdir / "decision_boundary.png"
    fv.plot.decision_boundary(
        predict,
        x,
        y[:, 0],
        feature_names=("petal length (cm)", "petal width (cm)"),
        class_names=(f"not {config.species}", config.species),
        path=picture,
    )
    print(f"see {picture}")
    return 0


def count(number: int, one: str, many: str | None = None) -> str:
    """Returns the number with its noun."""
    return f"{number} {one if number == 1 else many or one + 's'}"


if __name__ == "__main__":
    fv.train.run_experiment(main, lambda: tyro.cli(Config, description=__doc__))
