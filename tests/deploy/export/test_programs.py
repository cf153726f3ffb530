import subprocess
import sys

import pytest
import torch
from torch import nn

from teamnet_pl.deploy import save_program
from teamnet_pl.optional import require
from tests.helpers.deploy import logits_at, make_images
from tests.helpers.nets import cifar, make_elastic


def test_program_of_any_batch_size(tmp_path):
    net = make_elastic(cifar(4, 14), [4, 2])
    for depth in net.depths:
        path = tmp_path / f"{depth}.pt2"
        save_program(net, depth, path)
        program = torch.export.load(path).module()
        for batch in (make_images(1), make_images(5)):
            torch.testing.assert_close(program(batch), logits_at(net, depth, batch))


def test_program_needs_no_teamnet(tmp_path):
    net = make_elastic(cifar(4, 14), [4, 2])
    save_program(net, 2, tmp_path / "net.pt2")
    torch.save(logits_at(net, 2, make_images()), tmp_path / "logits.pt")
    torch.save(make_images(), tmp_path / "images.pt")
    script = """
import sys
sys.modules["teamnet_pl"] = None
import torch
logits = torch.export.load("net.pt2").module()(torch.load("images.pt"))
torch.testing.assert_close(logits, torch.load("logits.pt"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_exporting_leaves_the_net_as_it_is(tmp_path):
    net = make_elastic(cifar(4, 14), [4, 2]).train()
    save_program(net, 2, tmp_path / "net.pt2")
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


class Stubborn(nn.Module):
    """Branches on the values of its batch, which torch.export refuses."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        logits = self.net(images)
        return logits if len(logits) < 100 or logits.sum() > 0 else -logits


def test_net_that_cannot_be_exported(tmp_path):
    net = make_elastic(Stubborn(cifar(4, 14)), [4, 2])
    with pytest.raises(ValueError, match="cannot export Stubborn at d2 for any number of images"):
        save_program(net, "d2", tmp_path / "net.pt2")


def test_library_that_is_not_installed():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'teamnet_pl\[fast\]'"):
        require("no_such_library", "fast")
