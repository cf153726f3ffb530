from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from teamnet_pl.deploy import save_onnx, save_onnx_all_depths
from tests.helpers.deploy import logits_at, make_images, onnx_session, run_onnx
from tests.helpers.nets import cifar, convnext, make_elastic, vit

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

NETS = {
    "weights_per_depth": (cifar, (4, 8), {"per_depth_affine": True}),
    "layer_norm": (convnext, ([1, 1, 1, 1],), {}),
    "attention": (vit, (2,), {}),
}


@pytest.fixture(scope="module", params=NETS)
def net(request):
    build, arguments, options = NETS[request.param]
    return make_elastic(build(*arguments), 2, **options)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def files(net, tmp_path_factory):
    """A file for each depth and one for all."""
    folder = tmp_path_factory.mktemp("files")
    save_onnx_all_depths(net, folder / "all.onnx")
    for depth in net.depths:
        save_onnx(net, depth, folder / f"{depth}.onnx")
    return folder


def test_a_file_for_each_depth_and_one_for_all(net, files):
    one = onnx_session(files / "all.onnx")
    for depth in net.depths:
        session = onnx_session(files / f"{depth}.onnx")
        for batch in (make_images(1), make_images(4)):
            expected = logits_at(net, depth, batch)
            close(run_onnx(session, batch), expected)
            close(run_onnx(one, batch, depth=depth.num_blocks), expected)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A net and its file for all depths."""
    net = make_elastic(cifar(16, 14), [4, 3, 1])
    path = tmp_path_factory.mktemp("shared") / "all.onnx"
    save_onnx_all_depths(net, path)
    return net, path


@settings(max_examples=30)
@given(limit=st.integers(-(2**63), 2**63 - 1), count=st.integers(1, 9), seed=st.integers(0, 99))
@example(limit=4, count=1, seed=0)
@example(limit=3, count=1, seed=0)
@example(limit=2, count=1, seed=0)
@example(limit=1, count=1, seed=0)
@example(limit=0, count=1, seed=0)
def test_the_deepest_depth_within_the_limit_runs(shared, limit, count, seed):
    net, path = shared
    fits = [depth for depth in net.depths if depth.num_blocks <= limit] or [net.depths[-1]]
    batch = make_images(count, seed)
    close(run_onnx(path, batch, depth=limit), logits_at(net, fits[0], batch))


def test_weights_are_in_the_file_once(shared, tmp_path):
    net, path = shared
    arrays = [
        onnx.numpy_helper.to_array(weight)
        for graph in graphs(onnx.load(path).graph)
        for weight in graph.initializer
    ]
    every = [t.numpy() for depth in net.depths for t in net.extract(depth).state_dict().values()]
    distinct = {(a.shape, a.tobytes()): a for a in every if a.dtype == "float32"}
    # The exporter gives each convolution a zero bias.
    stored = [a.size for a in arrays if a.dtype == "float32" and a.any()]
    assert sum(stored) == sum(a.size for a in distinct.values())
    save_onnx(net, 4, tmp_path / "deepest.onnx")
    assert path.stat().st_size < 1.05 * (tmp_path / "deepest.onnx").stat().st_size


def graphs(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def optimized(path):
    """Counts the operators in the graphs that onnxruntime optimizes, innermost last."""
    options = {
        "optimized_model_filepath": str(path.with_suffix(".optimized")),
        "log_severity_level": 3,
    }
    onnx_session(path, **options)
    optimized_graphs = graphs(onnx.load(options["optimized_model_filepath"]).graph)
    return [Counter(node.op_type for node in graph.node) for graph in optimized_graphs]


def test_onnxruntime_optimizes_a_depth_as_in_a_separate_file(net, files):
    """So that it is as fast."""
    choice, *branches = optimized(files / "all.onnx")
    assert choice == {"Less": 1, "If": 1}
    separate = [optimized(files / f"{depth}.onnx") for depth in net.depths]
    assert len(branches) == len(separate)
    assert all(graph in branches for (graph,) in separate)


def test_some_of_the_depths(shared, tmp_path):
    net, _ = shared
    save_onnx_all_depths(net, tmp_path / "some.onnx", ["d3", 1])
    batch = make_images()
    for limit, runs in ((4, 3), (3, 3), (2, 1), (0, 1)):
        logits = run_onnx(tmp_path / "some.onnx", batch, depth=limit)
        close(logits, logits_at(net, runs, batch))


@pytest.mark.parametrize(
    ("depths", "message"),
    [([3], "at least two of them, found 1"), ([3, 2], "d4, d3, d1; 2 is none of them")],
)
def test_depths_that_cannot_be_in_one_file(shared, tmp_path, depths, message):
    with pytest.raises(ValueError, match=message):
        save_onnx_all_depths(shared[0], tmp_path / "all.onnx", depths)


def test_inputs_and_outputs_of_the_files(shared, tmp_path):
    net, path = shared
    save_onnx(net, 1, tmp_path / "separate.onnx")
    for file in (path, tmp_path / "separate.onnx"):
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        shapes = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*model.graph.input, *model.graph.output)
        }
        assert shapes.pop("depth", []) == []
        assert shapes == {"images": ["batch", 3, 32, 32], "logits": ["batch", 5]}
        assert b"stack_trace" not in model.SerializeToString()
