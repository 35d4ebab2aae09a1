"""The learning-rate range test."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.train import create_state, jit_step, train_step
from tests.train.runs import MESH, RNG, SOURCE, Net


def test_range_test_finds_where_it_diverges():
    """On a parabola of curvature 1, gradient descent diverges for rates above 2."""

    def objective(apply_fn, params, collections, batch, rng, train):
        loss = 50 * jnp.sum(params["hidden"]["bias"] ** 2) / 100
        return loss, ({"loss": fv.metrics.Mean(loss, jnp.float32(1))}, collections)

    def start(rate):
        state = create_state(Net(), fv.train.optimizer("sgd", rate), jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
        state.params["hidden"]["bias"] = jnp.ones(8)
        return state

    batches = fv.data.train_batches(SOURCE, 16, seed=0).from_step(0)
    step = jit_step(partial(train_step, objective=objective), MESH)
    found = fv.train.learning_rate_range(start, step, batches, RNG, low=1e-4, high=1e3, num_steps=100)
    assert found.diverged
    assert 1 < found.turned < 4
    assert found.suggestion == found.turned / 3 < 2
    assert len(found.rates) == len(found.losses) < 100
    np.testing.assert_allclose(found.rates[1] / found.rates[0], 1e7 ** (1 / 99))
    calm = fv.train.learning_rate_range(start, step, batches, RNG, low=1e-5, high=1e-3, num_steps=20)
    assert not calm.diverged
    assert calm.turned <= 1e-3
    with pytest.raises(ValueError, match=r"0 < low < high; got low=1 and high=0\.1"):
        fv.train.learning_rate_range(start, step, batches, RNG, low=1, high=0.1)
    with pytest.raises(ValueError, match="num_steps must be at least 10; got 5"):
        fv.train.learning_rate_range(start, step, batches, RNG, num_steps=5)
