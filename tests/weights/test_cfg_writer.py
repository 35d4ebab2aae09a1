"""Networks written as `.cfg` files: read again they are the same, and a fine-tuned one is complete."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.models.darknet_cfg import Convolution, Head
from flaxvision.weights import DarknetFile, parse_cfg, write_darknet
from flaxvision.weights.cfg_writer import cfg_text
from flaxvision.weights.darknet import values_of
from tests.models.darknet_loops import text_of
from tests.weights.test_darknet import CLASSIFIER, DETECTOR, POOLED, V1
from tests.weights.test_darknet_networks import narrow_tiny, narrow_v2, narrow_v3

YOLO_V4 = {"num": 1, "anchors": [3.25, 4], "classes": 2}
YOLO_V4 |= {"iou_loss": "ciou", "iou_normalizer": 0.07, "cls_normalizer": 0.5, "obj_normalizer": 2, "iou_thresh": 0.213}
ANCHORS = ((3, 4), (5.5, 7), (8, 9), (10, 20), (30, 15), (40, 50))


@pytest.mark.parametrize(
    ("sections", "size"),
    [
        (DETECTOR, 48),
        (CLASSIFIER, 9),
        (POOLED, 8),
        (narrow_v2()[2], 64),
        (narrow_v3(True)[2], 64),
        ([("convolutional", {"filters": 7, "size": 1}), ("yolo", YOLO_V4)], 8),
        ([("convolutional", {"filters": 7, "size": 3, "stride_x": 2, "stride_y": 1})], 8),
    ],
)
def test_the_file_describes_the_same_network(sections, size):
    model = parse_cfg(text_of(sections, size, size))
    assert parse_cfg(cfg_text(model)) == model


def test_width_and_height(tmp_path):
    model = parse_cfg(text_of(POOLED, 8, 16))
    assert model.input_size == (8, 16)
    fv.weights.save_cfg(tmp_path / "x.cfg", model.clone(input_size=(24, 40)))
    assert fv.weights.read_cfg(tmp_path / "x.cfg").input_size == (24, 40)


def test_heads_that_are_not_known(tmp_path):
    model = parse_cfg(text_of(V1, 8, 8))
    with pytest.raises(ValueError, match=r"model must have heads of YOLOv2 or YOLOv3 to be written; got .*detection"):
        fv.weights.save_cfg(tmp_path / "x.cfg", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["yolo", "region"])
def test_other_classes_and_anchors(kind, tmp_path):
    """What `load_cfg` makes for other classes is a network of its own, in two files."""
    sections = narrow_tiny("yolo_v3_tiny")[2] if kind == "yolo" else narrow_v2()[2]
    old = parse_cfg(text_of(sections, 64, 64))
    write_darknet(tmp_path / "x.weights", DarknetFile(np.arange(values_of(old), dtype=np.float32) * 1e-6, 0, (0, 2, 5)))
    (tmp_path / "x.cfg").write_text(text_of(sections, 64, 64))
    anchors = ANCHORS[: len(next(iter(old.heads.values())).anchors)]
    options = {"num_classes": old.num_labels + 1, "anchors": anchors}
    model, variables = fv.weights.load_cfg(tmp_path / "x.cfg", tmp_path / "x.weights", **options)
    assert sum((head.sizes for head in model.heads.values()), ()) == tuple(
        anchors[i] for head in model.heads.values() for i in getattr(head, "mask", range(len(anchors)))
    )
    last = [model.layers[i - 1] for i, layer in enumerate(model.layers) if isinstance(layer, Head)]
    assert all(isinstance(layer, Convolution) and layer.features % (6 + old.num_labels) == 0 for layer in last)
    fv.weights.save_cfg(tmp_path / "y.cfg", model)
    fv.weights.save_darknet(tmp_path / "y.weights", model, variables, version=(0, 2, 5))
    again, values = fv.weights.load_cfg(tmp_path / "y.cfg", tmp_path / "y.weights")
    assert again == model
    image = jnp.ones((1, 64, 64, 3))
    for name, output in model.apply(variables, image).items():
        np.testing.assert_array_equal(again.apply(values, image)[name], output)


def test_anchors_alone_keep_the_weights(tmp_path):
    sections = narrow_tiny("yolo_v3_tiny")[2]
    old = parse_cfg(text_of(sections, 64, 64))
    write_darknet(tmp_path / "x.weights", DarknetFile(np.ones(values_of(old), np.float32)))
    (tmp_path / "x.cfg").write_text(text_of(sections, 64, 64))
    model, variables = fv.weights.load_cfg(tmp_path / "x.cfg", tmp_path / "x.weights", anchors=ANCHORS[:4])
    assert next(iter(model.heads.values())).anchors == ANCHORS[:4]
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(variables))
    with pytest.raises(ValueError, match="anchors must be 4 widths and heights; got 5"):
        old.with_classes(2, ANCHORS[:5])


def test_classes_of_a_network_without_heads(tmp_path):
    old = parse_cfg(text_of(POOLED, 8, 8))
    write_darknet(tmp_path / "x.weights", DarknetFile(np.ones(values_of(old), np.float32)))
    (tmp_path / "x.cfg").write_text(text_of(POOLED, 8, 8))
    with pytest.raises(ValueError, match="num_classes and anchors must be None for a network without heads; got 3"):
        fv.weights.load_cfg(tmp_path / "x.cfg", tmp_path / "x.weights", num_classes=3)
