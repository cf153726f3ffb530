import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teamnet_pl.cooperation import Cooperation, Edge, KLDivergence, Transfer, distillation_loss

TEAMMATES = {"a": ["d2", "d1", "d0"], "b": ["d2", "d0"]}


def edges(cooperation):
    """(teacher, student): (weight, temperature)."""
    return {
        (transfer.teacher, transfer.student): (transfer.weight, transfer.kind.temperature)
        for transfer in cooperation.transfers(TEAMMATES, has_leader=True)
    }


def test_each_group_of_transfers_has_its_weight_and_temperature():
    cooperation = Cooperation(
        Edge(0.1, KLDivergence(1.0)), Edge(0.2, KLDivergence(2.0)), Edge(0.3, KLDivergence(3.0))
    )
    assert edges(cooperation) == {
        ("leader", "a/d2"): (0.1, 1.0),
        ("leader", "b/d2"): (0.1, 1.0),
        ("a/d2", "b/d2"): (0.2, 2.0),
        ("b/d2", "a/d2"): (0.2, 2.0),
        ("a/d2", "a/d1"): (0.3, 3.0),
        ("a/d2", "a/d0"): (0.3, 3.0),
        ("b/d2", "b/d0"): (0.3, 3.0),
    }


def test_extra_transfers_name_members_or_teammates():
    extra = [
        Transfer(0.1, KLDivergence(1.0), "a/d1", "a/d0"),
        Transfer(0.2, KLDivergence(2.0), "a", "b/d0"),
        Transfer(0.3, KLDivergence(3.0), "leader", "b"),
        Transfer(0.0, KLDivergence(4.0), "b", "a"),
    ]
    off = Edge(0.0)
    assert edges(Cooperation(off, off, off, extra)) == {
        ("a/d1", "a/d0"): (0.1, 1.0),
        ("a/d2", "b/d0"): (0.2, 2.0),
        ("leader", "b/d2"): (0.3, 3.0),
    }


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("a/d9", "a/d0"),  # unknown members
        ("a/d2", "c"),
        ("", ""),
        ("a", "leader"),  # the Leader cannot be taught
        ("a", "a/d2"),  # a member that teaches itself
        ("b/d0", "b/d0"),
    ],
)
def test_transfers_that_are_not_between_two_members_are_refused(teacher, student):
    cooperation = Cooperation(extra=[Transfer(0.5, KLDivergence(2.0), teacher, student)])
    with pytest.raises(ValueError, match=f"no transfer {teacher}->{student}: .*a/d1.*b/d0"):
        cooperation.transfers(TEAMMATES, has_leader=True)


def test_a_missing_leader_cannot_teach():
    cooperation = Cooperation(extra=[Transfer(0.5, KLDivergence(2.0), "leader", "a/d0")])
    with pytest.raises(ValueError, match="leader->a/d0"):
        cooperation.transfers(TEAMMATES, has_leader=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edge(weight=-0.1), "negative"),
        (lambda: KLDivergence(temperature=0.0), "> 0"),
        (lambda: KLDivergence(temperature=-1.0), "> 0"),
        (lambda: Cooperation(ramp=-0.1), "ramp"),
        (lambda: Cooperation(ramp=1.1), "ramp"),
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
