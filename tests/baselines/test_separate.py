import copy

import torch

from teamnet_pl.baselines import SeparateNets
from tests.helpers.nets import make_backbone, plain_at, train

SHAPE = (3, 8, 8)


def test_all_nets_start_from_the_same_weights():
    backbone = make_backbone()
    net = SeparateNets(copy.deepcopy(backbone), SHAPE).eval()
    images = torch.randn(2, *SHAPE).double()
    expected = [plain_at(backbone, net, depth).eval()(images) for depth in net.depths]
    torch.testing.assert_close(net.packed(images), torch.stack(expected))


def test_the_nets_share_nothing():
    net = SeparateNets(make_backbone(), SHAPE)
    tensors = [{*map(id, model.parameters()), *map(id, model.buffers())} for model in net.models()]
    assert len(set.union(*tensors)) == sum(map(len, tensors))
    assert {*map(id, net.parameters())} == {id(p) for m in net.models() for p in m.parameters()}


def test_a_net_learns_as_it_does_on_its_own():
    net = SeparateNets(make_backbone(), SHAPE)
    plain = net.extract("d1")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.02)
    train(net, steps=2)
    for step in range(2):
        images = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        (plain.train()(images).square().mean() / 4).backward()  # of the mean over four depths
        optimizer.step()
    torch.testing.assert_close(net.extract("d1").state_dict(), plain.state_dict())
