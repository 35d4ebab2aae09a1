"""Modules of the Inception networks against numpy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxvision import models
from flaxvision.layers import Conv, ConvNorm, SqueezeExcite
from flaxvision.models.inception_v4 import BLOCK8, BLOCK17, BLOCK35

UNIT = functools.partial(ConvNorm, norm=functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3))


def filled(module, x):
    """Made with numpy: compiling `init` costs more than all else here."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(0, max(1, np.prod(leaf.shape[:-1])) ** -0.5, leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(fill, shapes)


class Loops:
    """The parts of a module in numpy, by the names of its submodules."""

    def __init__(self, variables):
        self.variables = jax.tree.map(lambda v: np.asarray(v, np.float64), variables)

    def windows(self, x, size, stride, pad, value=0.0):
        (kh, kw), (ph, pw) = size, pad
        x = np.pad(x, [(0, 0), (ph, ph), (pw, pw), (0, 0)], constant_values=value)
        rows, columns = (range(0, n - k + 1, stride) for n, k in zip(x.shape[1:3], size, strict=True))
        return np.stack([np.stack([x[:, i : i + kh, j : j + kw] for j in columns], 1) for i in rows], 1)

    def conv(self, x, name, stride=1, pad=None):
        p, s = self.variables["params"][name], self.variables["batch_stats"][name]["bn"]
        kernel = p["conv"]["kernel"]
        size = kernel.shape[:2]
        y = np.tensordot(self.windows(x, size, stride, [k // 2 for k in size] if pad is None else pad), kernel, 3)
        y = y + p["conv"].get("bias", 0)
        return np.maximum((y - s["mean"]) / np.sqrt(s["var"] + 1e-3) * p["bn"]["scale"] + p["bn"]["bias"], 0)

    def chain(self, x, *names, reduce=False):
        for name in names[: -1 if reduce else None]:
            x = self.conv(x, name)
        return self.conv(x, names[-1], 2, (0, 0)) if reduce else x

    def max_pool(self, x):
        return self.windows(x, (3, 3), 2, (0, 0)).max((3, 4))

    def avg_pool(self, x, count_include_pad):
        total = self.windows(x, (3, 3), 1, (1, 1)).sum((3, 4))
        return total / (9 if count_include_pad else self.windows(np.ones_like(x), (3, 3), 1, (1, 1)).sum((3, 4)))


def steps(name, count):
    return [f"{name}_{i}" for i in range(1, count + 1)]


def a(m, x, pad=True, wide="branch5x5"):
    double = steps("branch3x3dbl", 3)
    pool = m.chain(m.avg_pool(x, pad), "branch_pool")
    return m.chain(x, "branch1x1"), m.chain(x, *steps(wide, 2)), m.chain(x, *double), pool


def b(m, x, pad=True):
    return *(m.chain(x, *n) for n in (["branch1x1"], steps("branch7x7", 3), steps("branch7x7dbl", 5))), m.chain(
        m.avg_pool(x, pad), "branch_pool"
    )


def c(m, x, pad=True, depth=2):
    single, double = m.chain(x, "branch3x3_1"), m.chain(x, *steps("branch3x3dbl", depth))
    forks = [m.chain(single, f"branch3x3_2{f}") for f in "ab"]
    forks += [m.chain(double, f"branch3x3dbl_{depth + 1}{f}") for f in "ab"]
    return m.chain(x, "branch1x1"), *forks, m.chain(m.avg_pool(x, pad), "branch_pool")


def reduction(*names):
    return lambda m, x: (*(m.chain(x, *n, reduce=True) for n in names), m.max_pool(x))


MODULES = {
    "v3a": (models.InceptionV3A(32, UNIT), a),
    "v3a keras": (models.InceptionV3A(32, UNIT, False), functools.partial(a, pad=False)),
    "v3b": (models.InceptionV3B(UNIT), reduction(["branch3x3"], steps("branch3x3dbl", 3))),
    "v3c": (models.InceptionV3C(16, UNIT), b),
    "v3d": (models.InceptionV3D(UNIT), reduction(steps("branch3x3", 2), steps("branch7x7x3", 4))),
    "v3e": (models.InceptionV3E(UNIT), c),
    "v4a": (models.InceptionV4A(UNIT), functools.partial(a, pad=False, wide="branch3x3")),
    "v4b": (models.InceptionV4B(UNIT), functools.partial(b, pad=False)),
    "v4c": (models.InceptionV4C(UNIT), functools.partial(c, pad=False, depth=3)),
    "reduction a": (models.ReductionA(2, 3, 4, 5, UNIT), reduction(["branch3x3"], steps("branch3x3dbl", 3))),
    "v4 reduction b": (models.InceptionV4ReductionB(UNIT), reduction(steps("branch3x3", 2), steps("branch7x7x3", 4))),
    "resnet reduction b": (
        models.InceptionResNetReductionB(UNIT),
        reduction(steps("branch3x3", 2), steps("branch3x3b", 2), steps("branch3x3dbl", 3)),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_against_numpy_loops(name):
    module, loops = MODULES[name]
    x = np.random.default_rng(1).normal(size=(2, 6, 5, 4)).astype(np.float32)
    variables = filled(module, x)
    expected = np.concatenate(loops(Loops(variables), x), axis=-1)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("strides", "pool"), [(1, "avg"), (1, "max"), (2, "avg")])
def test_the_module_with_batch_norm_against_numpy_loops(strides, pool):
    module = models.BNInceptionModule((3 if strides == 1 else 0, 4, 5, 6, 7, 8), UNIT, pool)
    x = np.random.default_rng(1).normal(size=(2, 5, 8, 4)).astype(np.float32)
    variables = filled(module, x)
    m = Loops(variables)
    expected = [m.chain(x, "branch1x1")] if strides == 1 else []
    expected.append(m.conv(m.chain(x, "branch3x3_1"), "branch3x3_2", strides))
    expected.append(m.conv(m.chain(x, "branch3x3dbl_1", "branch3x3dbl_2"), "branch3x3dbl_3", strides))
    if strides == 2:
        # 5 rows give 3: the pool pads both sides; 8 columns give 4: only the right.
        padded = np.pad(x, [(0, 0), (1, 1), (0, 1), (0, 0)], constant_values=-np.inf)
        expected.append(m.max_pool(padded))
    else:
        largest = m.windows(x, (3, 3), 1, (1, 1), -np.inf).max((3, 4))
        expected.append(m.chain(m.avg_pool(x, True) if pool == "avg" else largest, "branch_pool"))
    actual = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(actual, np.concatenate(expected, -1), rtol=1e-3, atol=1e-5)


def test_the_module_with_batch_norm_has_two_pools():
    with pytest.raises(ValueError, match="pool must be 'avg' or 'max'; got 'mean'"):
        models.BNInceptionModule((1, 1, 1, 1, 1, 1), UNIT, "mean").init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))


@pytest.mark.parametrize("reduction", [None, 2])
def test_the_residual_unit_against_numpy_loops(reduction):
    branches = (("branch1x1", (2, 1)), ("branch3x3", (3, 1), (4, (1, 3))))
    se = functools.partial(SqueezeExcite, reduction) if reduction else None
    module = models.InceptionResNetUnit(branches, 0.3, UNIT, Conv, se)
    x = np.random.default_rng(1).normal(size=(2, 4, 5, 4)).astype(np.float32)
    variables = filled(module, x)
    m = Loops(variables)
    p = m.variables["params"]
    y = np.concatenate([m.chain(x, "branch1x1"), m.chain(x, "branch3x3_1", "branch3x3_2")], -1)
    y = y @ p["up"]["kernel"][0, 0] + p["up"]["bias"]
    if reduction:
        hidden = np.maximum(y.mean((1, 2)) @ p["se"]["reduce"]["kernel"] + p["se"]["reduce"]["bias"], 0)
        gate = 1 / (1 + np.exp(-(hidden @ p["se"]["expand"]["kernel"] + p["se"]["expand"]["bias"])))
        y = y * gate[:, None, None, :]
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), np.maximum(x + 0.3 * y, 0), rtol=1e-3, atol=1e-5)


def test_the_residual_units_scales():
    assert [scale for _, scale in (BLOCK35, BLOCK17, BLOCK8)] == [0.17, 0.1, 0.2]
