"""The Inceptions with BatchNorm: their modules, their sizes, their auxiliary head, their names elsewhere."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision import models
from flaxvision.layers import Conv, ConvNorm, SqueezeExcite
from flaxvision.models.inception_v4 import BLOCK8, BLOCK17, BLOCK35
from flaxvision.weights.names import bn_inception, inception_v3, inception_v4

UNIT = functools.partial(ConvNorm, norm=functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3))
SIZES = {"bn_inception": (64, 96), "se_bn_inception": (64, 96)}


@functools.cache
def shapes_of(name, *image, **fields):
    x = jax.ShapeDtypeStruct((1, *image, 3), jnp.float32)
    return jax.eval_shape(fv.create_model(name, **fields).init, jax.random.key(0), x)


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


WIDTHS = {
    "bn_inception": (64, 192, 320, 608, 1024),
    "inception_v3": (64, 192, 288, 768, 2048),
    "inception_v4": (64, 192, 384, 1024, 1536),
    "inception_resnet_v2": (64, 192, 320, 1088, 1536),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_stages(name):
    sizes = SIZES.get(name, (107, 139))
    variables, backbone = shapes_of(name, *sizes), fv.create_backbone(name)
    maps = {}

    def apply(variables, x):
        maps.update({key: value.shape for key, value in backbone.apply(variables, x).items()})

    image = jax.ShapeDtypeStruct((1, *sizes, 3), jnp.float32)
    jax.eval_shape(apply, {key: leaves["backbone"] for key, leaves in variables.items()}, image)
    assert backbone.strides == {"stem": 2, "stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}
    assert list(maps) == list(backbone.strides)
    extents = np.asarray(sizes)
    for (stage, stride), width in zip(backbone.strides.items(), WIDTHS[name], strict=True):
        if name == "bn_inception":
            extents = np.asarray(sizes) // stride
        else:  # nothing is padded at stride 2, and two convolutions at stride 1 are not
            extents = (extents - 1) // 2 - (2 if stride < 8 else 0)
        assert maps[stage] == (1, *extents, width)


@pytest.mark.parametrize("name", ["inception_v3", "inception_v4", "inception_resnet_v2"])
def test_the_smallest_image(name):
    model = fv.create_model(name)
    with pytest.raises(ValueError, match="at least 75x75 pixels; got 74x90"):
        model.init(jax.random.key(0), jnp.zeros((1, 74, 90, 3)))


def test_any_extent_at_stride_2():
    """Caffe's pools and convolutions disagree about odd maps."""
    assert shapes_of("bn_inception", 299, 37)["params"]["head"]["kernel"].shape == (1024, 1000)


def test_the_auxiliary_head_of_v3():
    model = fv.create_model("inception_v3", num_classes=5, aux_heads=True)
    variables = shapes_of("inception_v3", 299, 299, num_classes=5, aux_heads=True)
    assert "aux_logits" not in variables

    def apply(variables, x, train):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, x, train=train, rngs=rngs, mutable=["batch_stats", "aux_logits"])

    image = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    logits, sown = jax.eval_shape(functools.partial(apply, train=True), variables, image)
    assert logits.shape == (2, 5)
    assert [leaf.shape for leaf in jax.tree.leaves(sown["aux_logits"])] == [(2, 5)]
    small = jax.ShapeDtypeStruct((2, 298, 299, 3), jnp.float32)
    _, sown = jax.eval_shape(functools.partial(apply, train=False), variables, small)
    assert "aux_logits" not in sown
    with pytest.raises(ValueError, match="17x17, which images of 299x299 give; got maps of 16x17"):
        jax.eval_shape(functools.partial(apply, train=True), variables, small)


def test_the_auxiliary_head_of_v3_counts():
    shapes = shapes_of("inception_v3", 299, 299, aux_heads=True)
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"])) == 27_161_264


def test_squeeze_and_excitation_follows_every_module():
    names = ("se_bn_inception", "se_inception_v3", "se_inception_resnet_v2")
    blocks = {name: shapes_of(name, *SIZES.get(name, (107, 139)))["params"]["backbone"] for name in names}
    for name in ("se_bn_inception", "se_inception_v3"):
        modules = {key for key in blocks[name] if key.startswith(("mixed", "inception")) and not key.endswith("_se")}
        assert {f"{key}_se" for key in modules} == {key for key in blocks[name] if key.endswith("_se")}
    assert blocks["se_bn_inception"]["inception3b_se"]["reduce"]["kernel"].shape == (320, 20)
    params = blocks["se_inception_resnet_v2"]
    assert {key for key in params if key.endswith("_se")} == {"mixed5b_se", "mixed6a_se", "mixed7a_se"}
    units = [key for key in params if key.startswith("block")]
    assert len(units) == 40
    assert all("se" in params[key] for key in units)


def test_biases():
    """The published Inception with BatchNorm has them all, the SENet authors' none."""
    for name, expected in (("bn_inception", True), ("se_bn_inception", False)):
        backbone = shapes_of(name, 64, 96)["params"]["backbone"]
        assert ("bias" in backbone["conv1"]["conv"]) == expected
        assert ("bias" in backbone["inception4c"]["branch3x3dbl_2"]["conv"]) == expected
        assert fv.create_model(name).epsilon == 1e-5


# Read off the libraries' state dicts and summaries.
TORCH = {
    "inception_v3": {
        "backbone/conv4a/bn": "Conv2d_4a_3x3.bn",
        "backbone/mixed5b/branch3x3dbl_3/conv": "Mixed_5b.branch3x3dbl_3.conv",
        "backbone/mixed7c/branch3x3dbl_3b/bn": "Mixed_7c.branch3x3dbl_3b.bn",
        "aux_head1/conv2/bn": "AuxLogits.conv1.bn",
        "head": "fc",
    },
    "inception_v4": {
        "backbone/conv2b/conv": "features.2.conv",
        "backbone/mixed3a/bn": "features.3.conv.bn",
        "backbone/mixed4a_branch7x7x3_4/conv": "features.4.branch1.3.conv",
        "backbone/mixed5e/branch_pool/conv": "features.9.branch3.1.conv",
        "backbone/mixed6a/branch3x3/conv": "features.10.branch0.conv",
        "backbone/mixed6h/branch7x7dbl_5/bn": "features.17.branch2.4.bn",
        "backbone/mixed7a/branch7x7x3_1/conv": "features.18.branch1.0.conv",
        "backbone/mixed7d/branch3x3dbl_4b/conv": "features.21.branch2_3b.conv",
        "backbone/mixed7b/branch_pool/conv": "features.19.branch3.1.conv",
        "head": "last_linear",
    },
    "inception_resnet_v2": {
        "backbone/conv7b/bn": "conv2d_7b.bn",
        "backbone/mixed5b/branch5x5_2/conv": "mixed_5b.branch1.1.conv",
        "backbone/block35_10/branch3x3dbl_3/conv": "repeat.9.branch2.2.conv",
        "backbone/block17_1/up": "repeat_1.0.conv2d",
        "backbone/mixed7a/branch3x3dbl_3/bn": "mixed_7a.branch2.2.bn",
        "backbone/block8_9/branch1x1/conv": "repeat_2.8.branch0.conv",
        "backbone/block8_10/branch3x3_3/conv": "block8.branch1.2.conv",
        "head": "classif",
    },
}
KERAS = {
    "inception_v3": {
        "backbone/conv1a/conv": "conv2d",
        "backbone/mixed5b/branch_pool/bn": "batch_normalization_11",
        "backbone/mixed7c/branch_pool/conv": "conv2d_93",
        "head": "predictions",
    },
    "inception_resnet_v2": {
        "backbone/mixed5b/branch1x1/conv": "conv2d_5",
        "backbone/block8_10/branch3x3_3/bn": "batch_normalization_202",
        "backbone/block17_20/up": "block17_20_conv",
        "backbone/conv7b/conv": "conv_7b",
    },
}


@pytest.mark.parametrize(("source", "names"), [("timm", TORCH), ("keras", KERAS)])
def test_names_elsewhere(source, names):
    layouts = {(layout.source, *layout.models): layout for layout in inception_v3.LAYOUTS + inception_v4.LAYOUTS}
    for model, pairs in names.items():
        for ours, theirs in pairs.items():
            assert layouts[source, model].module(ours) == theirs


def test_names_in_pytorchcv():
    module = bn_inception.LAYOUTS[0].module
    assert module("backbone/conv2_2/bn") == "features.init_block.conv2.conv2.bn"
    assert module("backbone/inception3a/branch_pool/conv") == "features.stage1.unit1.branches.branch4.conv.conv"
    assert module("backbone/inception3c/branch3x3dbl_3/conv") == "features.stage2.unit1.branches.branch2.conv3.conv"
    assert module("backbone/inception5b/branch1x1/bn") == "features.stage3.unit3.branches.branch1.bn"
