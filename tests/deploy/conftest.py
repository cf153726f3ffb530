"""Small elastic nets as if trained, and what runs them outside of torch."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv

from teamnet_pl import ElasticNet
from teamnet_pl.backbones import CifarResNet

SHAPE = (3, 32, 32)


def resnet(layers):
    return tv.ResNet(tv.resnet.Bottleneck, layers, num_classes=5, groups=4, width_per_group=2)


def convnext(layers):
    return timm.models.ConvNeXt(depths=layers, dims=(8, 12, 16, 20), num_classes=5)


def vit(layers):
    return timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=layers, num_heads=2, num_classes=5
    )


def cifar(width):
    return CifarResNet(20, num_classes=5, in_channels=3, width=width)


def elastic(backbone, depths, **kwargs) -> ElasticNet:
    """A net at all depths that differ, its batch norms' statistics too."""
    net = ElasticNet(backbone, SHAPE, depths=depths, **kwargs)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for seed in range(2):
        images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        net.train().packed(images).square().mean().backward()
        optimizer.step()
    return net.eval()


def images(count=3, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def logits_at(net, depth, batch):
    """The truth."""
    with torch.no_grad(), net.at(depth):
        return net(batch)


def onnx_session(path, **changes):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    for name, value in ({"intra_op_num_threads": 1} | changes).items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(path, batch, **inputs):
    """Logits that onnxruntime computes; a path or a session."""
    session = path if hasattr(path, "run") else onnx_session(path)
    arrays = {"images": batch.numpy()} | {k: np.array(v) for k, v in inputs.items()}
    return torch.from_numpy(session.run(None, arrays)[0])


@pytest.fixture(scope="session")
def nets():
    """What is in this file, for the tests beside it."""
    return SimpleNamespace(
        cifar=cifar,
        convnext=convnext,
        elastic=elastic,
        images=images,
        logits_at=logits_at,
        onnx_session=onnx_session,
        resnet=resnet,
        run_onnx=run_onnx,
        vit=vit,
    )
