import copy
import io
import pickle
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from teamnet_pl.elastic import ElasticNet, trace_backbone
from teamnet_pl.errors import TeamNetError
from tests.helpers.nets import BlockNet, Residual, basic_resnet, make_backbone, make_elastic, train

SHAPE = (3, 8, 8)


def make_net(seed=0, depths=4, kind="residual", norm="batch", **kwargs):
    """A net in float64 whose depths all have their own statistics."""
    return make_elastic(make_backbone(kind, norm=norm, seed=seed), depths, SHAPE, **kwargs)


@pytest.fixture
def images():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()


def outputs(net, images):
    """The outputs of each depth alone, followed by those of the packed forward."""
    single = []
    for depth in net.depths:
        with net.at(depth), torch.no_grad():
            single.append(net(images))
    with torch.no_grad():
        return [*single, *net.packed(images)]


def same(actual, expected, **kwargs):
    kwargs = {"rtol": 1e-10, "atol": 1e-10, **kwargs}
    torch.testing.assert_close(actual, expected, **kwargs)


# Depths and scopes


def test_depths_differ(images):
    net = make_net()
    singles = outputs(net, images)[:4]
    packed = outputs(net, images)[4:]
    same(singles, packed)
    for i, one in enumerate(singles):
        assert all((one - other).abs().max() > 1e-3 for other in singles[:i])


def test_a_depth_has_three_names(images):
    net = make_net()
    depth = net.depths[1]
    expected = outputs(net, images)[1]
    for name in (depth, depth.name, depth.num_blocks):
        assert net.depth(name) is depth
        with net.at(name) as inside:
            assert inside is net
            same(net(images), expected)


@pytest.mark.parametrize("name", ["d9", 9, "2", "", None])
def test_unknown_depth(images, name):
    net = make_net(depths=[3, 2, 0])
    expected = outputs(net, images)
    message = rf"has the depths d3, d2, d0; {name} is none of them"
    for use in (net.depth, net.extract, lambda name: net.at(name).__enter__()):
        with pytest.raises(ValueError, match=message):
            use(name)
    with net.at(2):
        with pytest.raises(ValueError, match=message), net.at(name):
            pass
        same(net(images), expected[1])


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ([], "the deepest first, each once; found none"),
        (["d0", "d3"], "the deepest first, each once; found d0, d3"),
        ([3, "d2", 2], "the deepest first, each once; found d3, d2, d2"),
        (["d3", "d1"], "has the depths d3, d2, d0; d1 is none of them"),
    ],
)
def test_depths_that_cannot_be_packed(images, depths, message):
    net = make_net(depths=[3, 2, 0])
    with net.at(2):
        (expected,) = net.packed(images, [2])
        with pytest.raises(TeamNetError, match=message):
            net.packed(images, depths)
        same(net(images), expected)


def test_depth_of_another_net():
    net, other = (
        make_net(depths=[3, 1], policy=f"{which}_stage_first") for which in ("first", "last")
    )
    assert net.depth(other.depths[0]) == other.depths[0]  # both keep all blocks
    with pytest.raises(ValueError, match="d1 is none of them"):
        net.at(other.depths[1]).__enter__()  # as many blocks, but different ones


def test_the_deepest_depth_runs_outside_a_scope(images):
    net = make_net()
    full, *_ = outputs(net, images)
    same(net(images), full)
    same(net.backbone(images), full)


def test_scopes_nest(images):
    net = make_net()
    full, second, third, *_ = outputs(net, images)
    with net.at(net.depths[1]):
        same(net(images), second)
        with net.at(net.depths[2]):
            same(net(images), third)
            with net.at(net.depths[0]):
                same(net(images), full)
            same(net(images), third)
        same(net(images), second)
    same(net(images), full)


def test_packed_within_a_scope(images):
    net = make_net()
    _, second, *_ = expected = outputs(net, images)
    with net.at(net.depths[1]):
        same([*net.packed(images)], expected[4:])
        same(net(images), second)


def test_scope_ends_with_an_exception(images):
    net = make_net()
    full, second, *_ = outputs(net, images)
    with net.at(net.depths[1]):
        with pytest.raises(KeyError), net.at(net.depths[2]):
            raise KeyError
        same(net(images), second)
        with pytest.raises(RuntimeError):
            net.packed(images[:, :1])  # one channel is not enough
        same(net(images), second)
    same(net(images), full)


def test_two_nets_do_not_disturb_each_other(images):
    a, b = make_net(seed=0), make_net(seed=1)
    of_a, of_b = outputs(a, images), outputs(b, images)
    with a.at(a.depths[1]):
        same(b(images), of_b[0])
        with b.at(b.depths[2]):
            same(a(images), of_a[1])
            same(b(images), of_b[2])
            same([*a.packed(images)], of_a[4:])
            same(b(images), of_b[2])
        same(a(images), of_a[1])
        same([*b.packed(images)], of_b[4:])
        same(a(images), of_a[1])
    same([a(images), b(images)], [of_a[0], of_b[0]])


def test_scopes_of_two_nets_interleave(images):
    a, b = make_net(seed=0), make_net(seed=1)
    of_a, of_b = outputs(a, images), outputs(b, images)
    scope_of_a, scope_of_b = ExitStack(), ExitStack()
    scope_of_a.enter_context(a.at(a.depths[1]))
    scope_of_b.enter_context(b.at(b.depths[2]))
    same([a(images), b(images)], [of_a[1], of_b[2]])
    scope_of_a.close()
    same([a(images), b(images)], [of_a[0], of_b[2]])
    scope_of_b.close()
    same([a(images), b(images)], [of_a[0], of_b[0]])


# The backbone is left unchanged


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_names_and_classes_stay(norm):
    backbone = make_backbone(norm=norm)
    plain = copy.deepcopy(backbone)
    net = ElasticNet(backbone, SHAPE, depths=3)
    assert net.backbone is backbone
    assert [(n, type(m)) for n, m in backbone.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    same(backbone.state_dict(), plain.state_dict(), rtol=0, atol=0)
    parameters = [name for name, _ in net.named_parameters()]
    assert parameters == [f"backbone.{name}" for name, _ in plain.named_parameters()]
    plain.load_state_dict(backbone.state_dict(), strict=True)


def test_backbone_with_a_forward_on_an_instance():
    """As in timm's FasterNet."""

    def instance_forward(x):
        return 2 * Residual.forward(block, x)

    block = Residual()
    block.forward = instance_forward
    backbone = BlockNet(blocks=[Residual(), block])
    net = ElasticNet(backbone, SHAPE, depths=[2, 0], blocks=["blocks.*"])
    images = torch.randn(2, 3, 8, 8)
    x = net.backbone.stem(images)
    x = x + net.backbone.blocks[0].conv(x)
    expected = net.backbone.head(2 * (x + block.conv(x)))
    torch.testing.assert_close(net.packed(images)[0], expected)
    torch.testing.assert_close(net(images), expected)
    torch.testing.assert_close(net.extract(2)(images), expected)
    assert net.extract(2).blocks[1].forward is instance_forward


def test_backbone_that_is_already_elastic():
    backbone = basic_resnet([1, 1, 1, 1])
    net = ElasticNet(backbone, (3, 32, 32), depths=2)
    for again in (backbone, net, nn.Sequential(backbone)):
        with pytest.raises(ValueError, match="elastic already"):
            ElasticNet(again, (3, 32, 32), depths=2)
    trace = trace_backbone(net.extract(1), (3, 32, 32))  # a plain net again
    assert [block.name for block in trace.blocks] == ["layer1.0"]


def test_backbone_is_unchanged_if_wrapping_fails():
    backbone = make_backbone()
    with pytest.raises(ValueError, match="skippable blocks"):
        ElasticNet(backbone, (3, 8, 8), depths=99)
    assert not any("forward" in vars(module) for module in backbone.modules())
    assert ElasticNet(backbone, (3, 8, 8), depths=2).stages == [2, 1]


def test_training_mode_reaches_all_statistics():
    net = make_net()
    assert len(list(net.norms.modules())) > 1
    for mode in (True, False):
        net.train(mode)
        assert all(module.training == mode for module in net.modules())


# Copies


def deep_copy(net):
    return copy.deepcopy(net)


def pickled(net):
    return pickle.loads(pickle.dumps(net))


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copies = pytest.mark.parametrize("clone", [deep_copy, pickled, saved])
kinds = pytest.mark.parametrize(
    ("kind", "per_depth_affine"),
    [("residual", False), ("residual", True), ("transformer", False)],
)


def storages(net):
    return {value.untyped_storage().data_ptr() for value in net.state_dict().values()}


@copies
@kinds
def test_a_copy_gives_the_same_outputs_and_shares_nothing(images, clone, kind, per_depth_affine):
    net = make_net(kind=kind, per_depth_affine=per_depth_affine, depths=3)
    expected = outputs(net, images)
    other = clone(net)
    same(outputs(other, images), expected)
    assert other.depths == net.depths

    assert storages(net).isdisjoint(storages(other))
    ours, theirs = ({id(module) for module in model.modules()} for model in (net, other))
    assert ours.isdisjoint(theirs)
    forwards = [(m, vars(m)["forward"]) for m in other.modules() if "forward" in vars(m)]
    assert len(forwards) >= len(other.blocks)
    for module, forward in forwards:
        assert forward.module is module
        referred = [value for value in vars(forward).values() if isinstance(value, nn.Module)]
        assert all(id(module) in theirs for module in referred)
        assert forward.selection is other._selection is not net._selection

    # A scope or a step of one net does not affect the other.
    with other.at(other.depths[1]):
        same(net(images), expected[0])
    train(other)
    same(outputs(net, images), expected)
    changed = outputs(other.eval(), images)
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(changed, expected, strict=True))
    with torch.no_grad():
        for value in net.state_dict().values():
            value.zero_()
    same(outputs(other, images), changed)


@copies
@pytest.mark.parametrize("per_depth_affine", [False, True])
def test_a_copy_trains_like_the_original(images, clone, per_depth_affine):
    net = make_net(per_depth_affine=per_depth_affine)
    other = clone(net)
    assert len(list(other.parameters())) == len(list(net.parameters()))
    for model in (net, other):
        train(model, steps=3)
    same(outputs(other.eval(), images), outputs(net.eval(), images))


@pytest.mark.parametrize("assign", [False, True])
@kinds
def test_state_dict(images, assign, kind, per_depth_affine):
    kwargs = {"kind": kind, "per_depth_affine": per_depth_affine}
    net, other = make_net(seed=0, **kwargs), make_net(seed=1, **kwargs)
    parameters = len(list(other.parameters()))
    state = copy.deepcopy(net.state_dict())
    assert state.keys() == other.state_dict().keys()
    other.load_state_dict(state, strict=True, assign=assign)
    same(outputs(other, images), outputs(net, images))
    # Shared tensors are still shared.
    assert len(list(other.parameters())) == parameters
    train(net)
    train(other)
    same(outputs(other.eval(), images), outputs(net.eval(), images))


def test_conversion_to_another_type(images):
    net = make_net()
    expected = outputs(net, images)
    actual = outputs(net.float(), images.float())
    assert {output.dtype for output in actual} == {torch.float32}
    same([output.double() for output in actual], expected, rtol=1e-3, atol=1e-3)


# Synchronized batch norm, for which the layers are replaced


def synchronized(net):
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


@pytest.mark.parametrize("per_depth_affine", [False, True])
def test_synchronized_batch_norm(images, per_depth_affine):
    net = make_net(per_depth_affine=per_depth_affine)
    plain = copy.deepcopy(net)
    expected = outputs(net, images)
    assert synchronized(net) is net
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    with torch.no_grad():
        same([*net.packed(images)], expected[4:])
    same(outputs(net, images), expected)
    # Without other processes, training is that of plain batch norm.
    train(net)
    train(plain)
    same(outputs(net.eval(), images), outputs(plain.eval(), images))
    assert len(list(net.parameters())) == len(list(plain.parameters()))


@pytest.mark.parametrize("use", ["forward", "at", "extract", "copy"])
def test_synchronized_batch_norm_in_each_first_use(images, use):
    net = make_net()
    expected = outputs(net, images)
    synchronized(net)
    with torch.no_grad():
        if use == "forward":
            same(net(images), expected[0])
        elif use == "at":
            with net.at(net.depths[2]):
                same(net(images), expected[2])
        elif use == "extract":
            same(net.extract(net.depths[2])(images), expected[2])
        else:
            same(outputs(copy.deepcopy(net), images), expected)
    same(outputs(net, images), expected)


def test_backbone_with_synchronized_batch_norm(images):
    nets = [
        ElasticNet(backbone, SHAPE, depths=4)
        for backbone in (make_backbone(), synchronized(make_backbone()))
    ]
    for net in nets:
        train(net)
    same(outputs(nets[1].eval(), images), outputs(nets[0].eval(), images))


@pytest.mark.parametrize("clone", [deep_copy, pickled])
def test_a_copy_made_within_a_scope_is_outside_it(images, clone):
    net = make_net()
    with net.at(net.depths[-1]):
        other = clone(net)
    same(other(images), net(images))
