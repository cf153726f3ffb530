"""ONNX files: one file for each depth, or one file for several depths with shared weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from teamnet_pl.deploy.export.programs import exported_program
from teamnet_pl.elastic import DepthLike, ElasticNet
from teamnet_pl.errors import TeamNetError
from teamnet_pl.optional import require

if TYPE_CHECKING:
    import onnx_ir as ir

    _SharedWeights: TypeAlias = dict[tuple[object, ...], ir.Value]
    """The weights by type, shape and content."""


def save_onnx(net: ElasticNet, depth: DepthLike, path: str | Path) -> None:
    """Saves one depth as an ONNX file.

    It maps ``images``, shape ``(batch, *net.input_shape)`` with any batch size, to ``logits``,
    shape ``(batch, classes)``, in the operator set that the installed torch exports by default.

    Args:
        net: The net.
        depth: One of its depths.
        path: The ONNX file.

    Raises:
        TeamNetError: If the net has no such depth, or cannot be exported.
        ModuleNotFoundError: If the extra ``onnx`` is not installed.
    """
    optimizer = require("onnxscript.optimizer", "onnx")
    ir = require("onnx_ir", "onnx")
    model = _exported_model(net, depth)
    optimizer.optimize(model)
    ir.save(model, path)


def save_onnx_all_depths(
    net: ElasticNet, path: str | Path, depths: Sequence[DepthLike] | None = None
) -> None:
    """Saves several depths as one ONNX file that holds their common weights once.

    Besides ``images`` (see `save_onnx`) it takes ``depth``, an integer: the largest number of
    skippable blocks that may run. The deepest depth with no more blocks than this runs, or the
    shallowest depth if all have more.

    Args:
        net: The net.
        path: The ONNX file.
        depths: Some of the net's depths; by default all.

    Raises:
        TeamNetError: If there are fewer than two depths, the net has no such depth, or it cannot be
            exported.
        ModuleNotFoundError: If the extra ``onnx`` is not installed.
    """
    ir = require("onnx_ir", "onnx")
    chosen = {net.depth(depth).num_blocks for depth in depths or net.depths}
    if len(chosen) < 2:
        raise TeamNetError(
            f"One file for several depths needs at least two of them, found {len(chosen)}."
        )
    models = {num_blocks: _exported_model(net, num_blocks) for num_blocks in sorted(chosen)}
    ir.save(_combined_model(models), path)


def _exported_model(net: ElasticNet, depth: DepthLike) -> ir.Model:
    """Exports one depth; batch norms are not yet folded into the convolutions."""
    passes = require("onnx_ir.passes.common", "onnx")
    require("onnxscript", "onnx")  # torch's exporter is built on it
    program = torch.onnx.export(
        exported_program(net, depth),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),  # only names the axis
        optimize=False,
        verbose=False,
    )
    assert program is not None
    model = program.model
    # Removes the source lines, 8% of the file of a ResNet-20.
    passes.ClearMetadataAndDocStringPass()(model)
    return model


def _combined_model(models: Mapping[int, ir.Model]) -> ir.Model:
    """Combines models into one that runs one of them, chosen by the number of blocks.

    Each depth is a whole graph in a branch of its own, so that onnxruntime optimizes it like a
    separate file. The weights are outside of the branches, once each, identified by their content.
    onnxruntime skips most optimizations of operators whose weights are not in the same graph.
    Therefore each branch has a ``Concat`` with the weight as its only input: onnxruntime computes
    its result while it loads the file, and the result is a constant of the branch. Without it a
    ConvNeXt takes two to three times as long.

    Args:
        models: The models by their number of blocks, in ascending order.
    """
    import onnx_ir as ir

    *_, deepest = models.values()
    images, logits = (
        ir.Value(name=value.name, type=value.type, shape=value.shape)
        for value in (deepest.graph.inputs[0], deepest.graph.outputs[0])
    )
    depth = ir.val("depth", ir.DataType.INT64, [])
    weights: _SharedWeights = {}
    *branches, (limit, graph) = (
        (num_blocks, _branch(model, str(num_blocks), images, weights))
        for num_blocks, model in models.items()
    )
    # Nested from the inside: "if depth < limit, then this branch, else the graph of the deeper".
    for num_blocks, branch in reversed(branches):
        limit_value = ir.val(f"limit_{num_blocks}", const_value=ir.tensor(limit))
        is_below = ir.val(f"at_most_{num_blocks}")
        chosen = ir.val(f"logits_{num_blocks}", shape=logits.shape, type=logits.type)
        nodes = [
            ir.node("Less", [depth, limit_value], outputs=[is_below]),
            ir.node(
                "If", [is_below], {"then_branch": branch, "else_branch": graph}, outputs=[chosen]
            ),
        ]
        graph = ir.Graph(
            [], [chosen], nodes=nodes, initializers=[limit_value], name=f"from_{num_blocks}"
        )
        limit = num_blocks
    graph.inputs.extend([images, depth])
    graph.outputs[0].name = logits.name
    graph.opset_imports.update(deepest.graph.opset_imports)
    for weight in weights.values():
        graph.register_initializer(weight)
    return ir.Model(graph, ir_version=deepest.ir_version)


def _branch(model: ir.Model, prefix: str, images: ir.Value, weights: _SharedWeights) -> ir.Graph:
    """Turns a model into a branch, whose images and weights come from outside.

    Args:
        model: The model; its graph is changed in place.
        prefix: Prefix of the names in the branch, which must be unique in the file.
        images: The input of the combined model.
        weights: The weights outside of the branches; those of the model are added.
    """
    import onnx_ir as ir
    from onnxscript import optimizer

    graph = model.graph
    branch_images = graph.inputs[0]
    shared = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or not tensor.shape or not tensor.numpy().any():
            continue  # scalars, and the zero biases that the exporter adds
        if tensor.size < 16 and not tensor.dtype.is_floating_point():
            continue  # shapes, which the optimizer needs to see
        content = hashlib.sha256(tensor.tobytes()).digest()
        weight = weights.setdefault(
            (tensor.dtype, tuple(tensor.shape), content),
            ir.val(f"w{len(weights)}", const_value=tensor),
        )
        shared.append((value, weight))
        # An input while the optimizer runs. Otherwise it would fold batch norms into convolutions,
        # whose weights would then differ between depths.
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    optimizer.optimize(model)
    copies = []
    for value, weight in shared:
        copy = ir.node("Concat", [weight], {"axis": 0})
        value.replace_all_uses_with(copy.outputs[0])
        copies.append(copy)
    branch_images.replace_all_uses_with(images)
    graph.inputs.clear()
    if copies:
        graph.insert_before(graph[0], copies)
    _shorten_names(graph, prefix)
    return graph


def _shorten_names(graph: ir.Graph, prefix: str) -> None:
    """Shortens all names: with small weights and many branches they are several % of the file."""
    graph.name = f"depth_{prefix}"
    for index, node in enumerate(graph):
        node.name = None
        for number, value in enumerate(node.outputs):
            value.name = f"{prefix}_{index}_{number}"
    for index, value in enumerate(list(graph.initializers.values())):
        value.name = f"{prefix}_c{index}"
