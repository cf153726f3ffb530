"""TeamNet: train one network that runs at many depths."""

from importlib.metadata import version

from teamnet_pl.backbones import BackboneConfig
from teamnet_pl.cooperation import Cooperation, LeaderConfig, Team, TeammateConfig
from teamnet_pl.elastic import Depth, ElasticNet
from teamnet_pl.errors import TeamNetError

__all__ = [
    "BackboneConfig",
    "Cooperation",
    "Depth",
    "ElasticNet",
    "LeaderConfig",
    "Team",
    "TeamNetError",
    "TeammateConfig",
]

__version__ = version("teamnet_pl")
