"""What holds for all baselines."""

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teamnet_pl.baselines import EarlyExitNet, LayerDropNet, SeparateNets, SlimmableNet
from teamnet_pl.elastic import ElasticNet, depth_costs
from teamnet_pl.elastic.costs import cost
from teamnet_pl.errors import TeamNetError
from tests.helpers.nets import make_backbone, train
from tests.helpers.strategies import depth_specs

SHAPE = (3, 8, 8)
ALL_DEPTHS = [EarlyExitNet, SeparateNets, SlimmableNet]
"""Those that train all depths in each step."""
CLASSES = [*ALL_DEPTHS, LayerDropNet]


def backbone_of(seed=4):
    """Also the narrowest net of this seed has outputs that depend on the images."""
    return make_backbone("preactivation", seed=seed)


def make_net(kind, **kwargs):
    """A net in float64 that has been trained for a few steps, in evaluation mode."""
    torch.manual_seed(0)
    net = kind(backbone_of(), SHAPE, **kwargs)
    train(net)
    return net.eval()


@pytest.fixture
def images():
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).double()


def alone(net, images):
    """The outputs of each depth alone."""
    outputs = []
    for depth in net.depths:
        with net.at(depth):
            outputs.append(net(images))
    return torch.stack(outputs)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_arguments_are_those_of_an_elastic_net(kind):
    assert inspect.signature(kind) == inspect.signature(ElasticNet)


@settings(max_examples=10)
@given(
    depths=depth_specs([2, 1]),
    policy=st.sampled_from(["round_robin", "first_stage_first"]),
    interleaved=st.booleans(),
)
@pytest.mark.parametrize("kind", CLASSES)
def test_the_depths_are_those_of_an_elastic_net(kind, depths, policy, interleaved):
    options = {"depths": depths, "policy": policy, "interleaved": interleaved}
    net = kind(backbone_of(), SHAPE, **options)
    elastic = ElasticNet(backbone_of(), SHAPE, **options)
    assert (net.depths, net.blocks) == (elastic.depths, elastic.blocks)
    assert net.input_shape == SHAPE


@pytest.mark.parametrize("kind", CLASSES)
def test_blocks_can_be_named(kind):
    net = kind(backbone_of(), SHAPE, depths=2, blocks=["stages.0.*"])
    assert [block.name for block in net.blocks] == ["stages.0.0", "stages.0.1"]
    assert [depth.per_stage for depth in net.depths] == [(2,), (0,)]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_depth_alone_packed_and_extracted_are_the_same(kind, images):
    net = make_net(kind)
    outputs = alone(net, images)
    for i, one in enumerate(outputs):
        assert all((one - other).abs().max() > 1e-3 for other in outputs[:i])
        assert (one[0] - one[1]).abs().max() > 1e-3
    same(net.packed(images), outputs)
    same(net(images), outputs[0])
    for depth, expected in zip(net.depths, outputs, strict=True):
        plain = net.extract(depth)
        same(plain(images), expected)
        assert not {*map(id, plain.parameters())} & {*map(id, net.parameters())}


@pytest.mark.parametrize("kind", ALL_DEPTHS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_packed_are_those_of_separate_forwards(kind, training, images):
    packed, single = make_net(kind).train(training), make_net(kind).train(training)
    weights = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    same(packed.packed(images), alone(copy.deepcopy(single), images))
    (packed.packed(images) * weights).sum().backward()
    for depth, weight in zip(single.depths, weights, strict=True):
        with single.at(depth):
            (single(images) * weight).sum().backward()
    for (name, a), (_, b) in zip(packed.named_parameters(), single.named_parameters(), strict=True):
        assert a.grad is not None, name  # as DDP needs
        same(a.grad, b.grad)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("indices", [[0], [3], [1, 2], [0, 3], [0, 1, 2, 3]])
def test_some_depths_packed(kind, indices, images):
    net = make_net(kind)
    depths = [net.depths[index] for index in indices]
    for names in (depths, [depth.name for depth in depths], [d.num_blocks for d in depths]):
        same(net.packed(images, names), alone(net, images)[indices])


@pytest.mark.parametrize("kind", CLASSES)
def test_wrong_depths(kind, images):
    net = make_net(kind)
    expected = alone(net, images)
    for depths in (["d0", "d3"], ["d2", "d2"], []):
        names = ", ".join(depths) or "none"
        with pytest.raises(TeamNetError, match=rf"Name at least one depth, .* found {names}\."):
            net.packed(images, depths)
    for use in (net.depth, net.extract, lambda name: net.packed(images, [name])):
        with pytest.raises(TeamNetError, match="d9 is none of them"):
            use("d9")
    with net.at("d2"):
        with pytest.raises(TeamNetError, match="d9 is none of them"), net.at("d9"):
            pass
        with pytest.raises(RuntimeError):
            net.packed(images[:, :1])  # one channel is not enough
        same(net(images), expected[1])


@pytest.mark.parametrize("kind", CLASSES)
def test_scopes_nest_and_end_with_an_exception(kind, images):
    net = make_net(kind)
    outputs = alone(net, images)
    with net.at(2) as inside:
        assert inside is net
        with net.at("d0"):
            same(net(images), outputs[3])
        with pytest.raises(KeyError), net.at("d0"):
            raise KeyError
        same(net(images), outputs[1])
        same(net.packed(images), outputs)
    same(net(images), outputs[0])


@pytest.mark.parametrize("kind", CLASSES)
def test_weights_are_saved_and_loaded(kind, images):
    net = make_net(kind)
    fresh = kind(backbone_of(seed=1), SHAPE).double().eval()
    assert (fresh.packed(images) - net.packed(images)).abs().max() > 1e-3
    fresh.load_state_dict(net.state_dict())
    same(fresh.packed(images), net.packed(images))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_deep_copy_is_the_same_and_independent(kind, images):
    net = make_net(kind)
    expected = net.packed(images)
    with net.at("d0"):
        copied = copy.deepcopy(net)
    same(copied(images), expected[0])  # not within the scope of the original
    same(copied.packed(images), expected)
    train(copied)
    assert (copied.eval().packed(images) - expected).abs().amax((1, 2)).min() > 1e-3
    same(net.packed(images), expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_names_of_the_backbone_stay(kind):
    backbone = backbone_of()
    names = [f"backbone.{name}" for name, _ in backbone.named_parameters()]
    net = kind(backbone, SHAPE)
    assert net.backbone is backbone
    assert [name for name, _ in net.named_parameters()][: len(names)] == names
    assert net.models()[0] is backbone


@pytest.mark.parametrize("kind", CLASSES)
def test_costs_of_the_depths(kind):
    net = make_net(kind)
    costs = depth_costs(net, SHAPE)
    macs = [measured.macs for measured in costs.values()]
    assert macs == sorted(set(macs), reverse=True)
    assert macs[0] == cost(backbone_of(), SHAPE).macs
    assert len({measured.parameters for measured in costs.values()}) == len(net.depths)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("option", ["per_depth_affine", "grad_checkpointing"])
def test_options_without_meaning_are_refused(kind, option):
    with pytest.raises(TeamNetError, match=rf"^{kind.__name__} has no {option}, found True: leave"):
        kind(backbone_of(), SHAPE, **{option: True})


@pytest.mark.parametrize("kind", CLASSES)
def test_an_elastic_backbone_is_refused(kind):
    net = ElasticNet(backbone_of(), SHAPE)
    with pytest.raises(TeamNetError, match="elastic already"):
        kind(net.backbone, SHAPE)
