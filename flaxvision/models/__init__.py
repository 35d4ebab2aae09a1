"""The networks, one file per paper. Importing this package registers every model.

A network with a feature hierarchy is composed of a backbone and a classifier:

    backbone = fv.models.ResNetBackbone(stage_sizes=(2, 2, 2, 2), bottleneck=False)
    model = fv.models.ResNet(backbone, num_classes=10)  # equals fv.create_model("resnet18", num_classes=10)

To add a network, write one file in this package that ends with `flaxvision.registry.register`, and import its classes
here.
"""

from flaxvision.models.alexnet import AlexNet as AlexNet
from flaxvision.models.alexnet import AlexNetBackbone as AlexNetBackbone
from flaxvision.models.alexnet import AlexNetDLI as AlexNetDLI
from flaxvision.models.alexnet import AlexNetDLIBackbone as AlexNetDLIBackbone
from flaxvision.models.backbone import Backbone as Backbone
from flaxvision.models.backbone import Classifier as Classifier
from flaxvision.models.bn_inception import BNInception as BNInception
from flaxvision.models.bn_inception import BNInceptionBackbone as BNInceptionBackbone
from flaxvision.models.bn_inception import BNInceptionModule as BNInceptionModule
from flaxvision.models.capsnet import CapsNet as CapsNet
from flaxvision.models.capsnet import CapsuleDecoder as CapsuleDecoder
from flaxvision.models.darknet import Darknet as Darknet
from flaxvision.models.darknet import Darknet53Backbone as Darknet53Backbone
from flaxvision.models.darknet import DarknetBackbone as DarknetBackbone
from flaxvision.models.darknet_cfg import CfgDetector as CfgDetector
from flaxvision.models.darknet_cfg import CfgNetwork as CfgNetwork
from flaxvision.models.deeplab import ASPP as ASPP
from flaxvision.models.deeplab import DeepLabV3 as DeepLabV3
from flaxvision.models.detector import Detector as Detector
from flaxvision.models.detector import batch_mean as batch_mean
from flaxvision.models.detector import row_keys as row_keys
from flaxvision.models.detector import valid_sizes as valid_sizes
from flaxvision.models.fashion_cnn import FashionCNN as FashionCNN
from flaxvision.models.faster_rcnn import BoxHead as BoxHead
from flaxvision.models.faster_rcnn import FasterRCNN as FasterRCNN
from flaxvision.models.fcn import FCN as FCN
from flaxvision.models.fcn import FCNVGG as FCNVGG
from flaxvision.models.fcn import FCNHead as FCNHead
from flaxvision.models.googlenet import GoogLeNet as GoogLeNet
from flaxvision.models.googlenet import GoogLeNetAux as GoogLeNetAux
from flaxvision.models.googlenet import GoogLeNetBackbone as GoogLeNetBackbone
from flaxvision.models.googlenet import InceptionModule as InceptionModule
from flaxvision.models.grid_detector import GridDetector as GridDetector
from flaxvision.models.inception_v3 import InceptionV3 as InceptionV3
from flaxvision.models.inception_v3 import InceptionV3A as InceptionV3A
from flaxvision.models.inception_v3 import InceptionV3Aux as InceptionV3Aux
from flaxvision.models.inception_v3 import InceptionV3B as InceptionV3B
from flaxvision.models.inception_v3 import InceptionV3Backbone as InceptionV3Backbone
from flaxvision.models.inception_v3 import InceptionV3C as InceptionV3C
from flaxvision.models.inception_v3 import InceptionV3D as InceptionV3D
from flaxvision.models.inception_v3 import InceptionV3E as InceptionV3E
from flaxvision.models.inception_v4 import InceptionResNetReductionB as InceptionResNetReductionB
from flaxvision.models.inception_v4 import InceptionResNetUnit as InceptionResNetUnit
from flaxvision.models.inception_v4 import InceptionResNetV2 as InceptionResNetV2
from flaxvision.models.inception_v4 import InceptionResNetV2Backbone as InceptionResNetV2Backbone
from flaxvision.models.inception_v4 import InceptionV4 as InceptionV4
from flaxvision.models.inception_v4 import InceptionV4A as InceptionV4A
from flaxvision.models.inception_v4 import InceptionV4B as InceptionV4B
from flaxvision.models.inception_v4 import InceptionV4Backbone as InceptionV4Backbone
from flaxvision.models.inception_v4 import InceptionV4C as InceptionV4C
from flaxvision.models.inception_v4 import InceptionV4ReductionB as InceptionV4ReductionB
from flaxvision.models.inception_v4 import ReductionA as ReductionA
from flaxvision.models.lenet import LeNet5 as LeNet5
from flaxvision.models.lenet import LeNet5Modern as LeNet5Modern
from flaxvision.models.lenet_dli import LeNetDLI as LeNetDLI
from flaxvision.models.mask_rcnn import MaskHead as MaskHead
from flaxvision.models.mask_rcnn import MaskRCNN as MaskRCNN
from flaxvision.models.mlp import MLP as MLP
from flaxvision.models.mobilenet_v1 import DepthwiseSeparable as DepthwiseSeparable
from flaxvision.models.mobilenet_v1 import MobileNetV1 as MobileNetV1
from flaxvision.models.mobilenet_v1 import MobileNetV1Backbone as MobileNetV1Backbone
from flaxvision.models.mobilenet_v2 import InvertedResidual as InvertedResidual
from flaxvision.models.mobilenet_v2 import MobileNetV2 as MobileNetV2
from flaxvision.models.mobilenet_v2 import MobileNetV2Backbone as MobileNetV2Backbone
from flaxvision.models.perceptron import Perceptron as Perceptron
from flaxvision.models.perceptron import perceptron_update as perceptron_update
from flaxvision.models.resnet import BasicBlock as BasicBlock
from flaxvision.models.resnet import Bottleneck as Bottleneck
from flaxvision.models.resnet import CifarResNet as CifarResNet
from flaxvision.models.resnet import CifarResNetBackbone as CifarResNetBackbone
from flaxvision.models.resnet import ResNet as ResNet
from flaxvision.models.resnet import ResNetBackbone as ResNetBackbone
from flaxvision.models.resnet import pad_shortcut as pad_shortcut
from flaxvision.models.rpn import RPNHead as RPNHead
from flaxvision.models.segmenter import Segmenter as Segmenter
from flaxvision.models.senet import SEBasicBlock as SEBasicBlock
from flaxvision.models.senet import SEBottleneck as SEBottleneck
from flaxvision.models.senet import SENet as SENet
from flaxvision.models.senet import SENetBackbone as SENetBackbone
from flaxvision.models.squeezenet import Fire as Fire
from flaxvision.models.squeezenet import SqueezeNet as SqueezeNet
from flaxvision.models.squeezenet import SqueezeNetBackbone as SqueezeNetBackbone
from flaxvision.models.unet import UNet as UNet
from flaxvision.models.unet import UNetBackbone as UNetBackbone
from flaxvision.models.unet import UNetSame as UNetSame
from flaxvision.models.vgg import VGG as VGG
from flaxvision.models.vgg import VGGBackbone as VGGBackbone
from flaxvision.models.xception import Xception as Xception
from flaxvision.models.xception import XceptionBackbone as XceptionBackbone
from flaxvision.models.xception import XceptionBlock as XceptionBlock
from flaxvision.models.yolo_heads import RegionHead as RegionHead
from flaxvision.models.yolo_heads import YoloHead as YoloHead
from flaxvision.models.yolo_v2 import YoloV2 as YoloV2
from flaxvision.models.yolo_v3 import YoloV3 as YoloV3
from flaxvision.models.zfnet import ZFNet as ZFNet
from flaxvision.models.zfnet import ZFNetBackbone as ZFNetBackbone
