import pytest
import torch
import torchvision.models as tv
from rich.console import Console
from torch import nn

from teamnet_pl.elastic import Cost, ElasticNet, cost, cost_table, depth_costs
from tests.helpers.nets import PostActivation, make_backbone


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Sequential(*(PostActivation("batch", 4, 4, stride=1) for _ in range(2))),
        nn.Conv2d(4, 6, 2, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def small_net_by_hand(blocks, height, width):
    h, w = height // 2, width // 2
    macs = 3 * 4 * 9 * h * w  # the stem
    macs += blocks * 4 * 4 * 9 * h * w
    macs += 4 * 6 * 4 // 2 * (h - 1) * (w - 1)  # grouped
    macs += 6 * 5
    parameters = (3 * 4 * 9 + 4) + blocks * (4 * 4 * 9 + 8) + (4 * 6 * 4 // 2 + 6) + (6 * 5 + 5)
    return Cost(macs, parameters)


def test_cost_of_a_linear_layer():
    assert cost(nn.Linear(7, 3), (7,)) == Cost(21, 24)


@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
def test_cost_of_a_plain_net(size):
    assert cost(small_net(), (3, *size)) == small_net_by_hand(2, *size)


@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
def test_cost_of_each_depth(size):
    net = ElasticNet(small_net(), (3, 8, 8), depths=3)
    expected = {f"d{blocks}": small_net_by_hand(blocks, *size) for blocks in (2, 1, 0)}
    costs = depth_costs(net, (3, *size))
    assert costs == expected
    assert list(costs) == ["d2", "d1", "d0"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_cost_of_attention(training, grad):
    """Attention counts whichever kernel computes it."""
    tokens, width, hidden, layers = 5, 8, 16, 2
    net = tv.VisionTransformer(32, 16, layers, 2, width, hidden, num_classes=3).train(training)
    macs = 4 * width * 3 * 16 * 16  # the patches
    macs += layers * 4 * tokens * width * width  # queries, keys, values, and their projection
    macs += layers * 2 * tokens * tokens * width
    macs += layers * 2 * tokens * width * hidden
    macs += width * 3
    with torch.set_grad_enabled(grad):
        assert cost(net, (3, 32, 32)).macs == macs


@pytest.mark.parametrize("per_depth_affine", [False, True])
@pytest.mark.parametrize("kind", ["residual", "preactivation", "transformer"])
def test_a_depth_costs_the_same_as_its_extracted_net(kind, per_depth_affine):
    backbone = make_backbone(kind, [(3, False), (2, True)])
    net = ElasticNet(backbone, (3, 8, 8), depths=5, per_depth_affine=per_depth_affine)
    costs = depth_costs(net, (3, 8, 12))
    for depth in net.depths:
        plain = net.extract(depth)
        assert costs[depth.name] == cost(plain, (3, 8, 12))
        assert costs[depth.name].parameters == sum(p.numel() for p in plain.parameters())
        with net.at(depth):
            assert cost(net, (3, 8, 12)).macs == costs[depth.name].macs
    macs = [measured.macs for measured in costs.values()]
    assert macs == sorted(set(macs), reverse=True)


def modes(net):
    return {name: module.training for name, module in net.named_modules()}


@pytest.mark.parametrize("training", [True, False])
def test_measuring_the_cost_leaves_the_net_unchanged(training):
    net = ElasticNet(small_net(), (3, 8, 8), depths=2).train(training)
    net.backbone[2].train(not training)
    net.backbone[0].weight.grad = gradient = torch.ones_like(net.backbone[0].weight)
    before = modes(net)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    cost(net, (3, 8, 8))
    depth_costs(net, (3, 8, 8))
    assert modes(net) == before
    assert len(set(before.values())) == 2
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert net.backbone[0].weight.grad is gradient
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net.eval()(images), net.packed(images)[0])  # at the deepest again


@pytest.mark.parametrize("fast_path", [True, False])
def test_everything_is_restored_if_the_net_fails(fast_path):
    net = small_net()
    net[2].eval()
    before = modes(net)
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        with pytest.raises(RuntimeError):
            cost(net, (1, 8, 8))
        assert torch.backends.mha.get_fastpath_enabled() == fast_path
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
    assert modes(net) == before


def test_table():
    nets = [ElasticNet(small_net(), (3, 8, 8), depths=depths) for depths in (3, [[2], [1]])]
    table = cost_table(nets, (3, 64, 64))
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["depth"] == ["d2", "d1", "d0", "d2", "d1"]
    assert columns["blocks per stage"] == ["2", "1", "0", "2", "1"]
    costs = [small_net_by_hand(blocks, 64, 64) for blocks in (2, 1, 0, 2, 1)]
    assert columns["MACs"] == [f"{expected.macs:,}" for expected in costs]
    assert columns["parameters"] == [f"{expected.parameters:,}" for expected in costs]
    console = Console(width=80)
    with console.capture() as printed:
        console.print(table)
    assert columns["MACs"][0] in printed.get()


def test_table_shows_the_blocks_of_each_stage():
    net = ElasticNet(make_backbone(), (3, 8, 8), depths=[[2, 1], [2, 0], [1, 0]])
    table = cost_table([net], (3, 8, 8))
    assert list(table.columns[1].cells) == ["2-1", "2-0", "1-0"]
