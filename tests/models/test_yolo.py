"""YOLOv2 and YOLOv3: counts, shapes, training, and backbones of other families."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.models import Detector, YoloV2, YoloV3
from flaxvision.models.yolo_v2 import COCO_ANCHORS, TINY_VOC_ANCHORS, VOC_ANCHORS
from tests.models.smallest import QUICK, counted, filled

NAMES = ("yolo_v2", "yolo_v2_tiny", "yolo_v3", "yolo_v3_spp", "yolo_v3_tiny")
TINY = (((4, 3),), ((4, 3),), ((4, 3),), ((4, 3),), ((6, 3),), ((8, 3), (8, 3)))
NARROW = {
    "yolo_v2": {"convs": TINY, "head_features": (8, 8), "passthrough_features": 4},
    "yolo_v3_tiny": {"convs": TINY, "necks": (((8, 1),), ()), "head_features": (8, 8), "lateral_features": (4,)},
}


def shapes_of(name, size=(1, 416, 416, 3), **fields):
    model = fv.create_model(name, **fields)
    return model, *jax.eval_shape(model.init_with_output, jax.random.key(0), jax.ShapeDtypeStruct(size, jnp.float32))


@pytest.mark.parametrize("name", NAMES)
def test_the_published_model_by_shape(name):
    info = fv.model_info(name)
    model, outputs, variables = shapes_of(name)
    assert isinstance(model, Detector)
    assert counted(variables) == info.params
    assert info.input_size == (416, 416)
    strides = [32] if "v2" in name else [32, 16] if "tiny" in name else [32, 16, 8]
    anchors = 5 if "v2" in name else 3
    depth = anchors * (5 + model.num_labels)
    shapes = {f"stride{s}": (1, 416 // s, 416 // s, depth) for s in strides}
    assert {key: x.shape for key, x in outputs.items()} == shapes
    assert [head.stride for head in model.heads.values()] == strides
    found = jax.eval_shape(model.candidates, outputs, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    assert found.scores.shape == (1, anchors * sum((416 // s) ** 2 for s in strides), model.num_labels)


@pytest.mark.parametrize(
    ("name", "fields", "params"),
    [
        ("yolo_v2", {"num_classes": 80, "anchors": COCO_ANCHORS}, 50_962_889),
        ("yolo_v2_tiny", {"num_classes": 80, "anchors": COCO_ANCHORS, "head_features": (512,)}, 11_232_057),
        ("yolo_v3", {"num_classes": 20}, 61_626_049),
    ],
)
def test_the_other_data_sets(name, fields, params):
    assert counted(shapes_of(name, **fields)[2]) == params


def test_anchors_are_those_of_the_field_for_any_number_of_classes():
    for classes in (20, 80):
        model = fv.create_model("yolo_v2", num_classes=classes)
        assert model.anchors == VOC_ANCHORS
        (head,) = model.heads.values()
        assert head.anchors == VOC_ANCHORS
    (head,) = fv.create_model("yolo_v2", num_classes=80, anchors=COCO_ANCHORS).heads.values()
    assert head.anchors == COCO_ANCHORS
    (head,) = fv.create_model("yolo_v2_tiny", num_classes=80).heads.values()
    assert head.anchors == TINY_VOC_ANCHORS


def test_the_backbones_are_those_of_the_classifiers():
    for detector, classifier in (("yolo_v2", "darknet19"), ("yolo_v3", "darknet53")):
        _, _, ours = shapes_of(detector, (1, 64, 64, 3))
        _, _, theirs = shapes_of(classifier, (1, 64, 64, 3))
        assert ours["params"]["backbone"] == theirs["params"]["backbone"]


def batch_of(size, classes):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.uniform(size=(2, *size, 3)), jnp.float32),
        "boxes": jnp.asarray([[[5, 5, 40, 60], [20, 30, 60, 50]], [[1, 2, 12, 14], [0, 0, 0, 0]]], jnp.float32),
        "labels": jnp.asarray([[0, classes - 1], [1, 0]]),
        "valid": jnp.asarray([[True, True], [True, False]]),
        "seen": jnp.asarray(0),
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "yolo_v3_tiny")) for name in NARROW]
)
def test_training(name):
    """Every parameter gets a gradient, BatchNorm moves, and a few steps lower the loss."""
    model = fv.create_model(name, num_classes=3, **NARROW[name])
    batch = batch_of((64, 96), 3)
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), batch["image"]))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, statistics):
        def loss(params):
            losses, updated = model.apply(
                {"params": params, "batch_stats": statistics}, batch, method="losses", mutable=["batch_stats"]
            )
            return sum(map(jnp.mean, losses.values())), (losses, updated["batch_stats"])

        (value, (losses, after)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        scale = 0.05 / jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
        return jax.tree.map(lambda p, g: p - scale * g, params, gradient), after, value, losses, gradient

    params, statistics = variables["params"], variables["batch_stats"]
    values = []
    for number in range(6):
        params, after, value, losses, gradient = step(params, statistics)
        if number == 0:
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
                assert np.isfinite(leaf).all(), path
                assert np.abs(leaf).max() > 0, path
            for old, new in zip(jax.tree.leaves(statistics), jax.tree.leaves(after), strict=True):
                assert np.abs(old - new).max() > 0
            assert set(losses) == {"box", "object", "class", *(["prior"] if "v2" in name else [])}
            assert {value.shape for value in losses.values()} == {(2,)}
        statistics = after
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]


def test_half_precision_by_shape():
    for name in NARROW:
        _, outputs, variables = shapes_of(name, (1, 64, 64, 3), dtype=jnp.bfloat16, **NARROW[name])
        assert {x.dtype for x in jax.tree.leaves((outputs, variables))} == {jnp.dtype(jnp.float32)}


def test_backbones_of_other_families():
    """Any backbone whose last stages double their strides."""
    for module, stages in ((YoloV3, ("stage2", "stage3", "stage4")), (YoloV2, ("stage3", "stage4"))):
        model = module(fv.create_backbone("resnet18", stages=stages), num_classes=3)
        x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        outputs = jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0]
        assert outputs["stride32"].shape[:3] == (1, 2, 2)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match=r"must have 2, 2, 1 and a multiple of 2 entries .*; got 3, 3, 2 and 9"):
        fv.create_model("yolo_v3", stages=("stage4", "stage5"))
    with pytest.raises(ValueError, match=r"a multiple of 3 entries .*; got 3, 3, 2 and 4"):
        fv.create_model("yolo_v3", anchors=((1, 1),) * 4)
    with pytest.raises(ValueError, match="num_classes must be at least 1 for a detector; got 0"):
        _ = fv.create_model("yolo_v3", num_classes=0).heads
    with pytest.raises(ValueError, match=r"multiples of 32; got \(64, 80\)"):
        shapes_of("yolo_v2", (1, 64, 80, 3))
