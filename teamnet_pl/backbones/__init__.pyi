from .cifar_resnet import CifarResNet as CifarResNet
from .create import BackboneConfig as BackboneConfig
from .create import create_backbone as create_backbone
from .create import default_input_shape as default_input_shape
from .wide_resnet import WideResNet as WideResNet
