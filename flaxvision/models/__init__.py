"""One file per paper; importing this package registers every model."""

from flaxvision.models.alexnet import AlexNet, AlexNetBackbone, AlexNetDLI, AlexNetDLIBackbone
from flaxvision.models.fashion_cnn import FashionCNN
from flaxvision.models.lenet import LeNet5, LeNet5Modern
from flaxvision.models.lenet_dli import LeNetDLI
from flaxvision.models.mlp import MLP
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
from flaxvision.models.zfnet import ZFNet, ZFNetBackbone

__all__ = [
    "MLP",
    "VGG",
    "AlexNet",
    "AlexNetBackbone",
    "AlexNetDLI",
    "AlexNetDLIBackbone",
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "CifarResNetBackbone",
    "FashionCNN",
    "Fire",
    "LeNet5",
    "LeNet5Modern",
    "LeNetDLI",
    "Perceptron",
    "ResNet",
    "ResNetBackbone",
    "SEBasicBlock",
    "SEBottleneck",
    "SENet",
    "SENetBackbone",
    "SqueezeNet",
    "SqueezeNetBackbone",
    "VGGBackbone",
    "ZFNet",
    "ZFNetBackbone",
    "pad_shortcut",
    "perceptron_update",
]
