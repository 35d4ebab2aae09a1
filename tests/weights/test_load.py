"""Tests of loading from files, bundles and tags, with other heads and channels."""

import csv
import logging
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import flaxvision as fv
from flaxvision.weights.convert import flat, layout_of, shapes_of
from flaxvision.weights.load import fold, load_weights
from flaxvision.weights.slots import slots_of

NAME = "resnet20_cifar"


def tensors_for(name, source, channels=None, **overrides):
    layout = layout_of(name, source)
    model = fv.create_model(name, **{**layout.fields, **overrides})
    slots = [s for s in slots_of(layout, shapes_of(name, model, channels=channels)) if s.constant is None]
    rng = np.random.default_rng(0)
    return {slot.name: rng.standard_normal(slot.shape, np.float32) for slot in slots}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    save_file(tensors_for(NAME, "akamaster"), path)
    return path


@pytest.fixture(scope="module")
def loaded(file):
    return flat(fv.weights.load(NAME, file, source="akamaster"))


def assert_same(one, other, but=()):
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        if path not in but:
            np.testing.assert_array_equal(leaf, other[path], err_msg=path)


HEAD = ("params/head/bias", "params/head/kernel")


def test_a_file(file, loaded):
    model, variables = fv.weights.load_model(NAME, str(file), source="akamaster")
    assert model == fv.create_model(NAME)
    assert_same(flat(variables), loaded)
    assert jax.eval_shape(model.apply, variables, jnp.zeros((1, 32, 32, 3))).shape == (1, 10)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_the_ending_says_the_format(tmp_path, loaded, ending):
    tensors = tensors_for(NAME, "akamaster")
    path = tmp_path / f"a.{ending}"
    np.savez(path, **tensors) if ending == "npz" else save_file(tensors, path)
    assert_same(flat(fv.weights.load(NAME, path, source="akamaster")), loaded)


def test_another_number_of_classes_starts_the_head_fresh_and_says_so(file, loaded, caplog):
    model, variables = fv.weights.load_model(NAME, file, source="akamaster", num_classes=7)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING  # which is seen without asking
    assert record.getMessage() == f"{NAME}: newly initialized for 7 classes: params/head/bias, params/head/kernel"
    assert model.num_classes == 7
    new = flat(variables)
    assert_same(new, loaded, but=HEAD)
    assert new[HEAD[1]].shape == (64, 7)


def test_fresh_values_are_the_initializers(tmp_path):
    x = jnp.zeros((1, 4))
    variables = fv.create_model("mlp", features=(6,), num_classes=3).init(jax.random.key(5), x)
    path = tmp_path / "a.safetensors"
    fv.weights.save(path, variables, name="mlp", features=(6,), num_classes=3, input_size=(4,))
    own = fv.create_model("mlp", features=(6,), num_classes=5).init(jax.random.key(0), x)
    new = fv.weights.load("mlp", path, num_classes=5)
    np.testing.assert_array_equal(new["params"]["hidden1"]["kernel"], variables["params"]["hidden1"]["kernel"])
    np.testing.assert_allclose(new["params"]["head"]["kernel"], own["params"]["head"]["kernel"], rtol=1e-6)
    other = fv.weights.load("mlp", path, num_classes=5, rng=jax.random.key(1))
    assert np.abs(other["params"]["head"]["kernel"] - new["params"]["head"]["kernel"]).max() > 0.01


def test_as_many_classes_as_there_are_change_nothing(file, loaded, caplog):
    with caplog.at_level(logging.INFO, "flaxvision.weights.load"):
        assert_same(flat(fv.weights.load(NAME, file, source="akamaster", num_classes=10, channels=3)), loaded)
    assert not caplog.records


def test_without_classes_the_head_is_left_out(file, loaded):
    model, variables = fv.weights.load_model(NAME, file, source="akamaster", num_classes=0)
    assert_same(flat(variables), {path: leaf for path, leaf in loaded.items() if path not in HEAD})
    assert jax.eval_shape(model.apply, variables, jnp.zeros((1, 32, 32, 3))).shape == (1, 64)


def test_the_file_says_how_many_classes_it_has(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tensors_for(NAME, "akamaster", num_classes=4, channels=1), path)
    model, variables = fv.weights.load_model(NAME, path, source="akamaster")
    assert model.num_classes == 4
    assert jax.eval_shape(model.apply, variables, jnp.zeros((1, 32, 32, 1))).shape == (1, 4)
    model, variables = fv.weights.load_model(NAME, path, source="akamaster", num_classes=10, channels=3)
    assert jax.eval_shape(model.apply, variables, jnp.zeros((1, 32, 32, 3))).shape == (1, 10)


def test_auxiliary_heads_start_fresh_too(tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    save_file(tensors_for("googlenet_bn", "torchvision", aux_heads=True), path)
    options = {"source": "torchvision", "aux_heads": True}
    whole = flat(fv.weights.load("googlenet_bn", path, **options))
    with caplog.at_level(logging.INFO, "flaxvision.weights.load"):
        new = flat(fv.weights.load("googlenet_bn", path, num_classes=5, **options))
    fresh = {path for path in whole if whole[path].shape != new[path].shape}
    assert len(fresh) == 6
    assert {path.split("/")[1] for path in fresh} == {"head", "aux_head1", "aux_head2"}
    assert_same(new, whole, but=fresh)
    assert all(path in caplog.text for path in fresh)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channels_fold_the_first_kernel(file, loaded, channels, caplog):
    with caplog.at_level(logging.INFO, "flaxvision.weights.load"):
        model, variables = fv.weights.load_model(NAME, file, source="akamaster", channels=channels)
    first = "params/backbone/stem_conv/kernel"
    assert f"folded {first} from 3 to {channels} channels" in caplog.text
    new = flat(variables)
    assert_same(new, loaded, but=(first,))
    kernel = loaded[first]
    if channels == 1:
        expected = kernel.sum(2, keepdims=True)
    else:
        expected = np.stack([kernel[:, :, i % 3] for i in range(channels)], 2) * np.float32(3 / channels)
    np.testing.assert_array_equal(new[first], expected)
    if channels in (1, 6):  # the response to a grey picture is what it was
        grey = np.random.default_rng(0).random((1, 9, 9, 1)).astype(np.float32)
        whole = jnp.sum(_convolved(grey.repeat(3, -1), kernel) - _convolved(grey.repeat(channels, -1), new[first]))
        assert abs(float(whole)) < 1e-3
    assert jax.eval_shape(model.apply, variables, jnp.zeros((1, 32, 32, channels))).shape == (1, 10)


def _convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_fold_keeps_the_dtype():
    assert fold(np.ones((3, 3, 3, 2), np.float32), 5).dtype == np.float32
    assert fold(np.ones((3, 3, 3, 2)), 1).dtype == np.float64
    np.testing.assert_array_equal(fold(np.ones((1, 1, 1, 2), np.float32), 4), np.full((1, 1, 4, 2), 0.25))


def test_a_dense_first_layer_cannot_be_folded(tmp_path):
    model = fv.create_model("mlp", features=(6,), num_classes=3)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    path = tmp_path / "a.safetensors"
    options = {"features": (6,), "num_classes": 3, "input_size": (4, 4), "channels": 3}
    fv.weights.save(path, variables, name="mlp", **options)
    with pytest.raises(ValueError, match=r"must be 3, since params/hidden1/kernel \[48, 6\] cannot be folded; got 1"):
        fv.weights.load("mlp", path, channels=1)


def test_a_tensor_that_does_not_fit_is_an_error(tmp_path):
    tensors = tensors_for(NAME, "akamaster")
    tensors["layer1.0.conv1.weight"] = tensors["layer1.0.conv1.weight"][:8]
    del tensors["linear.bias"]
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    for options in ({}, {"num_classes": 5}, {"channels": 1}):
        with pytest.raises(ValueError, match=r"missing: linear.bias .*conv1.weight must be .*; got \[8, 16, 3, 3\]"):
            fv.weights.load(NAME, path, source="akamaster", **options)


def test_a_bundle_says_what_it_is(tmp_path, loaded, file):
    model, variables = fv.weights.load_model(NAME, file, source="akamaster", num_classes=5)
    path = tmp_path / "mine.safetensors"
    fv.weights.save(path, variables, name=NAME, num_classes=5)
    again, found = fv.weights.load_model(NAME, path)
    assert again == model
    assert_same(flat(found), flat(variables))
    wider, found = fv.weights.load_model(NAME, path, num_classes=6, channels=1, dtype=jnp.bfloat16)
    assert (wider.num_classes, wider.backbone.dtype) == (6, jnp.bfloat16)
    assert jax.eval_shape(wider.apply, found, jnp.zeros((1, 32, 32, 1))).shape == (1, 6)
    with pytest.raises(
        ValueError, match=r"must be resnet20_cifar, the model of .*mine\.safetensors; got 'resnet32_cifar'"
    ):
        fv.weights.load("resnet32_cifar", path)


def test_a_damaged_bundle_is_an_error(tmp_path, file):
    path = tmp_path / "mine.safetensors"
    fv.weights.save(path, fv.weights.load(NAME, file, source="akamaster"), name=NAME)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="or its card is damaged"):
        fv.weights.load(NAME, path)


def test_numbers_that_are_not_finite_are_named(tmp_path, caplog):
    tensors = tensors_for(NAME, "akamaster")
    tensors["conv1.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, tmp_path / "a.safetensors")
    fv.weights.load(NAME, tmp_path / "a.safetensors", source="akamaster")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "non-finite values in params/backbone/stem_conv/kernel (from" in record.getMessage()


def test_wrong_arguments(tmp_path, file):
    with pytest.raises(ValueError, match="channels must be at least 1; got 0"):
        fv.weights.load(NAME, file, source="akamaster", channels=0)
    with pytest.raises(ValueError, match="num_classes must be at least 0; got -1"):
        fv.weights.load(NAME, file, source="akamaster", num_classes=-1)
    with pytest.raises(ValueError, match=r"library of .* \(akamaster\), since the file is not a bundle; got None"):
        fv.weights.load(NAME, file)
    with pytest.raises(ValueError, match=r"must be a library that has resnet20_cifar \(akamaster\); got 'torchvision'"):
        fv.weights.load(NAME, file, source="torchvision")
    with pytest.raises(FileNotFoundError, match=r"weights must be an existing file; got .*nowhere\.npz"):
        fv.weights.load(NAME, tmp_path / "nowhere.npz", source="akamaster")
    with pytest.raises(
        ValueError,
        match=r"path or a tag of resnet50 \(torchvision/.*\); got 'torchvision/IMAGENET1K_V3'",
    ):
        fv.weights.load("resnet50", "torchvision/IMAGENET1K_V3")
    with pytest.raises(ValueError, match="source must be None for the tag torchvision/IMAGENET1K_V2; got 'timm'"):
        fv.weights.load("resnet50", "torchvision/IMAGENET1K_V2", source="timm")
    with pytest.raises(TypeError, match="got 'classes'"):
        fv.weights.load("resnet50", "torchvision/IMAGENET1K_V2", classes=3)
    with pytest.raises(ValueError, match="got 'resnet51'"):
        fv.weights.load("resnet51", "torchvision/IMAGENET1K_V2")


def test_another_definition_is_an_error_for_variables_alone(tmp_path):
    """`load_model` sets the fields; the error of `load` names them."""
    name, options = "mobilenet_v2", {"source": "keras", "num_classes": 0}
    path, bundle = tmp_path / "a.safetensors", tmp_path / "bundle.safetensors"
    fields = fv.weights.fields(name, "keras")
    tensors = tensors_for(name, "keras", num_classes=0)
    save_file(tensors, path)
    model, variables = fv.weights.load_model(name, path, **options)
    assert model == fv.create_model(name, num_classes=0, **fields)
    with pytest.raises(ValueError, match=r"must include padding='SAME', epsilon=0.001, momentum=0.999 for keras's mob"):
        fv.weights.load(name, path, **options)
    chex.assert_trees_all_equal(fv.weights.load(name, path, **options, **fields), variables)
    # Bundles are no different, as far as the variables would run in the caller's model.
    fv.weights.save(bundle, variables, name=name, num_classes=0, **fields)
    again, found = fv.weights.load_model(name, bundle)
    assert again == model
    chex.assert_trees_all_equal(found, variables)
    with pytest.raises(ValueError, match=r"must include padding='SAME', .* for the network of .*bundle\.safetensors"):
        fv.weights.load(name, bundle)
    chex.assert_trees_all_equal(fv.weights.load(name, bundle, **fields), variables)


def test_class_names_stay_with_the_classes_that_they_name(tmp_path, file):
    cifar = fv.weights.class_names_for(NAME, "akamaster")
    options = {"source": "akamaster"}
    assert load_weights(NAME, file, **options).class_names == cifar
    assert load_weights(NAME, file, **options, channels=1).class_names == cifar
    assert load_weights(NAME, file, **options, num_classes=5).class_names is None
    assert load_weights(NAME, file, **options, num_classes=0).class_names is None
    save_file(tensors_for(NAME, "akamaster", num_classes=4), tmp_path / "four.safetensors")
    assert load_weights(NAME, tmp_path / "four.safetensors", **options).class_names is None
    path = tmp_path / "mine.safetensors"
    fv.weights.save(path, fv.weights.load(NAME, file, **options), name=NAME, class_names=cifar[::-1])
    assert load_weights(NAME, path).class_names == fv.weights.class_names_for(NAME, path) == cifar[::-1]
    assert load_weights(NAME, path, num_classes=5).class_names is None


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "source", "file"),
    [
        ("squeezenet1_0", "deep_compression", "squeezenet1_0_imagenet.npz"),
        ("mobilenet_v2", "coral", "mobilenet_v2_1.0_224_imagenet_int8.npz"),
    ],
)
def test_published_weights_know_the_photos(name, source, file):
    """The predictions are those in the index of `sample_photos`; SqueezeNet takes one kitten for a fox."""
    root = Path(os.environ["FLAXVISION_DATA"])
    model, variables = fv.weights.load_model(name, root / "weights" / file, source=source)
    preprocess = fv.weights.preprocessing_for(name, source)
    names = fv.weights.class_names_for(name, source)
    rows = list(csv.DictReader((root / "sample_photos" / "index.csv").read_text().splitlines()))
    images = np.stack([preprocess(Image.open(root / "sample_photos" / row["file"])) for row in rows])
    probabilities = np.asarray(jax.nn.softmax(jax.jit(model.apply)(variables, images)))
    shift = model.num_classes - 1000  # the class in front is background
    column = {"squeezenet1_0": "squeezenet", "mobilenet_v2": "mobilenetv2"}[name]
    wrong, apart = [], []
    for row, p in zip(rows, probabilities, strict=True):
        top = int(p.argmax()) - shift
        assert top == int(row[f"{column}_top1"])
        if top == int(row["imagenet_index"]):
            assert names[int(p.argmax())] == row["name"]
        apart.append(abs(float(p.max()) - float(row[f"{column}_prob"])))
        if str(top) not in row["accepted_indices"].split():
            wrong.append(row["file"])
    assert np.median(apart) < 1e-3  # the index was made with other roundings of the crop, which two photos show
    assert wrong == (["tabby_kitten.jpg"] if name == "squeezenet1_0" else [])


@pytest.mark.data
def test_published_resnet20_scores_as_published():
    root = Path(os.environ["FLAXVISION_DATA"])
    model, variables = fv.weights.load_model(NAME, root / "weights" / "resnet20_cifar10.npz", source="akamaster")
    preprocess = fv.weights.preprocessing_for(NAME, "akamaster")
    labels = np.fromfile(root / "cifar10" / "test_labels.u8", np.uint8)
    apply = jax.jit(lambda x: jnp.argmax(model.apply(variables, x), -1))
    right = 0
    for k, answers in enumerate(labels.reshape(10, 1000)):
        with Image.open(root / "cifar10" / f"test_{k:02d}.webp") as sheet:
            tiles = np.asarray(sheet.convert("RGB")).reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4)
        images = np.stack([preprocess(tile) for tile in tiles.reshape(1000, 32, 32, 3)])
        right += int(np.sum(np.asarray(apply(images)) == answers))
    assert right == 9173
