"""The interface of networks with a feature hierarchy: the two halves of a classifier, and the fields of a backbone."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import flaxvision as fv
from flaxvision import models
from tests.models.smallest import QUICK, SMALLEST, sample_of, with_backbone

# Networks with auxiliary classifiers have them here, on images that are large enough for them.
AUXILIARY = {"googlenet": (65, 65), "googlenet_bn": (65, 65), "inception_v3": (299, 299)}
TINY = {"stage_sizes": (1, 2, 2, 1), "features": (4, 6, 6, 8)}


def shapes_of(module, size=33):
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))


def filled(shapes, seed=0):
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        deviation = 0.3 if path[-1].key in ("bias", "mean") else max(1, np.prod(leaf.shape[:-1])) ** -0.5
        return jnp.asarray(rng.normal(0, deviation, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def images(*size, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, *size, 3)), jnp.float32)


def halves(model, variables, x, train):
    """Applies `features`, then `head`; returns the logits and the updates."""
    options = {"train": train, "rngs": {"dropout": jax.random.key(2)}, "mutable": ["batch_stats", "aux_logits"]}
    stages, one = model.apply(variables, x, method="features", **options)
    variables = {**variables, **{k: v for k, v in one.items() if k == "batch_stats"}}
    logits, two = model.apply(variables, stages, method="head", **options)
    return logits, {**one, **two}


def whole(model, variables, x, train):
    options = {"train": train, "rngs": {"dropout": jax.random.key(2)}, "mutable": ["batch_stats", "aux_logits"]}
    return model.apply(variables, x, **options)


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", with_backbone())
def test_a_call_is_the_head_of_the_features(name, train):
    """As programs: operation for operation the same, and so bit for bit."""
    size, fields, _ = SMALLEST[name]
    auxiliary = {"aux_heads": True} if name in AUXILIARY else {}
    model = fv.create_model(name, num_classes=5, **fields, **auxiliary)
    x = sample_of(AUXILIARY.get(name, size), 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    (one, outputs), (other, expected) = (
        jax.make_jaxpr(functools.partial(f, model, train=train), return_shape=True)(variables, x)
        for f in (halves, whole)
    )
    assert outputs == expected
    one, other = (re.sub(r"0x[0-9a-f]+", "", str(program)) for program in (one, other))
    assert one == other


@pytest.mark.parametrize("train", [False, True])
def test_a_call_is_the_head_of_the_features_bit_for_bit(train):
    model = models.SENet(models.SENetBackbone((1,), (4,), bottleneck=False, reduction=2), num_classes=5)
    x = images(9, 10)
    variables = filled(shapes_of(model))
    chex.assert_trees_all_equal(halves(model, variables, x, train), whole(model, variables, x, train))


def test_features_need_no_parameters_of_the_head():
    model = fv.create_model("resnet18")
    x = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, method="features"), jax.random.key(0), x)
    assert list(variables["params"]) == ["backbone"]
    stages = jax.eval_shape(functools.partial(model.apply, method="features"), variables, x)
    assert set(stages) == set(model.backbone.strides)


@pytest.mark.parametrize("name", with_backbone())
def test_the_stages_wanted(name):
    """Only these are returned, and no layer after the last of them has parameters."""
    size, fields, _ = SMALLEST[name]
    whole = fv.create_backbone(name, **fields)
    known = list(whole.strides)
    wanted = (known[1], known[0])
    backbone = fv.create_backbone(name, stages=wanted, **fields)
    assert backbone.strides == {stage: whole.strides[stage] for stage in known[:2]}
    x = sample_of(size, 3, rows=1)
    stages, variables = jax.eval_shape(backbone.init_with_output, jax.random.key(0), x)
    everything, all_variables = jax.eval_shape(whole.init_with_output, jax.random.key(0), x)
    chex.assert_trees_all_equal(stages, {stage: everything[stage] for stage in wanted})
    params, all_params = variables["params"], all_variables["params"]
    assert len(params) < len(all_params)
    chex.assert_trees_all_equal(params, {layer: all_params[layer] for layer in params})
    last = jax.eval_shape(fv.create_backbone(name, stages=known[-1:], **fields).init, jax.random.key(0), x)
    chex.assert_trees_all_equal(last, all_variables)


def test_a_classifier_on_an_earlier_stage():
    model = fv.create_model("resnet18", stages=("stage1", "stage2"), num_classes=0)
    x = jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.float32)
    features, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    chex.assert_shape(features, (2, 128))


@pytest.mark.parametrize("stages", [("stage5",), ("stage1", "stage9"), ()])
def test_unknown_stages_are_refused(stages):
    with pytest.raises(ValueError, match=r"stages must be one or more of stem, stage1, .* for ResNetBackbone; got"):
        fv.create_backbone("resnet50", stages=stages)


@pytest.mark.parametrize(
    ("name", "message"), [("googlenet", "inception4a and inception4d"), ("inception_v3", "stage3")]
)
def test_auxiliary_heads_need_their_stages(name, message):
    model = fv.create_model(name, aux_heads=True, stages=("stage4",))
    with pytest.raises(ValueError, match=f"stages must include {message} if aux_heads is set; got stage4"):
        shapes_of(model, 75)


def test_models_are_values():
    one, other = (
        models.ResNet(models.ResNetBackbone(stage_sizes=(2, 2, 2, 2), bottleneck=False), num_classes=10) for _ in "12"
    )
    assert one == other == fv.create_model("resnet18", num_classes=10)
    assert hash(one) == hash(other)
    assert one != fv.create_model("resnet18", num_classes=10, output_stride=8)


def test_frozen_batch_norm():
    """Training normalizes by the running statistics; statistics, scales and biases receive no update."""
    fields = {"stage_sizes": (1, 1), "features": (4, 6), "num_classes": 3}
    free, frozen = (fv.create_model("resnet20_cifar", batch_norm=mode, **fields) for mode in ("sync", "frozen"))
    x = images(8, 9)
    variables = filled(shapes_of(free))
    chex.assert_trees_all_equal_structs(variables, shapes_of(frozen))

    def loss(params, model):
        logits, updates = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(logits**2), (logits, updates["batch_stats"])

    grads, (logits, statistics) = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(variables["params"], frozen)
    np.testing.assert_allclose(logits, free.apply(variables, x), rtol=1e-5)
    chex.assert_trees_all_equal(statistics, variables["batch_stats"])
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        names = [key.key for key in path]
        of_norm = any("bn" in name for name in names)
        assert (float(jnp.abs(gradient).max()) == 0) == of_norm, names


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "googlenet_bn", "inception_v4", "squeezenet1_0"])
def test_families_without_dilation(name):
    with pytest.raises(ValueError, match=r"output_stride must be None for \w+Backbone; got 8"):
        fv.create_model(name, output_stride=8)


@pytest.mark.parametrize(("name", "smallest"), [
    ("resnet50", 4), ("resnet20_cifar", 1), ("senet154", 4), ("mobilenet_v1", 2), ("mobilenet_v2", 2), ("xception", 2)
])  # fmt: skip
def test_output_strides(name, smallest):
    published = fv.create_backbone(name).strides
    supported = sorted({stride for stride in published.values() if stride >= smallest})
    for stride in supported:
        strides = fv.create_backbone(name, output_stride=stride).strides
        assert strides == {stage: min(stride, published[stage]) for stage in published}
    listed = ", ".join(map(str, supported))
    for wrong in (3, 64, smallest // 2):
        with pytest.raises(ValueError, match=f"output_stride must be None or one of {listed} for .*; got {wrong}"):
            fv.create_backbone(name, output_stride=wrong)


ATROUS = {
    "basic": models.ResNetBackbone(**TINY, bottleneck=False),
    "bottleneck": models.ResNetBackbone(**TINY),
    "bottleneck by the paper": models.ResNetBackbone(**TINY, stride_in_1x1=True),
    "cifar": models.CifarResNetBackbone((1, 2, 2), (4, 6, 6)),
    "se basic": models.SENetBackbone(**TINY, bottleneck=False, reduction=2),
    "se bottleneck": models.SENetBackbone(**TINY, reduction=2),
    "senet154": models.SENetBackbone(
        **TINY, reduction=2, groups=2, widths=(2, 4), stride_in_1x1=False, shortcut_size=3, stem_features=(4, 4, 6)
    ),
    "mobilenet v1": models.MobileNetV1Backbone(width_multiplier=0.1, padding=((1, 1), (1, 1))),
    "mobilenet v2": models.MobileNetV2Backbone(width_multiplier=0.1),
    "xception": models.XceptionBackbone(middle_blocks=1, pool_padding=((1, 1), (1, 1))),
}

SLOW_ATROUS = {"bottleneck by the paper", "se basic", "se bottleneck", "senet154", "mobilenet v1", "xception"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW_ATROUS)) for n in ATROUS])
def test_dilated_stages_contain_the_strided_ones(name):
    """A dilated stage, subsampled by the stride that it lost, is the strided stage; the parameters are the same."""
    strided = ATROUS[name]
    size = 75 if name == "xception" else 37
    shapes = shapes_of(strided, size)
    variables = filled(shapes)
    if name.startswith("se"):  # the squeeze averages over more pixels: let its gate depend on its biases alone
        variables = jax.tree_util.tree_map_with_path(
            lambda path, v: 0 * v if [key.key for key in path[-2:]] == ["expand", "kernel"] else v, variables
        )
    x = images(size, size + 3)
    limits = sorted({stride for stride in strided.strides.values() if stride >= (strided.atrous_from or 0)})
    limits = limits[-3:-1]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(variables, x):
        return [strided.clone(output_stride=limit).apply(variables, x) for limit in (None, *limits)]

    expected, *results = run(variables, x)
    for limit, result in zip(limits, results, strict=True):
        dense = strided.clone(output_stride=limit)
        chex.assert_trees_all_equal(shapes_of(dense, size), shapes)
        for stage, stride in strided.strides.items():
            step = stride // dense.strides[stage]
            # Elements near 0 are differences of larger numbers; in float64 the largest error is 3e-14 (Xception).
            rounding = max(1e-5, 2e-6 * np.abs(expected[stage]).max())
            np.testing.assert_allclose(result[stage][:, ::step, ::step], expected[stage], rtol=1e-4, atol=rounding)
    assert results[0][stage].shape[1] > 4 * (expected[stage].shape[1] - 1)


@pytest.mark.reference
def test_dilation_as_torchvision():
    """`replace_stride_with_dilation` of ResNet-50, with weights drawn by torch."""
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in theirs.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if name.endswith("var") else 0))
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    variables = fv.weights.convert("resnet50", tensors, source="torchvision")
    model = fv.create_model("resnet50", output_stride=8)
    x = images(65, 80)
    with torch.no_grad():
        inputs = torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())
        logits = theirs(inputs).numpy()
        maps = torchvision.models._utils.IntermediateLayerGetter(theirs, {"layer3": "stage3", "layer4": "stage4"})
        expected = {stage: value.numpy().transpose(0, 2, 3, 1) for stage, value in maps(inputs).items()}
    stages = jax.jit(functools.partial(model.apply, method="features"))(variables, x)
    for stage, value in expected.items():
        assert stages[stage].shape == value.shape
        assert np.linalg.norm(stages[stage] - value) <= 1e-5 * np.linalg.norm(value)
    ours = jax.jit(model.apply)(variables, x)
    assert np.linalg.norm(ours - logits) <= 1e-5 * np.linalg.norm(logits)


def test_the_parameters_of_frozen_stages():
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    assert fv.create_backbone("resnet18").frozen_params(image) == ()
    backbone = fv.create_backbone("resnet18", frozen_stages=2, stages=("stage3", "stage4"))
    found = backbone.frozen_params(image)
    assert {path.partition("/")[0].partition("_")[0] for path in found} == {"stem", "stage1"}
    shapes = flatten_dict(jax.eval_shape(backbone.init, jax.random.key(0), image)["params"], sep="/")
    assert set(found) == {path for path in shapes if path.startswith(("stem", "stage1"))}
    # Layers whose names do not tell their stage.
    found = fv.create_backbone("squeezenet1_0", frozen_stages=2).frozen_params(image)
    assert {path.partition("/")[0] for path in found} == {"stem_conv", "fire2", "fire3", "fire4"}
