from .early_exits import EarlyExitNet as EarlyExitNet
from .layer_drop import LayerDropNet as LayerDropNet
from .separate import SeparateNets as SeparateNets
from .slimmable import SlimmableNet as SlimmableNet
