"""ONNX files: one for each depth, or one for all of them with shared weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from teamnet_pl.deploy.export import exported_program
from teamnet_pl.elastic import DepthLike, ElasticNet
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require

if TYPE_CHECKING:
    import onnx_ir as ir

    _Weights: TypeAlias = dict[tuple[object, ...], ir.Value]
    """By type, shape and content."""


def save_onnx(net: ElasticNet, depth: DepthLike, path: str | Path) -> None:
    """Saves one depth as an ONNX file.

    It maps ``images``, shape ``(batch, *net.input_shape)`` for any batch, to ``logits``,
    ``(batch, classes)``, in the operator set that the torch in use exports by default.

    Args:
        net: The net.
        depth: One of its depths.
        path: The ONNX file.

    Raises:
        ValueError: If the net has no such depth, or cannot be exported.
        ModuleNotFoundError: If the extra ``onnx`` is not installed.
    """
    optimizer = require("onnxscript.optimizer", "onnx")
    ir = require("onnx_ir", "onnx")
    model = _graph(net, depth)
    optimizer.optimize(model)
    ir.save(model, path)


def save_onnx_all_depths(
    net: ElasticNet, path: str | Path, depths: Sequence[DepthLike] | None = None
) -> None:
    """Saves several depths as one ONNX file that holds their common weights once.

    Beside ``images`` (see `save_onnx`) it takes ``depth``, an integer: how many blocks may run at
    most. It runs the deepest of its depths that keeps no more of them, or else the shallowest.

    Args:
        net: The net.
        path: The ONNX file.
        depths: Some of the net's depths, by default all.

    Raises:
        ValueError: If there are fewer than two depths, the net has no such depth, or it cannot be
            exported.
        ModuleNotFoundError: If the extra ``onnx`` is not installed.
    """
    ir = require("onnx_ir", "onnx")
    chosen = {net.depth(depth).num_blocks for depth in depths or net.depths}
    if len(chosen) < 2:
        raise TeamNetError(
            f"One file for several depths needs at least two of them, found {len(chosen)}."
        )
    ir.save(_joined({blocks: _graph(net, blocks) for blocks in sorted(chosen)}), path)


def _graph(net: ElasticNet, depth: DepthLike) -> ir.Model:
    """One depth as the exporter writes it: batch norms are not yet part of the convolutions."""
    passes = require("onnx_ir.passes.common", "onnx")
    require("onnxscript", "onnx")  # which torch's exporter is made with
    program = torch.onnx.export(
        exported_program(net, depth),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),  # its name
        optimize=False,
        verbose=False,
    )
    assert program is not None
    model = program.model
    passes.ClearMetadataAndDocStringPass()(model)  # source lines: 8% of the file of a ResNet-20
    return model


def _joined(models: Mapping[int, ir.Model]) -> ir.Model:
    """One model that runs the one or other, by the number of blocks, the fewest first.

    Each depth is a whole graph in a branch, so that onnxruntime optimises it like a file of its
    own. The weights are outside of the branches, once, by their content. Since onnxruntime leaves
    out most optimisations of operators whose weights are not in the same graph, each branch has a
    ``Concat`` of nothing but the weight, whose result onnxruntime computes when it loads the file,
    as a constant of the branch. Without it a ConvNeXt takes two to three times as long.
    """
    import onnx_ir as ir

    *_, deepest = models.values()
    images, logits = (
        ir.Value(name=value.name, type=value.type, shape=value.shape)
        for value in (deepest.graph.inputs[0], deepest.graph.outputs[0])
    )
    depth = ir.val("depth", ir.DataType.INT64, [])
    weights: _Weights = {}
    *branches, (limit, graph) = (
        (blocks, _branch(model, str(blocks), images, weights)) for blocks, model in models.items()
    )
    for blocks, branch in reversed(branches):
        fewest = ir.val(f"limit_{blocks}", const_value=ir.tensor(limit))
        shallow = ir.val(f"at_most_{blocks}")
        chosen = ir.val(f"logits_{blocks}", shape=logits.shape, type=logits.type)
        nodes = [
            ir.node("Less", [depth, fewest], outputs=[shallow]),
            ir.node(
                "If", [shallow], {"then_branch": branch, "else_branch": graph}, outputs=[chosen]
            ),
        ]
        graph = ir.Graph([], [chosen], nodes=nodes, initializers=[fewest], name=f"from_{blocks}")
        limit = blocks
    graph.inputs.extend([images, depth])
    graph.outputs[0].name = logits.name
    graph.opset_imports.update(deepest.graph.opset_imports)
    for weight in weights.values():
        graph.register_initializer(weight)
    return ir.Model(graph, ir_version=deepest.ir_version)


def _branch(model: ir.Model, prefix: str, images: ir.Value, weights: _Weights) -> ir.Graph:
    """Turns a model into a branch: its images and its weights come from outside."""
    import onnx_ir as ir
    from onnxscript import optimizer

    graph = model.graph
    own_images = graph.inputs[0]
    shared = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or not tensor.shape or not tensor.numpy().any():
            continue  # scalars, and the biases of zeros that the exporter adds
        if tensor.size < 16 and not tensor.dtype.is_floating_point():
            continue  # shapes, for the optimiser to look at
        content = hashlib.sha256(tensor.tobytes()).digest()
        weight = weights.setdefault(
            (tensor.dtype, tuple(tensor.shape), content),
            ir.val(f"w{len(weights)}", const_value=tensor),
        )
        shared.append((value, weight))
        # An input while the optimiser runs, which else makes batch norms part of convolutions,
        # whose weights are then not the same at all depths.
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    optimizer.optimize(model)
    copies = []
    for value, weight in shared:
        copies.append(own := ir.node("Concat", [weight], {"axis": 0}))
        value.replace_all_uses_with(own.outputs[0])
    own_images.replace_all_uses_with(images)
    graph.inputs.clear()
    if copies:
        graph.insert_before(graph[0], copies)
    # Short names: of small weights and many branches they would be a few per cent of the file.
    graph.name = f"depth_{prefix}"
    for index, node in enumerate(graph):
        node.name = None
        for number, value in enumerate(node.outputs):
            value.name = f"{prefix}_{index}_{number}"
    for index, value in enumerate(list(graph.initializers.values())):
        value.name = f"{prefix}_c{index}"
    return graph
