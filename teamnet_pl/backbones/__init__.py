"""Backbones by name: plain nets that map a batch of images to logits."""

from teamnet_pl.backbones.cifar_resnet import CifarResNet
from teamnet_pl.backbones.create import BackboneConfig, create_backbone, own_input_shape
from teamnet_pl.backbones.wide_resnet import WideResNet

__all__ = ["BackboneConfig", "CifarResNet", "WideResNet", "create_backbone", "own_input_shape"]
