from itertools import accumulate, pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teamnet_pl.elastic import DepthPolicy, derive_depths, drop_order

POLICIES = get_args(DepthPolicy)
stage_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=5)
policies = st.sampled_from(POLICIES)


@pytest.mark.parametrize(
    ("stages", "policy", "order"),
    [
        ([3, 2, 1], "round_robin", [5, 4, 2, 3, 1, 0]),
        ([1, 3], "round_robin", [3, 0, 2, 1]),
        ([3, 2, 1], "last_stage_first", [5, 4, 3, 2, 1, 0]),
        ([3, 2, 1], "first_stage_first", [2, 1, 0, 4, 3, 5]),
        ([3, 1], "evenly_spread", [3, 1, 0, 2]),
        ([2, 3], "evenly_spread", [4, 2, 0, 3, 1]),
    ],
)
def test_drop_order(stages, policy, order):
    assert drop_order(stages, policy) == order


@given(stages=stage_sizes, policy=policies)
@settings(max_examples=50)
def test_drop_order_names_every_block_once(stages, policy):
    assert sorted(drop_order(stages, policy)) == list(range(sum(stages)))


@given(stages=stage_sizes, policy=policies, data=st.data())
@settings(max_examples=100)
def test_any_number_of_depths(stages, policy, data):
    total = sum(stages)
    number = data.draw(st.integers(2, total + 1) | st.just(total + 1), label="depths")
    depths = derive_depths(stages, number, policy)

    assert len(depths) == number
    assert depths[0].kept == (True,) * total
    assert depths[-1].kept == (False,) * total
    kept = [{i for i, keep in enumerate(depth.kept) if keep} for depth in depths]
    assert all(shallow < deep for deep, shallow in pairwise(kept))  # nested, so distinct as well
    dropped = [total - len(blocks) for blocks in kept]
    order = drop_order(stages, policy)
    assert kept == [set(order[count:]) for count in dropped]
    steps = [b - a for a, b in pairwise(dropped)]
    assert max(steps) - min(steps) <= 1  # spread evenly
    for depth, blocks in zip(depths, kept, strict=True):
        ends = [0, *accumulate(stages)]
        assert depth.name == str(depth) == f"d{len(blocks)}"
        assert depth.num_blocks == len(blocks)
        assert depth.per_stage == tuple(sum(depth.kept[a:b]) for a, b in pairwise(ends))


@given(stages=stage_sizes, policy=policies, data=st.data())
@settings(max_examples=50)
def test_list_of_counts_is_the_same_as_a_number(stages, policy, data):
    total = sum(stages)
    every = derive_depths(stages, total + 1, policy)
    counts = data.draw(st.lists(st.integers(0, total - 1), min_size=1, unique=True), label="counts")
    some = derive_depths(stages, [*counts, total], policy)
    assert some == tuple(depth for depth in every if depth.num_blocks in {*counts, total})


@pytest.mark.parametrize(
    ("stages", "number", "plain", "between"),
    [
        ([8], 3, [8, 4, 0], [8, 6, 2]),
        ([6, 6], 4, [12, 8, 4, 0], [12, 10, 6, 2]),
        ([2, 2], 3, [4, 2, 0], [4, 3, 1]),
        ([2, 2], 5, [4, 3, 2, 1, 0], [4, 3, 2, 1, 0]),  # no room between them
    ],
)
def test_interleaved_depths(stages, number, plain, between):
    assert [d.num_blocks for d in derive_depths(stages, number)] == plain
    assert [d.num_blocks for d in derive_depths(stages, number, interleaved=True)] == between


@given(stages=stage_sizes, policy=policies, data=st.data())
@settings(max_examples=50)
def test_interleaving_keeps_the_number_of_depths(stages, policy, data):
    total = sum(stages)
    number = data.draw(st.integers(2, total + 1), label="depths")
    depths = derive_depths(stages, number, policy, interleaved=True)
    counts = [depth.num_blocks for depth in depths]
    assert len(set(counts)) == number
    assert counts[0] == total
    others = [depth.num_blocks for depth in derive_depths(stages, number, policy)]
    for (deep, shallow), between in zip(pairwise(others), counts[1:], strict=True):
        assert deep >= between >= shallow
    assert set(depths) <= set(derive_depths(stages, total + 1, policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_counts_per_stage_keep_the_first_blocks_of_a_stage(policy):
    depths = derive_depths([3, 2], [[1, 0], [3, 2], [2, 0]], policy)
    assert [depth.kept for depth in depths] == [
        (True, True, True, True, True),
        (True, True, False, False, False),
        (True, False, False, False, False),
    ]
    assert [depth.per_stage for depth in depths] == [(3, 2), (2, 0), (1, 0)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (1, "2 to 6 depths, found 1"),
        (0, "2 to 6 depths, found 0"),
        (7, "2 to 6 depths, found 7"),
        ([5], "at least two depths, found 1"),
        ([], "at least two depths, found 0"),
        ([[3, 2]], "at least two depths, found 1"),
        ([5, 3, 3], "nested"),
        ([6, 5], "keeps 0 to 5"),
        ([5, -1], "keeps 0 to 5"),
        ([4, 3], "deepest depth must keep them all"),
        ([[3, 1], [1, 1]], "deepest depth must keep them all"),
        ([[3, 2], [1, 2], [2, 0]], r"nested.*\[2, 0\] does not fit inside \[1, 2\]"),
        ([[3, 2], [1, 1], [2, 0]], "nested"),
        ([[3, 2], [3, 2]], "nested"),
        ([[3, 2], [3]], r"cannot keep \[3\]"),
        ([[3, 2], [3, 1, 0]], r"cannot keep \[3, 1, 0\]"),
        ([[3, 2], [3, 3]], r"cannot keep \[3, 3\]"),
        ([[3, 2], [-1, 2]], r"cannot keep \[-1, 2\]"),
        ([5, [3, 1]], "Depths are a number"),
        (["5", "3"], "Depths are a number"),
    ],
)
def test_depths_that_do_not_fit(spec, message):
    with pytest.raises(ValueError, match=message):
        derive_depths([3, 2], spec)


def test_errors_describe_the_net():
    with pytest.raises(ValueError, match=r"5 skippable blocks, \[3, 2\] by stage"):
        derive_depths([3, 2], 9)


@pytest.mark.parametrize("spec", [3, [5, 1]])
def test_unknown_policy(spec):
    with pytest.raises(ValueError, match=r"policy 'random'.*round_robin.*evenly_spread"):
        derive_depths([3, 2], spec, "random")
