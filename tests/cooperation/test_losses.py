"""The cooperative loss alone: logits in, a hand-written sum out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from teamnet_pl.cooperation import Cooperation, CooperativeLoss, Edge, KLDivergence, Transfer

CLASSES = 4
TEAMMATES = {"a": ["d2", "d1", "d0"], "b": ["d2", "d0"]}
MEMBERS = ["leader", "a/d2", "a/d1", "a/d0", "b/d2", "b/d0"]
PAIRS = {
    "leader": [("leader", "a/d2"), ("leader", "b/d2")],
    "peer": [("a/d2", "b/d2"), ("b/d2", "a/d2")],
    "sub_networks": [("a/d2", "a/d1"), ("a/d2", "a/d0"), ("b/d2", "b/d0")],
}
EXTRA = ("b/d0", "a/d1")


def make_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = {
        member: torch.randn(3, CLASSES, generator=generator, dtype=torch.double)
        for member in MEMBERS
    }
    return logits, torch.randint(CLASSES, (3,), generator=generator)


def label_loss(logits, labels):
    """The sum of the cross-entropies of all members."""
    log_likelihoods = [
        values.log_softmax(-1)[range(len(labels)), labels].mean() for values in logits.values()
    ]
    return -sum(log_likelihoods)


def divergence(logits, teacher, student, temperature):
    teacher, student = ((logits[name] / temperature).softmax(-1) for name in (teacher, student))
    return temperature**2 * (teacher * (teacher / student).log()).sum(-1).mean()


weights = st.floats(0, 3)
temperatures = st.floats(0.5, 5)


@given(
    edges=st.fixed_dictionaries(dict.fromkeys(PAIRS, st.tuples(weights, temperatures))),
    extra=st.tuples(weights, temperatures),
    ramp=st.floats(0, 1),
    progress=st.floats(0.01, 1),
    seed=st.integers(0, 2**31),
)
def test_the_loss_is_the_sum_written_by_hand(edges, extra, ramp, progress, seed):
    cooperation = Cooperation(
        **{
            group: Edge(weight, KLDivergence(temperature))
            for group, (weight, temperature) in edges.items()
        },
        extra=[Transfer(extra[0], KLDivergence(extra[1]), *EXTRA)],
        ramp=ramp,
    )
    criterion = CooperativeLoss(TEAMMATES, cooperation)
    logits, labels = make_logits(seed)
    expected = label_loss(logits, labels)
    factor = min(1.0, progress / ramp) if ramp else 1.0
    for group, (weight, temperature) in edges.items():
        for teacher, student in PAIRS[group]:
            expected += factor * weight * divergence(logits, teacher, student, temperature)
    expected += factor * extra[0] * divergence(logits, *EXTRA, extra[1])
    loss = criterion(logits, labels, progress)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(criterion.total(criterion.terms(logits, labels), progress), loss)


@pytest.mark.parametrize(("progress", "factor"), [(0.1, 0.25), (0.2, 0.5), (0.4, 1), (0.9, 1)])
def test_progress_below_the_ramp_scales_the_transfers_only(progress, factor):
    criterion = CooperativeLoss(TEAMMATES, Cooperation(ramp=0.4))
    logits, labels = make_logits(0)
    alone = sum(criterion.terms(logits, labels).labels.values())
    torch.testing.assert_close(alone, label_loss(logits, labels))
    transfers = criterion(logits, labels) - alone
    assert transfers > 0.1
    loss = criterion(logits, labels, progress)
    torch.testing.assert_close(loss, alone + factor * transfers)
    assert criterion.ramp(progress) == pytest.approx(factor)


def test_terms_are_named_and_unweighted():
    criterion = CooperativeLoss(TEAMMATES, Cooperation(peer=Edge(0.0), sub_networks=Edge(7.0)))
    logits, labels = make_logits(1)
    terms = criterion.terms(logits, labels).named()
    pairs = PAIRS["leader"] + PAIRS["sub_networks"]
    assert list(terms) == [f"ce/{member}" for member in MEMBERS] + [
        f"kd/{teacher}->{student}" for teacher, student in pairs
    ]
    for member in MEMBERS:
        torch.testing.assert_close(terms[f"ce/{member}"], F.cross_entropy(logits[member], labels))
    for pair in pairs:
        expected = divergence(logits, *pair, 2.0)
        torch.testing.assert_close(terms["kd/{}->{}".format(*pair)], expected)


def test_a_frozen_leader_has_no_label_loss():
    logits, labels = make_logits(2)
    criterion = CooperativeLoss(TEAMMATES, leader_frozen=True)
    terms = criterion.terms(logits, labels)
    assert list(terms.labels) == MEMBERS[1:]
    assert "leader->a/d2" in terms.transfers


def test_labels_alone_without_transfers():
    cooperation = Cooperation(peer=Edge(0.0), sub_networks=Edge(0.0))
    criterion = CooperativeLoss(TEAMMATES, cooperation, leader=False)
    logits, labels = make_logits(3)
    del logits["leader"]
    assert criterion.transfers == ()
    for progress in (0.0, 1.0):
        loss = criterion(logits, labels, progress)
        torch.testing.assert_close(loss, label_loss(logits, labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_labels_may_be_probabilities(smoothing):
    criterion = CooperativeLoss(TEAMMATES, label_smoothing=smoothing)
    logits, labels = make_logits(4)
    one_hot = torch.eye(CLASSES, dtype=torch.double)[labels]
    torch.testing.assert_close(criterion(logits, one_hot), criterion(logits, labels))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range(smoothing):
    with pytest.raises(
        ValueError, match=rf"label_smoothing must be in \[0, 1\), found {smoothing}"
    ):
        CooperativeLoss(TEAMMATES, label_smoothing=smoothing)
