import pytest
import torch
from torch import nn

from teamnet_pl.elastic.evaluation import evaluation, example_images


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_gradients_are_restored(fails):
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3)))
    net[1].eval()
    try:
        with evaluation(net):
            assert not any(module.training for module in net.modules())
            assert not torch.is_grad_enabled()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [module.training for module in net.modules()] == [True, True, False, False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_example_images(dtype):
    net = nn.Linear(3, 2).to(dtype)
    random = torch.get_rng_state()
    images = example_images(net, 2, (3, 4, 5))
    assert images.shape == (2, 3, 4, 5)
    assert images.dtype == dtype
    assert torch.equal(images, example_images(net, 2, (3, 4, 5)))
    assert not torch.equal(images[0], images[1])
    assert torch.equal(torch.get_rng_state(), random)


def test_example_images_of_a_net_without_parameters():
    assert example_images(nn.Flatten(), 1, (3, 4, 5)).dtype == torch.float32
