"""One body, three compilations: jit on one device, jit on eight, pmap on eight."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxvision as fv
from flaxvision.train import create_state, eval_step, jit_step, make_mesh, pmap_step, train_step


class Net(nn.Module):
    axis_name: str | None = None
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name if train else None, name="norm")(x)
        x = nn.relu(x).mean((1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x)


RNG = jax.random.key(7)
SAMPLE = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)
OBJECTIVE = fv.train.classification()


def batch_of(step=0, rows=16):
    rng = np.random.default_rng(step)
    return {
        # The means of the rows are far apart, so that the statistics of a replica differ from those of the batch.
        "image": (rng.normal(size=(rows, 6, 6, 2)) + np.linspace(-1, 1, rows)[:, None, None, None]).astype(np.float32),
        "label": rng.integers(0, 3, rows).astype(np.int32),
    }


def state_of(model=None, **options):
    return create_state(model or Net(), optax.sgd(0.1, 0.9), jax.random.key(0), SAMPLE, **options)


def run(step, state, steps=5, rows=16):
    metrics = None
    for i in range(steps):
        state, metrics = step(state, batch_of(i, rows), RNG)
    return jax.device_get((state.params, state.collections, state.ema)), jax.device_get(metrics)


def distance(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def one_device():
    return make_mesh(jax.devices()[:1])


def test_jit_on_one_jit_on_eight_and_pmap_on_eight_agree():
    step = partial(train_step, objective=OBJECTIVE)
    single, m1 = run(jit_step(step, one_device()), state_of(ema_decay=0.9))
    sharded, m8 = run(jit_step(step, make_mesh()), state_of(ema_decay=0.9))
    mapped, mp = run(pmap_step(step), state_of(Net(axis_name="data"), ema_decay=0.9))
    assert distance(single, sharded) < 1e-6
    assert distance(single, mapped) < 1e-6
    for m in (m8, mp):
        chex.assert_trees_all_close(m, m1, rtol=1e-5)
    # The parameters have changed.
    assert distance(single[0], jax.device_get(state_of().params)) > 1e-2


def test_unsynchronised_batch_norm_differs_per_replica_and_says_how():
    """Without axis_name, each replica normalizes by its own two rows and the mean of the running statistics is kept."""
    step = partial(train_step, objective=OBJECTIVE)
    synchronised, _ = run(jit_step(step), state_of(), steps=1)
    apart, _ = run(pmap_step(step), state_of(), steps=1)
    assert distance(synchronised[0], apart[0]) > 1e-4
    params, x = state_of().params, batch_of()["image"]
    y = nn.Conv(4, (3, 3)).apply({"params": params["conv"]}, x)
    replicas = np.asarray(y).reshape(8, 2 * 36, 4)
    np.testing.assert_allclose(
        apart[1]["batch_stats"]["norm"]["mean"], 0.1 * replicas.mean((0, 1)), rtol=1e-4, atol=1e-6
    )
    variance = 0.9 + 0.1 * replicas.var(1).mean(0)
    np.testing.assert_allclose(apart[1]["batch_stats"]["norm"]["var"], variance, rtol=1e-4)
    whole = 0.9 + 0.1 * np.asarray(y).var((0, 1, 2))
    np.testing.assert_allclose(synchronised[1]["batch_stats"]["norm"]["var"], whole, rtol=1e-4)
    assert np.all(whole > variance + 1e-3)


def test_a_state_passes_freely_between_jit_and_pmap():
    step = partial(train_step, objective=OBJECTIVE)
    model = Net(axis_name="data")
    steps = [pmap_step(step), jit_step(partial(step)), pmap_step(step), jit_step(step, one_device())]
    state, plain = state_of(), state_of()
    reference = jit_step(step, one_device())
    for i, compiled in enumerate(steps):
        state = state.replace(apply_fn=(model if i % 2 == 0 else Net()).apply)
        state, _ = compiled(state, batch_of(i), RNG)
        plain, _ = reference(plain, batch_of(i), RNG)
        assert int(state.step) == i + 1
        assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, plain.params)
    assert distance(jax.device_get(state.params), jax.device_get(plain.params)) < 1e-6


def test_the_update_against_plain_gradients():
    """Without BatchNorm, the step is SGD on the mean loss of the real rows."""
    model = fv.create_model("mlp", features=(5,), num_classes=3)
    state = create_state(model, optax.sgd(0.5), jax.random.key(0), SAMPLE)
    batch = batch_of() | {"mask": (np.arange(16) < 11).astype(np.float32)}

    def loss(params):
        logits = model.apply({"params": params}, batch["image"][:11])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"][:11]).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    want = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads)
    for compiled in (jit_step, pmap_step):
        got, metrics = compiled(partial(train_step, objective=OBJECTIVE))(jax.tree.map(jnp.array, state), batch, RNG)
        assert distance(jax.device_get(got.params), jax.device_get(want)) < 1e-5
        assert float(metrics["loss"].weight) == 11
        np.testing.assert_allclose(metrics["loss"].compute(), value, rtol=1e-5)


def test_accumulation_gives_the_update_of_the_whole_batch():
    model = fv.create_model("mlp", features=(5,), num_classes=3)
    fresh = partial(create_state, model, optax.sgd(0.5), jax.random.key(0), SAMPLE)
    batch = batch_of() | {"mask": (np.arange(16) < 11).astype(np.float32)}
    whole, m1 = jit_step(partial(train_step, objective=OBJECTIVE))(fresh(), batch, RNG)
    for mesh in (one_device(), make_mesh(jax.devices()[:4])):
        parts, m4 = jit_step(partial(train_step, objective=OBJECTIVE, accumulate=4), mesh)(fresh(), batch, RNG)
        assert distance(jax.device_get(whole.params), jax.device_get(parts.params)) < 1e-5
        chex.assert_trees_all_close(jax.device_get(m4["loss"]), jax.device_get(m1["loss"]), rtol=1e-5)
        assert float(m4["accuracy"].weight) == 11
    with pytest.raises(ValueError, match="divide the 16 rows of the batch; got 3"):
        jit_step(partial(train_step, objective=OBJECTIVE, accumulate=3))(fresh(), batch, RNG)


def test_accumulation_carries_batch_norm_through_the_parts():
    step = jit_step(partial(train_step, objective=OBJECTIVE, accumulate=2), one_device())
    state, _ = step(state_of(), batch_of(), RNG)
    y = np.asarray(nn.Conv(4, (3, 3)).apply({"params": state_of().params["conv"]}, batch_of()["image"]))
    want = np.zeros(4)
    for part in (y[::2], y[1::2]):
        want = 0.9 * want + 0.1 * part.mean((0, 1, 2))
    np.testing.assert_allclose(state.collections["batch_stats"]["norm"]["mean"], want, rtol=1e-4)


def test_randomness_is_a_function_of_the_key_and_the_step():
    step = jit_step(partial(train_step, objective=OBJECTIVE))
    state = state_of(Net(dropout_rate=0.5))

    def loss(at, rng):
        start = jax.tree.map(jnp.array, state).replace(step=jnp.int32(at))
        return float(step(start, batch_of(), rng)[1]["loss"].total)

    assert loss(0, RNG) == loss(0, RNG)
    assert loss(0, RNG) != loss(1, RNG)
    assert loss(0, RNG) != loss(0, jax.random.key(8))


def test_pmap_draws_other_numbers_on_each_device():
    def transform(rng, batch):
        return batch | {"image": batch["image"] * 0 + jax.random.normal(rng, ())}

    def objective(apply_fn, params, collections, batch, rng, train):
        values = batch["image"][:, 0, 0, 0]
        metrics = {"loss": fv.metrics.Mean.of(values), "square": fv.metrics.Mean.of(values**2)}
        return 0.0 * jnp.sum(params["head"]["bias"]), (metrics, collections)

    _, m = pmap_step(partial(train_step, objective=objective, transform=transform))(state_of(), batch_of(), RNG)
    assert m["square"].compute() - m["loss"].compute() ** 2 > 1e-2


def test_ema_against_a_loop():
    step = jit_step(partial(train_step, objective=OBJECTIVE))
    state = state_of(ema_decay=0.5)
    want = jax.device_get({"params": state.params, **state.collections})
    for i in range(6):
        state, _ = step(state, batch_of(i), RNG)
        decay = min(0.5, (1 + i) / (10 + i))
        new = jax.device_get({"params": state.params, **state.collections})
        want = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, want, new)
    assert distance(jax.device_get(state.ema), want) < 1e-5
    assert distance(want["params"], jax.device_get(state.params)) > 1e-4


def test_evaluation_can_use_the_average():
    state = state_of(ema_decay=0.5)
    state = state.replace(ema=jax.tree.map(jnp.zeros_like, state.ema))
    metrics = jit_step(partial(eval_step, objective=OBJECTIVE, use_ema=True))(state, batch_of())
    np.testing.assert_allclose(metrics["loss"].compute(), np.log(3), rtol=1e-5)  # zero logits
    with pytest.raises(ValueError, match="ema_decay"):
        jit_step(partial(eval_step, objective=OBJECTIVE, use_ema=True))(state_of(), batch_of())


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("size", [8, 24, 48])
@pytest.mark.parametrize("compiled", [jit_step, pmap_step])
def test_an_evaluation_counts_every_example_once(devices, size, compiled):
    """37 examples in batches of 8, 24 and 48: no size divides the set, and one is larger than it."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(37, 6, 6, 2)).astype(np.float32), rng.integers(0, 3, 37)
    source = fv.data.ArraySource(images, labels)
    state = state_of()
    step = partial(eval_step, objective=OBJECTIVE)
    many = jax.devices()[:devices]
    step = jit_step(step, make_mesh(many)) if compiled is jit_step else pmap_step(step, many)
    total = None
    for batch in fv.data.eval_batches(source, size):
        batch["image"][batch["mask"] == 0] = np.nan  # the values of padding must not matter
        total = fv.metrics.merge(total, fv.metrics.to_host(step(state, batch)))
    logits = np.asarray(Net().apply(state.variables, images))
    want = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels))
    assert total["loss"].weight == total["accuracy"].weight == 37
    assert total["accuracy"].total == (logits.argmax(-1) == labels).sum()
    np.testing.assert_allclose(total["loss"].total, np.sum(want), rtol=1e-5)
    assert fv.metrics.compute(total)["accuracy"] == np.mean(logits.argmax(-1) == labels)


@pytest.mark.parametrize("compiled", [jit_step, pmap_step])
def test_a_batch_that_the_devices_do_not_divide(compiled):
    step = compiled(partial(train_step, objective=OBJECTIVE))
    with pytest.raises(ValueError, match=r"batch size must be a multiple of the 8 devices, such as 8; got 12"):
        step(state_of(), batch_of(rows=12), RNG)
    with pytest.raises(ValueError, match=r"same number of rows; got \[8, 16\]"):
        step(state_of(), batch_of() | {"label": np.zeros(8, np.int32)}, RNG)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_steps_lower_for_cpu_cuda_and_tpu(dtype):
    model = fv.create_model("lenet_dli", dtype=dtype)
    sample = jax.ShapeDtypeStruct((8, 28, 28, 1), jnp.uint8)
    state = jax.eval_shape(
        lambda: create_state(model, optax.sgd(0.1, 0.9), jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    )
    batch = {"image": sample, "label": jax.ShapeDtypeStruct((8,), jnp.int32)}
    transform = fv.data.augment.make_transform(fv.data.augment.random_flip, mean=(0.1,), std=(0.3,))
    rng = jax.eval_shape(lambda: jax.random.key(0))
    step = partial(train_step, objective=OBJECTIVE, transform=transform)
    flat, tree = jax.tree.flatten((state, batch, rng))

    def train(*leaves):
        return jax.tree.leaves(step(*jax.tree.unflatten(tree, leaves)))

    def evaluate(*leaves):
        state, batch, _ = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(eval_step(state, batch, objective=OBJECTIVE, transform=transform))

    for function in (train, evaluate):
        exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(*flat)
        assert exported.platforms == ("cpu", "cuda", "tpu")
        assert len(exported.mlir_module_serialized) > 1000


def test_the_state_is_donated():
    state = state_of()
    kernel = state.params["conv"]["kernel"]
    jit_step(partial(train_step, objective=OBJECTIVE), one_device())(state, batch_of(), RNG)
    assert kernel.is_deleted()


def test_create_state_checks_the_decay():
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\) or None; got 1"):
        state_of(ema_decay=1)


def test_create_state_takes_given_variables():
    variables = jax.tree.map(lambda x: x + 1, state_of().variables)
    state = state_of(variables=variables)
    assert distance(state.params, variables["params"]) == 0
    assert distance(state.collections, {"batch_stats": variables["batch_stats"]}) == 0


class Convolutions(nn.Module):
    """Wide enough for all CPU-specific forms, including filter gradients in pieces."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(fv.layers.Conv(32, (3, 3), name="conv1")(x))
        x = fv.layers.max_pool(x, 3, strides=2, padding="SAME")
        x = nn.relu(fv.layers.DepthwiseConv((3, 3), name="depthwise")(x))
        x = nn.relu(fv.layers.Conv(32, (1, 1), name="pointwise")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("compiled", [jit_step, pytest.param(pmap_step, marks=pytest.mark.slow)])
def test_our_layers_train_the_same_on_eight_devices(compiled):
    sample = jax.ShapeDtypeStruct((1, 20, 20, 16), jnp.float32)
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(16, 20, 20, 16)).astype(np.float32), "label": rng.integers(0, 3, 16)}
    fresh = partial(create_state, Convolutions(), optax.sgd(0.1, 0.9), jax.random.key(0), sample)
    one, eight = jit_step(partial(train_step, objective=OBJECTIVE), one_device()), fresh()
    want = fresh()
    many = compiled(partial(train_step, objective=OBJECTIVE))
    for _ in range(3):
        want, _ = one(want, batch, RNG)
        eight, _ = many(eight, batch, RNG)
    assert distance(jax.device_get(want.params), jax.device_get(eight.params)) < 1e-6
    assert distance(jax.device_get(want.params), jax.device_get(fresh().params)) > 1e-3


def test_bfloat16_trains_with_float32_parameters():
    model = fv.create_model("mlp", features=(16,), num_classes=3, dtype=jnp.bfloat16)
    state = create_state(model, optax.sgd(0.1), jax.random.key(0), SAMPLE)
    step = jit_step(partial(train_step, objective=OBJECTIVE), one_device())
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch_of(), RNG)
        losses.append(float(metrics["loss"].total))
    assert losses[-1] < 0.5 * losses[0]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("compiled", [jit_step, pmap_step])
def test_padded_rows_do_not_reach_the_gradients(compiled):
    model = fv.create_model("mlp", features=(5,), num_classes=3)
    states = []
    for filler in (0.0, np.nan):
        batch = batch_of() | {"mask": (np.arange(16) < 11).astype(np.float32)}
        batch["image"][11:] = filler
        state = create_state(model, optax.sgd(0.5), jax.random.key(0), SAMPLE)
        states.append(compiled(partial(train_step, objective=OBJECTIVE))(state, batch, RNG)[0])
    assert distance(jax.device_get(states[0].params), jax.device_get(states[1].params)) == 0


def test_given_variables_stay_the_callers():
    variables = jax.tree.map(jnp.array, state_of().variables)
    state = state_of(variables=variables)
    jit_step(partial(train_step, objective=OBJECTIVE), one_device())(state, batch_of(), RNG)
    assert not any(x.is_deleted() for x in jax.tree.leaves(variables))


def test_the_objective_gives_the_loss_as_a_mean():
    def objective(apply_fn, params, collections, batch, rng, train):
        loss, (metrics, collections) = OBJECTIVE(apply_fn, params, collections, batch, rng, train)
        return loss, ({"error": metrics["loss"]}, collections)

    with pytest.raises(ValueError, match=r"training metrics must include 'loss', a Mean; got \{'error': 'Mean'\}"):
        jax.eval_shape(partial(train_step, objective=objective), state_of(), batch_of(), RNG)
