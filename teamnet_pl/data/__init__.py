"""Image classification datasets as Lightning data modules."""

from teamnet_pl.data.base import ImageDataModule
from teamnet_pl.data.cifar import CIFAR10, CIFAR100, SVHN
from teamnet_pl.data.digits import Digits
from teamnet_pl.data.encoded import Statistics
from teamnet_pl.data.folders import ImageFolder, ImageNet, Imagenette, TinyImageNet
from teamnet_pl.data.hugging_face import HuggingFace
from teamnet_pl.data.lit_data import LitData
from teamnet_pl.data.medmnist import MedMNIST
from teamnet_pl.data.mnist import EMNIST, MNIST, FashionMNIST
from teamnet_pl.data.random_images import RandomImages
from teamnet_pl.data.shards import Shards
from teamnet_pl.data.splits import SplitDataModule

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
