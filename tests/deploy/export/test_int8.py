import pytest
import torch

from teamnet_pl.deploy import onnx_accuracy, save_onnx, save_onnx_int8
from tests.helpers.deploy import logits_at, make_images, run_onnx
from tests.helpers.nets import cifar, convnext, make_elastic

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module", params=["cifar", "convnext"])
def files(request, tmp_path_factory):
    """A net, its ONNX file and the 8-bit one."""
    build, arguments = {"cifar": (cifar, 8), "convnext": (convnext, [1, 1, 1, 1])}[request.param]
    torch.manual_seed(0)  # of the weights, which the tolerance below depends on
    net = make_elastic(build(arguments), 2)
    folder = tmp_path_factory.mktemp("int8")
    save_onnx(net, net.depths[1], folder / "float.onnx")
    images = [make_images(16, seed) for seed in range(2)]
    save_onnx_int8(folder / "float.onnx", folder / "int8.onnx", images)
    return net, folder / "float.onnx", folder / "int8.onnx"


def test_logits_are_close_to_those_of_the_source(files):
    net, _, int8 = files
    for count in (1, 5):
        batch = make_images(count, seed=7)
        expected = logits_at(net, net.depths[1], batch)
        logits = run_onnx(int8, batch)
        assert not torch.equal(logits, expected)
        torch.testing.assert_close(logits, expected, rtol=0, atol=0.1 * float(expected.abs().max()))


def test_weights_have_8_bits_and_a_scale_for_each_channel(files):
    _, before, after = files
    convolutions = [
        weight.name
        for weight in onnx.load(before).graph.initializer
        if len(weight.dims) == 4 and weight.data_type == onnx.TensorProto.FLOAT
    ]
    graph = onnx.load(after).graph
    weights = {weight.name: weight for weight in graph.initializer}
    quantized = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    quantized = [node for node in quantized if node.input[0] in weights]
    quantized = [node for node in quantized if len(weights[node.input[0]].dims) == 4]
    assert len(quantized) == len(convolutions) > 0
    for node in quantized:
        weight, scale = (weights[name] for name in node.input[:2])
        assert weight.data_type == onnx.TensorProto.INT8
        assert list(scale.dims) == [weight.dims[0]]


def test_accuracy_is_the_share_of_right_predictions(files):
    net, before, _ = files
    batches = [make_images(6, seed) for seed in range(2)]
    predicted = [logits_at(net, net.depths[1], batch).argmax(-1) for batch in batches]
    wrong = [(labels + 1) % 5 for labels in predicted]
    labels = [predicted[0], torch.cat([predicted[1][:2], wrong[1][2:]])]
    assert onnx_accuracy(before, zip(batches, labels, strict=True)) == pytest.approx(8 / 12)


def test_without_images(files, tmp_path):
    with pytest.raises(ValueError, match="takes at least one image, found none"):
        save_onnx_int8(files[1], tmp_path / "int8.onnx", [])
