from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from teamnet_pl.elastic import Block, DepthPolicy, Trace, derive_depths
from teamnet_pl.elastic.plan import Expansion, Fork, Streams, num_fork_levels, plan_streams
from tests.helpers.strategies import depth_specs

POLICIES = get_args(DepthPolicy)


@given(
    stages=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    policy=st.sampled_from(POLICIES),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
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
    assert early.expansions == {"": Expansion(1, (0,) * len(depths))}
    plan = plan_streams(depths, trace)
    assert plan.expansions == {}
    for begun in range(total + 1):
        prefixes = [depth.kept[:begun] for depth in depths]
        first = tuple(prefixes.index(prefix) for prefix in dict.fromkeys(prefixes))
        assert plan.streams[f"norm{begun}"] == Streams(first, len(depths))
        assert early.streams[f"norm{begun}"].starts == tuple(range(len(depths)))
        if begun < total:
            runs = [depth.kept[begun] for depth in depths]
            inside = tuple(i for i in first if runs[i])
            assert plan.streams[f"block{begun}.norm"] == Streams(inside, sum(runs))
            fork = early.forks[f"block{begun}"]
            assert fork == Fork(len(depths), sum(runs), sum(runs))
