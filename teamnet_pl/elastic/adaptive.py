"""The base of all nets of several depths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import TypeAlias

from torch import Tensor, nn

from teamnet_pl.elastic.depths import Depth
from teamnet_pl.errors import TeamNetError

DepthLike: TypeAlias = Depth | str | int
"""A depth of a net, or its name (``"d9"``), or the number of blocks that it keeps (``9``)."""


class AdaptiveNet(nn.Module, ABC):
    """A net that runs at any of several depths, chosen at run time.

    `ElasticNet` is the one that this package is about; `teamnet_pl.baselines` has the other ways to
    get nets of several sizes.

    Attributes:
        depths: The depths, the deepest first.
        input_shape: Shape of one image, ``(channels, height, width)``.
    """

    depths: tuple[Depth, ...]
    input_shape: tuple[int, ...]

    def depth(self, depth: DepthLike) -> Depth:
        """Looks up one of this net's depths by its name or its number of blocks.

        Raises:
            TeamNetError: If the net has no such depth.
        """
        return self.depths[self._index(depth)]

    def _index(self, depth: DepthLike) -> int:
        for index, known in enumerate(self.depths):
            if depth in (known, known.name, known.num_blocks):
                return index
        raise TeamNetError(
            f"This net has the depths {', '.join(known.name for known in self.depths)}; {depth!s} "
            "is none of them."
        )

    def _indices(self, depths: Sequence[DepthLike] | None) -> tuple[int, ...]:
        if depths is None:
            depths = self.training_depths() if self.training else self.depths
        indices = tuple(self._index(depth) for depth in depths)
        if not indices or any(index >= after for index, after in pairwise(indices)):
            listed = ", ".join(self.depths[index].name for index in indices) or "none"
            raise TeamNetError(
                f"Name at least one depth, the deepest first, each once; found {listed}."
            )
        return indices

    @abstractmethod
    def models(self) -> list[nn.Module]:
        """Lists the parts of this net that are whole models, for options of an optimizer."""

    def copied_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yields each parameter that belongs to single depths, with the backbone's original."""
        yield from ()

    def training_depths(self) -> tuple[Depth, ...]:
        """Lists the depths whose logits a step of training may compute: by default all."""
        return self.depths

    def shared_parameters(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yields each parameter with the number of depths that use it.

        Raises:
            TeamNetError: If that is not known of this kind of net.
        """
        raise TeamNetError(
            f"A {type(self).__name__} does not know how many depths share a weight: set "
            "shared_gradients to sum."
        )

    @abstractmethod
    def at(self, depth: DepthLike) -> AbstractContextManager[AdaptiveNet]:
        """Runs the net at one depth within a ``with`` block.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Raises:
            TeamNetError: If the net has no such depth.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Runs one depth: the deepest, unless within `at`.

        Args:
            images: Shape ``(N, channels, height, width)``.

        Returns:
            Logits, shape ``(N, classes)``.
        """

    @abstractmethod
    def packed(self, images: Tensor, depths: Sequence[DepthLike] | None = None) -> Tensor:
        """Runs several depths.

        Args:
            images: Shape ``(N, channels, height, width)``.
            depths: The depths to run, the deepest first; by default all, in training mode
                `training_depths`.

        Returns:
            Logits of each of these depths, shape ``(depths, N, classes)``.

        Raises:
            TeamNetError: If there are no depths, the net has no such depth, or they are not in
                order.
        """

    @abstractmethod
    def extract(self, depth: DepthLike) -> nn.Module:
        """Copies one depth as a plain net.

        Args:
            depth: One of `depths`, its name or its number of blocks.

        Raises:
            TeamNetError: If the net has no such depth.
        """
