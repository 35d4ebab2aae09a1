"""The contract of every classifier: shapes without arithmetic, arithmetic on the smallest of each family."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flaxvision as fv
from flaxvision.models import Backbone, Classifier
from tests.models.smallest import QUICK, SLOW, SMALLEST, counted, filled, sample_of, small

NAMES = fv.list_models(task="classification")


@pytest.mark.parametrize("name", NAMES)
def test_the_published_model_by_shape(name):
    """Parameters, logits and stages. `test_registry.py` compares the counts with the papers'."""
    info, model, stages = fv.model_info(name), fv.create_model(name), {}

    def watch(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, Backbone) and context.method_name == "__call__":
            stages.update({stage: x.shape for stage, x in result.items()})
        return result

    x = sample_of(info.input_size, info.channels)
    with nn.intercept_methods(watch):
        logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert (logits.shape, logits.dtype) == ((2, model.num_classes), jnp.float32)
    assert counted(variables) == info.params
    assert isinstance(model, Classifier) == bool(stages)
    if not stages:
        return
    strides = model.backbone.strides
    assert list(stages) == list(strides)
    assert list(strides.values()) == sorted(strides.values())
    rim = 10 if name == "alexnet_dli" else 4  # lost by convolutions without padding
    for stage, stride in strides.items():
        for extent, size in zip(stages[stage][1:3], x.shape[1:3], strict=True):
            assert abs(extent - size / stride) <= rim, (stage, stages[stage])


@pytest.mark.parametrize("name", SMALLEST)
def test_features_and_policy_by_shape(name):
    """Without a head, in half precision, for images of another depth: features are float32, parameters too."""
    size, cut, width = SMALLEST[name]
    model = fv.create_model(name, **cut)
    fields = {"axis_name": "data", "batch_norm": "ghost", "ghost_size": 2}
    fields = fields if "batch_norm" in fv.model_fields(model) else {}
    headless = fv.create_model(name, **cut, num_classes=0, dtype=jnp.bfloat16, **fields)
    norms = set()

    def watch(call, args, kwargs, context):
        if isinstance(context.module, fv.layers.BatchNorm):
            norm = context.module
            norms.add((norm.axis_name, norm.mode, norm.ghost_size, norm.dtype))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        features, variables = jax.eval_shape(headless.init_with_output, jax.random.key(0), sample_of(size, 4))
    assert norms == ({("data", "ghost", 2, jnp.bfloat16)} if "batch_stats" in variables else set())
    assert (features.shape, features.dtype) == ((2, width), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} <= {jnp.dtype("float32")}


@pytest.mark.parametrize("name", {type(fv.create_model(name)): name for name in SMALLEST}.values())
def test_the_nnx_bridge(name):
    """One of each class: the same parameters and statistics under the same names, and the same logits by shape."""
    linen, x, variables = small(name)

    def bridged(x):
        model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x)
        return model, model(x)

    model, output = nnx.eval_shape(bridged, x)
    assert (output.shape, output.dtype) == ((2, linen.num_classes), jnp.float32)
    for collection, kind in {"params": nnx.Param, "batch_stats": nnx.BatchStat}.items():
        ours = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables.get(collection, {}))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.state(model, kind))) == ours


def test_the_nnx_bridge_gives_the_same_logits():
    linen, x, _ = small("mlp")
    x = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32)
    model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x)
    params = {
        layer: {k: v.get_value() for k, v in leaves.items()} for layer, leaves in nnx.state(model, nnx.Param).items()
    }
    np.testing.assert_allclose(model(x), linen.apply({"params": params}, x), rtol=1e-6)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SMALLEST])
def test_training(name):
    """Every parameter gets a gradient, BatchNorm moves, and bfloat16 is near float32: one compilation each."""
    model, x, shapes = small(name, num_classes=5)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, *x.shape[1:])), jnp.float32)
    variables = filled(shapes)
    statistics = {k: v for k, v in variables.items() if k != "params"}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params):
        def loss(params):
            logits, updated = model.apply(
                {"params": params, **statistics},
                x,
                train=True,
                rngs={"dropout": jax.random.key(2)},
                mutable=["batch_stats"],
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

    half = small(name, num_classes=5, dtype=jnp.bfloat16)[0]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def evaluate(v, x):
        return model.apply(v, x), half.apply(v, x)

    exact, rough = evaluate(variables, x)
    assert rough.dtype == jnp.float32
    error = float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact))
    assert 0 < error < (0.1 if isinstance(model, Classifier) else 0.05)


@pytest.mark.parametrize("name", ["mlp", "lenet_dli", "resnet20_cifar"])
def test_each_image_stands_for_itself(name):
    """Evaluation is deterministic, and an image's logits do not depend on the rest of the batch."""
    model, x, shapes = small(name)
    x = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32)
    variables = filled(shapes)
    logits = model.apply(variables, x)
    chex.assert_tree_all_finite(logits)
    chex.assert_trees_all_equal(logits, model.apply(variables, x))
    chex.assert_trees_all_close(model.apply(variables, x[1:]), logits[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lenet_dli", "fashion_cnn"])
def test_dropout_only_in_training(name):
    model, x, shapes = small(name)
    x, variables = jnp.ones(x.shape), filled(shapes)
    one, two = (model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(k)}) for k in (0, 1))
    assert float(jnp.abs(one - two).max()) > 0


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"perceptron", "mlp"}))
def test_one_image_is_no_batch(name):
    info = fv.model_info(name)
    image = jax.ShapeDtypeStruct((*info.input_size, info.channels), jnp.float32)
    with pytest.raises(ValueError, match=r"\[N, "):
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


def test_models_hash_and_compare():
    """A model is a value: jit keys its cache on it."""
    for name in ("lenet5", "lenet_dli", "resnet18", "inception_v3"):
        assert fv.create_model(name) == fv.create_model(name)
        assert hash(fv.create_model(name)) == hash(fv.create_model(name))
