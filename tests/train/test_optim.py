import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision.train import OPTIMIZERS, SCHEDULES, optimizer, schedule

PARAMS = {"kernel": np.array([[1.0, -2.0], [0.5, 3.0]]), "bias": np.array([0.3, -0.1])}
GRADS = [
    {"kernel": np.array([[0.1, -0.2], [0.3, 0.4]]) * (i + 1), "bias": np.array([1.0, 2.0]) / (i + 1)} for i in range(4)
]


def run(tx):
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    for g in GRADS:
        updates, state = tx.update(jax.tree.map(jnp.asarray, g), state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params


def reference(rule, weight_decay=0.0):
    """Each rule written out for one array; `rule(p, g, memory, t)` gives the new array."""
    out = {}
    for name, p in PARAMS.items():
        p, memory = p.copy(), {}
        decay = weight_decay if p.ndim > 1 else 0.0
        for t, grads in enumerate(GRADS, 1):
            p = rule(p, grads[name], memory, t, decay)
        out[name] = p
    return out


def momentum(lr, m, nesterov=False):
    def rule(p, g, memory, t, decay):
        g = g + decay * p
        v = memory["v"] = m * memory.get("v", 0) + g
        return p - lr * (g + m * v if nesterov else v)

    return rule


def adam(lr, b1=0.9, b2=0.999, eps=1e-8, trust=False):
    def rule(p, g, memory, t, decay):
        m = memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
        v = memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g * g
        update = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p
        ratio = np.linalg.norm(p) / np.linalg.norm(update) if trust else 1
        return p - lr * ratio * update

    return rule


def rmsprop(lr, d, m, eps=1e-8):
    def rule(p, g, memory, t, decay):
        g = g + decay * p
        v = memory["v"] = d * memory.get("v", 0) + (1 - d) * g * g
        b = memory["b"] = m * memory.get("b", 0) + lr * g / (np.sqrt(v + eps))
        return p - b

    return rule


def lars(lr, m, trust=0.001):
    def rule(p, g, memory, t, decay):
        g = g + decay * p
        ratio = trust * np.linalg.norm(p) / np.linalg.norm(g) if p.ndim > 1 else 1
        v = memory["v"] = m * memory.get("v", 0) + lr * ratio * g
        return p - v

    return rule


CASES = {
    "sgd": (momentum(0.1, 0), {"weight_decay": 0.01}),
    "momentum": (momentum(0.1, 0.8), {"momentum": 0.8, "weight_decay": 0.01}),
    "nesterov": (momentum(0.1, 0.8, True), {"momentum": 0.8, "weight_decay": 0.01}),
    "adam": (adam(0.1), {}),
    "adamw": (adam(0.1), {"weight_decay": 0.01}),
    "rmsprop": (rmsprop(0.1, 0.7, 0.8), {"rms_decay": 0.7, "momentum": 0.8, "weight_decay": 0.01}),
    "lamb": (adam(0.1, eps=1e-6, trust=True), {"weight_decay": 0.01}),
    "lars": (lars(0.1, 0.8), {"momentum": 0.8, "weight_decay": 0.01}),
}


def test_the_cases_cover_the_names():
    assert set(CASES) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_against_the_rule_written_out(name):
    rule, options = CASES[name]
    got = run(optimizer(name, 0.1, **options))
    want = reference(rule, options.get("weight_decay", 0.0))
    for key in PARAMS:
        np.testing.assert_allclose(got[key], want[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_clipping_comes_before_all_else():
    scaled = optimizer("sgd", 0.1, clip_norm=0.5)
    params = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = scaled.update(jax.tree.map(jnp.asarray, GRADS[0]), scaled.init(params), params)
    norm = np.sqrt(sum((g**2).sum() for g in GRADS[0].values()))
    np.testing.assert_allclose(updates["kernel"], -0.1 * GRADS[0]["kernel"] * 0.5 / norm, rtol=1e-5)


def test_optimizer_refuses():
    with pytest.raises(ValueError, match=r"name must be a known optimizer, such as adam, .*; got 'adamm'"):
        optimizer("adamm", 0.1)
    with pytest.raises(ValueError, match=r"weight_decay must be 0 for adam .*; got 0.1"):
        optimizer("adam", 0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="clip_norm must be positive or None; got 0"):
        optimizer("sgd", 0.1, clip_norm=0)
    with pytest.raises(ValueError, match="weight_decay must not be negative; got -1"):
        optimizer("sgd", 0.1, weight_decay=-1)


def values(name, total=90, **options):
    rate = schedule(name, 2.0, total, **options)
    return np.asarray([float(rate(t)) for t in range(total)])


def test_schedules_written_out():
    t = np.arange(90)
    np.testing.assert_allclose(values("constant"), 2)
    np.testing.assert_allclose(values("step"), 2 * 0.1 ** ((t >= 30).astype(int) + (t >= 60) + (t >= 80)), rtol=1e-5)
    np.testing.assert_allclose(values("cosine"), 1 + np.cos(np.pi * t / 90), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(values("cosine", end_factor=0.1), 0.2 + 0.9 * (1 + np.cos(np.pi * t / 90)), rtol=1e-4)
    np.testing.assert_allclose(values("polynomial", power=2), 2 * (1 - t / 90) ** 2, rtol=1e-4, atol=1e-6)
    rate = values("one_cycle")
    assert rate.argmax() == 27
    np.testing.assert_allclose([rate[0], rate[27]], [2 / 25, 2], rtol=1e-5)
    assert np.all(np.diff(rate[:28]) > 0)
    assert np.all(np.diff(rate[28:]) < 0)
    assert rate[-1] < 0.01


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "one_cycle"])
def test_warm_up_rises_to_the_peak_and_the_rest_keeps_its_place(name):
    rate = values(name, warmup_steps=9)
    np.testing.assert_allclose(rate[:9], 2 * (np.arange(9) + 1) / 10, rtol=1e-5)
    np.testing.assert_allclose(rate[9], 2, rtol=1e-5)
    if name == "step":
        np.testing.assert_allclose(rate[[29, 30, 59, 60, 79, 80]], [2, 0.2, 0.2, 0.02, 0.02, 0.002], rtol=1e-5)


def test_schedule_refuses():
    with pytest.raises(ValueError, match=r"name must be a known schedule, such as cosine, .*; got 'cosin'"):
        schedule("cosin", 1, 10)
    with pytest.raises(ValueError, match=r"warmup_steps must be in \[0, total_steps=10\); got 10"):
        schedule("cosine", 1, 10, warmup_steps=10)
    with pytest.raises(ValueError, match=r"warmup_steps must be 0 for one_cycle, .*; got 1"):
        schedule("one_cycle", 1, 10, warmup_steps=1)
    with pytest.raises(ValueError, match="must come after the 8 warm-up steps"):
        schedule("step", 1, 10, warmup_steps=8)
