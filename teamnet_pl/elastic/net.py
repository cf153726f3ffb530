"""One net, many depths."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from teamnet_pl.elastic.adaptive import AdaptiveNet, DepthLike
from teamnet_pl.elastic.depths import DepthPolicy, DepthSpec, derive_depths
from teamnet_pl.elastic.discovery.coupling import perturb_zero_weights
from teamnet_pl.elastic.discovery.find import siblings_of_blocks, trace_backbone
from teamnet_pl.elastic.evaluation import evaluation, example_images
from teamnet_pl.elastic.extraction import without_blocks
from teamnet_pl.elastic.forwards import (
    ElasticForward,
    ExpandingForward,
    PerStreamForward,
    Selection,
    SkippableForward,
)
from teamnet_pl.elastic.outputs import at_depth, difference, with_depth_axis
from teamnet_pl.elastic.plan import Plan, Trace, num_fork_levels, plan_streams
from teamnet_pl.errors import TeamNetError


class ElasticNet(AdaptiveNet):
    """A backbone that runs at any of its depths, with shared weights.

    The module tree of the backbone, its parameter names and its classes stay as they are: only
    skippable blocks, and batch norms and other layers that couple the samples of a batch, get a
    ``forward`` of their own. All depths share the parameters. Batch norms, and the other layers
    that couple samples, keep running statistics per depth (in `norms`; those of the deepest depth
    stay in the backbone). Depths that run the same blocks before such a layer share its
    statistics, since theirs are equal.

    Args:
        backbone: Maps images ``(N, *input_shape)`` to logits ``(N, classes)``, or to any tensors in
            tuples, dictionaries and the like. It is not copied.
        input_shape: Shape of one image, ``(channels, height, width)``, used to find the blocks. The
            net takes any size that the backbone takes.
        depths: How many depths, spread evenly from all blocks to none; or how many blocks each
            keeps; or how many each keeps in each stage. See `derive_depths`.
        policy: The order in which blocks are dropped, see `drop_order`.
        interleaved: Whether the depths lie between those of a net that is not interleaved, if they
            are given by their number. See `derive_depths`.
        blocks: Names of the skippable blocks, with wildcards. By default the residual blocks that
            keep their input's shape, see `trace_backbone`.
        per_depth_affine: Whether batch norms also have weights and biases per depth.
        grad_checkpointing: Whether blocks, and modules of their class beside them, run again in the
            backward pass instead of keeping their activations for it: less memory, more time, the
            same results.

    Attributes:
        blocks: The skippable blocks, in the order in which they run.
        stages: Number of skippable blocks in each stage.
        depths: The depths, the deepest first.
        input_shape: Shape of the images that the blocks were found with.
        returns_logits: Whether the backbone returns logits alone, in training and evaluation.
        norms: By the name of a layer that couples samples, with hyphens for dots: its copies for
            shallower depths.
        grad_checkpointing: Whether blocks run again in the backward pass.

    Raises:
        TeamNetError: If the backbone has no skippable blocks, couples the samples of a batch around
            them, or is elastic already; or if the depths do not fit it.

    Examples:
        >>> import torch, torchvision
        >>> net = ElasticNet(torchvision.models.resnet18(num_classes=10), (3, 32, 32), depths=3)
        >>> [(depth.name, depth.per_stage) for depth in net.depths]
        [('d5', (2, 1, 1, 1)), ('d2', (2, 0, 0, 0)), ('d0', (0, 0, 0, 0))]
        >>> images = torch.randn(4, 3, 32, 32)
        >>> net(images).shape  # the deepest depth
        torch.Size([4, 10])
        >>> net.packed(images).shape  # all depths in one pass
        torch.Size([3, 4, 10])
        >>> net.packed(images, ["d5", "d0"]).shape
        torch.Size([2, 4, 10])
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
        check_is_plain(backbone)
        trace = trace_backbone(backbone, input_shape, blocks)
        self.backbone = backbone
        self.input_shape = tuple(input_shape)
        self.blocks = trace.blocks
        self.stages = trace.stages
        self.depths = derive_depths(trace.stages, depths, policy, interleaved)
        self.returns_logits = trace.returns_logits
        self.norms = nn.ModuleDict()
        self.grad_checkpointing = grad_checkpointing
        self._selection = Selection()
        self._forwards: dict[str, ElasticForward] = {}
        self._make_elastic(trace, per_depth_affine)

    def _make_elastic(self, trace: Trace, per_depth_affine: bool) -> None:
        """Attaches the forwards such that streams fork as late as the net permits."""
        problem: str | None = None
        for level in range(num_fork_levels(trace)):
            problem = self._try_level(level, trace, per_depth_affine)
            if problem is None:
                return
        raise TeamNetError(
            f"{type(self.backbone).__name__} cannot run its depths in one pass: {problem}"
        )

    def _try_level(self, level: int, trace: Trace, per_depth_affine: bool) -> str | None:
        """Lets streams fork at a level, see `plan_streams`; returns the problem if that fails."""
        try:
            self._attach(trace, plan_streams(self.depths, trace, level), per_depth_affine)
            self._check_packed()
        except Exception as error:  # whatever a net raises for features of another batch size
            self._detach()
            return str(error)
        return None

    def _attach(self, trace: Trace, plan: Plan, per_depth_affine: bool) -> None:
        """Gives the modules of the backbone the forwards that carry out a plan."""
        self._add_skippable_forwards(trace, plan)
        self._add_expanding_forwards(trace, plan)
        self._add_per_stream_forwards(plan, per_depth_affine)
        if self.grad_checkpointing:
            self._add_checkpointing_forwards()
        self._install()

    def _add_skippable_forwards(self, trace: Trace, plan: Plan) -> None:
        for index, block in enumerate(trace.blocks):
            self._forwards[block.name] = SkippableForward(
                self.backbone.get_submodule(block.name),
                self._selection,
                self.grad_checkpointing,
                tuple(depth.kept[index] for depth in self.depths),
                plan.arriving[block.name],
                block.passthrough,
                trace.has_batch_axis[block.name],
            )

    def _add_expanding_forwards(self, trace: Trace, plan: Plan) -> None:
        for name, expansion in plan.expansions.items():
            module = self.backbone.get_submodule(name)
            has_batch_axis = trace.has_batch_axis[name]
            self._forwards[name] = ExpandingForward(
                module, self._selection, expansion, has_batch_axis
            )

    def _add_per_stream_forwards(self, plan: Plan, per_depth_affine: bool) -> None:
        for name, stream_at in plan.coupled.items():
            num_copies = stream_at[-1]
            if not num_copies:
                continue
            layer = self.backbone.get_submodule(name)
            copies = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_copies))
            if not per_depth_affine:
                _share_parameters(copies, layer)
            # Module names cannot hold dots.
            self.norms[name.replace(".", "-")] = copies
            self._forwards[name] = PerStreamForward(layer, self._selection, copies, stream_at)

    def _add_checkpointing_forwards(self) -> None:
        for name in siblings_of_blocks(self.backbone, self.blocks):
            if name not in self._forwards:
                module = self.backbone.get_submodule(name)
                self._forwards[name] = ElasticForward(
                    module, self._selection, grad_checkpointing=True
                )

    def copied_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yields each parameter that belongs to single depths, with the backbone's original."""
        for forward in self._forwards.values():
            if isinstance(forward, PerStreamForward):
                for copied in forward.copies:
                    pairs = zip(copied.parameters(), forward.module.parameters(), strict=True)
                    yield from (pair for pair in pairs if pair[0] is not pair[1])

    def shared_parameters(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yields each parameter with the number of depths that use it."""
        shared = dict.fromkeys(self.backbone.parameters(), len(self.depths))
        for index, block in enumerate(self.blocks):
            number = sum(depth.kept[index] for depth in self.depths)
            parameters = self.backbone.get_submodule(block.name).parameters()
            shared |= dict.fromkeys(parameters, number)
        per_stream: Counter[nn.Parameter] = Counter()
        for forward in self._forwards.values():
            if isinstance(forward, PerStreamForward):
                for stream, layer in enumerate([forward.module, *forward.copies]):
                    for parameter in layer.parameters():
                        per_stream[parameter] += forward.stream_at.count(stream)
        yield from (shared | per_stream).items()

    def _detach(self) -> None:
        """Takes the forwards off again."""
        for forward in self._forwards.values():
            vars(forward.module).pop("forward", None)
            if forward.instance_forward is not None:
                forward.module.forward = forward.instance_forward
        self._forwards.clear()
        self.norms.clear()

    def _check_packed(self) -> None:
        """Compares the packed forward of a copy with one forward for each depth."""
        trial = copy.deepcopy(self)
        perturb_zero_weights(trial)
        images = example_images(self, 2, self.input_shape)
        with evaluation(trial):
            with trial._selected(trial._indices(None)):
                packed = trial.backbone(images)
            for index, depth in enumerate(trial.depths):
                with trial.at(depth):
                    alone = trial(images)
                error = difference(at_depth(packed, index, len(trial.depths), len(images)), alone)
                if error > torch.finfo(images.dtype).eps ** 0.5:
                    raise TeamNetError(
                        f"its outputs at {depth} would differ, relatively by {error:.2g}."
                    )

    def _install(self) -> None:
        """Puts the forwards in place, also where a module was replaced (by a SyncBatchNorm)."""
        for name, forward in self._forwards.items():
            # `get_submodule` would be too slow, since this runs at every use of the net.
            module = self.backbone
            for key in name.split(".") if name else ():
                module = cast(nn.Module, module._modules[key])
            if vars(module).get("forward") is not forward:
                forward.module = module
                module.forward = forward

    def models(self) -> list[nn.Module]:
        """Lists the backbone."""
        return [self.backbone]

    @contextmanager
    def _selected(self, indices: tuple[int, ...]) -> Iterator[None]:
        if not torch.compiler.is_compiling():
            self._install()
        with self._selection.at(indices):
            yield

    @contextmanager
    def at(self, depth: DepthLike) -> Iterator[ElasticNet]:
        """Runs the net at one depth within a ``with`` block.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Yields:
            This net.

        Raises:
            TeamNetError: If the net has no such depth.
        """
        with self._selected((self._index(depth),)):
            yield self

    def forward(self, images: Tensor) -> Any:
        """Runs one depth: the deepest, unless within `at`.

        Args:
            images: Shape ``(N, channels, height, width)``.

        Returns:
            The outputs of the backbone, such as logits of shape ``(N, classes)``.
        """
        return self.backbone(images)

    def packed(self, images: Tensor, depths: Sequence[DepthLike] | None = None) -> Any:
        """Runs several depths in one pass.

        The results, their gradients and the running statistics are those of one forward for each
        of these depths; the parts that several of them have in common are computed once, and what
        belongs only to others is left alone. Dropout and stochastic depth draw for each stream.
        Compiled, each choice of depths has a graph of its own.

        Args:
            images: Shape ``(N, channels, height, width)``.
            depths: The depths to run, the deepest first, each one of `depths`, its name or its
                number of blocks; all by default.

        Returns:
            The outputs of each of these depths, in their order: logits of shape
            ``(depths, N, classes)``, or whatever the backbone returns, each tensor with an axis of
            depths before its batch axis.

        Raises:
            TeamNetError: If there are no depths, the net has no such depth, or they are not in
                order.
        """
        indices = self._indices(depths)
        with self._selected(indices):
            outputs = self.backbone(images)
        return with_depth_axis(outputs, len(indices), len(images))

    def view(self, depth: DepthLike) -> ElasticNet:
        """Makes a net that stays at one depth and has the very same weights.

        `at` changes the depth of the net itself, for all its users. Views of several depths run
        side by side, also in several threads.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Returns:
            A net whose parameters and buffers are this net's own tensors. Move this net to its
            device first: moving one of them later would leave the buffers of the others behind.

        Raises:
            TeamNetError: If the net has no such depth.
        """
        index = self._index(depth)
        self._install()
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        view = copy.deepcopy(self, shared)
        view._selection.depths = (index,)
        return view

    def extract(self, depth: DepthLike) -> nn.Module:
        """Copies one depth as a plain net.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Returns:
            A copy of the backbone, of its own class, without the skipped blocks and with this
            depth's batch norm statistics. Nothing in it refers to this package.

        Raises:
            TeamNetError: If the net has no such depth, or cannot do without the blocks.
        """
        index = self._index(depth)
        plain = self._copy_backbone_without_forwards(index)
        flags = zip(self.blocks, self.depths[index].kept, strict=True)
        images = example_images(self, 2, self.input_shape)
        with self.at(depth), evaluation(self):
            outputs = self(images)
        return without_blocks(plain, [b.name for b, kept in flags if not kept], images, outputs)

    def _copy_backbone_without_forwards(self, index: int) -> nn.Module:
        """Copies the backbone with all blocks, but with the statistics of one depth."""
        # A memo that maps the forwards to None leaves them out of the copy.
        no_forwards = {id(forward): None for forward in self._forwards.values()}
        plain = copy.deepcopy(self.backbone, no_forwards)
        for name, forward in self._forwards.items():
            module = plain.get_submodule(name)
            vars(module).pop("forward", None)
            if forward.instance_forward is not None:
                original = {id(forward.module): module}
                module.forward = copy.deepcopy(forward.instance_forward, original)
            if isinstance(forward, PerStreamForward) and index < len(forward.stream_at):
                stream = forward.stream_at[index]
                if stream:
                    module.load_state_dict(forward.copies[stream - 1].state_dict())
        return plain


def check_is_plain(backbone: nn.Module) -> None:
    """Refuses a backbone that is elastic already, or has a part that is.

    Raises:
        TeamNetError: If it is.
    """
    for name, module in backbone.named_modules():
        if isinstance(vars(module).get("forward"), ElasticForward):
            raise TeamNetError(
                f"{name or type(backbone).__name__} is elastic already: pass a plain copy."
            )


def _share_parameters(copies: nn.ModuleList, layer: nn.Module) -> None:
    """Gives the parameters of a layer to copies of it."""
    for copied in copies:
        for module, original in zip(copied.modules(), layer.modules(), strict=True):
            # The dict itself: parameters stay shared whatever replaces them.
            module._parameters = original._parameters
