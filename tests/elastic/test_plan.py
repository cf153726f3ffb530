from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from teamnet_pl.elastic import Block, DepthPolicy, Trace, derive_depths
from teamnet_pl.elastic.plan import Expansion, num_fork_levels, plan_streams
from tests.helpers.strategies import depth_specs

POLICIES = get_args(DepthPolicy)


@given(
    stages=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    policy=st.sampled_from(POLICIES),
    data=st.data(),
)
@settings(max_examples=100)
def test_plan_has_a_stream_for_each_distinct_prefix(stages, policy, data):
    depths = derive_depths(stages, data.draw(depth_specs(stages), label="depths"), policy)
    total = sum(stages)
    blocks = [Block(f"block{i}", 0) for i in range(total)]
    order = [("", True), ("norm0", True), ("norm0", False)]
    for i in range(total):
        inside, after = f"block{i}.norm", f"norm{i + 1}"
        order += [(f"block{i}", True), (inside, True), (inside, False), (f"block{i}", False)]
        order += [(after, True), (after, False)]
    order.append(("", False))
    norms = [name for name, begins in order if begins and "norm" in name]
    trace = Trace(tuple(blocks), tuple(norms), tuple(order), {})
    assert num_fork_levels(trace) == 2
    early = plan_streams(depths, trace, level=1)
    apart = tuple(range(len(depths)))
    assert early.expansions == {"": Expansion((0,) * len(depths), apart)}
    plan = plan_streams(depths, trace)
    assert plan.expansions == {}
    for begun in range(total + 1):
        prefixes = [depth.kept[:begun] for depth in depths]
        distinct = [*dict.fromkeys(prefixes)]
        streams = tuple(distinct.index(prefix) for prefix in prefixes)
        assert plan.coupled[f"norm{begun}"] == streams
        assert early.coupled[f"norm{begun}"] == apart
        if begun < total:
            num_running = sum(depth.kept[begun] for depth in depths)
            assert plan.arriving[f"block{begun}"] == streams
            assert early.arriving[f"block{begun}"] == apart
            assert plan.coupled[f"block{begun}.norm"] == streams[:num_running]
