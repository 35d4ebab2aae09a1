"""What holds of every small classifier."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxvision as fv

FEATURES = {"perceptron": 2, "mlp": 100, "lenet5": 84, "lenet5_modern": 84, "lenet_dli": 128, "fashion_cnn": 64}
NAMES = sorted(FEATURES)  # test_zoo.py has the others


def images(name, rows=2, seed=0):
    info = fv.model_info(name)
    shape = (*info.input_size, info.channels) if len(info.input_size) == 2 else info.input_size
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, *shape)), jnp.float32)


@functools.cache
def variables_of(name, **overrides):
    """Random parameters made with numpy: compiling `init` costs more than all else here."""
    model = fv.create_model(name, **overrides)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images(name))
    rng = np.random.default_rng(1)

    def fill(x):
        fan_in = max(1, int(np.prod(x.shape[:-1])))
        return jnp.asarray(rng.normal(scale=fan_in**-0.5, size=x.shape), x.dtype)

    return jax.tree.map(fill, shapes)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    model, x = fv.create_model(name), images(name)
    variables = variables_of(name)
    logits = model.apply(variables, x)
    assert logits.shape == (2, model.num_classes)
    assert logits.dtype == jnp.float32
    assert bool(jnp.all(jnp.isfinite(logits)))
    np.testing.assert_array_equal(logits, model.apply(variables, x))
    # Each row stands for itself.
    np.testing.assert_allclose(model.apply(variables, x[1:]), logits[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_features_without_a_head(name):
    features = jax.eval_shape(
        lambda x: fv.create_model(name, num_classes=0).init_with_output(jax.random.key(0), x)[0], images(name)
    )
    assert features.shape == (2, FEATURES[name])
    assert features.dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model, x = fv.create_model(name), images(name, 8)
    variables = variables_of(name)

    def loss(params):
        logits = model.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(2)})
        labels = jnp.arange(8) % max(model.num_classes, 2)
        if model.num_classes == 1:
            return optax.sigmoid_binary_cross_entropy(logits[:, 0], labels).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.all(jnp.isfinite(g))), path
        assert float(jnp.abs(g).max()) > 0, path


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_float32(name):
    variables, x = variables_of(name), images(name)
    exact = fv.create_model(name).apply(variables, x)
    rough = fv.create_model(name, dtype=jnp.bfloat16).apply(variables, x)
    assert rough.dtype == jnp.float32
    error = jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)
    assert 0 < float(error) < 0.05
    shapes = jax.eval_shape(lambda v: fv.create_model(name, dtype=jnp.bfloat16).init(jax.random.key(0), v), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes["params"])} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["lenet_dli", "fashion_cnn"])
def test_dropout_only_in_training(name):
    model, x, variables = fv.create_model(name), images(name), variables_of(name)
    one, two = (model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(k)}) for k in (0, 1))
    assert float(jnp.abs(one - two).max()) > 0


def test_the_nnx_bridge_gives_the_same_logits():
    from flax import nnx

    x = images("mlp")
    model = nnx.bridge.ToNNX(fv.create_model("mlp"), rngs=nnx.Rngs(0)).lazy_init(x)
    state = nnx.state(model, nnx.Param)
    params = {layer: {k: v.get_value() for k, v in leaves.items()} for layer, leaves in state.items()}
    np.testing.assert_allclose(model(x), fv.create_model("mlp").apply({"params": params}, x), rtol=1e-6)


def numpy_conv(x, kernel, bias):
    n, h, w, _ = x.shape
    kh, kw, _, k = kernel.shape
    out = np.zeros((n, h - kh + 1, w - kw + 1, k))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            out[:, i, j] = np.tensordot(x[:, i : i + kh, j : j + kw], kernel, 3) + bias
    return out


def squash(x):
    return 1.7159 * np.tanh(2 / 3 * x)


def test_lenet5_against_a_numpy_loop():
    """The paper's network written out again: table I's connections, trainable pools, RBF distances."""
    from flaxvision.layers import digit_codes

    variables, x = variables_of("lenet5"), images("lenet5")
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])
    table = {  # read off the paper by columns: X marks
        0: "XXX...", 1: ".XXX..", 2: "..XXX.", 3: "...XXX", 4: "X...XX", 5: "XX...X", 6: "XXXX..", 7: ".XXXX.",
        8: "..XXXX", 9: "X..XXX", 10: "XX..XX", 11: "XXX..X", 12: "XX.XX.", 13: ".XX.XX", 14: "X.XX.X", 15: "XXXXXX",
    }  # fmt: skip

    def pool(x, p):
        s = x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]
        return squash(s * p["coefficient"] + p["bias"])

    y = np.asarray(x, np.float64)
    y = pool(squash(numpy_conv(y, p["c1"]["kernel"], p["c1"]["bias"])), p["s2"])
    dense, connection = np.zeros((5, 5, 6, 16)), 0
    for out in range(16):
        for source in range(6):
            if table[out][source] == "X":
                dense[:, :, source, out] = p["c3"]["kernel"][:, :, connection]
                connection += 1
    assert connection == 60
    y = pool(squash(numpy_conv(y, dense, p["c3"]["bias"])), p["s4"])
    y = squash(numpy_conv(y, p["c5"]["kernel"], p["c5"]["bias"])).reshape(2, 120)
    y = squash(y @ p["f6"]["kernel"] + p["f6"]["bias"])
    distances = [[sum((row - code) ** 2) for code in np.asarray(digit_codes())] for row in y]
    np.testing.assert_allclose(fv.create_model("lenet5").apply(variables, x), -np.asarray(distances), rtol=1e-4)


def test_lenet5_wants_32_pixels():
    for name in ("lenet5", "lenet5_modern"):
        with pytest.raises(ValueError, match=r"wants images \[N, 32, 32, C\]; got \(1, 28, 28, 1\)"):
            fv.create_model(name).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))


def test_lenet5_takes_other_numbers_of_classes():
    x = images("lenet5")
    logits, _ = jax.eval_shape(
        lambda x: fv.create_model("lenet5", num_classes=17).init_with_output(jax.random.key(0), x), x
    )
    assert logits.shape == (2, 17)


@pytest.mark.parametrize("activation", ["relu", "selu", "tanh", "logistic"])
def test_mlp_against_numpy(activation):
    model = fv.create_model("mlp", features=(6, 5), num_classes=3, activation=activation)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 1)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    functions = {
        "relu": lambda z: np.maximum(z, 0),
        "tanh": np.tanh,
        "logistic": lambda z: 1 / (1 + np.exp(-z)),
        "selu": lambda z: 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * (np.exp(z) - 1)),
    }
    y = np.asarray(x).reshape(4, 4)
    for layer in ("hidden1", "hidden2"):
        p = variables["params"][layer]
        y = functions[activation](y @ np.asarray(p["kernel"]) + np.asarray(p["bias"]))
    p = variables["params"]["head"]
    np.testing.assert_allclose(
        model.apply(variables, x), y @ np.asarray(p["kernel"]) + np.asarray(p["bias"]), rtol=2e-5, atol=1e-6
    )


def test_mlp_refuses_another_activation():
    with pytest.raises(ValueError, match="one of relu, selu, tanh, logistic; got 'gelu'"):
        fv.create_model("mlp", activation="gelu").init(jax.random.key(0), jnp.zeros((1, 4)))


def test_the_perceptron_rule_against_a_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)).astype(np.float32), (rng.random((20, 2)) > 0.5).astype(np.float32)
    params = fv.create_model("perceptron", num_classes=2).init(jax.random.key(0), x)["params"]
    new, wrong = fv.models.perceptron_update(params, jnp.asarray(x), jnp.asarray(y), 0.5)
    w, b, mistakes = np.zeros((3, 2), np.float32), np.zeros(2, np.float32), 0
    for xi, yi in zip(x, y, strict=True):
        for k in range(2):
            guess = 1.0 if xi @ w[:, k] + b[k] >= 0 else 0.0
            mistakes += int(guess != yi[k])
            w[:, k] += 0.5 * (yi[k] - guess) * xi
            b[k] += 0.5 * (yi[k] - guess)
    np.testing.assert_allclose(new["units"]["kernel"], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["units"]["bias"], b, rtol=1e-5)
    assert int(wrong) == mistakes > 0


def test_the_perceptron_separates_setosa():
    from sklearn.datasets import load_iris

    iris = load_iris()
    x = jnp.asarray(iris.data[:, 2:], jnp.float32)
    y = jnp.asarray(iris.target == 0, jnp.float32)[:, None]
    model = fv.create_model("perceptron")
    params = model.init(jax.random.key(0), x)["params"]
    for _ in range(20):
        params, wrong = fv.models.perceptron_update(params, x, y)
    assert int(wrong) == 0
    np.testing.assert_array_equal(model.apply({"params": params}, x, threshold=True), y)


def test_the_perceptron_rule_checks_shapes():
    params = {"units": {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}}
    with pytest.raises(ValueError, match=r"x must be \[N, 2\] and y \[N, 1\]"):
        fv.models.perceptron_update(params, jnp.zeros((4, 3)), jnp.zeros((4, 1)))


def test_modules_hash_and_compare():
    """A model is a value: jit keys its cache on it."""
    assert fv.create_model("lenet5") == fv.create_model("lenet5")
    assert hash(fv.create_model("lenet_dli")) == hash(fv.create_model("lenet_dli"))
    assert isinstance(fv.create_model("mlp"), nn.Module)
