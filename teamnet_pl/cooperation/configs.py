"""The members of a team as plain data."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import nn

from teamnet_pl.backbones import BackboneConfig
from teamnet_pl.elastic import AdaptiveNet, DepthPolicy, DepthSpec
from teamnet_pl.errors import TeamNetError


@dataclass(frozen=True)
class LeaderConfig(BackboneConfig):
    """The Leader: by default twice as wide as the default Teammates.

    Attributes:
        frozen: Whether it only teaches: evaluation mode, no gradient, no label loss.
    """

    name: str = "cifar/resnet20x2"
    frozen: bool = False

    @property
    def new_classifiers(self) -> bool:
        """Whether classifiers may start with new weights: those of a frozen net never learn."""
        return not self.frozen


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
        net: Class path of the net that runs the backbone at these depths; those in
            `teamnet_pl.baselines` are other ways than an elastic net.
        sampled_depths: Number of depths, besides the deepest and the shallowest, that each step of
            training draws and runs; all by default. Source: the sandwich rule of Yu and Huang,
            "Universally Slimmable Networks" (arXiv 1903.05134).
        progressive: Share of the Teammates' training over which the shallower depths join one by
            one, the deeper ones first. Source: progressive shrinking of Cai et al., "Once-for-All"
            (arXiv 1908.09791).
        shared_gradients: Whether the gradient of a weight is the sum over the depths that share it,
            or their mean. Source of the mean: gradient equilibrium of Li et al., "Improved
            Techniques for Training Adaptive Deep Networks" (arXiv 1908.06294).
    """

    depths: DepthSpec = 4
    policy: DepthPolicy = "last_stage_first"
    interleaved: bool = False
    blocks: list[str] | None = None
    per_depth_affine: bool = False
    grad_checkpointing: bool = False
    net: str = "teamnet_pl.elastic.ElasticNet"
    sampled_depths: int | None = None
    progressive: float = 0.0
    shared_gradients: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if self.sampled_depths is not None and self.sampled_depths < 0:
            raise TeamNetError(f"sampled_depths must be 0 or more, found {self.sampled_depths}.")
        if not 0 <= self.progressive <= 1:
            raise TeamNetError(
                f"progressive is a share of the training, 0 to 1; found {self.progressive}."
            )
        if self.shared_gradients not in ("sum", "mean"):
            raise TeamNetError(
                f"shared_gradients must be sum or mean, found {self.shared_gradients!r}."
            )

    def elastic_options(self) -> dict[str, Any]:
        """Returns the arguments of the net's class other than the backbone and the input shape."""
        return {name: getattr(self, name) for name in _ELASTIC_OPTIONS}

    def net_class(self) -> type[AdaptiveNet]:
        """Imports the net's class.

        Raises:
            TeamNetError: If there is no such class, or it is not a net of several depths.
        """
        module, _, name = self.net.rpartition(".")
        try:
            net = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise TeamNetError(f"The net {self.net!r} cannot be imported: {error}.") from error
        if not (isinstance(net, type) and issubclass(net, AdaptiveNet)):
            raise TeamNetError(
                f"The net {self.net} is not a class derived from teamnet_pl.elastic.AdaptiveNet: "
                "choose ElasticNet or one in teamnet_pl.baselines."
            )
        return net


_ELASTIC_OPTIONS = (
    "depths",
    "policy",
    "interleaved",
    "blocks",
    "per_depth_affine",
    "grad_checkpointing",
)

if TYPE_CHECKING:
    Leader: TypeAlias = LeaderConfig | nn.Module
    Teammate: TypeAlias = TeammateConfig | nn.Module
else:  # The command line and files make members of configs alone.
    Leader, Teammate = LeaderConfig, TeammateConfig
