"""One file per paper; importing this package registers every model."""

from flaxvision.models.alexnet import AlexNet, AlexNetBackbone, AlexNetDLI, AlexNetDLIBackbone
from flaxvision.models.bn_inception import BNInception, BNInceptionBackbone, BNInceptionModule
from flaxvision.models.capsnet import CapsNet, CapsuleDecoder
from flaxvision.models.fashion_cnn import FashionCNN
from flaxvision.models.googlenet import GoogLeNet, GoogLeNetAux, GoogLeNetBackbone, InceptionModule
from flaxvision.models.inception_v3 import (
    InceptionV3,
    InceptionV3A,
    InceptionV3Aux,
    InceptionV3B,
    InceptionV3Backbone,
    InceptionV3C,
    InceptionV3D,
    InceptionV3E,
)
from flaxvision.models.inception_v4 import (
    InceptionResNetReductionB,
    InceptionResNetUnit,
    InceptionResNetV2,
    InceptionResNetV2Backbone,
    InceptionV4,
    InceptionV4A,
    InceptionV4B,
    InceptionV4Backbone,
    InceptionV4C,
    InceptionV4ReductionB,
    ReductionA,
)
from flaxvision.models.lenet import LeNet5, LeNet5Modern
from flaxvision.models.lenet_dli import LeNetDLI
from flaxvision.models.mlp import MLP
from flaxvision.models.mobilenet_v2 import InvertedResidual, MobileNetV2, MobileNetV2Backbone
from flaxvision.models.perceptron import Perceptron, perceptron_update
from flaxvision.models.resnet import (
    BasicBlock,
    Bottleneck,
    CifarResNet,
    CifarResNetBackbone,
    ResNet,
    ResNetBackbone,
    pad_shortcut,
)
from flaxvision.models.senet import SEBasicBlock, SEBottleneck, SENet, SENetBackbone
from flaxvision.models.squeezenet import Fire, SqueezeNet, SqueezeNetBackbone
from flaxvision.models.vgg import VGG, VGGBackbone
from flaxvision.models.xception import Xception, XceptionBackbone, XceptionBlock
from flaxvision.models.zfnet import ZFNet, ZFNetBackbone

__all__ = [
    "MLP",
    "VGG",
    "AlexNet",
    "AlexNetBackbone",
    "AlexNetDLI",
    "AlexNetDLIBackbone",
    "BNInception",
    "BNInceptionBackbone",
    "BNInceptionModule",
    "BasicBlock",
    "Bottleneck",
    "CapsNet",
    "CapsuleDecoder",
    "CifarResNet",
    "CifarResNetBackbone",
    "FashionCNN",
    "Fire",
    "GoogLeNet",
    "GoogLeNetAux",
    "GoogLeNetBackbone",
    "InceptionModule",
    "InceptionResNetReductionB",
    "InceptionResNetUnit",
    "InceptionResNetV2",
    "InceptionResNetV2Backbone",
    "InceptionV3",
    "InceptionV3A",
    "InceptionV3Aux",
    "InceptionV3B",
    "InceptionV3Backbone",
    "InceptionV3C",
    "InceptionV3D",
    "InceptionV3E",
    "InceptionV4",
    "InceptionV4A",
    "InceptionV4B",
    "InceptionV4Backbone",
    "InceptionV4C",
    "InceptionV4ReductionB",
    "InvertedResidual",
    "LeNet5",
    "LeNet5Modern",
    "LeNetDLI",
    "MobileNetV2",
    "MobileNetV2Backbone",
    "Perceptron",
    "ReductionA",
    "ResNet",
    "ResNetBackbone",
    "SEBasicBlock",
    "SEBottleneck",
    "SENet",
    "SENetBackbone",
    "SqueezeNet",
    "SqueezeNetBackbone",
    "VGGBackbone",
    "Xception",
    "XceptionBackbone",
    "XceptionBlock",
    "ZFNet",
    "ZFNetBackbone",
    "pad_shortcut",
    "perceptron_update",
]
