"""The modes of BatchNorm against plain NumPy: jit and pmap, one device and eight, padded rows, accumulation."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxvision as fv
from flaxvision.layers import BatchNorm
from flaxvision.train import create_state, jit_step, make_mesh, pmap_step, train_step

EPSILON, MOMENTUM = 1e-3, 0.9
ROWS, CHANNELS, GHOST = 32, 2, 2
SAMPLE = jax.ShapeDtypeStruct((1, 3, 2, CHANNELS), jnp.float32)
RNG = jax.random.key(3)
KINDS = {"jit": jit_step, "pmap": pmap_step}


class Net(nn.Module):
    """A parameter before the normalization, so that gradients pass through the statistics."""

    mode: str = "sync"

    @nn.compact
    def __call__(self, x, *, train=False):
        curve = self.param("curve", nn.initializers.ones, (CHANNELS,))
        x = x + curve.reshape(1, 1, 1, -1) * x**2
        ghost = GHOST if self.mode == "ghost" else None
        norm = BatchNorm(
            use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON, mode=self.mode, ghost_size=ghost
        )
        return jnp.sin(norm(x)).mean((1, 2))


def batch_of(padded):
    """Rows whose means differ, so that every choice of statistics gives another result."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(ROWS, 3, 2, CHANNELS)) + np.linspace(-2, 2, ROWS)[:, None, None, None]
    batch = {"image": image.astype(np.float32), "label": rng.normal(size=(ROWS, CHANNELS)).astype(np.float32)}
    if padded:  # single rows, a whole ghost group and, on eight devices, all rows of a device
        batch["mask"] = np.ones(ROWS, np.float32)
        batch["mask"][[3, 8, 9, 17, 28, 29, 30, 31]] = 0
        batch["image"][batch["mask"] == 0] = np.nan
        batch["label"][batch["mask"] == 0] = np.nan
    return batch


def reference(mode, devices, accumulate, batch, params):
    """Returns the mean loss and the running statistics after a step, in float64."""
    mask = batch.get("mask", np.ones(ROWS)) > 0
    images, labels = (np.where(mask.reshape(-1, *[1] * (v.ndim - 1)), v, 0.0) for v in (batch["image"], batch["label"]))
    running = np.zeros(CHANNELS), np.ones(CHANNELS)
    losses = []
    for part in range(accumulate):
        x, label, real = (np.float64(v[part::accumulate]) for v in (images, labels, mask))
        x, real = x + params["curve"] * x**2, real > 0
        size = {"local": len(x) // devices, "ghost": GHOST}.get(mode, len(x))
        seen, normalized = [], np.zeros_like(x)
        for start in range(0, len(x), size):
            rows = np.arange(start, start + size)
            kept = rows[real[rows]]
            if mode == "frozen":
                mean, var = running
            elif len(kept):
                mean, var = x[kept].mean((0, 1, 2)), x[kept].var((0, 1, 2))
                seen.append((len(kept), mean, var))
            else:
                continue
            normalized[rows] = (x[rows] - mean) / np.sqrt(var + EPSILON)
        if seen:
            weights, means, variances = (np.array(v) for v in zip(*seen, strict=True))
            new = (np.average(v, axis=0, weights=weights) for v in (means, variances))
            running = tuple(MOMENTUM * old + (1 - MOMENTUM) * v for old, v in zip(running, new, strict=True))
        outputs = np.sin(normalized * params["scale"] + params["bias"]).mean((1, 2))
        losses.append(((outputs - label) ** 2).mean(-1)[real])
    return np.concatenate(losses).mean(), running


def gradients(mode, devices, accumulate, batch, params):
    """Central differences of the reference."""

    def loss(name, channel, change):
        moved = {key: value.copy() for key, value in params.items()}
        moved[name][channel] += change
        return reference(mode, devices, accumulate, batch, moved)[0]

    return {
        name: np.array([(loss(name, c, 1e-5) - loss(name, c, -1e-5)) / 2e-5 for c in range(CHANNELS)])
        for name in params
    }


@pytest.mark.parametrize(
    ("padded", "accumulate"),
    [(True, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(False, 1), (True, 1), (False, 2)])],
)
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["sync", "local", "ghost", "frozen"])
def test_against_numpy(mode, kind, devices, padded, accumulate):
    many = jax.devices()[:devices]
    assert len(many) == devices
    batch = batch_of(padded)
    step = partial(train_step, objective=fv.train.regression(), accumulate=accumulate)
    compiled = KINDS[kind](step, make_mesh(many) if kind == "jit" else many)
    state = create_state(Net(mode), optax.sgd(1.0), jax.random.key(0), SAMPLE)
    params = {"curve": np.array([0.3, -0.2]), "scale": np.array([0.8, 1.5]), "bias": np.array([0.1, -0.4])}
    single = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    curve = single.pop("curve")
    state = state.replace(params={"curve": curve, "BatchNorm_0": single})
    before = jax.device_get(state.params)
    state, metrics = compiled(state, batch, RNG)
    loss, (mean, var) = reference(mode, devices, accumulate, batch, params)
    np.testing.assert_allclose(metrics["loss"].compute(), loss, rtol=1e-5)
    statistics = state.collections["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics["var"], var, rtol=1e-5)
    found = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params)
    want = gradients(mode, devices, accumulate, batch, params)
    np.testing.assert_allclose(found["curve"], want.pop("curve"), rtol=1e-3, atol=1e-5)
    for name, value in want.items():
        value = np.zeros(CHANNELS) if mode == "frozen" else value
        np.testing.assert_allclose(found["BatchNorm_0"][name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_modes_differ():
    batch = batch_of(True)
    params = {"curve": np.array([0.3, -0.2]), "scale": np.array([0.8, 1.5]), "bias": np.array([0.1, -0.4])}
    losses = [reference(mode, 8, 1, batch, params)[0] for mode in ("sync", "local", "ghost", "frozen")]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_padding_leaves_the_running_statistics(kind):
    for mode in ("sync", "local", "ghost"):
        state = create_state(Net(mode), optax.sgd(1.0), jax.random.key(0), SAMPLE)
        before = jax.device_get((state.params, state.collections))
        batch = batch_of(True)
        batch["mask"][:] = 0
        state, _ = KINDS[kind](partial(train_step, objective=fv.train.regression()))(state, batch, RNG)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.collections)), before)


def test_rows_that_do_not_divide():
    def step(mode, **options):
        state = create_state(Net(mode), optax.sgd(1.0), jax.random.key(0), SAMPLE)
        jit_step(partial(train_step, objective=fv.train.regression(), **options))(state, batch_of(False), RNG)

    with pytest.raises(ValueError, match="ghost_size must divide the 1 rows on each device; got 2"):
        step("ghost", accumulate=4)
    with pytest.raises(ValueError, match="x must have a multiple of 8 rows, the number of devices; got 4"):
        step("local", accumulate=8)


@pytest.mark.slow
def test_models_take_the_mode():
    """ResNet by ghosts of two rows on eight devices is ResNet by ghosts of two rows on one."""
    fields = {"stage_sizes": (1,), "features": (4,), "num_classes": 3, "batch_norm": "ghost", "ghost_size": 2}
    model = fv.create_model("resnet20_cifar", **fields)
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(16, 6, 6, 3)).astype(np.float32), "label": rng.integers(0, 3, 16)}
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        state = create_state(model, optax.sgd(0.1), RNG, jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32))
        step = jit_step(partial(train_step, objective=fv.train.classification()), make_mesh(devices))
        for _ in range(2):
            state, _ = step(state, batch, RNG)
        found.append(jax.device_get((state.params, state.collections)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *found)
    whole = fv.create_model("resnet20_cifar", **fields | {"batch_norm": "sync", "ghost_size": None})
    variables = {"params": found[0][0], **found[0][1]}
    ghost, sync = (m.apply(variables, batch["image"], train=True, mutable=["batch_stats"])[0] for m in (model, whole))
    assert float(jnp.abs(ghost - sync).max()) > 1e-2
