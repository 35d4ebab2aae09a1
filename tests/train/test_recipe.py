"""Recipes as data: the numbers that reach the schedule and the optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.train import Recipe, optimizer, schedule


def test_the_defaults_are_ninety_epochs_in_three_steps():
    recipe = Recipe()
    rates = recipe.learning_rate_schedule(5004)
    assert recipe.num_steps(5004) == 450_360
    # 1.28 million images in batches of 256 make 5,004 steps: divided by 10 after 30, 60 and 80 epochs.
    for epoch, rate in ((0, 0.1), (29.99, 0.1), (30.01, 0.01), (59.99, 0.01), (60.01, 1e-3), (80.01, 1e-4)):
        assert float(rates(int(epoch * 5004))) == pytest.approx(rate)


def test_a_shortened_run_keeps_its_shape():
    whole = Recipe(epochs=10.0, warmup_epochs=1.0, schedule="cosine")
    short = dataclasses.replace(whole, epochs=5.0, warmup_epochs=0.5)
    for share in (0.15, 0.4, 0.9):
        assert float(short.learning_rate_schedule(100)(int(500 * share))) == pytest.approx(
            float(whole.learning_rate_schedule(100)(int(1000 * share)))
        )


def test_boundaries_that_fall_on_one_step_multiply():
    boundaries = tuple(k / 50 for k in range(1, 50))
    rates = schedule("step", 1.0, 40, boundaries=boundaries, factor=0.5)
    assert float(rates(39)) == pytest.approx(0.5 ** sum(round(b * 40) < 39 for b in boundaries))
    assert float(rates(40)) == pytest.approx(0.5**49)


@pytest.mark.parametrize("name", ["momentum", "rmsprop"])
def test_the_optimizer_has_the_numbers_of_the_recipe(name):
    recipe = Recipe(optimizer=name, epsilon=1.0, rms_decay=0.8, momentum=0.7, weight_decay=0.1, clip_norm=0.5)
    params, grads = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.arange(4.0).reshape(2, 2)}
    mine = recipe.make_optimizer(0.3)
    theirs = optimizer(name, 0.3, eps=1.0, rms_decay=0.8, momentum=0.7, weight_decay=0.1, clip_norm=0.5)
    updates = [jax.jit(tx.update)(grads, tx.init(params), params)[0]["kernel"] for tx in (mine, theirs)]
    np.testing.assert_array_equal(*updates)


@pytest.mark.parametrize(("field", "value"), [
    ("epochs", 0.0),
    ("batch_size", 0),
    ("learning_rate", float("nan")),
    ("accumulate", -1),
    ("weight_decay", -1e-4),
    ("boundaries", (0.5, 1.0)),
])  # fmt: skip
def test_numbers_out_of_range_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"{field} must .*got"):
        Recipe(**{field: value})
