"""Image classification datasets as Lightning data modules."""

from teamnet_pl.data.base import ImageDataModule
from teamnet_pl.data.digits import Digits
from teamnet_pl.data.fashion_mnist import FashionMNIST

__all__ = ["Digits", "FashionMNIST", "ImageDataModule"]
