import copy

import pytest
import torch
import torchvision.models as tv
from torch import nn

from teamnet_pl.backbones import CifarResNet
from teamnet_pl.baselines import SlimmableNet
from teamnet_pl.elastic import ElasticNet, depth_costs
from teamnet_pl.errors import TeamNetError
from tests.helpers.nets import BlockNet, basic_resnet, cifar, resnet, train, vit

SHAPE = (3, 32, 32)


@pytest.fixture
def images():
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def halved(monkeypatch):
    """Makes the shallower depth half as wide."""
    monkeypatch.setattr(SlimmableNet, "_find_width", lambda net, target: 0.5)


def make_net(backbone, shape=SHAPE):
    """A net in float64 of two depths that has been trained for two steps."""
    net = SlimmableNet(backbone.double(), shape, depths=2)
    train(net)
    return net


def narrow_copy(net, narrow):
    """The truth: a narrower net, built by hand, with the first weights and its batch norms.

    Args:
        net: The net of two depths.
        narrow: A net of the backbone's class with fewer channels.
    """
    narrow = narrow.double()
    whole = dict(net.backbone.named_parameters())
    norms = net.norms[net.depths[1].name]
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            parameter.copy_(whole[name][tuple(slice(size) for size in parameter.shape)])
    for name, module in narrow.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.load_state_dict(norms[name.replace(".", "-")].state_dict())
    return narrow.train(net.training)


class Inverted(nn.Module):
    """An inverted residual block with squeeze and excitation: depthwise convolution, gates."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, 2 * hidden, 3, padding=1, groups=hidden)
        self.norm2 = nn.BatchNorm2d(2 * hidden)
        self.squeeze = nn.Linear(2 * hidden, channels)
        self.excite = nn.Linear(channels, 2 * hidden)
        self.project = nn.Conv2d(2 * hidden, channels, 1)

    def forward(self, x):
        y = self.norm2(self.depthwise(self.norm1(self.expand(x)).relu())).relu()
        y = y * self.excite(self.squeeze(y.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return x + self.project(y)


class InvertedNet(nn.Module):
    """Ends in linear layers behind the flattened features."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.blocks = nn.Sequential(Inverted(channels, hidden), Inverted(channels, hidden))
        self.hidden = nn.Linear(channels * 16, hidden)
        self.head = nn.Linear(hidden, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(self.hidden(x.flatten(1)).relu())


NARROW = {
    "resnet": (lambda: cifar(8), lambda: cifar(4), SHAPE),
    "depthwise": (lambda: InvertedNet(8, 12), lambda: InvertedNet(4, 6), (3, 8, 8)),
}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("training", [True, False])
def test_a_narrow_net_by_hand(name, training, halved):
    make, make_narrow, shape = NARROW[name]
    torch.manual_seed(0)
    net = make_net(make(), shape).train(training)
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)).double()
    narrow = narrow_copy(net, make_narrow())
    plain = net.extract("d0")
    assert type(plain) is type(narrow)
    assert repr(plain) == repr(narrow)
    assert plain.training == training
    torch.testing.assert_close(plain.state_dict(), narrow.state_dict())
    whole = copy.deepcopy(net.backbone)
    wide, small = whole(images), narrow(images)
    torch.testing.assert_close(net.packed(images), torch.stack([wide, small]))
    net.zero_grad()
    net.packed(images)[1].square().sum().backward()
    small.square().sum().backward()
    gradients = {name: p.grad for name, p in net.backbone.named_parameters()}
    norms = {
        f"{name}.{key}": parameter.grad
        for name, module in narrow.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key, parameter in net.norms["d0"][name.replace(".", "-")].named_parameters()
    }
    for key, parameter in narrow.named_parameters():
        if key in norms:
            torch.testing.assert_close(norms[key], parameter.grad)
            continue
        expected = torch.zeros_like(gradients[key])
        expected[tuple(slice(size) for size in parameter.shape)] = parameter.grad
        torch.testing.assert_close(gradients[key], expected)


def test_statistics_are_those_of_each_width_alone(images):
    torch.manual_seed(0)
    net = SlimmableNet(cifar(4).double(), SHAPE, depths=3).train()
    plain = [net.extract(depth) for depth in net.depths]
    net.packed(images)
    for depth, alone in zip(net.depths, plain, strict=True):
        alone(images)
        torch.testing.assert_close(net.extract(depth).state_dict(), alone.state_dict())
    means = [each.layer1[0].bn1.running_mean[0] for each in plain]
    assert len(set(means)) == 3


def test_the_channels_of_images_and_the_logits_are_all_there(images):
    net = SlimmableNet(cifar(4).double(), SHAPE, depths=2)
    plain = net.extract("d0")
    assert plain.conv1.in_channels == 3
    assert plain.conv1.out_channels < 4
    assert plain.fc.out_features == 5
    assert plain(images).shape == (4, 5)


def test_at_least_one_channel_is_kept(monkeypatch, images):
    monkeypatch.setattr(SlimmableNet, "_find_width", lambda net, target: 0.0)
    net = make_net(cifar(4)).eval()
    narrow = net.extract("d0")
    assert {m.out_channels for m in narrow.modules() if isinstance(m, nn.Conv2d)} == {1}
    torch.testing.assert_close(net.packed(images)[1], narrow(images))


def test_layers_that_run_twice_or_never(halved):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    class Pooled(BlockNet):
        def __init__(self):
            super().__init__(between=Twice())
            self.head = nn.Linear(4, 5)
            self.unused = nn.Linear(4, 5)

        def forward(self, x):
            x = self.between(self.stem(x))
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    net = SlimmableNet(Pooled(), (3, 8, 8), depths=2).eval()
    plain = net.extract("d0")
    assert plain.between.conv.weight.shape == (2, 2, 3, 3)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net.packed(images)[1], plain(images))
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_copies_are_named_with_their_originals():
    net = SlimmableNet(cifar(4), SHAPE, depths=3)
    pairs = {id(copied): original for copied, original in net.copied_parameters()}
    for depth in ("d4", "d0"):
        for name, norm in net.norms[depth].items():
            original = net.backbone.get_submodule(name.replace("-", "."))
            assert pairs.pop(id(norm.weight)) is original.weight
            assert pairs.pop(id(norm.bias)) is original.bias
    assert not pairs


# Costs


def macs_of_resnet20(width):
    """Multiply-accumulates at a share of the channels 16, 32, 64, for 10 classes."""
    a, b, c = (max(1, round(width * channels)) for channels in (16, 32, 64))
    first = 32 * 32 * (9 * 3 * a + 6 * 9 * a * a)
    second = 16 * 16 * (9 * a * b + 5 * 9 * b * b + a * b)
    third = 8 * 8 * (9 * b * c + 5 * 9 * c * c + b * c)
    return first + second + third + 10 * c


def test_the_widths_are_those_of_the_nearest_costs():
    net = SlimmableNet(CifarResNet(20, 10), SHAPE, depths=8)
    costs = depth_costs(net, SHAPE)
    elastic = depth_costs(ElasticNet(CifarResNet(20, 10), SHAPE, depths=8), SHAPE)
    possible = [macs_of_resnet20(step / 4096) for step in range(4097)]
    for depth, width in net.widths.items():
        target = elastic[depth].macs
        assert costs[depth].macs == macs_of_resnet20(width)
        nearest = min(possible, key=lambda macs: abs(macs - target))
        assert abs(costs[depth].macs - target) <= abs(nearest - target)


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        pytest.param(lambda: CifarResNet(20, 10), 0.01, id="resnet20"),
        pytest.param(lambda: tv.resnet18(num_classes=10), 0.005, id="resnet18"),
        pytest.param(lambda: tv.mobilenet_v2(num_classes=10), 0.005, id="mobilenet_v2"),
    ],
)
def test_the_costs_are_about_those_of_the_elastic_net(make, tolerance):
    costs = depth_costs(SlimmableNet(make(), SHAPE), SHAPE)
    elastic = depth_costs(ElasticNet(make(), SHAPE), SHAPE)
    assert list(costs) == list(elastic)
    for depth, measured in costs.items():
        assert measured.macs == pytest.approx(elastic[depth].macs, rel=tolerance)


# Refusals


def test_weights_in_other_layers_are_refused():
    with pytest.raises(TeamNetError, match=r"^VisionTransformer cannot be slimmed.*in itself \("):
        SlimmableNet(vit(2), SHAPE, depths=2)
    net = basic_resnet([2, 1, 1, 1])
    net.bn1 = nn.GroupNorm(4, 64)
    with pytest.raises(TeamNetError, match=r"^ResNet cannot be slimmed.*in bn1 \(GroupNorm\)"):
        SlimmableNet(net, SHAPE, depths=2)


def test_grouped_convolutions_are_refused():
    with pytest.raises(TeamNetError, match=r"since layer1\.0\.conv2 has 4 groups of 8 channels"):
        SlimmableNet(resnet([2, 1, 1, 1]), SHAPE, depths=2)


class Joining(nn.Module):
    """Two branches whose features another function joins, as in DenseNet or GoogLeNet."""

    def __init__(self, join):
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)
        self.join = join

    def forward(self, x):
        x = self.join(self.left(x), self.right(x))
        x = x + self.block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b: torch.stack([a, b], 2).flatten(1, 2).flip(1),
        lambda a, b: torch.cat([a, b], 1).softmax(1),
    ],
)
def test_nets_that_join_their_channels_are_refused(join, scale, halved):
    net = Joining(join)
    net.head.weight.data *= scale  # at zero it hides what is before it
    with pytest.raises(TeamNetError, match=r"^Joining cannot be slimmed.*\(its outputs differ by"):
        SlimmableNet(net, (3, 8, 8), depths=2, blocks=["block"])


def test_a_net_that_adds_its_branches_is_not_refused():
    class Adding(Joining):
        def __init__(self):
            super().__init__(torch.add)
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
            self.head = nn.Linear(8, 5)

    net = SlimmableNet(Adding(), (3, 8, 8), depths=2, blocks=["block"])
    assert net.widths["d0"] < 1
