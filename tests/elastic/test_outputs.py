"""Nets that return more than logits: every tensor equals that of a forward at each depth alone."""

from collections import namedtuple

import pytest
import timm
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves
from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50

from teamnet_pl import Team
from teamnet_pl.baselines import LayerDropNet
from teamnet_pl.elastic import ElasticNet
from teamnet_pl.elastic.outputs import at_depth, difference, with_depth_axis
from teamnet_pl.errors import TeamNetError
from tests.helpers.nets import BlockNet, Residual

Both = namedtuple("Both", ["logits", "features"])


class WithOutputs(BlockNet):
    """Two blocks, and outputs of a kind besides the logits."""

    def __init__(self, kind):
        super().__init__(blocks=[Residual(), Residual()])
        self.kind = kind

    def forward(self, x):
        for block in [self.stem, *self.blocks]:
            x = block(x)
        logits = self.head(x)
        return {
            "map": lambda: x,
            "tuple": lambda: (logits, x),
            "named": lambda: Both(logits, x),
            "nested": lambda: {"all": [logits, {"features": x}], "scale": 2.0, "none": None},
        }[self.kind]()


def unet(_kind=None):
    """A net with residual stages at two resolutions, whose features are joined again."""

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.high = nn.ModuleList([Residual(), Residual()])
            self.down = nn.MaxPool2d(2)
            self.low = nn.ModuleList([Residual(), Residual()])
            self.up = nn.Upsample(scale_factor=2)
            self.head = nn.Conv2d(8, 5, 1)

        def forward(self, x):
            x = self.stem(x)
            for block in self.high:
                x = block(x)
            y = self.down(x)
            for block in self.low:
                y = block(y)
            return self.head(torch.cat([x, self.up(y)], dim=1))

    return UNet()


def features(_kind=None):
    return timm.create_model("resnet18", features_only=True)


def segmentation(kind):
    make = {"fcn": fcn_resnet50, "deeplab": deeplabv3_resnet50}[kind]
    return make(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


NETS = {
    **dict.fromkeys(("map", "tuple", "named", "nested"), (WithOutputs, 8)),
    "unet": (unet, 8),
    "features": (features, 32),
    "fcn": (segmentation, 32),
    "deeplab": (segmentation, 32),
}


@pytest.fixture(params=NETS)
def net(request):
    make, size = NETS[request.param]
    torch.manual_seed(0)
    return ElasticNet(make(request.param).double(), (3, size, size), depths=3)


def total(outputs):
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return sum((index + 1) * tensor.square().mean() for index, tensor in enumerate(tensors))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_packed_outputs_and_gradients_are_those_of_each_depth(net, mode):
    net.train(mode == "train")
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(2, *net.input_shape, dtype=torch.float64)
    packed = net.packed(images)
    sum(
        total(at_depth(flat(packed), index, len(net.depths), len(images)))
        for index in range(len(net.depths))
    ).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    for index, depth in enumerate(net.depths):
        with net.at(depth):
            alone = net(images)
        total(alone).backward()
        taken = at_depth(flat(packed), index, len(net.depths), len(images))
        assert tree_flatten(taken)[1] == tree_flatten(alone)[1]
        for value, expected in zip(tree_leaves(taken), tree_leaves(alone), strict=True):
            if isinstance(expected, torch.Tensor):
                torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
            else:
                assert value == expected
    for name, parameter in net.named_parameters():
        if parameter.grad is None:
            assert gradients[name] is None
        else:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-12)


def flat(packed):
    """Packed outputs with their depths along the batch axis again."""
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.flatten(0, 1) if isinstance(leaf, torch.Tensor) else leaf, packed
    )


def test_a_plain_net_of_each_depth_returns_the_same(net):
    images = torch.randn(2, *net.input_shape, dtype=torch.float64)
    net.eval()
    for depth in net.depths:
        plain = net.extract(depth).eval()
        with torch.no_grad(), net.at(depth):
            assert difference(plain(images), net(images)) < 1e-10


def test_outputs_without_a_batch_are_refused():
    class Scalar(BlockNet):
        def forward(self, x):
            return super().forward(x).mean()

    with pytest.raises(TeamNetError, match=r"must return a tensor whose first axis is the batch"):
        ElasticNet(Scalar(blocks=[Residual(), Residual()]), (3, 8, 8))


class AuxiliaryInTraining(BlockNet):
    """Its outputs are logits in evaluation alone, as with auxiliary heads."""

    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


def test_teams_and_baselines_need_logits():
    net = ElasticNet(AuxiliaryInTraining(), (3, 8, 8), depths=2)
    assert not net.returns_logits
    with pytest.raises(TeamNetError, match=r"a \(AuxiliaryInTraining\) must return logits"):
        Team(5, (3, 8, 8), leader=None, a=net, b=None)
    with pytest.raises(TeamNetError, match=r"LayerDropNet is of logits.*AuxiliaryInTraining"):
        LayerDropNet(AuxiliaryInTraining(), (3, 8, 8), depths=2)


def test_the_depth_axis_comes_first():
    packed = with_depth_axis((torch.arange(12).view(6, 2), "name"), depths=3, rows=2)
    assert packed[0].shape == (3, 2, 2)
    assert packed[1] == "name"
    assert at_depth(torch.arange(6), 1, depths=3, rows=2).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.tensor([1.0, 4.0]), torch.tensor([1.0, 4.0]), 0.0),
        (torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]), 0.25),
        ([torch.ones(2)], (torch.ones(2),), float("inf")),
        (torch.ones(2), torch.ones(3), float("inf")),
        (torch.tensor([torch.nan]), torch.ones(1), float("inf")),
        (torch.tensor([torch.nan, 2.0]), torch.tensor([torch.nan, 2.0]), 0.0),
        ((torch.ones(2), 1), (torch.ones(2), 2), float("inf")),
        (torch.tensor([1]), torch.tensor([2]), float("inf")),
    ],
)
def test_difference(a, b, expected):
    assert difference(a, b) == expected
