"""LeNet-5: the paper's network written out again in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.layers import digit_codes


def images(*size):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 1)), jnp.float32)


def variables_of(model, x, seed=0):
    """Random parameters made with numpy: compiling `init` costs more than all else here."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(
        lambda v: jnp.asarray(rng.normal(0, max(1, np.prod(v.shape[:-1])) ** -0.5, v.shape), v.dtype), shapes
    )


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
    model, x = fv.create_model("lenet5"), images(32, 32)
    variables = variables_of(model, x)
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
    np.testing.assert_allclose(model.apply(variables, x), -np.asarray(distances), rtol=1e-4)


def test_lenet5_wants_32_pixels():
    for name in ("lenet5", "lenet5_modern"):
        with pytest.raises(ValueError, match=r"images must have the shape \[N, 32, 32, C\].*; got \(1, 28, 28, 1\)"):
            fv.create_model(name).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))


def test_lenet5_takes_other_numbers_of_classes():
    x = images(32, 32)
    logits, _ = jax.eval_shape(
        lambda x: fv.create_model("lenet5", num_classes=17).init_with_output(jax.random.key(0), x), x
    )
    assert logits.shape == (2, 17)
