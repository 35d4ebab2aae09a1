"""Tests of the tables of published weights and of the class names."""

from pathlib import Path

import pytest

import flaxvision as fv
from flaxvision import published
from flaxvision.weights.convert import labels_of
from parity.libraries import NAMES

NAME = "resnet20_cifar"


def test_class_names():
    names = fv.weights.class_names_for("resnet50", "torchvision/IMAGENET1K_V2")
    assert (len(names), len(set(names))) == (1000, 1000)
    assert [names[i] for i in (0, 88, 281, 967, 985)] == ["tench", "macaw", "tabby cat", "espresso", "daisy"]
    coral = fv.weights.class_names_for("mobilenet_v2", "coral")
    assert coral == ("background", *names)
    assert fv.weights.class_names_for("squeezenet1_0", "deep_compression") == names
    assert fv.weights.class_names_for("resnet50", "keras") == names
    assert fv.weights.class_names_for("zfnet", "pytorchcv") is None
    cifar = fv.weights.class_names_for(NAME, "akamaster")
    assert cifar == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for name in ("darknet19", "darknet53", "tiny_darknet"):
        darknet = fv.weights.class_names_for(name, "darknet")
        assert sorted(darknet) == sorted(names)
        assert (darknet[0], darknet[2], darknet[999]) == ("kit fox", "Siberian Husky", "dumbbell")
    known = "cifar10, coco90, imagenet1k, imagenet1k_darknet, voc21, coco80, imagenet1001"
    with pytest.raises(ValueError, match=f"class_names must be one of {known}; got 'coco'"):
        published.class_names("coco")


def test_every_table_is_read():
    folder = Path(published.__file__).parent / "weights" / "published"
    assert {path.stem for path in folder.glob("*.toml")} == set(published.LIBRARIES)
    assert set(published.table()) <= set(fv.list_models())
    # A model's first tag gives its default preprocessing: torchvision before timm before Keras, but for Xception.
    assert fv.weights.tags("resnet50")[::4] == ("torchvision/IMAGENET1K_V1", "keras/imagenet")
    assert fv.weights.tags("xception") == ("keras/imagenet", "timm/tf_in1k")


@pytest.mark.parametrize("name", fv.list_models())
def test_the_registry_names_the_published_weights(name):
    tags = fv.weights.tags(name)
    assert tags == fv.model_info(name).weights
    assert len(set(tags)) == len(tags)
    assert sorted(tags) == sorted(published.table().get(name, {}))
    for tag in tags:
        info = fv.weights.tag_of(name, tag)
        assert info.tag == tag
        assert len(info.class_names) == labels_of(fv.create_model(name))
        assert info.source in fv.weights.sources(name)
        assert info.url.startswith(("https://", "hf://"))
        assert info.digest is None or info.digest.startswith(("sha256:", "md5:"))
        assert info.classes == fv.create_model(name).num_classes
        task = fv.model_info(name).task
        assert (info.box_ap is None) == (task != "detection" or info.source == "darknet")
        assert (info.miou is None) == (task != "segmentation")
        assert info.box_ap is None or 10 < info.box_ap < 60
        assert info.mask_ap is None or 10 < info.mask_ap < info.box_ap
        assert info.top1 is None or 50 < info.top1 < info.top5 < 100
        assert info.licence
        assert info.recipe.startswith("https://")


def test_facts_of_some_tags():
    v2 = fv.weights.tag_of("resnet50", "torchvision/IMAGENET1K_V2")
    assert (v2.top1, v2.top5, v2.digest) == (80.858, 95.434, "sha256:11ad3fa6")
    assert (v2.preprocessing.resize, v2.preprocessing.crop) == (232, 224)
    google = fv.weights.tag_of("googlenet_bn", "torchvision/IMAGENET1K_V1").preprocessing
    assert google.mean == google.std == (0.5, 0.5, 0.5)  # transform_input=True
    assert fv.weights.tag_of("inception_v3", "torchvision/IMAGENET1K_V1").preprocessing.mean == (0.5, 0.5, 0.5)
    assert fv.weights.tag_of("inception_v3", "timm/tv_in1k").preprocessing.interpolation == "bicubic"
    assert fv.weights.tag_of("xception", "timm/tf_in1k").preprocessing.resize == 333
    yolo = fv.weights.tag_of("yolo_v3", "darknet/coco")
    assert (len(yolo.class_names), yolo.class_names[16], yolo.class_names[79]) == (80, "dog", "toothbrush")
    assert yolo.preprocessing is None
    keras = fv.weights.tag_of("vgg16", "keras/imagenet")
    assert keras.digest == "md5:64373286793e3c8b2b4e3219cbf3544b"
    assert keras.preprocessing.order == "BGR"


@pytest.mark.reference
@pytest.mark.parametrize("name", [n for n in fv.list_models() if fv.model_info(n).weights])
def test_the_tags_against_the_libraries(name):
    import timm
    import torchvision

    theirs = {
        "alexnet_tv": "alexnet",
        "googlenet_bn": "googlenet",
        "faster_rcnn_resnet50_fpn": "fasterrcnn_resnet50_fpn",
        "mask_rcnn_resnet50_fpn": "maskrcnn_resnet50_fpn",
    }.get(name, name)
    for tag in fv.weights.tags(name):
        info = fv.weights.tag_of(name, tag)
        library, _, label = tag.partition("/")
        if library == "torchvision":
            weights = torchvision.models.get_model_weights(theirs)[label]
            metrics = weights.meta["_metrics"].get("ImageNet-1K", {})
            assert info.url == weights.url
            assert info.url.endswith(f"{info.digest.removeprefix('sha256:')}.pth")
            if info.box_ap:
                coco = weights.meta["_metrics"]["COCO-val2017"]
                assert (info.box_ap, info.mask_ap) == (coco["box_map"], coco.get("mask_map"))
                assert tuple(weights.meta["categories"]) == ("__background__", *info.class_names)
                assert weights.meta["num_params"] == fv.model_info(name).params
            if info.top1:
                assert len(weights.meta["categories"]) == info.classes
                assert (info.top1, info.top5) == (metrics["acc@1"], metrics["acc@5"])
            assert info.recipe == weights.meta["recipe"]
        if library == "timm":
            cfg = timm.get_pretrained_cfg(f"{NAMES['timm'].get(name, name)}.{label}")
            assert info.url == (f"hf://{cfg.hf_hub_id}/model.safetensors" if cfg.hf_hub_id else cfg.url)
            assert info.licence.lower() == cfg.license
            assert info.classes == cfg.num_classes
