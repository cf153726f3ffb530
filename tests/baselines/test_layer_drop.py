import copy

import pytest
import torch

from teamnet_pl.baselines import LayerDropNet
from tests.helpers.nets import BlockNet, PairNet, Residual, Skipped, make_backbone, plain_at, train

SHAPE = (3, 8, 8)


@pytest.fixture
def images():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()


def test_a_depth_skips_its_blocks(images):
    net = LayerDropNet(make_backbone(), SHAPE)
    train(net, steps=5)
    plain = copy.deepcopy(net.backbone)
    expected = [plain_at(plain, net, depth).eval()(images) for depth in net.depths]
    torch.testing.assert_close(net.eval().packed(images), torch.stack(expected))


def test_a_step_of_training_computes_the_deepest_depth_alone(images):
    net = LayerDropNet(make_backbone(), SHAPE)
    assert net.training_depths() == net.depths[:1]
    assert net.train().packed(images).shape == (1, 2, 5)
    assert net.packed(images, net.training_depths()).shape == (1, 2, 5)
    assert net.eval().packed(images).shape == (4, 2, 5)


def count_runs(net):
    """The names of the blocks that each of some passes runs, as lists to which it is added."""
    runs = []

    for block in net.blocks:
        inner = net.backbone.get_submodule(block.name).conv
        inner.register_forward_hook(lambda *_, name=block.name: runs.append(name))
    return runs


def test_each_block_is_dropped_with_the_probability(images):
    torch.manual_seed(0)
    net = LayerDropNet(make_backbone(), SHAPE).train()
    runs = count_runs(net)
    for _ in range(400):
        net.packed(images)
    for block in net.blocks:  # the standard deviation of the share is 0.02
        assert runs.count(block.name) / 400 == pytest.approx(1 - net.drop_rate, abs=0.07)
    assert net.drop_rate == 0.2
    pairs = {tuple(runs[i : i + 3]) for i in range(0, len(runs), 3)}
    assert len(pairs) > 1  # blocks are dropped on their own


def test_the_draw_is_of_the_global_generator_and_a_block_is_left_out(images):
    net = LayerDropNet(make_backbone(), SHAPE)
    runs = count_runs(net)
    ran = set()
    for seed in range(20):
        plain = copy.deepcopy(net.backbone).train()
        for module in plain.modules():
            module._forward_hooks.clear()
        net.train().zero_grad()
        torch.manual_seed(seed)
        outputs = net.packed(images)
        outputs.sum().backward()
        first = list(runs)
        ran.add(tuple(first))
        runs.clear()
        for block in net.blocks:
            module = net.backbone.get_submodule(block.name)
            assert all((p.grad is not None) == (block.name in first) for p in module.parameters())
            if block.name not in first:
                plain.set_submodule(block.name, Skipped())
        torch.testing.assert_close(outputs[0], plain(images))
        torch.manual_seed(seed)
        net.packed(images)
        assert runs == first
        runs.clear()
    assert len(ran) > 3


def test_another_rate(images):
    class AllDropped(LayerDropNet):
        drop_rate = 1.0

    net = AllDropped(make_backbone(), SHAPE).train()
    plain = plain_at(net.backbone, net, "d0").train()
    torch.testing.assert_close(net.packed(images)[0], plain(images))
    with net.at("d0"):  # of which the same blocks are skipped and dropped
        torch.testing.assert_close(net(images), plain(images))
    assert not any("forward" in vars(module) for module in net.modules())


def test_nothing_is_drawn_in_evaluation(images):
    net = LayerDropNet(make_backbone(), SHAPE).eval()
    before = torch.get_rng_state()
    net.packed(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_has_just_the_state_of_its_backbone():
    net = LayerDropNet(make_backbone(), SHAPE)
    assert list(net.state_dict()) == [f"backbone.{key}" for key in net.backbone.state_dict()]


def test_forwards_are_left_as_they_were():
    def instance_forward(x):
        return 2 * Residual.forward(block, x)

    block = Residual()
    block.forward = instance_forward
    net = LayerDropNet(BlockNet(blocks=[Residual(), block]), SHAPE, depths=2, blocks=["blocks.*"])
    images = torch.randn(2, 3, 8, 8)
    with net.at("d0"), pytest.raises(RuntimeError):
        net.eval()(images[:, :1])  # one channel is not enough
    with net.at("d0"):
        stem = net.backbone.stem(images)
        torch.testing.assert_close(net(images), net.backbone.head(stem))
    assert block.forward is instance_forward
    assert not any("forward" in vars(m) for m in net.modules() if m is not block)
    x = net.backbone.blocks[0](stem)
    torch.testing.assert_close(net(images), net.backbone.head(2 * (x + block.conv(x))))


def test_a_block_of_two_features_is_skipped(images):
    net = LayerDropNet(PairNet().double(), SHAPE, depths=[2, 0]).eval()
    expected = net.backbone.head(net.backbone.stem(images).mean((2, 3)))
    torch.testing.assert_close(net.packed(images)[1], expected)
    torch.testing.assert_close(net.extract("d0")(images), expected)
