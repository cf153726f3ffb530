import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teamnet_pl.cooperation import (
    Cooperation,
    Edge,
    KLDivergence,
    LabelWeights,
    PeerEdge,
    SubNetworkEdge,
    TeacherEdge,
    Transfer,
    distillation_loss,
)

TEAMMATES = {"a": ["d2", "d1", "d0"], "b": ["d2", "d0"]}


def edges(cooperation):
    """(teacher, student): (weight, temperature)."""
    return {
        (transfer.teacher, transfer.student): (transfer.weight, transfer.kind.temperature)
        for transfer in cooperation.transfers(TEAMMATES, has_leader=True)
    }


def kl(temperature):
    return KLDivergence(temperature)


OFF = {
    "leader": TeacherEdge(0.0),
    "peer": PeerEdge(0.0),
    "sub_networks": SubNetworkEdge(0.0),
}


def test_each_group_of_transfers_has_its_weight_and_temperature():
    cooperation = Cooperation(
        leader=TeacherEdge(0.1, kl(1.0)),
        peer=PeerEdge(0.2, kl(2.0), students="deepest"),
        sub_networks=SubNetworkEdge(0.3, kl(3.0)),
        ensemble=TeacherEdge(0.4, kl(4.0), students="deepest"),
        to_leader=Edge(0.5, kl(5.0)),
    )
    assert edges(cooperation) == {
        ("leader", "a/d2"): (0.1, 1.0),
        ("leader", "a/d1"): (0.1, 1.0),
        ("leader", "a/d0"): (0.1, 1.0),
        ("leader", "b/d2"): (0.1, 1.0),
        ("leader", "b/d0"): (0.1, 1.0),
        ("a/d2", "b/d2"): (0.2, 2.0),
        ("b/d2", "a/d2"): (0.2, 2.0),
        ("a/d2", "a/d1"): (0.3, 3.0),
        ("a/d2", "a/d0"): (0.3, 3.0),
        ("b/d2", "b/d0"): (0.3, 3.0),
        ("ensemble", "a/d2"): (0.4, 4.0),
        ("ensemble", "b/d2"): (0.4, 4.0),
        ("a/d2", "leader"): (0.5, 5.0),
        ("b/d2", "leader"): (0.5, 5.0),
    }


@pytest.mark.parametrize(
    ("group", "edge", "expected"),
    [
        ("leader", TeacherEdge(1.0, students="deepest"), ["leader a/d3", "leader b/d3"]),
        (
            "peer",
            PeerEdge(1.0),
            ["b/d3 a/d3", "b/d3 a/d1", "a/d3 b/d3", "a/d3 b/d2", "a/d3 b/d0"],
        ),
        (
            "peer",
            PeerEdge(1.0, teachers="nearest"),
            ["b/d3 a/d3", "b/d2 a/d1", "a/d3 b/d3", "a/d3 b/d2", "a/d1 b/d0"],
        ),
        ("peer", PeerEdge(1.0, students="deepest"), ["b/d3 a/d3", "a/d3 b/d3"]),
        ("sub_networks", SubNetworkEdge(1.0), ["a/d3 a/d1", "b/d3 b/d2", "b/d3 b/d0"]),
        (
            "sub_networks",
            SubNetworkEdge(1.0, teachers="next"),
            ["a/d3 a/d1", "b/d3 b/d2", "b/d2 b/d0"],
        ),
        (
            "sub_networks",
            SubNetworkEdge(1.0, teachers="others"),
            [
                *("a/d1 a/d3", "a/d3 a/d1"),
                *("b/d2 b/d3", "b/d0 b/d3", "b/d3 b/d2", "b/d0 b/d2", "b/d3 b/d0", "b/d2 b/d0"),
            ],
        ),
    ],
)
def test_which_depths_teach_and_learn(group, edge, expected):
    cooperation = Cooperation(**{**OFF, group: edge})
    teammates = {"a": ["d3", "d1"], "b": ["d3", "d2", "d0"]}
    transfers = cooperation.transfers(teammates, has_leader=True)
    assert [f"{each.teacher} {each.student}" for each in transfers] == expected


def test_extra_transfers_name_members_or_teammates():
    extra = [
        Transfer(0.1, kl(1.0), teacher="a/d1", student="a/d0"),
        Transfer(0.2, kl(2.0), teacher="a", student="b/d0"),
        Transfer(0.3, kl(3.0), teacher="leader", student="b"),
        Transfer(0.0, kl(4.0), teacher="b", student="a"),
        Transfer(0.5, kl(5.0), teacher="ensemble", student="leader"),
    ]
    assert edges(Cooperation(**OFF, extra=extra)) == {
        ("a/d1", "a/d0"): (0.1, 1.0),
        ("a/d2", "b/d0"): (0.2, 2.0),
        ("leader", "b/d2"): (0.3, 3.0),
        ("ensemble", "leader"): (0.5, 5.0),
    }


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("a/d9", "a/d0"),  # unknown members
        ("a/d2", "c"),
        ("", ""),
        ("a", "ensemble"),  # which is no net
        ("a", "a/d2"),  # a member that teaches itself
        ("b/d0", "b/d0"),
    ],
)
def test_transfers_that_are_not_between_two_members_are_refused(teacher, student):
    cooperation = Cooperation(extra=[Transfer(0.5, teacher=teacher, student=student)])
    with pytest.raises(ValueError, match=f"no transfer {teacher}->{student}: .*a/d1.*b/d0"):
        cooperation.transfers(TEAMMATES, has_leader=True)


def test_a_factor_of_an_unknown_member_is_refused():
    cooperation = Cooperation(member_weights={"a/d9": 2.0})
    with pytest.raises(ValueError, match="no member a/d9; the members are a/d0, a/d1"):
        cooperation.transfers(TEAMMATES, has_leader=True)


def test_a_missing_leader_cannot_teach():
    cooperation = Cooperation(extra=[Transfer(0.5, teacher="leader", student="a/d0")])
    with pytest.raises(ValueError, match="leader->a/d0"):
        cooperation.transfers(TEAMMATES, has_leader=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edge(weight=-0.1), "negative"),
        (lambda: KLDivergence(temperature=0.0), "> 0"),
        (lambda: KLDivergence(temperature=-1.0), "> 0"),
        (lambda: Edge(1.0, ramp=-0.1), "ramp"),
        (lambda: Edge(1.0, ramp=1.1), "ramp"),
        (lambda: LabelWeights(others=-1.0), "others must not be negative"),
        (lambda: Cooperation(member_weights={"a/d2": -1.0}), "a/d2 must not be negative"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(
    images=st.integers(1, 5),
    classes=st.integers(2, 7),
    temperature=st.floats(0.5, 8.0),
    seed=st.integers(0, 2**31),
    large=st.booleans(),
)
def test_distillation_is_the_divergence_times_the_temperature_squared(
    images, classes, temperature, seed, large
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, images, classes, generator=generator).double() * (1 + 30 * large)
    student, teacher = logits
    softened = [
        torch.distributions.Categorical(logits=logits / temperature)
        for logits in (teacher, student)
    ]
    expected = temperature**2 * torch.distributions.kl_divergence(*softened).mean()
    loss = distillation_loss(student, teacher, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-12)


def test_distillation_stays_finite_where_a_probability_is_zero():
    student, teacher = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(200.0)
