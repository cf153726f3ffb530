from .base import ImageDataModule
from .cifar import CIFAR10, CIFAR100, SVHN
from .digits import Digits
from .encoded import Statistics
from .folders import ImageFolder, ImageNet, Imagenette, TinyImageNet
from .hugging_face import HuggingFace
from .lit_data import LitData
from .medmnist import MedMNIST
from .mnist import EMNIST, MNIST, FashionMNIST
from .random_images import RandomImages
from .shards import Shards
from .splits import SplitDataModule

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "EMNIST",
    "MNIST",
    "SVHN",
    "Digits",
    "FashionMNIST",
    "HuggingFace",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "Imagenette",
    "LitData",
    "MedMNIST",
    "RandomImages",
    "Shards",
    "SplitDataModule",
    "Statistics",
    "TinyImageNet",
]
