"""A team of nets that learn from labels and from each other."""

from teamnet_pl.cooperation.configs import LeaderConfig, TeammateConfig
from teamnet_pl.cooperation.optimization import OptimizerConfig, ScheduleConfig
from teamnet_pl.cooperation.team import Team
from teamnet_pl.cooperation.transfers import Cooperation, Edge, Transfer, distillation_loss

__all__ = [
    "Cooperation",
    "Edge",
    "LeaderConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "Team",
    "TeammateConfig",
    "Transfer",
    "distillation_loss",
]
