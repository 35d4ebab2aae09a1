"""AlexNet: the paper's network and the book's written out again in numpy, and what the variants differ in."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import flaxvision as fv
from flaxvision.models import AlexNet, AlexNetBackbone, AlexNetDLI, AlexNetDLIBackbone

FEATURES = (4, 8, 6, 8, 4)
HEAD = {"hidden_features": 5, "num_classes": 3}


def filled(model, x, seed=0):
    """Variables made with numpy, biases and statistics too."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        scale = 0.3 if name in ("bias", "mean") else (2 / np.prod(leaf.shape[:-1])) ** 0.5
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def images(height, width, seed=1):
    return np.random.default_rng(seed).normal(0, 30, (2, height, width, 3)).astype(np.float32)


def conv(x, p, stride, pad, groups=1):
    x, kernel = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))), p["kernel"]
    k, inputs, outputs = kernel.shape[0], kernel.shape[2], kernel.shape[3] // groups
    rows, columns = (x.shape[1] - k) // stride + 1, (x.shape[2] - k) // stride + 1
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[3]))
    for g in range(groups):
        seen, own = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
        for i in range(rows):
            for j in range(columns):
                window = x[:, i * stride : i * stride + k, j * stride : j * stride + k, seen]
                y[:, i, j, own] = np.tensordot(window, kernel[..., own], 3)
    return np.maximum(y + p["bias"], 0)


def pool(x, ceil):
    rows, columns = (int((np.ceil if ceil else np.floor)((n - 3) / 2)) + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, x.shape[3]))
    for i in range(rows):
        for j in range(columns):
            y[:, i, j] = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    return y


def normalized(x):
    y = np.zeros_like(x)
    for i in range(x.shape[-1]):
        neighbours = x[..., max(0, i - 2) : i + 3]
        y[..., i] = x[..., i] / (2 + 1e-4 * (neighbours**2).sum(-1)) ** 0.75
    return y


def close(given, expected):
    assert np.linalg.norm(given - expected) <= 1e-5 * np.linalg.norm(expected)


def test_alexnet_against_numpy():
    """Section 3.5: normalization after the first two ReLUs, then overlapping pools; maps of two GPUs apart."""
    model, x = AlexNet(AlexNetBackbone(FEATURES), **HEAD), images(66, 79)
    variables = filled(model, x)
    p = jax.tree.map(lambda v: v.astype(np.float64), variables["params"])
    c = p["backbone"]
    assert c["conv2"]["kernel"].shape == (5, 5, 2, 8)
    y = pool(normalized(conv(x.astype(np.float64), c["conv1"], 4, 0)), ceil=True)
    y = pool(normalized(conv(y, c["conv2"], 1, 2, groups=2)), ceil=True)
    y = conv(y, c["conv3"], 1, 1)
    y = conv(y, c["conv4"], 1, 1, groups=2)
    y = pool(conv(y, c["conv5"], 1, 1, groups=2), ceil=True).reshape(2, -1)
    for name in ("fc6", "fc7"):
        y = np.maximum(y @ p[name]["kernel"] + p[name]["bias"], 0)
    close(jax.jit(model.apply)(variables, x), y @ p["head"]["kernel"] + p["head"]["bias"])


def test_alexnet_dli_against_numpy():
    """The book's: BatchNorm after each pool, tanh, no padding."""
    model, x = AlexNetDLI(AlexNetDLIBackbone(FEATURES), **HEAD), images(196, 207) / 30
    variables = filled(model, x)
    p, stats = (jax.tree.map(lambda v: v.astype(np.float64), variables[k]) for k in ("params", "batch_stats"))

    def norm(x, p, stats):
        return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-3) * p["scale"] + p["bias"]

    c, s = p["backbone"], stats["backbone"]
    y = norm(pool(conv(x.astype(np.float64), c["conv1"], 4, 0), ceil=False), c["bn1"], s["bn1"])
    y = norm(pool(conv(y, c["conv2"], 1, 0), ceil=False), c["bn2"], s["bn2"])
    for name in ("conv3", "conv4", "conv5"):
        y = conv(y, c[name], 1, 0)
    y = norm(pool(y, ceil=False), p["bn3"], stats["bn3"]).reshape(2, -1)
    for name in ("fc6", "fc7"):
        y = np.tanh(y @ p[name]["kernel"] + p[name]["bias"])
    close(jax.jit(model.apply)(variables, x), y @ p["head"]["kernel"] + p["head"]["bias"])


def shapes_at(name, height, width, **fields):
    model = fv.create_model(name, **fields)
    x = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)


@pytest.mark.parametrize("name", ["alexnet", "alexnet_ungrouped"])
def test_the_printed_224_pixels_give_the_parameters_of_227(name):
    assert shapes_at(name, 224, 224) == shapes_at(name, 227, 227)


def test_sizes():
    assert shapes_at("alexnet_tv", 63, 100) == shapes_at("alexnet_tv", 224, 224)
    for size in (39, 55):
        assert shapes_at("alexnet", size, size)["params"]["fc6"]["kernel"].shape == (256, 4096)
    assert shapes_at("alexnet_dli", 195, 195)["params"]["fc6"]["kernel"].shape == (384, 4096)
    for name, size in (("alexnet", 38), ("alexnet_tv", 62), ("alexnet_dli", 194)):
        with pytest.raises(ValueError, match=r"window_shape must fit .* got \(3, 3\)\. .*image is too small"):
            shapes_at(name, size, size)


def test_backbone():
    x = jax.ShapeDtypeStruct((1, 227, 227, 3), jnp.float32)
    extents = {"alexnet": (55, 27, 13), "alexnet_tv": (56, 27, 13), "alexnet_dli": (55, 23, 5)}
    for name, expected in extents.items():
        backbone = fv.create_backbone(name)
        stages = jax.eval_shape(backbone.apply, _trunk(shapes_at(name, 227, 227)), x)
        assert list(stages) == list(backbone.strides) == ["stage1", "stage2", "stage3"]
        assert list(backbone.strides.values()) == [4, 8, 16]
        assert tuple(stage.shape[1] for stage in stages.values()) == expected


def _trunk(variables):
    return {collection: tree["backbone"] for collection, tree in variables.items() if "backbone" in tree}


@pytest.mark.parametrize(("first", "dropped"), [(False, True), (True, False)])
def test_where_dropout_acts(first, dropped):
    """The paper drops what the hidden layers give, torchvision what they get: the last ReLU's output stays whole."""
    model = AlexNet(AlexNetBackbone(FEATURES), 0, hidden_features=5, dropout_first=first, dropout_rate=1.0)
    x = images(55, 55)
    variables = jax.tree.map(np.abs, filled(model, x))
    features = jax.jit(lambda v, x: model.apply(v, x, train=True, rngs={"dropout": jax.random.key(0)}))(variables, x)
    assert bool((features == 0).all()) == dropped


def started(model, *leaves):
    """Some parameters as they start; what isn't asked for isn't compiled."""

    def init(key):
        flat = flatten_dict(model.init(key, jnp.zeros((1, 55, 55, 3)))["params"], sep="/")
        return {path: leaf for path, leaf in flat.items() if path.endswith(leaves)}

    return jax.jit(init)(jax.random.key(0))


def test_initializers():
    paper = started(AlexNet(AlexNetBackbone(FEATURES), **HEAD), "bias", "conv1/kernel")
    assert 0.009 < float(paper.pop("backbone/conv1/kernel").std()) < 0.011
    values = {path.split("/")[-2]: set(leaf.tolist()) for path, leaf in paper.items()}
    ones = {"conv2", "conv4", "conv5", "fc6", "fc7"}
    assert values == {name: {1.0 if name in ones else 0.0} for name in (*ones, "conv1", "conv3", "head")}
    torch = started(AlexNet(AlexNetBackbone(FEATURES, torch_init=True), **HEAD), "conv2/kernel", "conv2/bias")
    limit = (5 * 5 * 2) ** -0.5
    for leaf in torch.values():
        assert 0.6 * limit < float(jnp.abs(leaf).max()) <= limit


@pytest.mark.parametrize(("name", "source"), [("alexnet", "caffe"), ("alexnet_tv", "torchvision")])
def test_conversion_turns_the_flattened_maps(name, source):
    """Row c * 36 + h * 6 + w of the library's first matrix is our row (h * 6 + w) * 256 + c; and back."""
    convert = importlib.import_module("flaxvision.weights.convert")
    fields = fv.weights.fields(name, source)
    shapes = {k: v.shape for k, v in convert.shapes_of(name, fv.create_model(name)).items()}
    variables = convert.nested({k: np.broadcast_to(np.float32(0), s) for k, s in shapes.items()})
    tensors = convert.export(name, variables, source=source, **fields)
    fc6 = {"caffe": "fc6.weight", "torchvision": "classifier.1.weight"}[source]
    tensors[fc6] = np.zeros((4096, 9216), np.float32)
    tensors[fc6][7] = np.arange(9216)
    kernel = convert.convert(name, tensors, source=source, **fields)["params"]["fc6"]["kernel"]
    c, h, w = 200, 4, 1
    assert kernel[(h * 6 + w) * 256 + c, 7] == c * 36 + h * 6 + w
