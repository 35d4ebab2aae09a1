"""Our networks and the cfg files of darknet: the same layers, classes and order of tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.models.darknet_cfg import Head
from flaxvision.weights import DarknetFile, parse_cfg, write_darknet
from flaxvision.weights.darknet import split, values_of
from tests.models.darknet_loops import text_of
from tests.models.smallest import QUICK

NORM = {"batch_normalize": 1}


def drawn(count, seed=0):
    """Values of a weights file; none is negative, since some are variances."""
    return np.random.default_rng(seed).uniform(0.05, 0.6, count).astype(np.float32)


def test_another_number_of_classes(tmp_path, caplog):
    """The last convolution before each head is new, and the others keep their values."""
    sections = narrow_tiny("yolo_v3_tiny")[2]
    (tmp_path / "x.cfg").write_text(text_of(sections, 64, 64))
    old = parse_cfg(text_of(sections, 64, 64))
    write_darknet(tmp_path / "x.weights", DarknetFile(drawn(values_of(old)), 0, (0, 2, 5)))
    kept, variables = fv.weights.load_cfg(tmp_path / "x.cfg", tmp_path / "x.weights", num_classes=2)
    assert (kept.num_labels, kept.epsilon, caplog.text) == (2, 1e-5, "")
    model, anew = fv.weights.load_cfg(tmp_path / "x.cfg", tmp_path / "x.weights", num_classes=5)
    assert "newly initialized for 5 classes: " in caplog.text
    assert model.num_labels == 5
    changed = []
    for name, tree in anew["params"].items():
        if not all(np.array_equal(tree[leaf], variables["params"][name][leaf]) for leaf in tree):
            changed.append(name)
    assert changed == [f"layer{i - 1}_conv" for i, layer in enumerate(model.layers) if isinstance(layer, Head)]
    assert anew["params"][changed[0]]["kernel"].shape[-1] == 2 * (5 + 5)
    outputs = jax.eval_shape(model.apply, anew, jnp.zeros((1, 64, 64, 3)))
    assert {x.shape[-1] for x in outputs.values()} == {20}
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        model.with_classes(0)


def conv(filters, size, stride=1):
    return (
        "convolutional",
        {"filters": filters, "size": size, "stride": stride, "pad": 1, **NORM, "activation": "leaky"},
    )


def plain(filters):
    return ("convolutional", {"filters": filters, "size": 1, "pad": 1, "activation": "linear"})


def yolo(mask, anchors, classes=2):
    flat = [x for pair in anchors for x in pair]
    return ("yolo", {"mask": mask, "anchors": flat, "classes": classes, "num": len(anchors), "ignore_thresh": 0.5})


POOL = ("maxpool", {"size": 2, "stride": 2})


def narrow_v2():
    rows = (((4, 3),), ((4, 3),), ((4, 3), (4, 1)), ((4, 3),), ((8, 3), (4, 1), (8, 3)), ((8, 3),))
    sections = []
    for number, row in enumerate(rows):
        sections += [POOL] * (number > 0) + [conv(*one) for one in row]
    sections += [conv(8, 3), conv(8, 3), ("route", {"layers": [-5]}), conv(4, 1), ("reorg", {"stride": 2})]
    anchors = ((1, 2), (3, 1.5))
    flat = [x for pair in anchors for x in pair]
    region = {"anchors": flat, "classes": 2, "num": 2, "softmax": 1, "bias_match": 1, "rescore": 1, "thresh": 0.6}
    region |= {"object_scale": 5, "noobject_scale": 1, "class_scale": 1, "coord_scale": 1}
    sections += [("route", {"layers": [-1, -4]}), conv(8, 3), plain(14), ("region", region)]
    fields = {"convs": rows, "anchors": anchors, "head_features": (8, 8, 8), "passthrough_features": 4}
    return "yolo_v2", fields, sections


def narrow_v3(spp):
    sections, width = [conv(4, 3)], 4
    for _ in range(5):
        width *= 2
        sections += [conv(width, 3, 2), conv(width // 2, 1), conv(width, 3), ("shortcut", {"from": [-3]})]
    anchors = ((4, 5), (6, 9), (10, 8), (12, 20), (30, 30), (60, 50))
    sections += [conv(8, 1)]
    if spp:
        for size, back in ((5, -2), (9, -4), (13, 0)):
            sections += [("maxpool", {"size": size, "stride": 1})] + [("route", {"layers": [back]})] * (back < 0)
        sections += [("route", {"layers": [-1, -3, -5, -6]}), conv(8, 1)]
    sections += [conv(16, 3), plain(14), yolo([4, 5], anchors), ("route", {"layers": [-4]})]
    sections += [conv(4, 1), ("upsample", {"stride": 2}), ("route", {"layers": [-1, 16]}), conv(6, 1)]
    sections += [conv(8, 3), plain(14), yolo([2, 3], anchors), ("route", {"layers": [-4]})]
    sections += [conv(4, 1), ("upsample", {"stride": 2}), ("route", {"layers": [-1, 12]})]
    sections += [conv(8, 3), plain(14), yolo([0, 1], anchors)]
    first = ((8, 1), (0, 0), (8, 1)) if spp else ((8, 1),)
    fields = {"stage_sizes": (1,) * 5, "stem_features": 4, "anchors": anchors, "necks": (first, ((6, 1),), ())}
    fields |= {"head_features": (16, 8, 8), "lateral_features": (4, 4)}
    return "yolo_v3_spp" if spp else "yolo_v3", fields, sections


def narrow_tiny(name):
    rows = (((4, 3),), ((4, 3),), ((4, 3),), ((4, 3),), ((6, 3),), ((8, 3), (8, 3)))
    sections = []
    for number, row in enumerate(rows[:-1]):
        sections += [POOL] * (number > 0) + [conv(*one) for one in row]
    sections += [POOL, conv(8, 3), ("maxpool", {"size": 2, "stride": 1}), conv(8, 3)]
    if name == "yolo_v2_tiny":
        region = {"anchors": [1, 2, 3, 1.5], "classes": 2, "num": 2, "softmax": 1, "bias_match": 1, "rescore": 1}
        region |= {"thresh": 0.6, "object_scale": 5}
        sections += [conv(6, 3), plain(14), ("region", region)]
        return name, {"convs": rows, "anchors": ((1, 2), (3, 1.5)), "head_features": (6,)}, sections
    anchors = ((4, 5), (6, 9), (10, 8), (12, 20))
    sections += [conv(6, 1), conv(8, 3), plain(14), yolo([2, 3], anchors), ("route", {"layers": [-4]}), conv(4, 1)]
    sections += [
        ("upsample", {"stride": 2}),
        ("route", {"layers": [-1, 8]}),
        conv(6, 3),
        plain(14),
        yolo([0, 1], anchors),
    ]
    fields = {"convs": rows, "anchors": anchors, "necks": (((6, 1),), ()), "head_features": (8, 6)}
    return name, fields | {"lateral_features": (4,)}, sections


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case[0], marks=[pytest.mark.slow] * (case[0] in ("yolo_v3", "yolo_v2_tiny")))
        for case in (
            narrow_v2(),
            narrow_v3(False),
            narrow_v3(True),
            *map(narrow_tiny, ("yolo_v2_tiny", "yolo_v3_tiny")),
        )
    ],
)
def test_our_networks_are_those_of_the_cfg_files(case, tmp_path):
    """The same weights file gives the same outputs and heads. The official cfg files: `test_darknet_data.py`."""
    name, fields, sections = case
    cfg = parse_cfg(text_of(sections, 64, 96))
    model = fv.create_model(name, num_classes=2, **fields)
    path = tmp_path / "x.weights"
    write_darknet(path, DarknetFile(drawn(values_of(cfg)) - 0.04, 5))
    theirs = fv.weights.load_darknet(cfg, path)
    ours = fv.weights.load(name, path, source="darknet", num_classes=2, **fields)
    x = np.random.default_rng(0).uniform(size=(1, 64, 96, 3)).astype(np.float32)
    expected, found = (jax.jit(m.apply, compiler_options=QUICK)(v, x) for m, v in ((cfg, theirs), (model, ours)))
    assert list(cfg.heads.values()) == list(model.heads.values())
    for one, other in zip(cfg.heads, model.heads, strict=True):
        scale = np.abs(expected[one]).max()
        np.testing.assert_allclose(found[other], expected[one], rtol=0, atol=1e-6 * scale)
    fv.weights.save_darknet(tmp_path / "y.weights", model, ours, seen=5)
    assert (tmp_path / "y.weights").read_bytes() == path.read_bytes()


def test_the_length_of_a_file_tells_the_number_of_classes(tmp_path):
    name, fields, _ = narrow_tiny("yolo_v3_tiny")
    path, wide = tmp_path / "x.weights", fv.create_model(name, num_classes=7, **fields)
    write_darknet(path, DarknetFile(drawn(values_of(wide))))
    variables = fv.weights.load(name, path, source="darknet", **fields)
    assert variables["params"]["head32_out"]["kernel"].shape == (1, 1, 8, 24)
    jax.tree.map(np.testing.assert_array_equal, variables, fv.weights.load_darknet(wide, path))
    _, anew = fv.weights.load_model(name, path, source="darknet", num_classes=3, **fields)
    assert anew["params"]["head16_out"]["kernel"].shape == (1, 1, 6, 16)
    np.testing.assert_array_equal(
        anew["params"]["backbone"]["stem_conv1"]["conv"]["kernel"],
        variables["params"]["backbone"]["stem_conv1"]["conv"]["kernel"],
    )
    write_darknet(path, DarknetFile(drawn(values_of(wide) + 1)))
    with pytest.raises(ValueError, match=r"x.weights must hold .* too (few|many)"):
        fv.weights.load(name, path, source="darknet", **fields)


def test_tensors_in_the_order_of_the_file():
    model = fv.create_model("tiny_darknet", convs=(((2, 3), (3, 1)),), num_classes=4)
    names = list(split(model, drawn(values_of(model)), "x", (8, 8, 3)))
    unit = [f"bn.{leaf}" for leaf in ("bias", "weight", "running_mean", "running_var")] + ["conv.weight"]
    assert names == [
        *(f"backbone/stem_conv1/{leaf}" for leaf in unit),
        *(f"backbone/stem_conv2/{leaf}" for leaf in unit),
        "head.bias",
        "head.weight",
    ]
