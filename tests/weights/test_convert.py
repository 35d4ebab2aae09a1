"""Tests of the conversion of other libraries' tensors to variables and back."""

import functools
import re
import time
import tracemalloc

import chex
import ml_dtypes
import numpy as np
import pytest

import flaxvision as fv
from flaxvision.weights.convert import _traced, layout_of, shapes_of
from flaxvision.weights.layout import Layout
from flaxvision.weights.names import layouts
from flaxvision.weights.slots import canonical, slots_of

# Networks that repeat the units of a shallower one.
DEEPER = re.compile(r"(se_)?resnet1(01|52)|resnet(44|56|110)_cifar|vgg1[39](_bn)?")
PAIRS = sorted((name, layout.source) for layout in layouts() for name in layout.models)


def slots_for(name, source, **overrides):
    layout = layout_of(name, source)
    model = fv.create_model(name, **{**layout.fields, **overrides})
    return layout, [s for s in slots_of(layout, shapes_of(name, model)) if s.constant is None]


def tensors_for(name, source, dtype=np.float32, **overrides):
    """Returns random tensors of the library in a new dict."""
    return dict(drawn(name, source, np.dtype(dtype), **overrides))


@functools.lru_cache(maxsize=4)
def drawn(name, source, dtype, **overrides):
    layout, slots = slots_for(name, source, **overrides)
    rng = np.random.default_rng(0)
    tensors = {slot.name: rng.random(slot.shape, np.float32).astype(dtype) - dtype.type(0.5) for slot in slots}
    return layout.restore(tensors) if layout.restore else tensors


def convert(name, tensors, source, **overrides):
    """Converts to the network of the source."""
    return fv.weights.convert(name, tensors, source=source, **{**fv.weights.fields(name, source), **overrides})


def export(name, variables, source, **overrides):
    return fv.weights.export(name, variables, source=source, **{**fv.weights.fields(name, source), **overrides})


def test_every_source_is_named_once():
    assert len(set(PAIRS)) == len(PAIRS) > 40
    assert {name for name, _ in PAIRS} <= set(fv.list_models())


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if DEEPER.fullmatch(n) else ()) for n in sorted({n for n, _ in PAIRS})],
)
def test_every_variable_has_a_place_of_its_own(name):
    """Checks the axes of each tensor in both directions: numbers of small tensors, shapes of large ones."""
    for source in fv.weights.sources(name):  # one test for all, since sources share the trace of the model
        layout, slots = slots_for(name, source)
        shapes = shapes_of(name, fv.create_model(name, **layout.fields))
        modules = {path.partition("/")[2].rpartition("/")[0] for path in shapes}
        assert layout.first in modules, source
        for slot in slots:
            ours = shapes[slot.path].shape
            if np.prod(slot.shape) < 20_000:
                there = np.arange(np.prod(slot.shape)).reshape(slot.shape)
                here = slot.forward(there)
                np.testing.assert_array_equal(slot.backward(here), there)
            else:
                here = slot.forward(np.broadcast_to(np.int8(0), slot.shape))
                assert slot.backward(np.broadcast_to(np.int8(0), ours)).shape == slot.shape
            assert here.shape == ours, (source, slot.path)


@pytest.mark.parametrize(
    ("name", "source", "overrides"),
    [
        ("resnet18", "torchvision", {}),
        ("resnet20_cifar", "akamaster", {}),
        ("squeezenet1_0", "torchvision", {"num_classes": 10}),
        ("googlenet_bn", "torchvision", {"aux_heads": True, "num_classes": 7}),
        ("mobilenet_v1", "timm", {}),
        ("mobilenet_v1", "keras", {"num_classes": 3}),
        ("mobilenet_v2", "timm", {}),
        ("mobilenet_v2", "keras", {"num_classes": 3}),
        ("xception", "keras", {}),
    ],
)
def test_there_and_back_is_the_same_bit_for_bit(name, source, overrides):
    tensors = tensors_for(name, source, **overrides)
    variables = convert(name, tensors, source=source, **overrides)
    again = export(name, variables, source=source, **overrides)
    chex.assert_trees_all_equal(again, tensors, strict=True)


def test_a_convolution_and_a_dense_layer_by_hand():
    tensors = tensors_for("resnet18", "torchvision", num_classes=5)
    variables = convert("resnet18", tensors, source="torchvision", num_classes=5)
    params, stats = variables["params"], variables["batch_stats"]
    kernel = params["backbone"]["stage2_block1"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 64, 128)
    assert kernel.flags.c_contiguous
    assert kernel[0, 2, 5, 7] == tensors["layer2.0.conv1.weight"][7, 5, 0, 2]
    assert params["head"]["kernel"][3, 2] == tensors["fc.weight"][2, 3]
    np.testing.assert_array_equal(params["backbone"]["stem_bn"]["scale"], tensors["bn1.weight"])
    np.testing.assert_array_equal(stats["backbone"]["stem_bn"]["var"], tensors["bn1.running_var"])
    assert not np.shares_memory(params["backbone"]["stem_bn"]["scale"], tensors["bn1.weight"])


def test_a_dense_layer_behind_a_flattened_map():
    """torch flattens in the order C, H, W and we in H, W, C; the conversion permutes the kernel."""
    rng = np.random.default_rng(0)
    layout = Layout("torchvision", ("any",), lambda module: "classifier.0", flatten={"fc6": (2, 3, 4)})
    (slot,) = slots_of(layout, {"params/fc6/kernel": np.zeros((24, 5))})
    assert (slot.name, slot.shape) == ("classifier.0.weight", (5, 24))
    picture = rng.standard_normal((6, 2, 3, 4))
    kernel = rng.standard_normal(slot.shape)
    there = picture.transpose(0, 3, 1, 2).reshape(6, -1) @ kernel.T
    here = picture.reshape(6, -1) @ slot.forward(kernel)
    np.testing.assert_allclose(here, there, rtol=1e-12)
    np.testing.assert_array_equal(slot.backward(slot.forward(kernel)), kernel)


def test_layouts_that_name_a_tensor_twice_or_not_at_all():
    layout = Layout("torchvision", ("any",), lambda module: "same")
    with pytest.raises(ValueError, match=r"must differ; got same\.weight twice"):
        slots_of(layout, {"params/a/kernel": np.zeros((3, 5)), "params/b/kernel": np.zeros((3, 5))})
    with pytest.raises(ValueError, match=r"leaf of params/a/centers must be one of .*; got 'centers'"):
        slots_of(layout, {"params/a/centers": np.zeros((3, 5))})


def test_all_that_is_wrong_is_in_one_error():
    tensors = tensors_for("resnet18", "torchvision")
    del tensors["layer1.0.conv1.weight"], tensors["bn1.bias"]
    tensors["layer4.1.extra"] = np.zeros((2, 3), np.float32)
    tensors["fc.bias"] = np.zeros(999, np.float32)
    tensors["bn1.weight"] = np.zeros(64, np.int64)
    tensors["bn1.num_batches_tracked"] = np.zeros((), np.int64)
    with pytest.raises(ValueError, match="do not fit torchvision's resnet18") as caught:
        convert("resnet18", tensors, source="torchvision")
    said = str(caught.value)
    assert "2 missing: " in said
    assert "layer1.0.conv1.weight [64, 64, 3, 3]" in said
    assert "bn1.bias [64]" in said
    assert "1 unexpected: layer4.1.extra [2, 3]" in said
    assert "1 of the wrong shape: fc.bias must be [1000]; got [999]" in said
    assert "1 not floating point: bn1.weight" in said
    assert "num_batches_tracked" not in said


def test_what_keras_lacks_is_named_too():
    tensors = tensors_for("resnet50", "keras")
    del tensors["conv2_block1_1_conv/bias"], tensors["conv1_bn/gamma"]
    tensors["odd"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="do not fit keras's resnet50") as caught:
        convert("resnet50", tensors, source="keras")
    for part in ("conv2_block1_1_conv/bias [64]", "conv1_bn/gamma [64]", "1 unexpected: odd [2]"):
        assert part in str(caught.value)


def test_another_model_is_an_error():
    with pytest.raises(ValueError, match=r"missing: .*layer1.2.conv1.weight"):
        convert("resnet34", tensors_for("resnet18", "torchvision"), source="torchvision")
    with pytest.raises(ValueError, match=r"unexpected: .*layer1.2.conv1.weight \[64, 64, 3, 3\]"):
        convert("resnet18", tensors_for("resnet34", "torchvision"), source="torchvision")
    with pytest.raises(ValueError, match=r"fc.bias must be \[10\]; got \[1000\]"):
        convert("resnet18", tensors_for("resnet18", "torchvision"), source="torchvision", num_classes=10)


def test_wrong_names_and_fields():
    with pytest.raises(ValueError, match=r"must be a library that has resnet18 \(timm, torchvision\); got 'torch'"):
        fv.weights.convert("resnet18", {}, source="torch")
    with pytest.raises(ValueError, match="got 'resnet19'"):
        fv.weights.convert("resnet19", {}, source="torchvision")
    with pytest.raises(TypeError, match="got 'classes'"):
        fv.weights.convert("resnet18", {}, source="torchvision", classes=3)
    with pytest.raises(ValueError, match="must be a model with a known source; got 'mlp'"):
        fv.weights.fields("mlp", "keras")


def test_another_definition_is_an_error_that_names_the_fields():
    """The weights of timm's Xception would run in Keras' Xception, with logits that are 20 % off."""
    tensors = tensors_for("xception", "timm", num_classes=3)
    said = r"must include pool_padding=\(\(1, 1\), \(1, 1\)\), epsilon=1e-05, momentum=0.9 for timm's xception; got n"
    with pytest.raises(ValueError, match=said):
        fv.weights.convert("xception", tensors, source="timm", num_classes=3)
    fields = fv.weights.fields("xception", "timm")
    variables = fv.weights.convert("xception", tensors, source="timm", num_classes=3, **fields)
    with pytest.raises(ValueError, match=r"overrides must include pool_padding=.* for timm's xception; got none"):
        fv.weights.export("xception", variables, source="timm")
    again = fv.weights.export("xception", variables, source="timm", num_classes=3, **fields)
    chex.assert_trees_all_equal(again, tensors)
    # Any override is the caller's decision, whatever its value.
    chosen = {**fields, "epsilon": 1e-3}
    chex.assert_trees_all_equal(
        fv.weights.convert("xception", tensors, source="timm", num_classes=3, **chosen), variables
    )
    del chosen["epsilon"]
    with pytest.raises(ValueError, match=r"must include epsilon=1e-05 for timm's xception; got .*momentum=0\.9"):
        fv.weights.convert("xception", tensors, source="timm", num_classes=3, **chosen)


def test_the_fields_of_a_source():
    assert fv.weights.fields("resnet50", "torchvision") == {}
    keras = fv.weights.fields("resnet50", "keras")
    assert keras["epsilon"] == 1.001e-5
    keras["epsilon"] = 0  # a copy
    assert fv.weights.fields("resnet50", "keras")["epsilon"] == 1.001e-5
    assert fv.weights.sources("resnet50") == ["keras", "timm", "torchvision"]
    assert fv.weights.sources("mlp") == []


def test_dtypes():
    """float64 stays and half precision is widened to float32, so that no precision is lost."""
    for given, expected in ((np.float64, np.float64), (np.float16, np.float32), (ml_dtypes.bfloat16, np.float32)):
        tensors = tensors_for("resnet20_cifar", "akamaster", dtype=given)
        variables = convert("resnet20_cifar", tensors, source="akamaster")
        kernel = variables["params"]["head"]["kernel"]
        assert kernel.dtype == expected
        np.testing.assert_array_equal(kernel.T, tensors["linear.weight"].astype(expected))


def test_without_a_head_its_tensors_are_left():
    tensors = tensors_for("resnet18", "torchvision")
    variables = convert("resnet18", tensors, source="torchvision", num_classes=0)
    assert set(variables["params"]) == {"backbone"}
    tensors["other.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r": 1 unexpected: other.weight \[3\]$"):
        convert("resnet18", tensors, source="torchvision", num_classes=0)


def test_auxiliary_heads_are_ignored_only_where_the_model_has_none():
    tensors = tensors_for("googlenet_bn", "torchvision", aux_heads=True)
    bare = convert("googlenet_bn", tensors, source="torchvision")
    assert not [key for key in bare["params"] if key.startswith("aux")]
    gone = next(key for key in tensors if key.startswith("aux1."))
    del tensors[gone]
    convert("googlenet_bn", tensors, source="torchvision")
    with pytest.raises(ValueError, match=f"1 missing: {re.escape(gone)}"):
        convert("googlenet_bn", tensors, source="torchvision", aux_heads=True)


def test_an_auxiliary_head_with_a_tensor_too_many():
    tensors = tensors_for("googlenet_bn", "torchvision", aux_heads=True) | {"aux1.fc3.bias": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r": 1 unexpected: aux1.fc3.bias \[3\]$"):
        convert("googlenet_bn", tensors, source="torchvision", aux_heads=True)


def test_variables_that_a_library_lacks():
    tensors = tensors_for("inception_v3", "keras")
    variables = convert("inception_v3", tensors, source="keras")
    again = export("inception_v3", variables, source="keras")
    assert again.keys() == tensors.keys()
    leaf = variables["params"]["backbone"]
    while "scale" not in leaf:
        leaf = next(iter(value for value in leaf.values() if "bn" in value or "scale" in value))
        leaf = leaf.get("bn", leaf)
    np.testing.assert_array_equal(leaf["scale"], 1)
    leaf["scale"] = leaf["scale"] * 2
    with pytest.raises(ValueError, match=r"variables must be the constants .*; got .*/scale from 2 to 2, not 1"):
        export("inception_v3", variables, source="keras")


def test_export_is_strict():
    variables = convert("resnet18", tensors_for("resnet18", "torchvision"), source="torchvision")
    del variables["params"]["head"]["bias"]
    variables["params"]["extra"] = np.zeros(2)
    with pytest.raises(ValueError, match=r"1 missing: params/head/bias \[1000\]; 1 unexpected: params/extra \[2\]"):
        export("resnet18", variables, source="torchvision")


def test_other_channels():
    tensors = tensors_for("resnet18", "torchvision")
    tensors["conv1.weight"] = tensors["conv1.weight"][:, :1]
    with pytest.raises(ValueError, match=r"conv1.weight must be \[64, 3, 7, 7\]; got \[64, 1, 7, 7\]"):
        convert("resnet18", tensors, source="torchvision")
    variables = convert("resnet18", tensors, source="torchvision", channels=1)
    assert variables["params"]["backbone"]["stem_conv"]["kernel"].shape == (7, 7, 1, 64)
    again = export("resnet18", variables, source="torchvision", channels=1)
    np.testing.assert_array_equal(again["conv1.weight"], tensors["conv1.weight"])


def test_keras_names_of_any_version_and_session():
    assert canonical(["conv2d_5/kernel:0", "conv2d_6/kernel:0", "batch_normalization/beta:0", "conv1/bias"]) == {
        "conv2d_5/kernel:0": "conv2d/kernel",
        "conv2d_6/kernel:0": "conv2d_1/kernel",
        "batch_normalization/beta:0": "batch_normalization/beta",
        "conv1/bias": "conv1/bias",
    }
    assert canonical(["a/depthwise_kernel:0", "b/depthwise_kernel", "b/pointwise_kernel"]) == {
        "a/depthwise_kernel:0": "a/kernel",
        "b/depthwise_kernel": "b/depthwise_kernel",
        "b/pointwise_kernel": "b/pointwise_kernel",
    }
    tensors = tensors_for("inception_v3", "keras")

    def later(key):
        found = re.fullmatch(r"(conv2d|batch_normalization)(?:_(\d+))?(/.*)", key)
        return f"{found[1]}_{int(found[2] or 0) + 94}{found[3]}:0" if found else key

    one = convert("inception_v3", tensors, source="keras")
    two = convert("inception_v3", {later(k): v for k, v in tensors.items()}, source="keras")
    chex.assert_trees_all_equal(one, two)


def published(name, tensors):
    """Renames tensors as in the files that Keras publishes, which it reads by order."""
    counts = {}

    def old(layer):
        if name == "resnet50":
            return {"predictions": "probs"}.get(layer, layer)
        if name == "mobilenet_v2":
            layer = layer.replace("expanded_conv_", "block_0_")
            if found := re.fullmatch(r"block_(\d+)_(\w+?)(_BN)?", layer):
                return f"{'bn' if found[3] else 'mobl'}{found[1]}_conv_{found[1]}_{'bn_' if found[3] else ''}{found[2]}"
            return {"predictions": "Logits"}.get(layer, layer)
        kind = "separableconvolution2d" if re.search(r"_sepconv\d$", layer) else "convolution2d"
        kind = "batchnormalization" if layer.endswith("_bn") or layer.startswith("batch") else kind
        kind = "dense" if layer == "predictions" else kind
        counts[kind] = counts.get(kind, 0) + 1
        return f"{kind}_{counts[kind]}"

    layers = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
    if name == "xception":  # in the order of Keras' `Model.layers`
        layers = sorted(layers, key=_place_in_xception)
    names = {layer: old(layer) for layer in layers}
    split = [(layer, *key.rpartition("/")) for layer in layers for key in tensors if key.rpartition("/")[0] == layer]
    return {f"{names[layer]}/{leaf}": tensors[f"{layer}/{leaf}"] for layer, _, _, leaf in split}


def _place_in_xception(layer):
    """Sorts by block, with the shortcut last."""
    if layer == "predictions":
        return 99, 0
    if found := re.fullmatch(r"(?:conv2d|batch_normalization)(?:_(\d))?", layer):
        return (2, 3, 4, 13)[int(found[1] or 0)], 9
    found = re.fullmatch(r"block(\d+)_(?:sep)?conv(\d)(?:_bn)?", layer)
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("name", ["xception", "mobilenet_v2", "resnet50"])
def test_keras_names_in_its_published_files(name):
    tensors = tensors_for(name, "keras")
    old = published(name, tensors)
    assert len(old) == len(tensors)
    assert set(old) != set(tensors)
    one, two = (convert(name, given, source="keras") for given in (tensors, old))
    chex.assert_trees_all_equal(one, two)
    head = next(key for key in old if re.match(r"(dense_1|Logits|probs)/kernel", key))
    with pytest.raises(ValueError, match="1 missing: predictions/kernel"):
        convert(name, {key: array for key, array in old.items() if key != head}, source="keras")
    with pytest.raises(ValueError, match=r"1 unexpected: (dense|Logits|probs)/kernel \[2, 2\]"):
        convert(name, tensors | {head: np.zeros((2, 2), np.float32)}, source="keras")


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_resnet50_takes_under_two_seconds_and_under_three_times_its_size():
    tensors = tensors_for("resnet50", "torchvision")
    size = sum(tensor.nbytes for tensor in tensors.values())

    def seconds():
        _traced.cache_clear()  # the model is traced anew
        start = time.process_time()
        convert("resnet50", tensors, source="torchvision")
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 2
    tracemalloc.start()
    try:
        variables = convert("resnet50", tensors, source="torchvision")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size + peak < 3 * size  # the tensors themselves included
    assert len(_leaves(variables)) == 267


def test_channels_that_no_image_has():
    with pytest.raises(ValueError, match="channels must be at least 1; got 0"):
        convert("resnet20_cifar", {}, source="akamaster", channels=0)
