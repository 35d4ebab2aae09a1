"""The weights of keras.applications (Keras 3.15), from its sources; the accuracy is of keras.io.

Keras publishes the arithmetic of the pixels (its modes `caffe` and `tf`) and that the figures are of a single centre
crop, but not how the pictures were resized before it: here the shorter side becomes 1 / 0.875 of the crop, bilinear.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flaxvision.data.preprocessing import Preprocessing
from flaxvision.weights.tags import WeightsInfo

_BASE = "https://storage.googleapis.com/tensorflow/keras-applications/"
_ENDING = "_weights_tf_dim_ordering_tf_kernels.h5"
_CAFFE: dict[str, Any] = {"mean": (103.939, 116.779, 123.68), "std": (1.0, 1.0, 1.0), "divisor": 1.0, "order": "BGR"}
_TF: dict[str, Any] = {"mean": (1.0, 1.0, 1.0), "std": (1.0, 1.0, 1.0), "divisor": 127.5}

# name, file, md5, crop, mode, top-1, top-5
_WEIGHTS = (
    ("vgg16", f"vgg16/vgg16{_ENDING}", "64373286793e3c8b2b4e3219cbf3544b", 224, _CAFFE, 71.3, 90.1),
    ("vgg19", f"vgg19/vgg19{_ENDING}", "cbe5617147190e668d6c5d5026f83318", 224, _CAFFE, 71.3, 90.0),
    ("resnet50", f"resnet/resnet50{_ENDING}", "2cb95161c43110f7111970584f804107", 224, _CAFFE, 74.9, 92.1),
    ("resnet101", f"resnet/resnet101{_ENDING}", "f1aeb4b969a6efcfb50fad2f0c20cfc5", 224, _CAFFE, 76.4, 92.8),
    ("resnet152", f"resnet/resnet152{_ENDING}", "100835be76be38e30d865e96f2aaae62", 224, _CAFFE, 76.6, 93.1),
    ("inception_v3", f"inception_v3/inception_v3{_ENDING}", "9a0d58056eeedaa3f26cb7ebd46da564", 299, _TF, 77.9, 93.7),
    (
        "inception_resnet_v2",
        f"inception_resnet_v2/inception_resnet_v2{_ENDING}",
        "e693bd0210a403b3192acc6073ad2e96",
        299,
        _TF,
        80.3,
        95.3,
    ),
    ("xception", f"xception/xception{_ENDING}", "0a58e3b7378bc2990ea3b43d5981f1f6", 299, _TF, 79.0, 94.5),
    (
        "mobilenet_v2",
        f"mobilenet_v2/mobilenet_v2{_ENDING.removesuffix('.h5')}_1.0_224.h5",
        None,
        224,
        _TF,
        71.3,
        90.1,
    ),
)


def entries() -> Iterator[tuple[str, WeightsInfo]]:
    """Registry names and what is known of their weights."""
    for name, file, md5, crop, mode, top1, top5 in _WEIGHTS:
        yield (
            name,
            WeightsInfo(
                tag="keras/imagenet",
                url=_BASE + file,
                digest=f"md5:{md5}" if md5 else None,
                preprocessing=Preprocessing(crop, round(crop / 0.875), **mode),
                top1=top1,
                top5=top5,
                licence="Apache-2.0",
                recipe="https://keras.io/api/applications/",
            ),
        )
