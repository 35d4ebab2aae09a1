import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxvision as fv

# Trainable parameters at the defaults, from the papers' own figures.
GOLDEN = {
    "alexnet": 60_965_224,
    "alexnet_dli": 21_881_681,
    "alexnet_tv": 61_100_840,
    "alexnet_ungrouped": 62_378_344,
    "bn_inception": 11_295_240,
    "capsnet": 6_804_224,
    "darknet19": 20_842_376,
    "darknet53": 41_609_928,
    "deeplabv3_mobilenet_v2": 2_113_557,
    "deeplabv3_resnet50": 39_638_869,
    "fashion_cnn": 1_413_834,
    "faster_rcnn_resnet50_fpn": 41_755_286,
    "fcn16s_vgg16": 134_815_994,
    "fcn32s_vgg16": 136_152_917,
    "fcn8s_vgg16": 134_489_759,
    "fcn_resnet50": 32_957_013,
    "googlenet": 6_998_552,
    "googlenet_bn": 6_624_904,
    "inception_resnet_v2": 55_843_464,
    "inception_v3": 23_834_568,
    "inception_v4": 42_679_816,
    "lenet5": 60_000,
    "lenet5_modern": 61_706,
    "lenet_dli": 1_199_882,
    "mask_rcnn_resnet50_fpn": 44_401_393,
    "mlp": 266_610,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "perceptron": 3,
    "resnet101": 44_549_160,
    "resnet110_cifar": 1_727_962,
    "resnet152": 60_192_808,
    "resnet18": 11_689_512,
    "resnet20_cifar": 269_722,
    "resnet32_cifar": 464_154,
    "resnet34": 21_797_672,
    "resnet44_cifar": 658_586,
    "resnet50": 25_557_032,
    "resnet56_cifar": 853_018,
    "se_bn_inception": 11_931_622,
    "se_inception_resnet_v2": 65_092_718,
    "se_inception_v3": 25_496_188,
    "se_resnet101": 49_326_872,
    "se_resnet152": 66_821_848,
    "se_resnet18": 11_778_592,
    "se_resnet34": 21_958_868,
    "se_resnet50": 28_088_024,
    "senet154": 115_088_984,
    "squeezenet1_0": 1_248_424,
    "tiny_darknet": 1_042_104,
    "unet": 31_030_658,
    "unet_mobilenet_v2": 6_629_090,
    "unet_resnet34": 24_436_514,
    "unet_same": 31_036_546,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg16_dli": 134_333_137,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "xception": 22_855_952,
    "yolo_v2": 50_655_389,
    "yolo_v2_tiny": 15_861_773,
    "yolo_v3": 61_949_149,
    "yolo_v3_spp": 62_998_749,
    "yolo_v3_tiny": 8_852_366,
    "zfnet": 62_357_608,
}
# With the classifiers and decoders that the defaults leave out.
LARGER = {
    ("googlenet", "aux_heads"): 13_378_280,
    ("googlenet_bn", "aux_heads"): 13_004_888,
    ("inception_v3", "aux_heads"): 27_161_264,
    ("capsnet", "decoder"): 8_215_568,
}


def sample_of(info, batch=1):
    shape = (*info.input_size, info.channels) if len(info.input_size) == 2 else info.input_size
    return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)


def count(variables):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables["params"]))


def test_the_golden_table_covers_the_registry():
    assert set(fv.list_models()) == set(GOLDEN)


def variables_of(name, **overrides):
    model = fv.create_model(name, **overrides)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), sample_of(fv.model_info(name)))


def test_parameter_counts_are_exact():
    """`models/test_contract.py` counts the parameters of every classifier, and the tests of the detectors theirs."""
    assert {name: fv.model_info(name).params for name in GOLDEN} == GOLDEN


@pytest.mark.parametrize(("name", "part"), sorted(LARGER))
def test_parameter_counts_with_all_parts(name, part):
    assert count(variables_of(name, **{part: True})) == LARGER[name, part]


def test_squeeze_and_excitation_adds_its_two_dense_layers():
    """What no publication gives: the Inceptions plus C²/8 + C/16 + C for each module's C channels."""
    v3 = [256, 288, 288, *[768] * 5, 1280, 2048, 2048]
    v2 = [320, *[320] * 10, 1088, *[1088] * 20, 2080, *[2080] * 10]
    for name, plain, channels in [
        ("se_inception_v3", "inception_v3", v3),
        ("se_inception_resnet_v2", "inception_resnet_v2", v2),
    ]:
        assert GOLDEN[name] - GOLDEN[plain] == sum(c * c // 8 + c // 16 + c for c in channels), name


def test_the_cifar_nets_by_hand():
    """Table 6 of the paper says 0.27, 0.46, 0.66, 0.85 and 1.7 million; 3x3 kernels, BatchNorms and the classifier."""
    for n in (3, 5, 7, 9, 18):
        layers, into = [(3, 16)], 16
        for width in (16, 32, 64):
            layers += [(into, width)] + [(width, width)] * (2 * n - 1)
            into = width
        want = sum(9 * a * b + 2 * b for a, b in layers) + 650
        assert GOLDEN[f"resnet{6 * n + 2}_cifar"] == want


def test_mlp_counts_follow_its_widths():
    model = fv.create_model("mlp", features=(7, 5), num_classes=3)
    variables = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x), jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32)
    )
    assert count(variables) == 16 * 7 + 7 + 7 * 5 + 5 + 5 * 3 + 3


def test_models_are_plain_modules_and_overrides_are_their_fields():
    model = fv.create_model("lenet_dli", num_classes=3, dtype=jnp.bfloat16)
    assert isinstance(model, nn.Module)
    assert model.num_classes == 3
    assert model.dtype == jnp.bfloat16


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"name must be a registered model \(similar: lenet5, .*\); got 'lenet_5'"):
        fv.create_model("lenet_5")
    with pytest.raises(ValueError, match="fashion_cnn"):
        fv.model_info("fashioncnn")


def test_overrides_go_to_the_module_that_has_the_field():
    model = fv.create_model("googlenet_bn", num_classes=7, dtype=jnp.bfloat16, stages=("stage4",), dropout_rate=0.1)
    backbone = fv.models.GoogLeNetBackbone(norm=True, wide_kernel=3, dtype=jnp.bfloat16, stages=("stage4",))
    assert model == fv.models.GoogLeNet(backbone, num_classes=7, dropout_rate=0.1)
    assert fv.create_backbone("googlenet_bn", num_classes=7, dtype=jnp.bfloat16, stages=("stage4",)) == backbone


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_fields_rebuild_a_model(name):
    """Bundles and manifests hold flat overrides. No field of a classifier has the name of one of its backbone."""
    model = fv.create_model(name, num_classes=3)
    fields = fv.model_fields(model)
    assert "backbone" not in fields
    assert fv.create_model(name, **fields) == model
    if isinstance(model, fv.models.Classifier):
        assert not set(fv.model_fields(model.backbone)) & {field.name for field in dataclasses.fields(model)} - {
            "parent",
            "name",
        }


def test_a_backbone_is_asked_of_a_model_that_has_one():
    with pytest.raises(ValueError, match=r"name must be a model with a backbone \(alexnet, .*\); got 'mlp'"):
        fv.create_backbone("mlp")


def test_an_unknown_override_is_refused_with_the_fields():
    with pytest.raises(TypeError, match=r"overrides must be fields of lenet5 \(num_classes, .*\); got 'classes'"):
        fv.create_model("lenet5", classes=3)
    with pytest.raises(TypeError, match="'name'"):
        fv.create_model("lenet5", name="other")
    with pytest.raises(
        TypeError, match=r"fields of resnet18 \(num_classes, .*, stages, .*, stage_sizes, .*; got 'foo'"
    ):
        fv.create_model("resnet18", foo=1)
    with pytest.raises(TypeError, match="got 'backbone'"):
        fv.create_model("resnet18", backbone=None)


def test_num_classes_is_a_count():
    with pytest.raises(ValueError, match="num_classes must be at least 0; got -1"):
        fv.create_model("resnet18", num_classes=-1)
    with pytest.raises(TypeError):
        fv.create_model("resnet18", num_classes=2.5)


def test_list_models_filters():
    assert fv.list_models("lenet*") == ["lenet5", "lenet5_modern", "lenet_dli"]
    segmenters, detectors = (fv.list_models(task=task) for task in ("segmentation", "detection"))
    assert {"fcn8s_vgg16", "unet", "deeplabv3_resnet50"} <= set(segmenters)
    assert {"faster_rcnn_resnet50_fpn", "mask_rcnn_resnet50_fpn", "yolo_v2", "yolo_v3"} <= set(detectors)
    assert sorted([*fv.list_models(task="classification"), *detectors, *segmenters]) == sorted(GOLDEN)


def test_a_name_is_registered_once():
    from flaxvision.registry import register

    with pytest.raises(ValueError, match="name must not be registered already; got 'mlp'"):
        register(fv.models.MLP, "mlp")


def test_info_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fv.model_info("mlp").params = 1  # type: ignore[misc]


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"task must be 'classification', .*; got 'clasification'"):
        fv.list_models(task="clasification")
