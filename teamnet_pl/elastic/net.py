"""One net, many depths."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from teamnet_pl.elastic.blocks import Trace, trace
from teamnet_pl.elastic.depths import Depth, DepthPolicy, DepthSpec, derive_depths
from teamnet_pl.elastic.evaluation import evaluation, example_images
from teamnet_pl.elastic.extraction import without_blocks
from teamnet_pl.elastic.mixing import show_weights
from teamnet_pl.elastic.streams import (
    ElasticForward,
    ExpandingForward,
    PerStreamForward,
    Plan,
    Selection,
    SkippableForward,
    fork_levels,
)
from teamnet_pl.errors import TeamNetError

DepthLike: TypeAlias = Depth | str | int
"""A depth of a net, or its name (``"d9"``), or the number of blocks that it keeps (``9``)."""


class ElasticNet(nn.Module):
    """A backbone that runs at any of its depths, by shared weights.

    The backbone stays as it is, module tree, parameter names and classes: skippable blocks and
    batch norms only get a ``forward`` of their own, and so do other layers that mix the samples of
    a batch, for which the same holds. Parameters are shared by all depths. Batch norm
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
        grad_checkpointing: Whether blocks, and what is of their class beside them, run again in the
            backward pass instead of keeping what they need for it: less memory, more time, the same
            results.

    Attributes:
        blocks: The skippable blocks, in the order in which they run.
        stages: Number of skippable blocks in each stage.
        depths: The depths, the deepest first.

    Raises:
        ValueError: If the backbone has no skippable blocks, mixes samples of a batch around them,
            or is elastic already; or if the depths do not fit it.

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
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, module in backbone.named_modules():
            if isinstance(vars(module).get("forward"), ElasticForward):
                raise TeamNetError(
                    f"{name or type(backbone).__name__} is elastic already: pass a plain copy."
                )
        found = trace(backbone, input_shape, blocks)
        self.backbone = backbone
        self.input_shape = tuple(input_shape)
        self.blocks = found.blocks
        self.stages = found.stages
        self.depths = derive_depths(found.stages, depths, policy, interleaved)
        self.norms = nn.ModuleDict()
        self.grad_checkpointing = grad_checkpointing
        self._selection = Selection()
        self._forwards: dict[str, ElasticForward] = {}
        problems = []
        for level in range(fork_levels(found)):
            problem = self._make_elastic(found, level, per_depth_affine)
            if problem is None:
                return
            problems.append(problem)
        raise TeamNetError(
            f"{type(backbone).__name__} cannot run its depths in one pass: {problems[-1]}"
        )

    def _make_elastic(self, found: Trace, level: int, per_depth_affine: bool) -> str | None:
        """Lets streams fork at a level, see `Plan.of`, and says what is wrong with that."""
        try:
            self._attach(found, Plan.of(self.depths, found, level), per_depth_affine)
            self._check_packed()
        except Exception as error:  # whatever a net does with features of another batch size
            self._detach()
            return str(error)
        return None

    def _attach(self, found: Trace, plan: Plan, per_depth_affine: bool) -> None:
        """Gives the backbone's modules their forwards."""
        for index, block in enumerate(found.blocks):
            self._forwards[block.name] = SkippableForward(
                self.backbone.get_submodule(block.name),
                self._selection,
                self.grad_checkpointing,
                tuple(depth.kept[index] for depth in self.depths),
                plan.forks[block.name],
                block.hands_on,
                found.batched[block.name],
            )
        for name, expansion in plan.expansions.items():
            self._forwards[name] = ExpandingForward(
                self.backbone.get_submodule(name), self._selection, expansion, found.batched[name]
            )
        for name, streams in plan.streams.items():
            layer = self.backbone.get_submodule(name)
            copies = nn.ModuleList(copy.deepcopy(layer) for _ in streams.starts[1:])
            if not copies:
                continue
            if not per_depth_affine:
                for each in copies:
                    for mine, shared in zip(each.modules(), layer.modules(), strict=True):
                        # The dict itself: weights stay shared whatever replaces them.
                        mine._parameters = shared._parameters
            stream_at = tuple(
                sum(start <= index for start in streams.starts) - 1
                for index in range(streams.depths)
            )
            # Module names cannot hold dots.
            self.norms[name.replace(".", "-")] = copies
            self._forwards[name] = PerStreamForward(layer, self._selection, copies, stream_at)
        if self.grad_checkpointing:
            for name in self._alike():
                module = self.backbone.get_submodule(name)
                own = ElasticForward(module, self._selection, grad_checkpointing=True)
                self._forwards.setdefault(name, own)
        self._install()

    def copied_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Each parameter that single depths have for themselves, with the backbone's original."""
        for forward in self._forwards.values():
            if isinstance(forward, PerStreamForward):
                for copied in forward.copies:
                    pairs = zip(copied.parameters(), forward.module.parameters(), strict=True)
                    yield from (pair for pair in pairs if pair[0] is not pair[1])

    def _alike(self) -> set[str]:
        """Modules in a row with blocks and of their class, such as the first of a stage."""
        found = set()
        for block in self.blocks:
            row, _, _ = block.name.rpartition(".")
            kind = type(self.backbone.get_submodule(block.name))
            for key, module in self.backbone.get_submodule(row).named_children():
                if type(module) is kind:
                    found.add(f"{row}.{key}" if row else key)
        return found

    def _detach(self) -> None:
        """Takes the forwards off again."""
        for forward in self._forwards.values():
            vars(forward.module).pop("forward", None)
            if forward.own is not None:
                forward.module.forward = forward.own
        self._forwards.clear()
        self.norms.clear()

    def _check_packed(self) -> None:
        """Holds the packed forward of a copy against one forward for each depth."""
        trial = copy.deepcopy(self)
        show_weights(trial)
        images = example_images(self, 2, self.input_shape)
        with evaluation(trial):
            packed = trial.packed(images)
            for depth, logits in zip(trial.depths, packed, strict=True):
                with trial.at(depth):
                    alone = trial(images)
                apart = float((logits - alone).abs().max())
                if apart > torch.finfo(alone.dtype).eps ** 0.5 * float(alone.abs().max()):
                    raise TeamNetError(f"at {depth} its outputs would be {apart:.2g} apart.")

    def _install(self) -> None:
        """Puts the forwards in place, again where a module was replaced (by a SyncBatchNorm)."""
        for name, forward in self._forwards.items():
            module = self.backbone
            for key in (
                name.split(".") if name else ()
            ):  # at every use of the net; `get_submodule` is much slower
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
        raise TeamNetError(
            f"This net has the depths {', '.join(own.name for own in self.depths)}; {depth!s} is "
            "none of them."
        )

    @contextmanager
    def _selected(self, index: int | None) -> Iterator[None]:
        if not torch.compiler.is_compiling():
            self._install()
        with self._selection.at(index):
            yield

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
            if own.own is not None:
                module.forward = copy.deepcopy(own.own, {id(own.module): module})
            if isinstance(own, PerStreamForward) and index < len(own.stream_at):
                stream = own.stream_at[index]
                if stream:
                    module.load_state_dict(own.copies[stream - 1].state_dict())
        flags = zip(self.blocks, self.depths[index].kept, strict=True)
        images = example_images(self, 2, self.input_shape)
        with self.at(depth), evaluation(self):
            logits = self(images)
        return without_blocks(plain, [b.name for b, kept in flags if not kept], images, logits)
