"""Views: one net at several depths side by side, with one set of weights."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.helpers.nets import make_backbone, make_elastic

SHAPE = (3, 8, 8)


@pytest.fixture(params=[False, True], ids=["shared_affine", "per_depth_affine"])
def net(request):
    """A net whose depths all have their own statistics."""
    return make_elastic(make_backbone(), 4, SHAPE, per_depth_affine=request.param)


@pytest.fixture
def images():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()


@torch.no_grad()
def test_a_view_matches_the_extracted_net(net, images):
    for depth in net.depths:
        expected = net.extract(depth).eval()(images)
        with net.at(3):  # the depth of the net itself does not matter
            view = net.view(depth.name)
            torch.testing.assert_close(view(images), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(view(images), expected, rtol=1e-10, atol=1e-10)


def test_no_weight_is_copied(net):
    state = dict(net.state_dict(keep_vars=True))
    for depth in net.depths:
        view = net.view(depth)
        viewed = view.state_dict(keep_vars=True)
        assert viewed.keys() == state.keys()
        assert all(viewed[name] is state[name] for name in state)
        assert not {id(module) for module in view.modules()} & {id(m) for m in net.modules()}


@torch.no_grad()
def test_a_change_of_the_weights_reaches_every_view(net, images):
    views = [net.view(depth) for depth in net.depths]
    net.backbone.head.bias += 1
    for view, depth in zip(views, net.depths, strict=True):
        torch.testing.assert_close(view(images), net.extract(depth).eval()(images))


def test_views_run_side_by_side(net, images):
    """Each thread stays at its depth while the depth of the net itself changes."""
    expected = [net.extract(depth).eval()(images).detach() for depth in net.depths]
    views = [net.view(depth) for depth in net.depths]

    @torch.no_grad()
    def run(index):
        with net.at(net.depths[index]):
            return [views[index](images) for _ in range(50)]

    with ThreadPoolExecutor(len(views)) as pool:
        for outputs, logits in zip(pool.map(run, range(len(views))), expected, strict=True):
            assert all(torch.allclose(one, logits, rtol=1e-10, atol=1e-10) for one in outputs)


def test_a_view_stays_at_its_depth(net, images):
    view = net.view(0)
    with view.at(net.depths[0]), torch.no_grad():
        torch.testing.assert_close(view(images), net.extract(net.depths[0]).eval()(images))
    with torch.no_grad():
        torch.testing.assert_close(view(images), net.extract(0).eval()(images))


@torch.no_grad()
def test_a_view_packs_some_depths(net, images):
    view = net.view(0)
    depths = net.depths[1:3]
    expected = torch.stack([net.extract(depth).eval()(images) for depth in depths])
    torch.testing.assert_close(view.packed(images, depths), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(view(images), net.extract(0).eval()(images))


def test_a_replaced_module_is_viewed(net, images):
    """As `convert_sync_batchnorm` replaces them."""
    old = net.backbone.norm
    net.backbone.norm = type(old)(old.num_features).double().eval()
    with torch.no_grad():
        logits = net.view(0)(images)
        with net.at(0):
            torch.testing.assert_close(logits, net(images))


def test_unknown_depth(net):
    with pytest.raises(ValueError, match="d9 is none of them"):
        net.view("d9")
