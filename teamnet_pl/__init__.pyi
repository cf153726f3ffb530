from .backbones import BackboneConfig as BackboneConfig
from .cooperation import Cooperation as Cooperation
from .cooperation import LeaderConfig as LeaderConfig
from .cooperation import Team as Team
from .cooperation import TeammateConfig as TeammateConfig
from .elastic import Depth as Depth
from .elastic import ElasticNet as ElasticNet
from .errors import TeamNetError as TeamNetError
from .training import TrainedTeam as TrainedTeam
from .training import train as train

__version__: str
