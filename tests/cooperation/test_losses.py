"""The cooperative loss alone: logits in, a hand-written sum out."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from teamnet_pl.cooperation import (
    Cooperation,
    CooperativeLoss,
    Edge,
    FeatureEdge,
    KLDivergence,
    LabelWeights,
    PeerEdge,
    SubNetworkEdge,
    TeacherEdge,
    Transfer,
)

CLASSES = 4
TEAMMATES = {"a": ["d2", "d1", "d0"], "b": ["d2", "d0"]}
MEMBERS = ["leader", "a/d2", "a/d1", "a/d0", "b/d2", "b/d0"]
PAIRS = {
    "leader": [("leader", student) for student in MEMBERS[1:]],
    "peer": [
        *[("b/d2", student) for student in ("a/d2", "a/d1", "a/d0")],
        *[("a/d2", student) for student in ("b/d2", "b/d0")],
    ],
    "sub_networks": [("a/d2", "a/d1"), ("a/d2", "a/d0"), ("b/d2", "b/d0")],
    "ensemble": [("ensemble", student) for student in MEMBERS[1:]],
    "to_leader": [("a/d2", "leader"), ("b/d2", "leader")],
}
EDGES = {
    "leader": TeacherEdge,
    "peer": PeerEdge,
    "sub_networks": SubNetworkEdge,
    "ensemble": TeacherEdge,
    "to_leader": Edge,
}
EXTRA = ("b/d0", "a/d1")
NO_TRANSFERS = Cooperation(**{group: edge(0.0) for group, edge in EDGES.items()})


def make_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = {
        member: torch.randn(3, CLASSES, generator=generator, dtype=torch.double)
        for member in MEMBERS
    }
    return logits, torch.randint(CLASSES, (3,), generator=generator)


def label_loss(logits, labels):
    return -logits.log_softmax(-1)[range(len(labels)), labels].mean()


def ensemble(logits, labels):
    """The mixture of the strong members' predictions, each by its probability of the label."""
    predictions = torch.stack([logits[name].softmax(-1) for name in ("leader", "a/d2", "b/d2")])
    weights = predictions[:, range(len(labels)), labels]
    weights = weights / weights.sum(0)
    return (weights[..., None] * predictions).sum(0).log()


def divergence(logits, teacher, student, temperature):
    teacher, student = ((logits[name] / temperature).softmax(-1) for name in (teacher, student))
    return temperature**2 * (teacher * (teacher / student).log()).sum(-1).mean()


def grown(ramp, progress):
    return min(1.0, progress / ramp) if ramp else 1.0


weights = st.floats(0, 3)
temperatures = st.floats(0.5, 5)
shares = st.floats(0, 1)


@given(
    edges=st.fixed_dictionaries(dict.fromkeys(PAIRS, st.tuples(weights, temperatures, shares))),
    extra=st.tuples(weights, temperatures, shares),
    label_weights=st.tuples(*[st.none() | st.floats(0.01, 3)] * 3),
    factors=st.dictionaries(st.sampled_from(MEMBERS), weights),
    progress=st.floats(0.01, 1),
    seed=st.integers(0, 2**31),
)
def test_the_loss_is_the_sum_written_by_hand(edges, extra, label_weights, factors, progress, seed):
    weight, temperature, ramp = extra
    cooperation = Cooperation(
        **{
            group: EDGES[group](weight, KLDivergence(temperature), ramp)
            for group, (weight, temperature, ramp) in edges.items()
        },
        extra=[Transfer(weight, KLDivergence(temperature), ramp, *EXTRA)],
        labels=LabelWeights(*label_weights),
        member_weights=factors,
    )
    criterion = CooperativeLoss(TEAMMATES, cooperation)
    logits, labels = make_logits(seed)
    expected = 0.0
    taken = dict.fromkeys(MEMBERS, 0.0)
    teachers = logits | {"ensemble": ensemble(logits, labels)}
    groups = [(PAIRS[group], *edge) for group, edge in edges.items()] + [([EXTRA], *extra)]
    for pairs, weight, temperature, ramp in groups:
        for teacher, student in pairs:
            term = divergence(teachers, teacher, student, temperature)
            expected += factors.get(student, 1) * grown(ramp, progress) * weight * term
            taken[student] += grown(ramp, progress) * weight
    deepest, others, leader = label_weights
    for member in MEMBERS:
        weight = {"leader": leader, "a/d2": deepest, "b/d2": deepest}.get(member, others)
        weight = max(0.1, 1 - taken[member]) if weight is None else weight
        expected += factors.get(member, 1) * weight * label_loss(logits[member], labels)
    loss = criterion(logits, labels, progress)
    torch.testing.assert_close(loss, torch.as_tensor(expected), rtol=1e-9, atol=1e-9)
    terms = criterion.terms(logits, labels, progress)
    torch.testing.assert_close(criterion.total(terms, progress), loss)


@pytest.mark.parametrize(("progress", "factor"), [(0.1, 0.25), (0.2, 0.5), (0.4, 1), (0.9, 1)])
def test_the_factors_of_ramps(progress, factor):
    cooperation = Cooperation(
        leader=TeacherEdge(1.0, ramp=0.4), peer=PeerEdge(0.0), ensemble=TeacherEdge(0.1, ramp=0.0)
    )
    ramps = CooperativeLoss(TEAMMATES, cooperation).ramps(progress)
    assert ramps["leader"] == pytest.approx(factor)
    assert ramps["ensemble"] == 1
    assert "peer" not in ramps


def test_terms_are_named_and_unweighted():
    cooperation = Cooperation(
        leader=TeacherEdge(0.5),
        peer=PeerEdge(0.0),
        sub_networks=SubNetworkEdge(7.0),
        labels=LabelWeights(others=0.0, leader=0.3),
    )
    criterion = CooperativeLoss(TEAMMATES, cooperation)
    logits, labels = make_logits(1)
    terms = criterion.terms(logits, labels).named()
    pairs = PAIRS["leader"] + PAIRS["sub_networks"]
    labeled = ["leader", "a/d2", "b/d2"]  # a label loss without a weight is not computed
    assert list(terms) == [f"ce/{member}" for member in labeled] + [
        f"kd/{teacher}_to_{student}" for teacher, student in pairs
    ]
    for member in labeled:
        torch.testing.assert_close(terms[f"ce/{member}"], F.cross_entropy(logits[member], labels))
    for pair in pairs:
        expected = divergence(logits, *pair, 4.0)
        torch.testing.assert_close(terms["kd/{}_to_{}".format(*pair)], expected)


@pytest.mark.parametrize(
    ("finish", "progress", "is_trained"),
    [(0.0, 0.1, False), (0.5, 0.5, True), (0.5, 0.51, False), (1.0, 1.0, True)],
)
def test_a_finished_leader_only_teaches(finish, progress, is_trained):
    logits, labels = make_logits(2)
    cooperation = Cooperation(leader=TeacherEdge(0.5), to_leader=Edge(0.5))
    criterion = CooperativeLoss(TEAMMATES, cooperation, leader_finish=finish)
    terms = criterion.terms(logits, labels, progress)
    assert ("leader" in terms.labels) == is_trained
    assert ("a/d2->leader" in terms.transfers) == is_trained
    assert {"leader->a/d2", "leader->a/d0"} <= terms.transfers.keys()
    assert terms.labels.keys() - {"leader"} == set(MEMBERS[1:])


@given(present=st.sets(st.sampled_from(MEMBERS), min_size=1), seed=st.integers(0, 2**31))
def test_members_that_a_step_leaves_out_have_no_terms(present, seed):
    edges = {group: edge(0.5) for group, edge in EDGES.items() if group != "ensemble"}
    criterion = CooperativeLoss(TEAMMATES, Cooperation(**edges))
    logits, labels = make_logits(seed)
    terms = criterion.terms({name: logits[name] for name in MEMBERS if name in present}, labels)
    assert terms.labels.keys() == present
    assert terms.transfers.keys() == {
        f"{teacher}->{student}"
        for group in edges
        for teacher, student in PAIRS[group]
        if present.issuperset({teacher, student})
    }


@pytest.mark.parametrize(
    ("labels", "member"), [({"deepest": 0.0}, "a/d2"), ({"others": 0.0}, "a/d1")]
)
def test_a_depth_that_nothing_teaches_is_refused(labels, member):
    cooperation = dataclasses.replace(NO_TRANSFERS, labels=LabelWeights(**labels))
    with pytest.raises(ValueError, match=f"Nothing teaches {member}"):
        CooperativeLoss(TEAMMATES, cooperation)


def test_a_step_without_any_loss_is_refused():
    criterion = CooperativeLoss(TEAMMATES, NO_TRANSFERS, leader_finish=0.5)
    logits, labels = make_logits(8)
    with pytest.raises(ValueError, match="No term of the loss has a weight"):
        criterion({"leader": logits["leader"]}, labels, progress=0.7)


def test_a_leader_that_nothing_teaches_is_refused():
    cooperation = dataclasses.replace(NO_TRANSFERS, labels=LabelWeights(leader=0.0))
    with pytest.raises(ValueError, match="Nothing teaches the Leader"):
        CooperativeLoss(TEAMMATES, cooperation)
    CooperativeLoss(TEAMMATES, cooperation, leader_finish=0.0)  # a frozen one


def test_transfers_grow_from_when_the_teammates_start():
    cooperation = dataclasses.replace(NO_TRANSFERS, leader=TeacherEdge(1.0, ramp=0.5))
    criterion = CooperativeLoss(TEAMMATES, cooperation, leader_alone=0.6)
    growth = [criterion.ramps(progress)["leader"] for progress in (0.3, 0.6, 0.7, 0.8, 1.0)]
    assert growth == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])


def test_other_logits_may_teach_in_place_of_a_member():
    criterion = CooperativeLoss(TEAMMATES, Cooperation(leader=TeacherEdge(0.5)))
    logits, labels = make_logits(6)
    averaged = {"leader": torch.randn(3, CLASSES, dtype=torch.double)}
    terms = criterion.terms(logits, labels, teachers=averaged)
    expected = divergence(logits | averaged, "leader", "a/d1", 4.0)
    torch.testing.assert_close(terms.transfers["leader->a/d1"], expected)
    torch.testing.assert_close(terms.labels["leader"], F.cross_entropy(logits["leader"], labels))


def test_no_teacher_gets_a_gradient():
    cooperation = Cooperation(**{group: edge(0.5) for group, edge in EDGES.items()})
    logits, labels = make_logits(7)
    logits = {name: values.requires_grad_() for name, values in logits.items()}
    terms = CooperativeLoss(TEAMMATES, cooperation).terms(logits, labels)
    for name, term in terms.transfers.items():
        student = name.partition("->")[2]
        gradients = torch.autograd.grad(
            term, list(logits.values()), allow_unused=True, retain_graph=True
        )
        moved = [member for member, grad in zip(logits, gradients, strict=True) if grad is not None]
        assert moved == [student]


def test_labels_alone_without_transfers():
    criterion = CooperativeLoss(TEAMMATES, NO_TRANSFERS, leader=False)
    logits, labels = make_logits(3)
    del logits["leader"]
    assert criterion.transfers == ()
    for progress in (0.0, 1.0):
        loss = criterion(logits, labels, progress)
        expected = sum(label_loss(values, labels) for values in logits.values())
        torch.testing.assert_close(loss, expected)


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


@given(weight=st.floats(0.1, 3), progress=st.floats(0.01, 1), seed=st.integers(0, 2**31))
def test_features_are_taught_where_both_nets_have_them(weight, progress, seed):
    cooperation = dataclasses.replace(
        NO_TRANSFERS,
        leader=TeacherEdge(0.5, ramp=0.4),
        sub_networks=SubNetworkEdge(0.5, ramp=0.0),
        features=FeatureEdge(weight, ["x", "y"]),
        labels=LabelWeights(1.0, 1.0, 1.0),
        member_weights={"a/d0": 2.0},
    )
    criterion = CooperativeLoss(TEAMMATES, cooperation)
    logits, labels = make_logits(seed)
    generator = torch.Generator().manual_seed(seed)
    features = {
        "leader": {"x": torch.randn(3, 2, generator=generator)},
        "a/d2": {"x": torch.randn(3, 2, generator=generator), "y": torch.randn(3, 4)},
        "a/d1": {"x": torch.randn(3, 5, generator=generator)},  # of another shape
        "a/d0": {"x": torch.randn(3, 2, generator=generator), "y": torch.randn(3, 4)},
    }

    def error(student, teacher, *modules):
        values = [
            ((features[student][name] - features[teacher][name]) ** 2).mean()
            / (features[teacher][name] ** 2).mean()
            for name in modules
        ]
        return sum(values) / len(values)

    terms = criterion.terms(logits, labels, progress, features=features)
    expected = {
        "leader->a/d2": error("a/d2", "leader", "x"),
        "leader->a/d0": error("a/d0", "leader", "x"),
        "a/d2->a/d0": error("a/d0", "a/d2", "x", "y"),
    }
    assert terms.features.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms.features[name], value)
        logged = terms.named()["features/" + name.replace("->", "_to_")]
        assert logged is terms.features[name]
    grown_leader = min(1.0, progress / 0.4)
    added = criterion.total(terms, progress) - criterion(logits, labels, progress)
    by_hand = grown_leader * expected["leader->a/d2"]
    by_hand += 2 * (grown_leader * expected["leader->a/d0"] + expected["a/d2->a/d0"])
    torch.testing.assert_close(added, weight * by_hand.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"), [((-1.0, ["x"]), "negative"), ((1.0, []), "names")]
)
def test_wrong_features_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureEdge(*options)
