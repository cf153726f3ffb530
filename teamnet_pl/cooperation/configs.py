"""The members of a team as plain data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from teamnet_pl.backbones import BackboneConfig
from teamnet_pl.elastic import DepthPolicy, DepthSpec


@dataclass(frozen=True)
class LeaderConfig(BackboneConfig):
    """The Leader.

    Attributes:
        frozen: Whether it only teaches: evaluation mode, no gradient, no label loss.
    """

    frozen: bool = False


@dataclass(frozen=True)
class TeammateConfig(BackboneConfig):
    """A Teammate.

    Attributes:
        depths: How many depths, or the number of blocks that each keeps, or the number that each
            keeps in each stage; see `teamnet_pl.elastic.derive_depths`.
        policy: The order in which blocks are dropped.
        interleaved: Whether depths given by their number lie half-way between those of a Teammate
            that is not interleaved.
        blocks: Names of the skippable blocks, with wildcards; by default they are found.
        per_depth_affine: Whether batch norms have weights and biases per depth.
        grad_checkpointing: Whether blocks run again in the backward pass: less memory, more time.
    """

    depths: DepthSpec = 4
    policy: DepthPolicy = "last_stage_first"
    interleaved: bool = False
    blocks: list[str] | None = None
    per_depth_affine: bool = False
    grad_checkpointing: bool = False

    def elastic_options(self) -> dict[str, Any]:
        """Returns the arguments of `ElasticNet` other than the backbone and the input shape."""
        inherited = fields(BackboneConfig)
        names = [field.name for field in fields(TeammateConfig)[len(inherited) :]]
        return {name: getattr(self, name) for name in names}


if TYPE_CHECKING:
    Leader: TypeAlias = LeaderConfig | nn.Module
    Teammate: TypeAlias = TeammateConfig | nn.Module
else:  # The command line and files make members of configs alone.
    Leader, Teammate = LeaderConfig, TeammateConfig
