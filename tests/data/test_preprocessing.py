"""The published evaluation transforms, against fixed numbers and against their publishers."""

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from flaxvision.data.preprocessing import Preprocessing
from flaxvision.weights.preprocessing import preprocessing_for

SIZES = [(500, 375), (375, 500), (333, 500), (256, 256), (224, 300), (1000, 241), (640, 427), (57, 91)]


def picture(width, height, seed=0):
    """Smooth colours with noise: resizing filters differ on it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    smooth = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * x * y), np.sin(5 * y - 4 * x)], -1) * 90 + 128
    return Image.fromarray(np.clip(smooth + rng.normal(scale=25, size=smooth.shape), 0, 255).astype(np.uint8))


def test_fixed_numbers():
    """A ramp, shrunk by Pillow's antialiased filters."""
    ramp = np.tile((np.arange(16) * 16).astype(np.uint8)[None, :, None], (8, 1, 3))
    pixels = Preprocessing(4, 4, mean=(0,) * 3, std=(1,) * 3, divisor=1.0)(ramp)
    np.testing.assert_array_equal(pixels[0, :, 0], [72, 104, 136, 168])
    pixels = Preprocessing(4, 4, "bicubic", (0,) * 3, (1,) * 3, 1.0)(ramp)
    np.testing.assert_array_equal(pixels[2, :, 1], [72, 104, 136, 168])
    pixels = Preprocessing((2, 3), (4, 5), "nearest", (0,) * 3, (1,) * 3, 1.0)(ramp)
    np.testing.assert_array_equal(pixels[..., 2], [[64, 128, 176]] * 2)


def test_the_arithmetic():
    grey = np.full((300, 300, 3), (124, 16, 255), np.uint8)
    usual = preprocessing_for("resnet50", "torchvision/IMAGENET1K_V1")(grey)
    assert (usual.shape, usual.dtype) == ((224, 224, 3), np.float32)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(usual[7, 9], (np.array([124, 16, 255]) / 255 - mean) / std, atol=1e-6)
    caffe = preprocessing_for("resnet50", "keras/imagenet")(grey)
    np.testing.assert_allclose(caffe[0, 0], [255 - 103.939, 16 - 116.779, 124 - 123.68], rtol=1e-6)
    signed = preprocessing_for("mobilenet_v2", "keras/imagenet")(grey)
    np.testing.assert_allclose(signed[0, 0], np.array([124, 16, 255]) / 127.5 - 1, rtol=1e-5)
    half = preprocessing_for("inception_v3", "torchvision/IMAGENET1K_V1")(grey)
    assert half.shape == (299, 299, 3)
    np.testing.assert_allclose(half[0, 0], np.array([124, 16, 255]) / 127.5 - 1, rtol=1e-5)
    squeeze = preprocessing_for("squeezenet1_0", "deep_compression")(grey)
    np.testing.assert_array_equal(squeeze[100, 100], [255 - 104, 16 - 117, 124 - 123])
    assert squeeze.shape == (227, 227, 3)
    coral = preprocessing_for("mobilenet_v2", "coral")(grey)
    np.testing.assert_allclose(coral[0, 0], (np.array([124, 16, 255]) - 127) * 0.0078431377, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_offsets(size):
    """The shorter side, truncated as torchvision truncates, and its rounding of the crop; by hand."""
    image = picture(*size)
    width, height = size
    if width <= height:
        resized = (256, int(256 * height / width))
    else:
        resized = (int(256 * width / height), 256)
    left, top = round((resized[0] - 224) / 2), round((resized[1] - 224) / 2)
    expected = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(np.asarray(Preprocessing().resized(image)), expected)


def test_a_picture_smaller_than_the_crop_gets_zeros_around():
    image = np.full((5, 3, 3), 200, np.uint8)
    pixels = Preprocessing(8, None, mean=(0,) * 3, std=(1,) * 3, divisor=1.0)(image)[..., 0]
    expected = np.zeros((8, 8))
    expected[1:6, 2:5] = 200
    np.testing.assert_array_equal(pixels, expected)


def test_every_kind_of_picture():
    image = picture(40, 30)
    transform = Preprocessing(16, 20)
    expected = transform(image)
    np.testing.assert_array_equal(transform(np.asarray(image)), expected)
    np.testing.assert_array_equal(transform(image.convert("RGBA")), expected)
    grey = image.convert("L")
    for other in (grey, np.asarray(grey), np.asarray(grey)[..., None], grey.convert("RGB")):
        np.testing.assert_array_equal(transform(other), transform(grey))
    assert Preprocessing(16, 20, mean=(0.1,), std=(0.3,), order="L")(image).shape == (16, 16, 1)
    assert transform(picture(40, 30).quantize(8)).shape == (16, 16, 3)


def test_what_is_no_picture():
    transform = Preprocessing()
    with pytest.raises(TypeError, match="must be a PIL image or a uint8 array; got an array of float32"):
        transform(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"must have the shape \[H, W, 3\], .*; got \[8, 8, 4\]"):
        transform(np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(ValueError, match="must have at least one pixel"):
        transform(np.zeros((0, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="interpolation must be one of nearest, bilinear, bicubic"):
        Preprocessing(interpolation="lanczos")
    with pytest.raises(ValueError, match="order must be RGB, BGR or L"):
        Preprocessing(order="GBR")


@pytest.mark.parametrize("name", [n for n in fv.list_models() if len(fv.model_info(n).input_size) == 2])
def test_every_model_has_one(name):
    info = fv.model_info(name)
    pixels = preprocessing_for(name)(picture(70, 60))
    assert pixels.dtype == np.float32
    assert pixels.ndim == 3
    if not info.weights:
        assert pixels.shape == (*info.input_size, info.channels)
    for tag in info.weights:
        transform = preprocessing_for(name, tag)
        assert transform == fv.weights.tag_of(name, tag).preprocessing
        assert transform.resize >= transform.crop


def test_names():
    with pytest.raises(ValueError, match=r"weights must be a path or a tag of resnet50 .*; got 'torchvision/V2'"):
        preprocessing_for("resnet50", "torchvision/V2")
    with pytest.raises(ValueError, match="must be a model that takes images; got 'perceptron', which takes vectors"):
        preprocessing_for("perceptron")
    assert preprocessing_for("lenet_dli") == Preprocessing(28, 28, mean=(0.1307,), std=(0.3081,), order="L")


def test_data_knows_nothing_of_weights_and_models():
    """`weights` imports `data`, so an import in the other direction would be a circle."""
    for path in sorted(Path(fv.data.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            wrong = [name for name in names if name.startswith(("flaxvision.weights", "flaxvision.registry"))]
            assert not wrong, f"{path.name} imports {wrong}"


@pytest.mark.reference
@pytest.mark.parametrize("size", SIZES)
def test_against_torchvision(size):
    import torchvision.models

    image = picture(*size)
    for name, theirs, label in (
        ("resnet50", "resnet50", "IMAGENET1K_V1"),
        ("resnet50", "resnet50", "IMAGENET1K_V2"),
        ("vgg16", "vgg16", "IMAGENET1K_FEATURES"),
        ("inception_v3", "inception_v3", "IMAGENET1K_V1"),
        ("googlenet_bn", "googlenet", "IMAGENET1K_V1"),
    ):
        expected = torchvision.models.get_model_weights(theirs)[label].transforms()(image).permute(1, 2, 0).numpy()
        found = preprocessing_for(name, f"torchvision/{label}")(image)
        if name in ("inception_v3", "googlenet_bn"):  # their networks do the rest
            expected = (expected * np.array([0.229, 0.224, 0.225]) + np.array([0.485, 0.456, 0.406]) - 0.5) / 0.5
            np.testing.assert_allclose(found, expected, atol=2e-6)
        else:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.reference
@pytest.mark.parametrize("size", SIZES)
def test_against_timm(size):
    import timm.data

    image = picture(*size)
    for name, theirs in (
        ("resnet50", "resnet50.a1_in1k"),
        ("resnet18", "resnet18.tv_in1k"),
        ("inception_resnet_v2", "inception_resnet_v2.tf_in1k"),
        ("mobilenet_v2", "mobilenetv2_100.ra_in1k"),
        ("xception", "legacy_xception.tf_in1k"),
    ):
        cfg = timm.get_pretrained_cfg(theirs).to_dict()
        config = timm.data.resolve_data_config(pretrained_cfg=cfg, use_test_size=True)
        expected = timm.data.create_transform(**config)(image).permute(1, 2, 0).numpy()
        found = preprocessing_for(name, f"timm/{theirs.partition('.')[2]}")(image)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.reference
def test_against_keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    import keras

    image = picture(500, 375)
    for name, module in (
        ("resnet50", keras.applications.resnet),
        ("vgg16", keras.applications.vgg16),
        ("xception", keras.applications.xception),
        ("mobilenet_v2", keras.applications.mobilenet_v2),
        ("inception_v3", keras.applications.inception_v3),
        ("inception_resnet_v2", keras.applications.inception_resnet_v2),
    ):
        transform = preprocessing_for(name, "keras/imagenet")
        pixels = np.asarray(transform.resized(image), np.float32)
        np.testing.assert_array_equal(transform(image), module.preprocess_input(pixels.copy()))
