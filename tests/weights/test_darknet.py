"""darknet's cfg and weights files: all layers against loops, files byte for byte, errors, and our own networks."""

import functools
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.models import CfgDetector, CfgNetwork
from flaxvision.models.darknet_cfg import ACTIVATIONS
from flaxvision.models.yolo_v2 import COCO_ANCHORS, VOC_ANCHORS
from flaxvision.weights import DarknetFile, parse_cfg, read_darknet, write_darknet
from flaxvision.weights.darknet import values_of
from tests.models.darknet_loops import ACTIVATE, run_loops, text_of
from tests.models.smallest import QUICK, filled

NORM = {"batch_normalize": 1}
# Every layer type of a network with heads: strides, groups, depthwise, dilation, odd sizes, routes of groups,
# shortcuts of other depths and sizes, three activations, SPP-like pools, and two heads.
DETECTOR = [
    ("convolutional", {"filters": 8, "size": 3, "stride": 2, "pad": 1, **NORM, "activation": "leaky"}),
    ("convolutional", {"filters": 8, "size": 3, "pad": 1, "groups": 8, **NORM, "activation": "mish"}),
    ("convolutional", {"filters": 12, "size": 3, "pad": 1, "groups": 4, "activation": "swish"}),
    ("convolutional", {"filters": 6, "size": 5, "pad": 1, "dilation": 2, **NORM, "activation": "relu"}),
    ("shortcut", {"from": [-3], "activation": "linear"}),  # 8 channels to 6
    ("convolutional", {"filters": 16, "size": 3, "stride": 2, "pad": 1, **NORM, "activation": "relu6"}),
    ("shortcut", {"from": [2], "alpha": 0.5, "beta": 2, "activation": "leaky"}),  # 12 channels of twice the size
    ("reorg", {"stride": 2}),
    ("route", {"layers": [-2]}),
    ("maxpool", {"size": 2, "stride": 1}),
    ("maxpool", {"size": 3, "stride": 1}),
    ("shortcut", {"from": [-1, 8]}),
    ("route", {"layers": [-1, 8], "groups": 2, "group_id": 1}),
    ("dropout", {"probability": 0.3}),
    ("convolutional", {"filters": 14, "size": 1, "stride": 1, "pad": 1, "activation": "linear"}),
    ("yolo", {"mask": [2, 3], "anchors": [4, 5, 8, 7, 10, 14, 20, 16], "classes": 2, "num": 4, "scale_x_y": 1.1}),
    ("route", {"layers": [7]}),
    ("convolutional", {"filters": 4, "size": 1, **NORM, "activation": "logistic"}),
    ("upsample", {"stride": 2, "scale": 0.5}),
    ("route", {"layers": [-1, 12]}),
    ("maxpool", {"size": 2, "stride": 2}),
    ("convolutional", {"filters": 21, "size": 1, "activation": "linear"}),
    ("region", {"anchors": [1, 2, 0.5, 0.5, 3, 1], "classes": 2, "num": 3, "softmax": 1}),
]
CLASSIFIER = [
    ("convolutional", {"filters": 4, "size": 3, "padding": 1, **NORM, "activation": "tanh"}),
    ("local", {"filters": 3, "size": 3, "stride": 2, "pad": 1, "activation": "elu"}),
    ("connected", {"output": 7, **NORM, "activation": "ramp"}),
    ("dropout", {}),
    ("connected", {"output": 5, "activation": "linear"}),
    ("softmax", {"groups": 1}),
    ("cost", {"type": "sse"}),
]
POOLED = [
    ("convolutional", {"filters": 6, "size": 3, "stride": 2, "pad": 1, **NORM, "activation": "selu"}),
    ("avgpool", {}),
    ("convolutional", {"filters": 3, "size": 1, "activation": "linear"}),
    ("softmax", {}),
]
V1 = [
    ("convolutional", {"filters": 2, "size": 4, "stride": 4, "activation": "relie"}),
    ("connected", {"output": 4 * (2 * 5 + 3), "activation": "linear"}),
    ("detection", {"classes": 3, "coords": 4, "side": 2, "num": 2, "sqrt": 1}),
]


def drawn(count, seed=0):
    """Values of a weights file; none is negative, since some are variances."""
    return np.random.default_rng(seed).uniform(0.05, 0.6, count).astype(np.float32)


def test_activations():
    x = np.linspace(-8, 8, 33)
    assert set(ACTIVATIONS) == set(ACTIVATE)
    for name, ours in ACTIVATIONS.items():
        np.testing.assert_allclose(ours(jnp.asarray(x, jnp.float32)), ACTIVATE[name](x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("sections", "size"),
    [(DETECTOR, (16, 24)), (CLASSIFIER, (5, 6)), (POOLED, (7, 9)), (V1, (8, 8))],
    ids=["detector", "classifier", "pooled", "v1"],
)
def test_every_layer_against_loops(sections, size, tmp_path):
    model = parse_cfg(text_of(sections, *size), epsilon=1e-3)
    write_darknet(tmp_path / "x.weights", DarknetFile(drawn(values_of(model)), 77))
    variables = fv.weights.load_darknet(model, tmp_path / "x.weights")
    x = np.random.default_rng(1).uniform(size=(2, *size, 3)).astype(np.float32)
    found = jax.jit(model.apply, compiler_options=QUICK)(variables, x)
    for row, image in enumerate(x):
        outputs, read = run_loops(sections, drawn(values_of(model)), image.transpose(2, 0, 1), 1e-3)
        assert read == values_of(model)
        if isinstance(model, CfgDetector):
            heads = [i for i, (kind, _) in enumerate(sections) if kind in ("yolo", "region", "detection")]
            assert set(found) == {f"layer{i}_{sections[i][0]}" for i in heads}
            expected = {f"layer{i}_{sections[i][0]}": outputs[i] for i in heads}
        else:
            expected = {"": outputs[-1].ravel()}
        for name, value in expected.items():
            ours = np.asarray(found[name] if name else found)[row]
            value = value.transpose(1, 2, 0) if value.ndim == 3 else value
            assert ours.shape == value.shape
            np.testing.assert_allclose(ours, value, rtol=2e-5, atol=2e-5 * np.abs(value).max())
    fv.weights.save_darknet(tmp_path / "y.weights", model, variables, seen=77)
    assert (tmp_path / "y.weights").read_bytes() == (tmp_path / "x.weights").read_bytes()


def test_names_and_fields():
    model = parse_cfg(text_of(DETECTOR, 32, 32))
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), jnp.zeros((1, 32, 32, 3)))
    assert {"layer0_conv", "layer0_bn", "layer2_conv", "layer14_conv"} <= set(variables["params"])
    assert set(variables["params"]["layer2_conv"]) == {"kernel", "bias"}
    assert set(variables["params"]["layer0_conv"]) == {"kernel"}
    yolo, region = model.heads.values()
    assert (yolo.mask, yolo.scale_xy, yolo.stride, yolo.num_classes) == ((2, 3), 1.1, 4, 2)
    assert yolo.sizes == ((10, 14), (20, 16))
    assert (region.stride, region.softmax, region.rescore) == (8, True, False)
    assert (model.num_labels, model.epsilon) == (2, 1e-6)
    assert hash(model) == hash(parse_cfg(text_of(DETECTOR, 32, 32)))
    assert isinstance(parse_cfg(text_of(POOLED, 8, 8)), CfgNetwork)
    with pytest.raises(ValueError, match=r"layers must have \[region\] or \[yolo\] heads .*; got layer2_detection"):
        _ = parse_cfg(text_of(V1, 8, 8)).heads


def test_dropout_and_batch_norm_in_training():
    model = parse_cfg(text_of(CLASSIFIER, 5, 6))
    x = jnp.asarray(drawn(4 * 90).reshape(4, 5, 6, 3))
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), x))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def train(key):
        return model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

    out = [train(jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(out[0][0], out[1][0])
    assert np.abs(out[0][0] - out[2][0]).max() > 0
    before, after = variables["batch_stats"], out[0][1]["batch_stats"]
    assert min(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, dict(after)))) > 0


@pytest.mark.parametrize(
    ("version", "header"), [((0, 1, 0), 16), ((0, 2, 0), 20), ((0, 2, 5), 20), ((0, 0, 1), 16), ((1, 0, 0), 20)]
)
def test_headers(version, header, tmp_path):
    path = tmp_path / "a.weights"
    seen = 2**31 if header == 16 else 2**40
    values = np.array([1.5, -0.0, np.nan, np.inf], np.float32)
    write_darknet(path, DarknetFile(values, seen, version))
    data = path.read_bytes()
    assert len(data) == header + 16
    assert data[:12] == struct.pack("<3i", *version)
    file = read_darknet(path)
    assert (file.seen, file.version) == (seen, version)
    assert file.values.tobytes() == values.tobytes()
    write_darknet(tmp_path / "b.weights", file)
    assert (tmp_path / "b.weights").read_bytes() == data
    with pytest.raises(ValueError, match=f"seen must fit into a header of {header} bytes .*; got {2**64} and"):
        write_darknet(path, DarknetFile(values, 2**64, version))
    assert path.read_bytes() == data


def test_files_that_are_no_weights(tmp_path):
    path = tmp_path / "x.weights"
    for data, error in (
        (b"", "its header is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is not a .weights file of darknet: its header is 89 50 4e 47"),
        (struct.pack("<3iQ", 0, 2, 0, 7) + bytes(6), "must have a header of 20 bytes and 4 bytes per value; got 26"),
        (struct.pack("<3iI", 0, 2, 0, 7), "must have a header of 20 bytes and 4 bytes per value; got 16 bytes"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(error)):
            read_darknet(path)
    with pytest.raises(FileNotFoundError, match="path must be an existing file"):
        read_darknet(tmp_path / "none.weights")


@pytest.mark.parametrize(("change", "fault"), [(-3, "3 too few"), (1, "1 too many"), (1200, "1,200 too many")])
def test_weights_that_do_not_fit(change, fault, tmp_path):
    (tmp_path / "x.cfg").write_text(text_of(POOLED, 8, 8))
    count = values_of(parse_cfg(text_of(POOLED, 8, 8)))
    assert count == 6 * 27 + 4 * 6 + 6 * 3 + 3
    write_darknet(tmp_path / "x.weights", DarknetFile(drawn(count + change)))
    with pytest.raises(ValueError, match=f"x.weights must hold {count} values for this network; got .*, {fault}$"):
        fv.weights.load_cfg(tmp_path / "x.cfg", tmp_path / "x.weights")


def test_the_header_of_the_fork_sets_epsilon(tmp_path):
    (tmp_path / "x.cfg").write_text(text_of(POOLED, 8, 8))
    count = values_of(parse_cfg(text_of(POOLED, 8, 8)))
    for version, epsilon in (((0, 1, 0), 1e-6), ((0, 2, 0), 1e-6), ((0, 2, 5), 1e-5)):
        write_darknet(tmp_path / "x.weights", DarknetFile(drawn(count), 0, version))
        assert fv.weights.load_cfg(tmp_path / "x.cfg", tmp_path / "x.weights")[0].epsilon == epsilon
    model, _ = fv.weights.load_cfg(tmp_path / "x.cfg", tmp_path / "x.weights", epsilon=0.1, dtype=jnp.bfloat16)
    assert (model.epsilon, model.dtype) == (0.1, jnp.bfloat16)


def test_a_registered_network_of_the_fork_has_its_epsilon(tmp_path):
    fields = {"convs": (((4, 3),), ((4, 3),)), "num_classes": 3}
    model, path = fv.create_model("tiny_darknet", **fields), tmp_path / "x.weights"
    for version, epsilon in (((0, 2, 0), 1e-6), ((0, 2, 5), 1e-5)):
        write_darknet(path, DarknetFile(drawn(values_of(model)), 0, version))
        loaded, _ = fv.weights.load_model("tiny_darknet", path, source="darknet", **fields)
        assert loaded.backbone.epsilon == epsilon
    with pytest.raises(ValueError, match="overrides must include epsilon=1e-05 for darknet's tiny_darknet"):
        fv.weights.load("tiny_darknet", path, source="darknet", **fields)
    fv.weights.load("tiny_darknet", path, source="darknet", epsilon=1e-5, **fields)


NET = "[net]\nheight=32\nwidth=32\nchannels=3\n"
CONV = "[convolutional]\nfilters=21\nactivation=linear\n"
YOLO = "[yolo]\nmask=0,1,2\nanchors=1,2, 3,4, 5,6\nnum=3\nclasses=2\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", r"cfg must begin with the section \[net\]; got no section"),
        (CONV, r"cfg must begin with the section \[net\]; got \[convolutional\] in line 1"),
        ("filters=1\n", r"cfg, line 1: the line must hold a section such as \[net\]; got 'filters=1'"),
        (NET + "# a comment\n[convolutional]\nfilters 3", "cfg, line 7: the line must hold an option and its value"),
        ("[net]\nheight=32", r"cfg, line 1, \[net\]: height, width and channels must be positive; got 32, 0 and 0"),
        (NET, r"cfg must have layers after \[net\]; got none"),
        (
            NET + CONV + "\n[lstm]\noutput=3",
            r"line 9, \[lstm\]: section must be one of convolutional, .*; got \[lstm\]",
        ),
        (NET + CONV + "stryde=2", r"line 8, \[convolutional\]: option must be one of .*stride.*; got stryde"),
        (
            NET + CONV + "antialiasing=1",
            r"line 8, \[convolutional\]: antialiasing must be 0, since nothing else is sup",
        ),
        (NET + CONV + "size=two", r"line 8, \[convolutional\]: size must be a number; got 'two'"),
        (NET + CONV + "size=2.5", r"line 8, \[convolutional\]: size must be an integer of at least 1; got 2.5"),
        (
            NET + "[conv]\nactivation=stairs",
            r"line 6, \[convolutional\]: activation must be one of linear, .*; got stai",
        ),
        (NET + CONV + "groups=2", r"line 8, .*: groups must divide the 3 input channels and the 21 filters; got 2"),
        (NET + CONV + "size=40", r"line 5, .*: the output must have a positive size; got \(-7, -7, 21\)"),
        (NET + CONV + "[route]\nlayers=-2", r"line 9, \[route\]: layers must name layers before this one, number 1"),
        (NET + CONV + "[route]\n", r"line 8, \[route\]: layers must name .*; got nothing"),
        (
            NET + CONV + "[route]\nlayers=1",
            r"line 9, \[route\]: layers must name layers before this one, number 1; got",
        ),
        (
            NET + CONV + "[maxpool]\nstride=2\n[route]\nlayers=0,1",
            r"line 11, .* feature maps of the same size; got 0: 32x32",
        ),
        (NET + CONV + "[route]\nlayers=0\ngroups=2", r"line 10, .*: groups must divide the channels 21 and exceed"),
        (NET + CONV + "[shortcut]\nfrom=0\nweights_type=per_feature", "line 10, .*: weights_type must be none"),
        (
            NET + CONV + "[upsample]\nstride=-2",
            r"line 9, \[upsample\]: stride must be an integer of at least 1; got -2",
        ),
        (NET + CONV + "[reorg]\nstride=2", r"line 9, .*: stride must divide the map 32x32, and its square the 21 chan"),
        (
            NET + CONV + YOLO.replace("=2\n", "=3\n"),
            r"line 8, \[yolo\]: filters of the layer before must be 24, 3 anch",
        ),
        (
            NET + CONV + YOLO.replace("0,1,2", "0,1,3"),
            r"line 9, .*: mask must hold indices of the 3 anchors; got 0,1,3",
        ),
        (NET + CONV + YOLO.replace(", 5,6", ""), r"line 10, .*: anchors must be 6 numbers, 2 for each of num=3; got 4"),
        (NET + CONV + "size=nan", r"line 8, \[convolutional\]: size must be a number; got 'nan'"),
        (NET + CONV + "[route]\nlayers=-1.5", r"line 9, \[route\]: layers must be integers with commas .*; got '-1.5'"),
        (NET + CONV + "[dropout]\nprobability=1", r"line 9, .*: probability must be in \[0, 1\); got 1.0"),
        (
            NET + CONV + YOLO.replace("0,1,2", "0,1,1"),
            r"line 9, .*: mask must hold indices of the 3 anchors; got 0,1,1",
        ),
        (NET + CONV + YOLO.replace("5,6", "5,-6"), r"line 10, .*: anchors must be positive; got -6"),
        (NET + CONV + YOLO.replace("5,6", "5,inf"), r"line 10, .*: anchors must be numbers with commas"),
        (NET + CONV + YOLO + "scale_x_y=0", r"line 13, .*: scale_x_y must be positive; got 0"),
        (NET + CONV + YOLO + "new_coords=1", r"line 13, \[yolo\]: new_coords must be 0, since nothing else"),
        (NET + CONV + YOLO + "iou_loss=best", r"line 13, \[yolo\]: iou_loss must be one of mse, iou, giou"),
        (
            NET + "[connected]\noutput=9\nactivation=linear\n" + CONV,
            r"line 8, .* must give a feature map; got a vector",
        ),
        (NET + "[local]\nfilters=2\nsize=5\npad=1", r"line 8, \[local\]: pad must be 0, or 1 for a size of 3; got 1"),
        (
            NET + "[detection]\nside=7\nclasses=20\nnum=2",
            r"line 5, .*: outputs of the layer before must be 1470, .*3072",
        ),
    ],
)
def test_errors_name_the_section_and_the_line(text, error):
    with pytest.raises(ValueError, match=error):
        parse_cfg(text)


def test_a_cfg_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be an existing file; got"):
        fv.weights.read_cfg(tmp_path / "none.cfg")
    with pytest.raises(TypeError, match="foo"):
        parse_cfg(text_of(POOLED, 8, 8), foo=1)


def test_comments_spaces_and_repetitions(tmp_path):
    """darknet removes all white space and reads the first of several equal options."""
    text = "[network]\r\n height = 8 # rows\nwidth\t=8\nchannels= 3\n;x\n"
    text += "[conv]\nfilters = 1 2\nfilters=5\nactivation = relu"
    (layer,) = parse_cfg(text).layers
    assert (layer.features, layer.activation, layer.kind) == (12, "relu", "convolutional")
    (tmp_path / "x.cfg").write_text(text, encoding="utf-8-sig")  # as some editors write it
    assert fv.weights.read_cfg(tmp_path / "x.cfg").layers == (layer,)


def test_the_anchors_of_coco_go_with_a_file_of_its_80_classes(tmp_path):
    """The files do not hold the anchors: those of VOC would give wrong boxes silently."""
    rows = (((4, 3),), ((4, 3),), ((4, 3),), ((4, 3),), ((4, 3),), ((6, 3),))
    narrow = {"convs": rows, "head_features": (6, 6), "passthrough_features": 4}
    files = {}
    for classes in (20, 80):
        model = fv.create_model("yolo_v2", num_classes=classes, **narrow)
        files[classes] = tmp_path / f"{classes}.weights"
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        variables = filled(jax.eval_shape(model.init, jax.random.key(0), image))
        fv.weights.save_darknet(files[classes], model, variables)
    load = functools.partial(fv.weights.load_model, "yolo_v2", source="darknet", **narrow)
    assert load(files[80])[0].anchors == COCO_ANCHORS
    assert load(files[80], num_classes=80)[0].anchors == COCO_ANCHORS
    assert load(files[20])[0].anchors == VOC_ANCHORS
    own = ((1.0, 2.0),) * 5
    assert load(files[80], anchors=own)[0].anchors == own
    strict = functools.partial(fv.weights.load, "yolo_v2", files[80], source="darknet", num_classes=80, **narrow)
    with pytest.raises(ValueError, match=r"must include anchors=\(\(0.57273, .* for darknet's yolo_v2 with 80 classes"):
        strict()
    strict(anchors=COCO_ANCHORS)
    strict(anchors=own)
