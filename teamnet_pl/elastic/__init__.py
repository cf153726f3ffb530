"""One net, many depths. Needs nothing but PyTorch and is useful alone."""

from teamnet_pl.elastic.adaptive import AdaptiveNet, DepthLike
from teamnet_pl.elastic.costs import Cost, cost, cost_table, costs_without_blocks, depth_costs
from teamnet_pl.elastic.depths import Depth, DepthPolicy, DepthSpec, derive_depths, drop_order
from teamnet_pl.elastic.discovery.find import trace_backbone
from teamnet_pl.elastic.features import DepthFeatures
from teamnet_pl.elastic.net import ElasticNet
from teamnet_pl.elastic.plan import Block, Trace

__all__ = [
    "AdaptiveNet",
    "Block",
    "Cost",
    "Depth",
    "DepthFeatures",
    "DepthLike",
    "DepthPolicy",
    "DepthSpec",
    "ElasticNet",
    "Trace",
    "cost",
    "cost_table",
    "costs_without_blocks",
    "depth_costs",
    "derive_depths",
    "drop_order",
    "trace_backbone",
]
