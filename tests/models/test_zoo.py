"""What holds of every network of the zoo: shapes without arithmetic, arithmetic on the smallest of each family."""

import fnmatch
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flaxvision as fv
from flaxvision.models.backbone import Backbone

SMALL = {"perceptron", "mlp", "lenet5", "lenet5_modern", "lenet_dli", "fashion_cnn"}  # test_models.py has these
ZOO = sorted(set(fv.list_models(task="classification")) - SMALL)

FEATURES = {
    "alexnet*": 4096,
    "zfnet": 4096,
    "vgg*": 4096,
    "googlenet*": 1024,
    "*bn_inception": 1024,
    "*inception_v3": 2048,
    "inception_v4": 1536,
    "*inception_resnet_v2": 1536,
    "*resnet18": 512,
    "*resnet34": 512,
    "resnet*_cifar": 64,
    "*resnet50": 2048,
    "*resnet101": 2048,
    "*resnet152": 2048,
    "senet154": 2048,
    "xception": 2048,
    "squeezenet1_0": 512,
    "mobilenet_v2": 1280,
    "capsnet": 1152 * 8,
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # halves the compilation
# One model of each body, cut where it only repeats itself, at a small input.
SMALLEST: dict[str, tuple[tuple[int, int], dict]] = {
    "alexnet": ((63, 70), {"hidden_features": 32}),
    "alexnet_tv": ((63, 70), {"hidden_features": 32}),
    "alexnet_dli": ((195, 199), {"hidden_features": 32}),
    "zfnet": ((63, 63), {"hidden_features": 32}),
    "vgg11_bn": ((32, 33), {"hidden_features": 32}),
    "vgg16_dli": ((32, 33), {"hidden_features": 32, "stage_sizes": (1, 1, 1, 1, 1)}),
    "squeezenet1_0": ((33, 35), {}),
    "googlenet": ((32, 33), {}),
    "googlenet_bn": ((32, 33), {}),
    "bn_inception": ((32, 33), {"use_bias": False}),  # as published its biases stand before BatchNorms: no gradient
    "inception_v3": ((75, 76), {}),
    "inception_v4": ((75, 76), {}),
    "inception_resnet_v2": ((75, 76), {}),
    "resnet50": ((33, 40), {"stage_sizes": (1, 1, 1, 1)}),
    "resnet20_cifar": ((16, 17), {"stage_sizes": (1, 1, 1)}),
    "se_resnet50": ((33, 40), {"stage_sizes": (1, 1, 1, 1)}),
    "senet154": ((33, 40), {"stage_sizes": (1, 1, 1, 1)}),
    "xception": ((71, 72), {}),
    "mobilenet_v2": ((33, 40), {}),
}


def info_of(name):
    return fv.model_info(name)


def shape_of(name, rows=2):
    info = info_of(name)
    return jax.ShapeDtypeStruct((rows, *info.input_size, info.channels), jnp.float32)


@functools.cache
def traced(name):
    """Logits and variables by shape."""
    return jax.eval_shape(lambda x: fv.create_model(name).init_with_output(jax.random.key(0), x), shape_of(name))


def filled(tree, seed=0):
    """Variables made with numpy: He-scaled kernels, shifts around 1, running statistics as they might be."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        leaf = path[-1].key
        if leaf == "var":
            value = rng.uniform(0.5, 2, x.shape)
        elif leaf == "scale":
            value = rng.uniform(0.3, 0.8, x.shape)
        elif leaf in ("bias", "mean"):
            value = rng.normal(0.5 if leaf == "bias" else 0, 0.2, x.shape)
        else:
            value = rng.normal(0, (2 / max(1, np.prod(x.shape[:-1]))) ** 0.5, x.shape)
        return jnp.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


@pytest.mark.parametrize("name", ZOO)
def test_logits_and_features_by_shape(name):
    logits, _ = traced(name)
    assert (logits.shape, logits.dtype) == ((2, fv.create_model(name).num_classes), jnp.float32)
    fields = {"axis_name": "data"} if hasattr(fv.create_model(name), "axis_name") else {}
    headless = fv.create_model(name, num_classes=0, dtype=jnp.bfloat16, **fields)
    x = shape_of(name)
    gray = jax.ShapeDtypeStruct((*x.shape[:-1], 4 - x.shape[-1]), jnp.float32)  # one channel, or three for capsnet
    norms = set()

    def watch(call, args, kwargs, context):
        if isinstance(context.module, fv.layers.BatchNorm):
            norms.add((context.module.axis_name, context.module.dtype))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        features, variables = jax.eval_shape(lambda x: headless.init_with_output(jax.random.key(0), x), gray)
    assert norms == ({("data", jnp.bfloat16)} if "batch_stats" in variables else set())
    (width,) = {n for pattern, n in FEATURES.items() if fnmatch.fnmatchcase(name, pattern)}
    assert (features.shape, features.dtype) == ((2, width), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", {type(fv.create_model(name)): name for name in reversed(ZOO)}.values())
def test_the_nnx_bridge(name):
    """One of each class: the same parameters and statistics under the same names, and the same logits by shape."""
    logits, variables = traced(name)

    def bridged(x):
        model = nnx.bridge.ToNNX(fv.create_model(name), rngs=nnx.Rngs(0)).lazy_init(x)
        return model, model(x)

    model, output = nnx.eval_shape(bridged, shape_of(name))
    assert (output.shape, output.dtype) == (logits.shape, logits.dtype)
    for collection, kind in {"params": nnx.Param, "batch_stats": nnx.BatchStat}.items():
        ours = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables.get(collection, {}))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.state(model, kind))) == ours


@pytest.mark.parametrize("name", [n for n in ZOO if isinstance(fv.create_model(n), Backbone)])
def test_stages_have_their_strides(name):
    backbone = fv.create_backbone(name)
    x = shape_of(name)
    _, variables = traced(name)
    parts = {c: tree["backbone"] for c, tree in variables.items() if "backbone" in tree}
    stages = jax.eval_shape(backbone.apply, parts, x)
    assert set(stages) == set(backbone.strides)
    assert list(backbone.strides.values()) == sorted(backbone.strides.values())
    for stage, stride in backbone.strides.items():
        for extent, size in zip(stages[stage].shape[1:3], x.shape[1:3], strict=True):
            rim = 10 if name == "alexnet_dli" else 4  # VALID networks lose it
            assert abs(extent - size / stride) <= rim, (stage, stages[stage].shape)


@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_training(name):
    """Every parameter gets a gradient, BatchNorm moves, and bfloat16 is near float32: one compilation each."""
    size, fields = SMALLEST[name]
    fields = {"num_classes": 5, **fields}
    model = fv.create_model(name, **fields)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, *size, info_of(name).channels)), jnp.float32)
    variables = filled(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x))
    statistics = {k: v for k, v in variables.items() if k != "params"}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params):
        def loss(params):
            logits, updated = model.apply(
                {"params": params, **statistics},
                x,
                train=True,
                rngs={"dropout": jax.random.key(2)},
                mutable=list(statistics) or ["batch_stats"],
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4)).mean(), updated

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, updated), grads = step(variables["params"])
    assert np.isfinite(value)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.all(jnp.isfinite(g))), path
        assert float(jnp.abs(g).max()) > 0, path
    for old, new in zip(jax.tree.leaves(statistics), jax.tree.leaves(dict(updated)), strict=True):
        assert float(jnp.abs(old - new).max()) > 0

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(v, x):
        return [fv.create_model(name, dtype=d, **fields).apply(v, x) for d in (None, jnp.bfloat16)]

    exact, rough = both(variables, x)
    assert rough.dtype == jnp.float32
    error = float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact))
    assert 0 < error < 0.1


@pytest.mark.parametrize("name", sorted(set(fv.list_models(task="classification")) - {"perceptron", "mlp"}))
def test_one_image_is_no_batch(name):
    info = fv.model_info(name)
    image = jax.ShapeDtypeStruct((*info.input_size, info.channels), jnp.float32)
    with pytest.raises(ValueError, match=r"images \[N, "):
        jax.eval_shape(fv.create_model(name).init, jax.random.key(0), image)


@pytest.mark.parametrize(
    "unit",
    [
        fv.layers.ConvNorm(8, (3, 3)),
        fv.models.BasicBlock(8),
        fv.models.Bottleneck(2),
        fv.models.SEBasicBlock(16),
        fv.models.SEBottleneck(16),
        fv.models.InvertedResidual(8),
    ],
    ids=lambda unit: type(unit).__name__,
)
def test_units_stand_alone(unit):
    """By their defaults they normalize by the running statistics, as every model does."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 8), jnp.float32)
    y, variables = jax.eval_shape(unit.init_with_output, jax.random.key(0), x)
    assert y.shape[:3] == (2, 8, 8)
    assert "batch_stats" in variables


def test_a_negative_number_of_classes():
    with pytest.raises(ValueError, match="num_classes must be 0 or more, got -1"):
        fv.create_model("resnet18", num_classes=-1)
