import pytest
import torch
from safetensors.torch import load_file, load_model

from teamnet_pl import ElasticNet
from teamnet_pl.deploy import save_weights
from tests.helpers.deploy import logits_at, make_images
from tests.helpers.nets import SHAPE, cifar, convnext, make_elastic, resnet, vit

# A builder and its layers; the blocks that a depth keeps; the layers of that depth.
NETS = {
    "resnet": (resnet, [3, 4, 6, 3], [2, 3, 1, 0], [3, 4, 2, 1]),
    "convnext": (convnext, [2, 1, 3, 1], [1, 1, 2, 0], [1, 1, 2, 0]),
    "vit": (vit, 4, [2], 2),
}


@pytest.mark.parametrize(
    ("build", "layers", "kept", "kept_layers"),
    [pytest.param(*values, id=name) for name, values in NETS.items()],
)
def test_weights_load_into_a_net_of_just_that_depth(tmp_path, build, layers, kept, kept_layers):
    full = ElasticNet(build(layers), SHAPE, depths=2).stages
    net = make_elastic(build(layers), [full, kept])
    shallow = net.depths[1]
    path = tmp_path / "weights.safetensors"
    save_weights(net, shallow, path)

    plain = build(kept_layers).eval()
    load_model(plain, path, strict=True)
    assert load_file(path).keys() == plain.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(plain(make_images()), logits_at(net, shallow, make_images()))


def test_no_such_depth(tmp_path):
    net = make_elastic(cifar(4, 14), [4, 2])
    with pytest.raises(ValueError, match="has the depths d4, d2"):
        save_weights(net, 3, tmp_path / "net.safetensors")
