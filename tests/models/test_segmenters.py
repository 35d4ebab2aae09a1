"""The contract of every segmenter: shapes without arithmetic, arithmetic on a small one of each family."""

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
from flaxvision.models.fcn import bilinear_kernel, start_from
from tests.models.smallest import QUICK, counted, filled, sample_of

NAMES = fv.list_models(task="segmentation")
RESNET = {"stage_sizes": (1, 1), "features": (4, 8), "bottleneck": False, "output_stride": 4}
VGG = {"stage_sizes": (1,) * 5, "features": (2,) * 5, "hidden_features": 4}
# A small input and fields that make the network narrow.
SMALL = {
    "fcn_resnet50": ((17, 22), {**RESNET, "stages": ("stage1", "stage2"), "aux_heads": True}),
    "deeplabv3_resnet50": ((17, 22), {**RESNET, "stages": ("stage1", "stage2"), "rates": (2, 3), "head_features": 8}),
    "deeplabv3_mobilenet_v2": (
        (17, 22),
        {"width_multiplier": 0.25, "blocks": (((1, 16, 1, 1),), ((6, 24, 2, 2),)), "output_stride": 2},
    ),
    "fcn32s_vgg16": ((20, 33), VGG),
    "fcn16s_vgg16": ((20, 33), VGG),
    "fcn8s_vgg16": ((20, 33), VGG),
    "unet": ((44, 48), {"features": (4, 8, 8)}),
    "unet_same": ((21, 30), {"features": (4, 8, 8), "decoder_features": (8, 4)}),
    "unet_mobilenet_v2": (
        (21, 30),
        {"width_multiplier": 0.25, "blocks": (((1, 16, 1, 1),), ((6, 24, 2, 2),)), "decoder_features": (4, 4)},
    ),
    "unet_resnet34": ((21, 30), {"stage_sizes": (1, 1), "features": (4, 8), "decoder_features": (8, 4, 4)}),
}


def small(name, **fields):
    size, cut = SMALL[name]
    model = fv.create_model(name, **cut, **fields)
    x = sample_of(size, fv.model_info(name).channels)
    return model, x, jax.eval_shape(model.init, jax.random.key(0), x)


def test_every_segmenter_is_here():
    assert set(NAMES) == set(SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_the_published_model_by_shape(name):
    info, model = fv.model_info(name), fv.create_model(name)
    x = sample_of(info.input_size, info.channels)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    size = (388, 388) if name == "unet" else info.input_size
    assert (logits.shape, logits.dtype) == ((2, *size, model.num_classes), jnp.float32)
    assert counted(variables) == info.params


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("fcn_resnet50", {"aux_heads": True}, 35_322_218),
        ("deeplabv3_resnet50", {"aux_heads": True}, 42_004_074),
        ("fcn32s_vgg16", {"learned_upsampling": False}, 134_346_581),
        ("fcn16s_vgg16", {"learned_upsampling": False}, 134_357_354),
        ("fcn8s_vgg16", {"learned_upsampling": False}, 134_362_751),
        ("unet_same", {"num_classes": 1, "features": (8, 16), "decoder_features": (8,)}, 6_489),
    ],
)
def test_other_published_counts(name, fields, count):
    info, model = fv.model_info(name), fv.create_model(name, **fields)
    variables = jax.eval_shape(model.init, jax.random.key(0), sample_of(info.input_size, info.channels))
    if name == "unet_same":
        convs = [(1, 8), (8, 8), (8, 16), (16, 16), (16, 8), (8, 8)]
        assert count == sum(9 * a * b + 2 * b for a, b in convs) + (4 * 16 * 8 + 8) + (8 + 1)
    assert counted(variables) == count


@pytest.mark.parametrize("name", NAMES)
def test_policy_and_halves_by_shape(name):
    """Half precision, ghost statistics and images of another depth reach every layer; the halves make the whole."""
    size, cut = SMALL[name]
    model = fv.create_model(name, **cut, dtype=jnp.bfloat16, axis_name="data", batch_norm="ghost", ghost_size=2)
    x, norms = sample_of(size, 4), set()

    def watch(call, args, kwargs, context):
        if isinstance(context.module, fv.layers.BatchNorm):
            norm = context.module
            norms.add((norm.axis_name, norm.mode, norm.ghost_size, norm.dtype))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert norms == ({("data", "ghost", 2, jnp.bfloat16)} if "batch_stats" in variables else set())
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} <= {jnp.dtype("float32")}
    features = jax.eval_shape(functools.partial(model.apply, method="features"), variables, x)
    assert list(features) == sorted(model.backbone.strides)
    halves = jax.eval_shape(functools.partial(model.apply, method="head", size=size), variables, features)
    assert halves.shape == logits.shape


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v2", "fcn8s_vgg16", "unet", "unet_same"])
def test_the_nnx_bridge(name):
    linen, x, variables = small(name)

    def bridged(x):
        model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x)
        return model, model(x)

    model, output = nnx.eval_shape(bridged, x)
    assert output.shape == jax.eval_shape(linen.apply, variables, x).shape
    for collection, kind in {"params": nnx.Param, "batch_stats": nnx.BatchStat}.items():
        ours = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables.get(collection, {}))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.state(model, kind))) == ours


SLOW = set(NAMES) - {"unet_same", "fcn_resnet50"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in sorted(set(NAMES) - {"fcn32s_vgg16", "fcn16s_vgg16"})
    ],
)
def test_training(name):
    """Every parameter gets a gradient, BatchNorm moves, bfloat16 is near float32, and an image stands for itself."""
    model, x, shapes = small(name, num_classes=3)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    variables = filled(shapes)
    statistics = {k: v for k, v in variables.items() if k != "params"}
    half = small(name, num_classes=3, dtype=jnp.bfloat16)[0]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params):
        def loss(params):
            logits, updated = model.apply(
                {"params": params, **statistics},
                x,
                train=True,
                rngs={"dropout": jax.random.key(2)},
                mutable=["batch_stats", "aux_logits"],
            )
            labels = jnp.arange(logits[..., 0].size).reshape(logits.shape[:3]) % 3
            entropy = optax.softmax_cross_entropy_with_integer_labels
            aux = [entropy(value[0], labels).mean() for value in updated.pop("aux_logits", {}).values()]
            return entropy(logits, labels).mean() + sum(aux), updated

        evaluated = model.apply({"params": params, **statistics}, x)
        return (
            jax.value_and_grad(loss, has_aux=True)(params),
            evaluated,
            half.apply({"params": params, **statistics}, x),
        )

    ((value, updated), grads), exact, rough = step(variables["params"])
    assert np.isfinite(value)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.all(jnp.isfinite(g))), path
        assert float(jnp.abs(g).max()) > 0, path
    for old, new in zip(jax.tree.leaves(statistics), jax.tree.leaves(dict(updated)), strict=True):
        assert float(jnp.abs(old - new).max()) > 0
    assert 0 < float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)) < 0.1


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_auxiliary_logits_have_the_size_of_the_images(name):
    size, cut = SMALL[name]
    model, x = fv.create_model(name, **{**cut, "aux_heads": True}), sample_of(size, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    def shape(train):
        options = {"train": train, "mutable": ["batch_stats", "aux_logits"], "rngs": {"dropout": jax.random.key(0)}}
        return jax.eval_shape(functools.partial(model.apply, **options), shapes, x)

    logits, changed = shape(True)
    assert changed["aux_logits"]["aux"][0].shape == logits.shape
    assert "aux_logits" not in shape(False)[1]


@pytest.mark.parametrize(
    ("extent", "stages", "message"),
    [
        (571, 5, r"12 \+ 16 n pixels, 188 or more \(nearest: 556 or 572\), .*; got 571"),
        (172, 5, r"\(nearest: 188\), .*; got 172"),
        (38, 3, r"0 \+ 4 n pixels, 44 or more \(nearest: 44\), for a U-Net of 3 stages .*; got 38"),
    ],
)
def test_the_size_of_images_for_the_paper_unet(extent, stages, message):
    model = fv.create_model("unet", features=(4,) * stages)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), sample_of((extent, extent), 1))


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_the_paper_unet_takes_the_sizes_that_it_names(stages):
    model = fv.create_model("unet", features=(2,) * stages)
    for wanted in (1, 2, 30, 100):
        extent = model.input_extent(wanted)
        x = sample_of((extent, model.input_extent(1)), 1)
        logits = jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0]
        assert logits.shape[1] == extent - 2 * model.margin >= wanted
        assert logits.shape[1] - 2 ** (stages - 1) < max(wanted, model.input_extent(1) - 2 * model.margin)
    assert fv.create_model("unet").input_extent(388) == 572


def test_the_paper_unet_sees_the_same_everywhere():
    """Without padding, a shift of the image by the stride shifts the logits and changes nothing else."""
    model, x, shapes = small("unet")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 48, 48, 1)), jnp.float32)
    variables = filled(shapes)
    apply = jax.jit(model.apply)
    whole = apply(variables, x)
    np.testing.assert_allclose(apply(variables, x[:, 4:, 4:]), whole[:, 4:, 4:], rtol=1e-4, atol=1e-5)


def test_unet_same_takes_any_backbone():
    for name, fields, steps in (("vgg11", {"ceil_mode": True}, 4), ("mobilenet_v2", {}, 5), ("resnet18", {}, 5)):
        backbone = fv.create_backbone(name, **fields)
        model = fv.models.UNetSame(backbone, num_classes=3, decoder_features=(8,) * steps)
        logits = jax.eval_shape(model.init_with_output, jax.random.key(0), sample_of((75, 90), 3))[0]
        assert logits.shape == (2, 75, 90, 3)
    model = fv.models.UNetSame(fv.create_backbone("xception"), decoder_features=(8,) * 5)  # no padding in its stem
    with pytest.raises(ValueError, match="backbone must give stages of the image's size divided by their stride"):
        jax.eval_shape(model.init, jax.random.key(0), sample_of((75, 90), 3))
    with pytest.raises(ValueError, match=r"decoder_features must have 5 entries for a stride of 32; got \(8,\)"):
        fv.models.UNetSame(backbone, decoder_features=(8,))
    with pytest.raises(ValueError, match=r"strides of the backbone must double from stage to stage; got \[4, 16\]"):
        fv.models.UNetSame(fv.create_backbone("resnet18", stages=("stage1", "stage3")))
    with pytest.raises(ValueError, match="upsampling must be 'transpose' or 'nearest'; got 'cubic'"):
        fv.create_model("unet_same", upsampling="cubic")


def test_a_segmenter_needs_classes():
    with pytest.raises(ValueError, match="num_classes must be at least 1 for FCN; got 0"):
        fv.create_model("fcn_resnet50", num_classes=0)


def test_the_bilinear_kernel_interpolates():
    """A transposed convolution by it is a bilinear resize, except at the border, where there is nothing beyond."""
    x = np.random.default_rng(0).normal(size=(1, 6, 7, 1)).astype(np.float32)
    stride, cut = 8, 4
    kernel = bilinear_kernel(stride).astype(np.float32)[..., None, None]
    resized = functools.partial(fv.layers.resize_bilinear, size=(6 * stride, 7 * stride))
    up, want = jax.jit(lambda x: (fv.layers.conv_transpose(x, kernel, stride, "VALID"), resized(x)))(x)
    up = up[:, cut : cut + 6 * stride, cut : cut + 7 * stride]
    inner = np.s_[:, cut:-cut, cut:-cut]
    np.testing.assert_allclose(up[inner], want[inner], rtol=1e-5, atol=1e-5)


def bilinear(stride, classes):
    return {"kernel": np.einsum("hw,io->hwio", bilinear_kernel(stride), np.eye(classes)).astype(np.float32)}


def resized_along(count, extent, stride, first):
    """Bilinear upsampling along one axis, and how it differs from upsampling by 2 and then by half the stride.

    Pixel p lies at `(p + first) / stride` in units of scores, beyond which there are zeros. Around each score, the two
    steps cut the corner of the interpolation, by up to an eighth of its second difference.

    Returns:
        Two matrices `[extent, count]`.
    """
    place = (np.arange(extent) + first) / stride
    distance = np.abs(place[:, None] - np.arange(-1, count + 1))
    direct, corner = np.maximum(1 - distance, 0), np.maximum(1 / 8 - distance / 2, 0)
    bend = -2 * np.eye(count + 2) + np.eye(count + 2, k=1) + np.eye(count + 2, k=-1)
    return direct[:, 1:-1], (corner @ bend)[:, 1:-1]


@pytest.mark.parametrize(
    ("names", "new", "stride", "first"),
    [
        pytest.param(("fcn32s_vgg16", "fcn16s_vgg16"), "stage4", 32, -12.5, marks=pytest.mark.slow),
        (("fcn16s_vgg16", "fcn8s_vgg16"), "stage3", 16, 11.5),
    ],
)
def test_a_finer_fcn_starts_as_the_coarser(names, new, stride, first):
    """The scores that both have are the same bits. The logits are equal in the middle half of the space between scores.

    Elsewhere the difference is that between a bilinear resize and two in a row.
    """
    size, cut = SMALL["fcn8s_vgg16"]
    coarse, fine = (fv.create_model(name, **cut, num_classes=2) for name in names)
    fixed = fine.clone(learned_upsampling=False)
    x, rng = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32), np.random.default_rng(0)
    trained = filled(jax.eval_shape(coarse.init, jax.random.key(1), x))["params"]
    trained |= {name: bilinear(stride if name == "upsample" else 2, 2) for name in trained if "upsample" in name}
    shapes = jax.eval_shape(fine.init, jax.random.key(0), x)["params"]
    fresh = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)  # as the scores start
    fresh |= {name: bilinear(stride // 2 if name == "upsample" else 2, 2) for name in shapes if "upsample" in name}
    started = start_from(fresh, trained)
    assert {name for name in started if name not in trained} == {f"score_{new}", f"upsample_{new}"}
    for name in set(trained) - {"upsample"}:
        chex.assert_trees_all_equal(started[name], trained[name])
    assert not np.any(started[f"score_{new}"]["kernel"])
    shapes = jax.eval_shape(functools.partial(fine.apply, method="features"), {"params": started}, x)
    stages = {name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for name, leaf in shapes.items()}

    def watched(model, layer):
        """A function that returns the logits and the scores that a layer upsamples."""

        @functools.partial(jax.jit, compiler_options=QUICK)
        def run(params):
            seen = []

            def watch(call, args, kwargs, context):
                if context.module.name == layer and context.method_name == "__call__":
                    seen.append(args[0])
                return call(*args, **kwargs)

            with nn.intercept_methods(watch):
                return model.apply({"params": params}, stages, method="head", size=size), *seen

        return run

    rough, scores = watched(coarse, "upsample")(trained)
    learned, same = watched(fine, f"upsample_{new}")(started)
    np.testing.assert_array_equal(same, scores)
    bare = {name: value for name, value in started.items() if not name.startswith("upsample")}
    np.testing.assert_allclose(watched(fixed, "")(bare)[0], learned, rtol=1e-4, atol=1e-4)

    scores, (rows, columns) = np.asarray(scores[0], np.float64), scores.shape[1:3]
    (by_row, row_bend), (by_column, column_bend) = (
        resized_along(count, extent, stride, first) for count, extent in zip((rows, columns), size, strict=True)
    )
    direct = np.einsum("yi,ijk,xj->yxk", by_row, scores, by_column)
    twice = np.einsum("yi,ijk,xj->yxk", by_row + row_bend, scores, by_column + column_bend)
    scale = np.abs(direct).max()
    np.testing.assert_allclose(rough[0], direct, atol=1e-5 * scale)
    np.testing.assert_allclose(learned[0], twice, atol=1e-5 * scale)
    middle = np.ix_(~row_bend.any(1), ~column_bend.any(1))
    assert 0.1 < rough[0][middle].size / rough[0].size < 0.5
    np.testing.assert_allclose(learned[0][middle], rough[0][middle], atol=1e-5 * scale)
    assert np.abs(learned - rough).max() > 0.005 * scale


def test_learned_upsampling_starts_as_bilinear_interpolation():
    """The initializer of the model."""
    model = fv.create_model("fcn8s_vgg16", **SMALL["fcn8s_vgg16"][1], num_classes=2)
    maps = {f"stage{i}": jnp.zeros((1, n, n, 2)) for i, n in ((3, 56), (4, 28), (5, 14))}
    init = jax.jit(functools.partial(model.init, method="head"))
    params = init(jax.random.key(0), maps)["params"]
    for name, stride in (("upsample", 8), ("upsample_stage3", 2), ("upsample_stage4", 2)):
        np.testing.assert_allclose(params[name]["kernel"], bilinear(stride, 2)["kernel"], rtol=1e-6)
    assert not any(np.any(params[name]["kernel"]) for name in ("score", "score_stage3", "score_stage4"))


def test_dense_layers_of_vgg_become_convolutions():
    """On the maps of one window, FCN's fc6 and fc7 compute what VGG's dense layers do."""
    fields = {"stage_sizes": (1,) * 5, "features": (4,) * 5, "hidden_features": 8}
    vgg = fv.create_model("vgg16", **fields)
    fcn = fv.create_model("fcn32s_vgg16", **fields)
    x = sample_of((32, 32), 3, 1)
    trained = filled(jax.eval_shape(vgg.init, jax.random.key(0), x))["params"]
    fresh = filled(jax.eval_shape(fcn.init, jax.random.key(0), x))["params"]
    params = start_from(fresh, trained)
    maps = jnp.asarray(np.random.default_rng(0).normal(size=(1, 14, 14, 4)), jnp.float32)
    dense = vgg.clone(num_classes=0).apply({"params": trained}, {"stage5": maps}, method="head")
    conv = functools.partial(fv.layers.conv, padding="VALID")
    y = fv.layers.max_pool(maps, 2)
    for name in ("fc6", "fc7"):
        y = jax.nn.relu(conv(y, params[name]["kernel"]) + params[name]["bias"][None, None, None])
    np.testing.assert_allclose(y[:, 0, 0], dense, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"trained must be the parameters .* got backbone/stage1_conv1/kernel"):
        start_from(fresh, {"backbone": {"stage1_conv1": {"kernel": jnp.zeros((3, 3, 3, 5))}}})
    with pytest.raises(ValueError, match="got none in common"):
        start_from(fresh, {"other": {"kernel": jnp.zeros(3)}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"skips": ("stage3",)}, r"skips must be \(\), .*; got \('stage3',\)"),
        (
            {"score_scales": (0.01,)},
            r"score_scales must have an entry for each of \('stage4', 'stage3'\); got \(0.01,\)",
        ),
        ({"ceil_mode": False}, "backbone must be a VGGBackbone with ceil_mode"),
        ({"stages": ("stage5",)}, "and the stages stage5 and skips"),
    ],
)
def test_wrong_fields_of_fcn(fields, message):
    with pytest.raises(ValueError, match=message):
        fv.create_model("fcn8s_vgg16", **fields)
