"""Tests of the evaluation transforms of published weights, against fixed numbers and against their publishers."""

import numpy as np
import pytest
from PIL import Image

import flaxvision as fv
from flaxvision.data.preprocessing import Preprocessing
from flaxvision.weights import preprocessing_for

SIZES = [(500, 375), (375, 500), (333, 500), (256, 256), (224, 300), (1000, 241), (640, 427), (57, 91)]


def picture(width, height, seed=0):
    """Returns smooth colours with noise, which different resizing filters change differently."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    smooth = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * x * y), np.sin(5 * y - 4 * x)], -1) * 90 + 128
    return Image.fromarray(np.clip(smooth + rng.normal(scale=25, size=smooth.shape), 0, 255).astype(np.uint8))


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


@pytest.mark.parametrize(
    "name", [n for n in fv.list_models(task="classification") if len(fv.model_info(n).input_size) == 2]
)
def test_every_classifier_has_one(name):
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
        ("mobilenet_v1", "mobilenetv1_100.ra4_e3600_r224_in1k"),
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
        ("mobilenet_v1", keras.applications.mobilenet),
        ("mobilenet_v2", keras.applications.mobilenet_v2),
        ("inception_v3", keras.applications.inception_v3),
        ("inception_resnet_v2", keras.applications.inception_resnet_v2),
    ):
        transform = preprocessing_for(name, "keras/imagenet")
        pixels = np.asarray(transform.resized(image), np.float32)
        np.testing.assert_array_equal(transform(image), module.preprocess_input(pixels.copy()))
