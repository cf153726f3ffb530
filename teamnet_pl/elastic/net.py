"""One net, many depths."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from teamnet_pl.elastic.blocks import trace
from teamnet_pl.elastic.depths import Depth, DepthPolicy, DepthSpec, derive_depths
from teamnet_pl.elastic.evaluation import evaluation, example_images
from teamnet_pl.elastic.extraction import without_blocks
from teamnet_pl.elastic.streams import PerStreamForward, Plan, Selection, SkippableForward

DepthLike: TypeAlias = Depth | str | int
"""A depth of a net, or its name (``"d9"``), or the number of blocks that it keeps (``9``)."""


class ElasticNet(nn.Module):
    """A backbone that runs at any of its depths, by shared weights.

    The backbone stays as it is, module tree, parameter names and classes: skippable blocks and
    batch norms only get a ``forward`` of their own. Parameters are shared by all depths. Batch norm
    keeps running statistics per depth (in `norms`; those of the deepest depth stay in the
    backbone), shared by depths that run the same blocks up to there, since theirs are equal.

    Args:
        backbone: Maps images ``(N, *input_shape)`` to logits ``(N, classes)``. It is not copied.
        input_shape: Shape of one image, ``(channels, height, width)``, used to find the blocks. The
            net takes every size that the backbone takes.
        depths: How many depths, spread evenly from all blocks to none; or how many blocks each
            keeps; or how many each keeps in each stage. See `derive_depths`.
        policy: The order in which blocks are dropped, see `drop_order`.
        interleaved: Whether a number of depths lie between those of a net that is not.
        blocks: Names of the skippable blocks, with wildcards. By default the residual blocks that
            keep their input's shape, see `trace`.
        per_depth_affine: Whether batch norms also have weights and biases per depth.

    Attributes:
        blocks: The skippable blocks, in the order in which they run.
        stages: Number of skippable blocks in each stage.
        depths: The depths, the deepest first.

    Raises:
        ValueError: If the backbone has no skippable blocks, mixes samples of a batch in another way
            than by batch norm, or is elastic already; or if the depths do not fit it.

    Example:
        >>> import torch, torchvision
        >>> net = ElasticNet(torchvision.models.resnet18(num_classes=10), (3, 32, 32), depths=3)
        >>> [(depth.name, depth.per_stage) for depth in net.depths]
        [('d5', (2, 1, 1, 1)), ('d2', (2, 0, 0, 0)), ('d0', (0, 0, 0, 0))]
        >>> images = torch.randn(4, 3, 32, 32)
        >>> net(images).shape  # the deepest depth
        torch.Size([4, 10])
        >>> net.packed(images).shape  # all depths in one pass
        torch.Size([3, 4, 10])
        >>> with net.at("d2"):
        ...     net(images).shape
        torch.Size([4, 10])
        >>> type(net.extract("d2")).__name__  # a plain net without the skipped blocks
        'ResNet'
    """

    def __init__(
        self,
        backbone: nn.Module,
        input_shape: Sequence[int],
        *,
        depths: DepthSpec = 4,
        policy: DepthPolicy = "last_stage_first",
        interleaved: bool = False,
        blocks: Sequence[str] | None = None,
        per_depth_affine: bool = False,
    ) -> None:
        super().__init__()
        found = trace(backbone, input_shape, blocks)
        self.backbone = backbone
        self.input_shape = tuple(input_shape)
        self.blocks = found.blocks
        self.stages = found.stages
        self.depths = derive_depths(found.stages, depths, policy, interleaved)
        self.norms = nn.ModuleDict()
        self._selection = Selection()
        self._forwards: dict[str, SkippableForward | PerStreamForward] = {}

        plan = Plan.of(self.depths)
        for index, block in enumerate(self.blocks):
            kept = tuple(depth.kept[index] for depth in self.depths)
            self._forwards[block.name] = SkippableForward(
                backbone.get_submodule(block.name), self._selection, kept, plan.forks[index]
            )
        for name, (begun, inside) in found.norms.items():
            norm = backbone.get_submodule(name)
            streams = plan.streams(begun, inside)
            copies = nn.ModuleList(copy.deepcopy(norm) for _ in streams[1:])
            if not copies:
                continue
            if not per_depth_affine:
                for each in copies:
                    for mine, shared in zip(each.modules(), norm.modules(), strict=True):
                        # The dict itself: weights stay shared whatever replaces them.
                        mine._parameters = shared._parameters
            runs = [inside is None or depth.kept[inside] for depth in self.depths]
            stream_at = (sum(start <= i for start in streams) - 1 for i in range(sum(runs)))
            # Module names cannot hold dots.
            self.norms[name.replace(".", "-")] = copies
            self._forwards[name] = PerStreamForward(norm, self._selection, copies, tuple(stream_at))
        self._install()

    def _install(self) -> None:
        """Puts the forwards in place, again where a module was replaced (by a SyncBatchNorm)."""
        for name, forward in self._forwards.items():
            module = self.backbone
            for key in name.split("."):  # at every use of the net; `get_submodule` is much slower
                module = cast(nn.Module, module._modules[key])
            if vars(module).get("forward") is not forward:
                forward.module = module
                module.forward = forward

    def depth(self, depth: DepthLike) -> Depth:
        """Looks up one of this net's depths by its name or its number of blocks.

        Raises:
            ValueError: If the net has no such depth.
        """
        return self.depths[self._index(depth)]

    def _index(self, depth: DepthLike) -> int:
        for index, own in enumerate(self.depths):
            if depth in (own, own.name, own.blocks):
                return index
        raise ValueError(
            f"This net has the depths {', '.join(own.name for own in self.depths)}; {depth!s} is "
            "none of them."
        )

    @contextmanager
    def _selected(self, index: int | None) -> Iterator[None]:
        if not torch.compiler.is_compiling():
            self._install()
        before = self._selection.depth
        self._selection.depth = index
        try:
            yield
        finally:
            self._selection.depth = before

    @contextmanager
    def at(self, depth: DepthLike) -> Iterator[ElasticNet]:
        """Runs the net at one depth within a ``with`` block.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Yields:
            This net.

        Raises:
            ValueError: If the net has no such depth.
        """
        with self._selected(self._index(depth)):
            yield self

    def forward(self, images: Tensor) -> Tensor:
        """Runs one depth: the deepest, unless within `at`.

        Args:
            images: Shape ``(N, channels, height, width)``.

        Returns:
            Logits, shape ``(N, classes)``.
        """
        logits: Tensor = self.backbone(images)
        return logits

    def packed(self, images: Tensor) -> Tensor:
        """Runs all depths in one pass.

        The results, their gradients and the running statistics are those of one forward for each
        depth; what several depths have in common is computed once. Dropout and stochastic depth
        draw for each stream.

        Args:
            images: Shape ``(N, channels, height, width)``.

        Returns:
            Logits of each depth, the deepest first, shape ``(depths, N, classes)``.
        """
        with self._selected(None):
            logits: Tensor = self.backbone(images)
        return logits.view(len(self.depths), len(images), logits.shape[-1])

    def view(self, depth: DepthLike) -> ElasticNet:
        """This net at one depth for good, with the very same weights.

        `at` changes what the net itself runs, for everyone who uses it. Views of several depths run
        side by side, in several threads too.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Returns:
            A net whose parameters and buffers are this net's own tensors. Move this net to its
            device before: moving one of them later would leave the others' buffers behind.

        Raises:
            ValueError: If the net has no such depth.
        """
        index = self._index(depth)
        self._install()
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        view = copy.deepcopy(self, shared)
        view._selection.depth = index
        return view

    def extract(self, depth: DepthLike) -> nn.Module:
        """Copies one depth out as a plain net.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Returns:
            A copy of the backbone, of its own class, without the skipped blocks and with this
            depth's batch norm statistics. Nothing in it refers to this package.

        Raises:
            ValueError: If the net has no such depth, or cannot do without the blocks.
        """
        index = self._index(depth)
        # The forwards are left out of the copy by giving them one already.
        plain = copy.deepcopy(self.backbone, {id(own): None for own in self._forwards.values()})
        for name, own in self._forwards.items():
            module = plain.get_submodule(name)
            vars(module).pop("forward", None)
            if isinstance(own, PerStreamForward) and index < len(own.stream_at):
                stream = own.stream_at[index]
                if stream:
                    module.load_state_dict(own.copies[stream - 1].state_dict())
        flags = zip(self.blocks, self.depths[index].kept, strict=True)
        images = example_images(self, 2, self.input_shape)
        with self.at(depth), evaluation(self):
            logits = self(images)
        return without_blocks(plain, [b.name for b, kept in flags if not kept], images, logits)
