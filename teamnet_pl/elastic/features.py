"""The features inside an elastic net, by depth."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from teamnet_pl.elastic.adaptive import DepthLike
from teamnet_pl.elastic.discovery.coupling import perturb_zero_weights
from teamnet_pl.elastic.evaluation import evaluation, example_images
from teamnet_pl.elastic.net import ElasticNet
from teamnet_pl.errors import TeamNetError


@contextmanager
def recorded(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keeps what modules of a net return within a ``with`` block.

    Args:
        net: The net.
        names: Names of its modules.

    Yields:
        The last tensor that each module has returned, by its name.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output

    handles = [net.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def modules_named(net: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Lists the modules of a net whose name fits one of some patterns, such as ``layer?``.

    Examples:
        >>> import torchvision
        >>> modules_named(torchvision.models.resnet18(), ["layer?", "fc"])
        ['layer1', 'layer2', 'layer3', 'layer4', 'fc']
    """
    names = [name for name, _ in net.named_modules() if name]
    return [name for name in names if any(fnmatch.fnmatchcase(name, each) for each in patterns)]


class DepthFeatures:
    """Reads the outputs of modules for each depth while an elastic net runs, packed.

    Args:
        net: The net.
        patterns: Names of modules of its backbone, with wildcards.

    Attributes:
        modules: The names of the modules that return a tensor with a batch axis.

    Raises:
        TeamNetError: If there is no such module.

    Examples:
        >>> import torchvision
        >>> net = ElasticNet(torchvision.models.resnet18(num_classes=10), (3, 32, 32), depths=3)
        >>> features = DepthFeatures(net, ["layer4"])
        >>> with features.recorded() as outputs:
        ...     logits = net.packed(torch.randn(2, 3, 32, 32))
        >>> for depth, values in features.by_depth(outputs).items():
        ...     print(depth, values["layer4"].shape)
        d5 torch.Size([2, 512, 1, 1])
        d2 torch.Size([2, 512, 1, 1])
        d0 torch.Size([2, 512, 1, 1])
    """

    def __init__(self, net: ElasticNet, patterns: Sequence[str]) -> None:
        self._net = net
        names = modules_named(net.backbone, patterns)
        self._stream_at = _streams(net, names)
        self.modules = list(self._stream_at)
        if not self.modules:
            raise TeamNetError(
                f"{type(net.backbone).__name__} has no module {' or '.join(patterns)} that returns "
                "features of each image: see `print(net)` for the names."
            )

    @contextmanager
    def recorded(self) -> Iterator[dict[str, Tensor]]:
        """Keeps the modules' outputs within a ``with`` block, in which the net runs once."""
        with recorded(self._net.backbone, self.modules) as outputs:
            yield outputs

    def by_depth(
        self, outputs: dict[str, Tensor], depths: Sequence[DepthLike] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Takes recorded outputs apart.

        Args:
            outputs: Of a packed pass, as `recorded` has kept them.
            depths: The depths of that pass; all by default.

        Returns:
            By depth and module, shape ``(N, ...)``; without modules that a depth does not run. A
            block that is skipped hands on its input.
        """
        run = [self._net.depth(depth) for depth in depths or self._net.depths]
        features: dict[str, dict[str, Tensor]] = {depth.name: {} for depth in run}
        for name, output in outputs.items():
            stream_at = self._stream_at[name]
            arriving = [depth.name for depth in run if depth.name in stream_at]
            streams = sorted({stream_at[depth] for depth in arriving})
            parts = dict(zip(streams, output.chunk(len(streams)), strict=True))
            for depth in arriving:
                features[depth][name] = parts[stream_at[depth]]
        return features


def _streams(net: ElasticNet, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """The index of the stream of each depth that runs a module, found by its values."""
    trial = copy.deepcopy(net)
    perturb_zero_weights(trial)
    images = example_images(trial, 2, trial.input_shape)
    with evaluation(trial):
        with recorded(trial.backbone, names) as packed:
            trial.packed(images)
        alone = {}
        for depth in trial.depths:
            with trial.at(depth), recorded(trial.backbone, names) as outputs:
                trial(images)
            alone[depth.name] = outputs
    stream_of: dict[str, dict[str, int]] = {}
    for name, output in packed.items():
        streams = output.chunk(len(output) // len(images))
        stream_at = {
            depth: index
            for depth, outputs in alone.items()
            if name in outputs and len(outputs[name]) == len(images)
            for index, rows in enumerate(streams)
            if rows.shape == outputs[name].shape
            and torch.allclose(rows, outputs[name], rtol=1e-3, atol=1e-5)
        }
        if len(set(stream_at.values())) == len(streams):
            stream_of[name] = stream_at
    return stream_of
