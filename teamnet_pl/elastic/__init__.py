"""One net, many depths. Needs no Lightning and is useful alone."""

from teamnet_pl.elastic.blocks import Block
from teamnet_pl.elastic.cost import Cost, cost, cost_table, costs_without_blocks, depth_costs
from teamnet_pl.elastic.depths import Depth, DepthPolicy, DepthSpec, derive_depths, drop_order
from teamnet_pl.elastic.net import DepthLike, ElasticNet

__all__ = [
    "Block",
    "Cost",
    "Depth",
    "DepthLike",
    "DepthPolicy",
    "DepthSpec",
    "ElasticNet",
    "cost",
    "cost_table",
    "costs_without_blocks",
    "depth_costs",
    "derive_depths",
    "drop_order",
]
