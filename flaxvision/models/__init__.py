"""One file per paper; importing this package registers every model."""

from flaxvision.models.fashion_cnn import FashionCNN
from flaxvision.models.lenet import LeNet5, LeNet5Modern
from flaxvision.models.lenet_dli import LeNetDLI
from flaxvision.models.mlp import MLP
from flaxvision.models.perceptron import Perceptron, perceptron_update

__all__ = ["MLP", "FashionCNN", "LeNet5", "LeNet5Modern", "LeNetDLI", "Perceptron", "perceptron_update"]
