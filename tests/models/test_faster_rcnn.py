"""Faster R-CNN: shapes, names, what padding changes, gradients, and independence of the number of devices."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import flaxvision as fv
from flaxvision.layers import Conv, batch_context
from flaxvision.models import Backbone, rpn
from tests.models.smallest import QUICK, filled

NAME = "faster_rcnn_resnet50_fpn"
IMAGE = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
LEVELS = [(16, 24), (8, 12), (4, 6)]  # of IMAGE


class SmallBackbone(Backbone):
    """Two convolutions with BatchNorm, at strides 4 and 8."""

    @property
    def stage_strides(self):
        return {"stage1": 4, "stage2": 8}

    @nn.nowrap
    def iter_stages(self, x, train):
        norm = self.make_norm(train, epsilon=1e-5, momentum=0.9)
        for stage, (features, strides) in enumerate([(4, 4), (6, 2)], start=1):
            x = Conv(features, (5, 5), strides, padding=2, use_bias=False, name=f"stage{stage}_conv", **self.dtypes)(x)
            x = nn.relu(norm(name=f"stage{stage}_bn")(x))
            yield f"stage{stage}", x


def tiny(**fields):
    return fv.models.FasterRCNN(
        backbone=SmallBackbone(**{"batch_norm": "frozen", **fields}),
        num_classes=4,
        fpn_features=8,
        head_features=16,
        anchor_sizes=((16,), (32,), (48,)),
        rpn_pre_nms_train=40,
        rpn_pre_nms_eval=30,
        rpn_post_nms_train=50,
        rpn_post_nms_eval=20,
        rpn_sample_size=32,
        box_sample_size=24,
    )


def anchors_of(model, levels, canvas, sizes):
    layout = {"anchor_sizes": model.anchor_sizes, "aspect_ratios": model.aspect_ratios, "size_divisor": 32}
    return [np.concatenate(x, axis=-1 - (x[0].dtype != bool)) for x in rpn.anchors_of(levels, canvas, sizes, **layout)]


@functools.cache
def variables_of(model):
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), IMAGE))
    # Offsets as large as those of He's kernels would send every box out of the image.
    for part in ("rpn", "box_head"):
        variables["params"][part]["deltas"] = jax.tree.map(lambda x: x / 20, variables["params"][part]["deltas"])
    return variables


def batch_of(rows=4, objects=3, canvas=(64, 96), seed=0):
    rng = np.random.default_rng(seed)
    size = np.stack([rng.integers(canvas[0] // 2, canvas[0] + 1, rows), rng.integers(48, canvas[1] + 1, rows)], 1)
    corner, extent = rng.uniform(0, 0.5, (rows, objects, 2)), rng.uniform(0.2, 0.5, (rows, objects, 2))
    scale = size[:, None, ::-1]
    boxes = np.concatenate([corner * scale, (corner + extent) * scale], -1).astype(np.float32)
    inside = (np.arange(canvas[0])[:, None] < size[:, :1, None]) & (np.arange(canvas[1]) < size[:, 1:, None])
    image = rng.normal(size=(rows, *canvas, 3)) * inside[..., None]
    valid = np.arange(objects)[None] < rng.integers(1, objects + 1, (rows, 1))
    return {
        "image": image.astype(np.float32),
        "size": size.astype(np.int32),
        "boxes": boxes,
        "labels": rng.integers(0, 3, (rows, objects)).astype(np.int32),
        "valid": valid,
        "crowd": np.zeros((rows, objects), bool),
        "difficult": np.zeros((rows, objects), bool),
        "mask": np.ones(rows, np.float32),
    }


def losses_of(model, variables, batch, rng, **options):
    return model.apply(variables, batch, rng, method="losses", **options)


@functools.cache
def compiled_losses(model):
    def run(variables, batch, rng):
        named, sown = losses_of(model, variables, batch, rng, mutable=["intermediates"])
        return named, sown["intermediates"]

    return jax.jit(run, compiler_options=QUICK)


def test_parameters():
    """torchvision counts neither frozen scales and biases nor statistics; the network that it trains has the former."""
    shapes = jax.eval_shape(fv.create_model(NAME).init, jax.random.key(0), IMAGE)
    params = flatten_dict(shapes["params"], sep="/")
    frozen = [path for path in params if path.endswith(("/scale", "/bias")) and ("bn" in path.split("/")[-2])]
    assert sum(leaf.size for path, leaf in params.items() if path not in frozen) == 41_755_286
    assert sum(leaf.size for leaf in params.values()) == 41_808_406
    assert fv.model_info(NAME).params == 41_755_286
    heads = {path.rpartition("/")[0] for path in params if not path.startswith("backbone/")}
    assert heads == {
        *(f"fpn/{kind}_stage{i}" for kind in ("inner", "layer") for i in range(1, 5)),
        *("rpn/conv", "rpn/objectness", "rpn/deltas"),
        *("box_head/fc1", "box_head/fc2", "box_head/classes", "box_head/deltas"),
    }
    resnet = jax.eval_shape(fv.create_model("resnet50").init, jax.random.key(0), IMAGE)
    chex.assert_trees_all_equal_shapes(shapes["params"]["backbone"], resnet["params"]["backbone"])


@pytest.mark.parametrize("train", [False, True])
def test_outputs_by_shape(train):
    model = fv.create_model(NAME, num_classes=5, dtype=jnp.bfloat16, batch_norm="sync")
    images, sizes = jax.ShapeDtypeStruct((2, 96, 128, 3), jnp.float32), jax.ShapeDtypeStruct((2, 2), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    apply = functools.partial(model.apply, train=train, mutable=["batch_stats"])
    outputs, _ = jax.eval_shape(apply, variables, images, sizes)
    anchors = [3 * h * w for h, w in ((24, 32), (12, 16), (6, 8), (3, 4), (2, 2))]
    found = jax.tree.map(lambda x: (x.shape, x.dtype), outputs)
    f32 = jnp.dtype("float32")
    assert found == {
        "proposals": ((2, 1000, 4), f32),
        "valid": ((2, 1000), jnp.dtype(bool)),
        "class_logits": ((2, 1000, 5), f32),
        "box_deltas": ((2, 1000, 5, 4), f32),
        "objectness": [((2, a), f32) for a in anchors],
        "rpn_deltas": [((2, a, 4), f32) for a in anchors],
    }
    candidates = jax.eval_shape(model.candidates, outputs, sizes)
    assert [x.shape for x in candidates] == [(2, 1000, 4, 4), (2, 1000, 4), (2, 1000)]
    assert model.num_labels == 4


@pytest.mark.parametrize(
    ("name", "stages"),
    [("mobilenet_v2", ("stage2", "stage3", "stage4")), ("squeezenet1_0", ("stage1", "stage2", "stage3"))],
)
def test_any_backbone(name, stages):
    sizes = ((32, 48), (64, 96), (128, 192), (256, 384))
    backbone = fv.create_backbone(name, stages=stages)
    model = fv.models.FasterRCNN(backbone=backbone, num_classes=3, anchor_sizes=sizes, rpn_post_nms_eval=50)
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), IMAGE)
    assert outputs["class_logits"].shape == (1, 50, 3)
    assert list(variables["params"]["fpn"]) == [f"{kind}_{s}" for kind in ("inner", "layer") for s in stages]
    assert len(outputs["objectness"]) == 4
    assert variables["params"]["rpn"]["deltas"]["bias"].shape == (4 * 6,)


def test_bad_fields():
    with pytest.raises(ValueError, match="num_classes must be at least 2, the background and a class; got 1"):
        fv.create_model(NAME, num_classes=1)
    with pytest.raises(
        ValueError, match=r"anchor_sizes must have one tuple .*stage3, stage4, pool\).*; got \(\(32,\), "
    ):
        fv.create_model(NAME, stages=("stage3", "stage4"))
    with pytest.raises(ValueError, match="frozen_stages must be from 0 to 5 for ResNetBackbone; got 6"):
        fv.create_model(NAME, frozen_stages=6)


def test_bad_arguments():
    model, images = tiny(), jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"images must have the shape \[N, H, W, C\] .*; got \(64, 96, 3\)"):
        jax.eval_shape(model.apply, shapes, jax.ShapeDtypeStruct((64, 96, 3), jnp.float32))
    with pytest.raises(ValueError, match=r"sizes must have the shape \(2, 2\), .*; got \(2,\)"):
        jax.eval_shape(model.apply, shapes, images, jax.ShapeDtypeStruct((2,), jnp.int32))
    with pytest.raises(ValueError, match=r"rng must be a key of jax\.random\.key or 8 of them.*; got key<fry> \(3,\)"):
        jax.eval_shape(functools.partial(losses_of, model), shapes, batch_of(8), jax.random.split(jax.random.key(0), 3))


def test_anchors_beyond_the_image_do_not_take_part():
    """On a large canvas, the anchors inside are those of the canvas that is just large enough."""
    layout = {"anchor_sizes": ((8,), (16, 20)), "aspect_ratios": (0.5, 1.0), "size_divisor": 32}
    sizes = jnp.asarray([[33, 70], [64, 96], [128, 1]])
    anchors_of = jax.jit(functools.partial(rpn.anchors_of, **layout), static_argnums=(0, 1))
    anchors, inside = anchors_of(((32, 40), (16, 20)), (128, 160), sizes)
    for row, (height, width) in enumerate([(64, 96), (64, 96), (128, 32)]):
        maps = ((height // 4, width // 4), (height // 8, width // 8))
        alone, whole = anchors_of(maps, (height, width), sizes[row : row + 1])
        for some, mask, wanted, every in zip(anchors, inside, alone, whole, strict=True):
            assert bool(every.all())
            np.testing.assert_array_equal(some[mask[row]], wanted)
    # torchvision's layout of a map that was rounded up: 96 // 2 pixels apart, not 64.
    (pool,), _ = rpn.anchors_of(
        [(2, 2)], (96, 128), sizes[:1], anchor_sizes=((10,),), aspect_ratios=(1.0,), size_divisor=32
    )
    np.testing.assert_array_equal(pool[:, :2] + 5, [[0, 0], [64, 0], [0, 48], [64, 48]])


@pytest.mark.slow
def test_the_sample_lies_in_the_image():
    model, batch = tiny(), batch_of()
    batch["size"] = np.asarray([[30, 33], [64, 96], [33, 64], [64, 20]], np.int32)
    batch["boxes"] = np.minimum(batch["boxes"], np.tile(batch["size"][:, None, ::-1], 2)).astype(np.float32)
    named, sown = compiled_losses(model)(variables_of(model), batch, jax.random.key(0))
    assert all(value.shape == (4,) and np.all(np.isfinite(value)) for value in named.values())
    _, inside = anchors_of(model, LEVELS, IMAGE.shape[1:3], jnp.asarray(batch["size"]))
    ((chosen, kept),), ((regions, exists),) = sown["rpn_sample"], sown["box_sample"]
    for row, (height, width) in enumerate(batch["size"]):
        assert inside[row][chosen[row][kept[row]]].all()
        found = np.asarray(regions[row][exists[row]])
        assert len(found) > 0
        assert (found >= 0).all()
        assert (found[:, 2] <= width).all()
        assert (found[:, 3] <= height).all()


def test_padded_rows_and_padded_objects_change_nothing():
    """But for the mean count of anchors or proposals, which is that of the real rows."""
    model, batch, keys = tiny(), batch_of(), jax.random.split(jax.random.key(3), 4)
    run = compiled_losses(model)
    whole, sown = run(variables_of(model), batch, keys)
    padded = batch | {name: batch[name].copy() for name in ("image", "boxes")}
    padded["image"][padded["image"] == 0] = 7.0  # beyond the images
    padded["image"][3] = np.nan
    padded["boxes"][~batch["valid"]] = 1e6
    padded["mask"] = np.asarray([1, 1, 1, 0], np.float32)
    found, _ = run(variables_of(model), padded, keys)
    for name, sample in {"objectness": "rpn", "rpn_box": "rpn", "classes": "box", "box": "box"}.items():
        counts = np.asarray(sown[f"{sample}_sample"][0][1]).sum(-1)
        wanted = np.asarray(whole[name])[:3] * counts.mean() / counts[:3].mean()
        np.testing.assert_allclose(found[name][:3], wanted, rtol=2e-5, err_msg=name)


def test_valid_may_be_numbers():
    """Augmentations keep its dtype."""
    model, batch = tiny(), batch_of()
    shapes = functools.partial(jax.eval_shape, functools.partial(losses_of, model), variables_of(model))
    wanted = shapes(batch, jax.random.key(0))
    for dtype in (np.float32, np.uint8):
        chex.assert_trees_all_equal_shapes_and_dtypes(
            shapes(batch | {"valid": batch["valid"].astype(dtype)}, jax.random.key(0)), wanted
        )


def test_an_image_without_objects_and_one_with_a_crowd():
    model, batch, key = tiny(), batch_of(), jax.random.split(jax.random.key(0), 4)
    run = compiled_losses(model)
    some, none = (np.asarray([[first, False, False]] + [[True, True, False]] * 3) for first in (True, False))
    with_all, _ = run(variables_of(model), batch | {"valid": some}, key)
    empty, _ = run(variables_of(model), batch | {"valid": none}, key)
    assert float(with_all["rpn_box"][0]) > 0
    assert float(with_all["box"][0]) > 0
    assert float(empty["rpn_box"][0]) == float(empty["box"][0]) == 0
    assert float(empty["objectness"][0]) > 0
    assert float(empty["classes"][0]) > 0
    # A crowd over the whole image is no truth, and nothing in it is background.
    boxes = batch["boxes"].copy()
    height, width = batch["size"][0]
    boxes[0, 0] = [0, 0, width, height]
    crowd, sown = run(variables_of(model), batch | {"valid": some, "boxes": boxes, "crowd": some & ~none}, key)
    assert float(crowd["rpn_box"][0]) == float(crowd["box"][0]) == float(crowd["classes"][0]) == 0
    ((chosen, kept),) = sown["rpn_sample"]
    anchors = anchors_of(model, LEVELS, IMAGE.shape[1:3], jnp.asarray(batch["size"]))[0][chosen[0][kept[0]]]
    clipped = np.clip(anchors, 0, [width, height, width, height])
    share = np.prod(clipped[:, 2:] - clipped[:, :2], -1) / np.prod(anchors[:, 2:] - anchors[:, :2], -1)
    assert (share < 0.5).all()
    difficult, _ = run(variables_of(model), batch | {"valid": some, "boxes": boxes, "difficult": some & ~none}, key)
    chex.assert_trees_all_equal(difficult, crowd)


def test_every_parameter_gets_a_gradient_and_frozen_ones_none():
    model, frozen = tiny(batch_norm="sync"), tiny(batch_norm="sync", frozen_stages=1)
    variables, batch = variables_of(model), batch_of(rows=2)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(params):
        def loss(params, model):
            found, _ = losses_of(
                model, {**variables, "params": params}, batch, jax.random.key(0), mutable=["batch_stats"]
            )
            return sum(value.mean() for value in found.values())

        return [jax.value_and_grad(loss)(params, model) for model in (model, frozen)]

    (value, free), (same, held) = gradients(variables["params"])
    assert float(value) == pytest.approx(float(same), rel=1e-6)
    for path, gradient in flatten_dict(free, sep="/").items():
        assert float(jnp.abs(gradient).max()) > 0, path
    for path, gradient in flatten_dict(held, sep="/").items():
        first = path.startswith("backbone/stage1")
        assert (float(jnp.abs(gradient).max()) == 0) == first, path
        if not first:
            np.testing.assert_allclose(gradient, flatten_dict(free, sep="/")[path], rtol=1e-3, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_one_compilation_for_each_canvas():
    """50 images of 50 sizes on two canvases."""
    model, rng = tiny(), np.random.default_rng(0)
    canvases = [(64, 96), (96, 64)]

    @functools.partial(jax.jit, compiler_options=QUICK)
    @chex.assert_max_traces(n=len(canvases))
    def detect(variables, images, sizes):
        return fv.detect(model, variables, images, sizes, max_detections=5)

    sizes = sorted({tuple(map(int, size)) for size in rng.integers(33, 97, (300, 2)) if min(size) <= 64})
    fits = [(size, canvases[size[0] > 64]) for size in sizes[:: len(sizes) // 50][:50]]
    assert len(fits) == 50
    assert {canvas for _, canvas in fits} == set(canvases)
    for size, canvas in fits:
        images = np.zeros((1, *canvas, 3), np.float32)
        images[0, : size[0], : size[1]] = rng.normal(size=(*size, 3))
        found = detect(variables_of(model), images, np.asarray([size], np.int32))
        boxes = np.asarray(found.boxes)[np.asarray(found.valid)]
        assert (boxes >= 0).all()
        assert (boxes <= [size[1], size[0]] * 2).all()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_the_number_of_devices_does_not_matter(parallel):
    """1 and 8 devices, with keys of the rows, uneven counts and a padded row. A toy detector does it in every run."""
    model, batch = tiny(), batch_of(rows=8)
    batch["mask"] = np.asarray([1, 1, 1, 1, 1, 1, 1, 0], np.float32)
    batch["valid"][2] = False
    keys = jax.random.split(jax.random.key(5), 8)
    variables = variables_of(model)
    constants = {name: value for name, value in variables.items() if name != "params"}

    def loss(params, batch, keys, axis_name=None):
        # Without synchronised BatchNorm, which would pass gradients between the devices.
        with batch_context(mask=batch["mask"], axis_name=axis_name):
            found = losses_of(model, {**constants, "params": params}, batch, keys)
        sums = {name: (value * batch["mask"]).sum() for name, value in found.items()}
        return sum(sums.values()) / 7, {name: value / 7 for name, value in sums.items()}

    def whole(params, batch, keys):
        gradient, named = jax.grad(loss, has_aux=True)(params, batch, keys)
        return named, gradient

    one = jax.jit(whole, compiler_options=QUICK)(variables["params"], batch, keys)

    if parallel == "jit":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        other = jax.jit(whole, compiler_options=QUICK)(variables["params"], *jax.device_put((batch, keys), split))
    else:

        def mapped(params, batch, keys):
            gradient, named = jax.grad(functools.partial(loss, axis_name="data"), has_aux=True)(params, batch, keys)
            return jax.lax.psum((named, gradient), "data")

        rows = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), (batch, keys))
        many = jax.pmap(mapped, "data", in_axes=(None, 0, 0), out_axes=None)
        other = many.lower(variables["params"], *rows).compile(QUICK)(variables["params"], *rows)
    assert float(one[0]["box"]) > 0
    for name, value in one[0].items():
        assert float(other[0][name]) == pytest.approx(float(value), rel=1e-5), name
    apart, size = (
        np.sqrt(sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(tree)))
        for tree in (jax.tree.map(jnp.subtract, jax.device_get(other[1]), jax.device_get(one[1])), one[1])
    )
    assert size > 0
    assert apart <= 1e-5 * size


def test_names_of_older_files():
    from flaxvision.weights.names.faster_rcnn import current_names

    names = ["backbone.fpn.inner_blocks.3.weight", "backbone.fpn.layer_blocks.0.bias", "rpn.head.conv.weight"]
    new = ["backbone.fpn.inner_blocks.3.0.weight", "backbone.fpn.layer_blocks.0.0.bias", "rpn.head.conv.0.0.weight"]
    assert list(current_names(dict.fromkeys(names, np.zeros(1)))) == new
    assert list(current_names(dict.fromkeys(new, np.zeros(1)))) == new


def test_class_names():
    names = fv.weights.class_names_for(NAME, "torchvision/COCO_V1")
    assert (len(names), names[0], names[11], names[17], names[89]) == (90, "person", "N/A", "dog", "toothbrush")
    assert len(set(names)) == 81
