"""Half precision: the moving average, the sums of gradients and the scale of the loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxvision as fv
from flaxvision.train import create_state, jit_step, make_mesh, pmap_step, train_step

RNG = jax.random.key(7)
SAMPLE = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
OBJECTIVE = fv.train.classification()


def keep_gradients():
    """An optimizer whose state is the gradients that it was given."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, _, params: (jax.tree.map(jnp.zeros_like, params), grads),
    )


def batch_of(rows=256):
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(rows, 4, 4, 3)).astype(np.float32),
        "label": rng.integers(0, 5, rows).astype(np.int32),
    }


def state_of(tx=None, seed=0, **fields):
    options = {key: fields.pop(key) for key in ("ema_decay", "variables") if key in fields}
    model = fv.create_model("mlp", features=(64,), num_classes=5, **fields)
    return create_state(model, tx or keep_gradients(), jax.random.key(seed), SAMPLE, **options)


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_average_of_half_precision_moves(dtype):
    """Near 1, the change of one step at decay 0.9999 is below half of the last bit."""
    state = state_of(optax.identity(), param_dtype=dtype, ema_decay=0.9999)
    state = state.replace(
        step=jnp.int32(10**6),
        params=jax.tree.map(lambda p: jnp.full(p.shape, 1.25, dtype), state.params),
        ema=jax.tree.map(jnp.ones_like, state.ema),
    )
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    for _ in range(20):
        state = state.apply_gradients(zeros, state.collections)
    want = 1.25 - 0.25 * 0.9999**20
    jax.tree.map(lambda x: np.testing.assert_allclose(x, want, rtol=2e-6), state.ema["params"])
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}


def test_the_average_of_half_precision_is_compiled_once_and_evaluated():
    state = state_of(optax.sgd(0.1), param_dtype=jnp.bfloat16, ema_decay=0.9)
    step, measure = fv.train.compile_steps(OBJECTIVE, use_ema=True)
    batch, shapes = batch_of(16), jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(2):
        state, _ = step(state, batch, RNG)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert np.isfinite(fv.metrics.compute(measure(state, batch))["loss"])


@pytest.mark.parametrize("compiled", [jit_step, pmap_step])
def test_parts_in_bfloat16_are_as_good_as_one_pass(compiled):
    """32 parts of 8 rows, against the gradient in float32 at the same parameters."""
    half, batch = state_of(param_dtype=jnp.bfloat16), batch_of()
    wide = state_of(variables=jax.tree.map(lambda x: x.astype(jnp.float32), half.variables))

    def found(state, accumulate=1, compile_step=jit_step):
        state = jax.tree.map(jnp.array, state)
        return compile_step(partial(train_step, objective=OBJECTIVE, accumulate=accumulate))(state, batch, RNG)[0]

    want = flat(found(wide).opt_state)
    error = lambda state: np.linalg.norm(flat(state.opt_state) - want) / np.linalg.norm(want)
    whole, parts = found(half), found(half, 32, compiled)
    assert {x.dtype for x in jax.tree.leaves(parts.opt_state)} == {jnp.dtype("bfloat16")}
    assert error(whole) < 5e-3
    assert error(parts) < 1.2 * error(whole)


@pytest.mark.parametrize("accumulate", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_float16_with_a_scaled_loss(accumulate):
    """The gradients of a small loss are zero in float16, unless it is scaled while it is differentiated."""

    def objective(*args):
        loss, rest = OBJECTIVE(*args)
        return 1e-6 * loss, rest

    batch, one = batch_of(), make_mesh(jax.devices()[:1])

    def found(dtype, **options):
        step = partial(train_step, objective=objective, accumulate=accumulate, **options)
        state, metrics = jit_step(step, one)(state_of(dtype=dtype), batch, RNG)
        return flat(state.opt_state), metrics["loss"].compute()

    (want, loss), (scaled, same) = found(jnp.float32), found(jnp.float16, loss_scale=2.0**14)
    assert np.linalg.norm(scaled - want) < 5e-3 * np.linalg.norm(want)
    assert same == pytest.approx(loss, rel=1e-3)  # the metrics are not scaled
    plain, _ = found(jnp.float16)
    assert np.linalg.norm(plain - want) > 0.1 * np.linalg.norm(want)
    with pytest.raises(ValueError, match="loss_scale must be positive and finite, or None; got 0"):
        found(jnp.float16, loss_scale=0)


def test_float16_parameters_are_not_trained():
    state = state_of(param_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"params must be float32, wider or bfloat16 .*; got float16 for head/bias"):
        jax.eval_shape(partial(train_step, objective=OBJECTIVE), state, batch_of(8), RNG)
    _, measure = fv.train.compile_steps(OBJECTIVE)
    assert np.isfinite(fv.metrics.compute(measure(state, batch_of(8)))["loss"])


def test_float32_is_not_converted():
    """The casts of half precision leave nothing in the program of full precision."""
    step = partial(train_step, objective=OBJECTIVE, accumulate=2)
    text = jax.jit(step).lower(state_of(optax.sgd(0.1), ema_decay=0.9), batch_of(8), RNG).as_text()
    assert not [line for line in text.splitlines() if "stablehlo.convert" in line and "f32>) -> tensor" in line]
