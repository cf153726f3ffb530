"""A net of several widths."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from typing import Any, TypeAlias, cast

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from teamnet_pl.baselines.base import BaselineNet
from teamnet_pl.elastic import DepthLike, cost, costs_without_blocks
from teamnet_pl.elastic.discovery.coupling import perturb_zero_weights
from teamnet_pl.elastic.evaluation import evaluation, example_images
from teamnet_pl.errors import TeamNetError

_Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Layer: TypeAlias = _Conv | nn.Linear | _BatchNorm


class SlimmableNet(BaselineNet):
    """A net that runs at several widths, with shared weights and batch norms of their own.

    A depth runs all blocks with the first channels of each layer: a share of them, the same in all
    layers, from which the MACs come nearest to those of the elastic net at this depth. The channels
    of the images and the logits are all there. Each width has its own batch norms, with their
    weights and biases.

    The names of the backbone's parameters stay as they are.

    Args:
        backbone: Maps images ``(N, *input_shape)`` to logits ``(N, classes)``, by convolutions
            (ordinary or depthwise), linear layers and batch norms. It is not copied.
        input_shape: As of an `ElasticNet`, like all other arguments; see `BaselineNet`.

    Attributes:
        widths: The share of the channels at each depth, by its name.
        norms: By the name of each depth but the deepest: its batch norms by the name of those of
            the backbone, with hyphens for dots.

    Raises:
        TeamNetError: As `BaselineNet`; or if the backbone has weights in other layers, or does more
            with its channels than add and scale them one by one, such as joining those of two
            branches.

    Source: Yu et al., "Slimmable Neural Networks" (arXiv 1812.08928).

    Examples:
        >>> import torch, torchvision
        >>> net = SlimmableNet(torchvision.models.resnet18(num_classes=10), (3, 32, 32), depths=3)
        >>> {depth: round(width, 2) for depth, width in net.widths.items()}
        {'d5': 1.0, 'd2': 0.78, 'd0': 0.59}
        >>> net.packed(torch.randn(2, 3, 32, 32)).shape
        torch.Size([3, 2, 10])
        >>> net.extract("d0").layer1[0].conv1
        Conv2d(38, 38, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """

    def _build(self) -> None:
        _check_layers(self.backbone)
        targets = costs_without_blocks(self.backbone, self.blocks, self.depths, self.input_shape)
        self.widths = {self.depths[0].name: 1.0}
        self.norms = nn.ModuleDict()
        self._norm_names = [
            n for n, layer in _layers(self.backbone) if isinstance(layer, _BatchNorm)
        ]
        self._slices: dict[str, dict[str, tuple[slice, ...]]] = {}
        """The parts of the weights of convolutions and linear layers, by depth."""
        self._groups: dict[str, dict[str, int]] = {}
        """The groups of depthwise convolutions, by depth."""
        try:
            self._last = _last_layer(self.backbone, self.input_shape)
            for depth, target in zip(self.depths[1:], targets[1:], strict=True):
                self.widths[depth.name] = self._find_width(target.macs)
                self._check_width(self.widths[depth.name])
                self._add_width(depth.name)
        except Exception as error:  # whatever a net raises for fewer channels
            raise TeamNetError(
                f"{type(self.backbone).__name__} cannot be slimmed, since it does more with its "
                f"channels than add and scale them one by one ({error}): use a net of convolutions "
                "and batch norms such as a ResNet or MobileNet."
            ) from error

    def _slim(self, net: nn.Module, width: float) -> nn.Module:
        """Slims a copy of a net like the backbone."""
        slimmed = copy.deepcopy(net)
        with slimming(slimmed, width, self._last), evaluation(slimmed):
            slimmed(example_images(slimmed, 2, self.input_shape))
        return slimmed

    def _find_width(self, target: int) -> float:
        """Finds the width whose MACs are nearest to a number."""
        plain = copy.deepcopy(self.backbone).to("meta")  # MACs are counted without computing

        @cache
        def macs(width: float) -> int:
            slimmed = copy.deepcopy(plain)
            with slimming(slimmed, width, self._last):
                return cost(slimmed, self.input_shape).macs

        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (middle, high) if macs(middle) <= target else (low, middle)
        return min((low, high), key=lambda width: abs(macs(width) - target))

    def _check_width(self, width: float) -> None:
        """Compares the slim net with the whole one in which all other channels are zero."""
        whole = copy.deepcopy(self.backbone)
        perturb_zero_weights(whole)
        slimmed = self._slim(whole, width)
        for name, layer in _layers(slimmed):
            zero = partial(_zero_others, _num_outputs(layer))
            whole.get_submodule(name).register_forward_hook(zero)
        images = example_images(whole, 2, self.input_shape)
        with evaluation(whole), evaluation(slimmed):
            difference = float((whole(images) - slimmed(images)).abs().max())
            limit = 1e-3 * float(whole(images).abs().max())
        if difference > limit:
            raise TeamNetError(f"its outputs differ by {difference:.2g} from those without them")

    def _add_width(self, depth: str) -> None:
        norms, self._slices[depth], self._groups[depth] = nn.ModuleDict(), {}, {}
        for name, layer in _layers(self._slim(self.backbone, self.widths[depth])):
            if isinstance(layer, _BatchNorm):
                norms[name.replace(".", "-")] = layer  # module names cannot hold dots
                continue
            for key, value in layer.named_parameters():
                self._slices[depth][f"{name}.{key}"] = tuple(map(slice, value.shape))
            if isinstance(layer, _Conv) and layer.groups > 1:
                self._groups[depth][name] = layer.groups
        self.norms[depth] = norms

    def _named_norms(self, depth: str) -> Iterator[tuple[str, nn.Module]]:
        """Yields the batch norms of a depth with the names of those of the backbone."""
        norms = cast(nn.ModuleDict, self.norms[depth])
        yield from zip(self._norm_names, norms.values(), strict=True)

    def copied_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yields each parameter of the narrower batch norms, with the backbone's original."""
        for depth in self.norms:
            for name, norm in self._named_norms(depth):
                yield from zip(
                    norm.parameters(), self.backbone.get_submodule(name).parameters(), strict=True
                )

    def _run(self, images: Tensor, index: int) -> Tensor:
        logits: Tensor
        if not index:
            logits = self.backbone(images)
            return logits
        depth = self.depths[index].name
        tensors: dict[str, Tensor] = {
            name: self.backbone.get_parameter(name)[kept]
            for name, kept in self._slices[depth].items()
        }
        for name, norm in self._named_norms(depth):
            for key, value in chain(norm.named_parameters(), norm.named_buffers()):
                tensors[f"{name}.{key}"] = value
        with _grouped(self.backbone, self._groups[depth]):
            logits = functional_call(self.backbone, tensors, images)
        return logits

    def extract(self, depth: DepthLike) -> nn.Module:
        """Copies one depth as a plain net.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Returns:
            A copy of the backbone, of its own class, with smaller layers.

        Raises:
            TeamNetError: If the net has no such depth.
        """
        name = self.depth(depth).name
        if name not in self.norms:
            return copy.deepcopy(self.backbone)
        plain = self._slim(self.backbone, self.widths[name])
        for key, norm in self._named_norms(name):
            plain.get_submodule(key).load_state_dict(norm.state_dict())
        return plain


@contextmanager
def slimming(net: nn.Module, width: float, last: str) -> Iterator[None]:
    """Slims a net, in place, at its first pass within a ``with`` block.

    Each layer keeps its first channels: the inputs of the channels that arrive, and a share of its
    outputs.

    Args:
        net: The net.
        width: The share of the outputs to keep; of each layer at least one.
        last: Name of the layer whose outputs are all kept.
    """
    handles: dict[str, RemovableHandle] = {}

    def slim_once(name: str, layer: _Layer, args: tuple[Tensor, ...]) -> None:
        handles[name].remove()  # a layer may run again
        _slim_layer(layer, 1.0 if name == last else width, args[0])

    for name, layer in _layers(net):
        handles[name] = layer.register_forward_pre_hook(partial(slim_once, name))
    try:
        yield
    finally:
        for handle in handles.values():
            handle.remove()


def _slim_layer(layer: _Layer, width: float, features: Tensor) -> None:
    """Fits a layer to its input; of its outputs keeps a share."""
    arriving = features.shape[_channel_axis(layer)]
    if isinstance(layer, _BatchNorm):
        layer.num_features = arriving
    elif isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = arriving, _share(layer.out_features, width)
    elif layer.groups > 1:
        layer.out_channels = layer.out_channels // layer.in_channels * arriving
        layer.in_channels = layer.groups = arriving
    else:
        layer.in_channels, layer.out_channels = arriving, _share(layer.out_channels, width)
    inputs = 1 if isinstance(layer, _Conv) and layer.groups > 1 else arriving
    sizes = slice(_num_outputs(layer)), slice(inputs)
    for name, value in layer.named_parameters():
        kept = value.detach()[sizes[: value.ndim]].clone()
        setattr(layer, name, nn.Parameter(kept, value.requires_grad))
    for name, buffer in layer.named_buffers():
        setattr(layer, name, buffer[sizes[: buffer.ndim]].clone())


def _share(channels: int, width: float) -> int:
    return max(1, round(width * channels))


def _channel_axis(layer: _Layer) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _num_outputs(layer: _Layer) -> int:
    if isinstance(layer, _BatchNorm):
        return layer.num_features
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _zero_others(count: int, layer: _Layer, _args: Any, output: Tensor) -> None:
    """Sets all channels of an output but the first to zero."""
    axis = _channel_axis(layer)
    output.narrow(axis, count, output.shape[axis] - count).zero_()


@contextmanager
def _grouped(net: nn.Module, groups: Mapping[str, int]) -> Iterator[None]:
    """Sets the groups of convolutions within a ``with`` block."""
    layers = {name: cast(nn.Conv2d, net.get_submodule(name)) for name in groups}
    before = {name: layer.groups for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.groups = groups[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.groups = before[name]


def _layers(net: nn.Module) -> list[tuple[str, _Layer]]:
    """Lists the layers that can be slimmed, by name."""
    return [(name, module) for name, module in net.named_modules() if isinstance(module, _Layer)]


def _last_layer(net: nn.Module, input_shape: Sequence[int]) -> str:
    """Finds the layer that runs last, whose outputs are the logits."""
    order: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda _module, _args, name=name: order.append(name))
        for name, layer in _layers(net)
    ]
    with evaluation(net):
        net(example_images(net, 2, input_shape))
    for handle in handles:
        handle.remove()
    return order[-1]


def _check_layers(net: nn.Module) -> None:
    """Refuses a net with weights that have no first channels to keep."""
    for name, module in net.named_modules():
        if not isinstance(module, _Layer) and any(True for _ in module.parameters(recurse=False)):
            raise TeamNetError(
                f"{type(net).__name__} cannot be slimmed, since it has weights in "
                f"{name or 'itself'} ({type(module).__name__}): use a net with weights in "
                "convolutions, linear layers and batch norms only, such as a ResNet or MobileNet."
            )
        if isinstance(module, _Conv) and module.groups not in (1, module.in_channels):
            raise TeamNetError(
                f"{type(net).__name__} cannot be slimmed, since {name} has {module.groups} groups "
                f"of {module.in_channels} channels: use a net whose convolutions are ordinary or "
                "depthwise."
            )
