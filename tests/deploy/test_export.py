import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from teamnet_pl import ElasticNet
from teamnet_pl.deploy import save_program, save_weights
from teamnet_pl.optional import require

# How to build it, with how many layers; the blocks that a depth keeps; that depth's layers.
NETS = {
    "resnet": ("resnet", [3, 4, 6, 3], [2, 3, 1, 0], [3, 4, 2, 1]),
    "convnext": ("convnext", [2, 1, 3, 1], [1, 1, 2, 0], [1, 1, 2, 0]),
    "vit": ("vit", 4, [2], 2),
}


@pytest.mark.parametrize(
    ("build", "layers", "kept", "kept_layers"),
    [pytest.param(*each, id=k) for k, each in NETS.items()],
)
def test_weights_load_into_the_net_that_one_would_build(
    nets, tmp_path, build, layers, kept, kept_layers
):
    build = getattr(nets, build)
    full = ElasticNet(build(layers), (3, 32, 32), depths=2).stages
    net = nets.elastic(build(layers), [full, kept])
    shallow = net.depths[1]
    path = tmp_path / "weights.safetensors"
    save_weights(net, shallow, path)

    plain = build(kept_layers).eval()
    load_model(plain, path, strict=True)
    assert load_file(path).keys() == plain.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(
            plain(nets.images()), nets.logits_at(net, shallow, nets.images())
        )


def test_program_of_any_batch_size(nets, tmp_path):
    net = nets.elastic(nets.cifar(4, 14), [4, 2])
    for depth in net.depths:
        path = tmp_path / f"{depth}.pt2"
        save_program(net, depth, path)
        program = torch.export.load(path).module()
        for batch in (nets.images(1), nets.images(5)):
            torch.testing.assert_close(program(batch), nets.logits_at(net, depth, batch))


def test_program_needs_no_teamnet(nets, tmp_path):
    net = nets.elastic(nets.cifar(4, 14), [4, 2])
    save_program(net, 2, tmp_path / "net.pt2")
    torch.save(nets.logits_at(net, 2, nets.images()), tmp_path / "logits.pt")
    torch.save(nets.images(), tmp_path / "images.pt")
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


def test_exporting_leaves_the_net_as_it_is(nets, tmp_path):
    net = nets.elastic(nets.cifar(4, 14), [4, 2]).train()
    save_program(net, 2, tmp_path / "net.pt2")
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_no_such_depth(nets, tmp_path):
    net = nets.elastic(nets.cifar(4, 14), [4, 2])
    with pytest.raises(ValueError, match="has the depths d4, d2"):
        save_weights(net, 3, tmp_path / "net.safetensors")


class Stubborn(nn.Module):
    """Looks at its batch in a way that depends on it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        logits = self.net(images)
        return logits if len(logits) < 100 or logits.sum() > 0 else -logits


def test_net_that_cannot_be_exported(nets, tmp_path):
    net = nets.elastic(Stubborn(nets.cifar(4, 14)), [4, 2])
    with pytest.raises(ValueError, match="cannot export Stubborn at d2 for any number of images"):
        save_program(net, "d2", tmp_path / "net.pt2")


def test_library_that_is_not_installed():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'teamnet_pl\[fast\]'"):
        require("no_such_library", "fast")
