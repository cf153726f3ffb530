"""The loss of a run equals the documented sum, computed with one plain net for each depth."""

from dataclasses import dataclass, field

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from teamnet_pl.cooperation import (
    Cooperation,
    Edge,
    KLDivergence,
    LabelWeights,
    PeerEdge,
    ScheduleConfig,
    SubNetworkEdge,
    TeacherEdge,
    Transfer,
)
from tests.helpers.runs import read_csv
from tests.helpers.teams import logits_by_hand, make_digits, make_team, make_trainer

STEPS = 4
MEMBERS = ["leader", "a/d7", "a/d4", "a/d0", "b/d7", "b/d5", "b/d2"]
PAIRS = {
    "leader": [("leader", student) for student in MEMBERS[1:]],
    "peer": [
        *[("b/d7", student) for student in ("a/d7", "a/d4", "a/d0")],
        *[("a/d7", student) for student in ("b/d7", "b/d5", "b/d2")],
    ],
    "sub_networks": [("a/d7", "a/d4"), ("a/d7", "a/d0"), ("b/d7", "b/d5"), ("b/d7", "b/d2")],
    "ensemble": [("ensemble", student) for student in MEMBERS[1:]],
    "to_leader": [("a/d7", "leader"), ("b/d7", "leader")],
}


@dataclass
class Case:
    """One way to train: edges by group as (weight, temperature, ramp), and the rest."""

    edges: dict = field(default_factory=lambda: EDGES)
    labels: tuple = (None, None, None)
    extra: list = field(default_factory=list)
    team: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)

    def cooperation(self):
        kinds = {"peer": PeerEdge, "sub_networks": SubNetworkEdge, "to_leader": Edge}
        edges = dict.fromkeys(PAIRS, (0.0, 1.0, 0.0)) | self.edges
        return Cooperation(
            **{
                group: kinds.get(group, TeacherEdge)(weight, KLDivergence(temperature), ramp)
                for group, (weight, temperature, ramp) in edges.items()
            },
            labels=LabelWeights(*self.labels),
            extra=[
                Transfer(weight, KLDivergence(temperature), ramp, teacher, student)
                for teacher, student, weight, temperature, ramp in self.extra
            ],
        )

    def transfers(self, members):
        """(teacher, student): (weight, temperature, ramp)"""
        edges = {pair: edge for group, edge in self.edges.items() for pair in PAIRS[group]}
        edges |= {(teacher, student): tuple(edge) for teacher, student, *edge in self.extra}
        members = members | {"ensemble"}
        return {pair: edge for pair, edge in edges.items() if members.issuperset(pair)}


EDGES = {"leader": (0.3, 4.0, 0.0), "peer": (0.2, 3.0, 0.5), "sub_networks": (0.1, 2.0, 1.0)}
FIRST = ScheduleConfig(leader_alone=0.5, leader_finish=0.5)
AHEAD = ScheduleConfig(leader_finish=0.5)
CASES = {
    "three groups": Case(),
    "all groups": Case(EDGES | {"ensemble": (0.6, 1.5, 0.5), "to_leader": (0.7, 2.5, 0.0)}),
    "label weights": Case(labels=(0.5, 0.0, 2.0)),
    "extra transfers": Case(
        {"sub_networks": (0.1, 2.0, 1.0)},
        extra=[("b/d2", "a/d0", 0.2, 2.5, 0.5), ("leader", "b/d2", 0.4, 1.5, 0.0)],
    ),
    "label smoothing": Case(team={"label_smoothing": 0.1}),
    "mixed labels": Case(
        EDGES | {"ensemble": (0.6, 1.5, 0.5)},
        team={"label_smoothing": 0.1},
        data={"mixup_alpha": 0.4, "cutmix_alpha": 1.0},
    ),
    "frozen leader": Case(team={"leader": {"frozen": True}}),
    "leader first": Case(team={"schedule": FIRST}),
    "leader ahead": Case(EDGES | {"to_leader": (0.7, 2.5, 0.0)}, team={"schedule": AHEAD}),
    "no leader": Case(team={"leader": None}),
    "no b": Case(team={"b": None}),
    "labels only": Case({}, team={"leader": None, "b": None}),
}


def trained(case, step):
    """Which of the Leader and the Teammates learn in a step, and whether the Teammates run."""
    schedule = case.team.get("schedule", ScheduleConfig())
    frozen = case.team.get("leader", {}) == {"frozen": True}
    done = (step + 1) / STEPS
    return not frozen and done <= schedule.leader_finish, done > schedule.leader_alone


def cross_entropy(logits, target, smoothing):
    classes = logits.shape[1]
    if target.ndim == 1:
        target = torch.eye(classes, dtype=logits.dtype)[target]
    target = (1 - smoothing) * target + smoothing / classes
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def divergence(student, teacher, temperature):
    teacher = (teacher.detach() / temperature).softmax(-1)
    student = (student / temperature).softmax(-1)
    return temperature**2 * (teacher * (teacher / student).log()).sum(-1).mean()


class ByHand(pl.Callback):
    """Computes the loss and the gradients of each step again, before the optimizer steps."""

    def __init__(self, case):
        self.case = case
        self.batch, self.loss, self.steps = None, None, []

    def on_train_batch_start(self, trainer, team, batch, batch_idx):
        self.batch = batch

    def on_before_backward(self, trainer, team, loss):
        self.loss = loss.detach()

    def on_after_backward(self, trainer, team):
        images, target = self.batch
        step = len(self.steps)
        done = (step + 1) / STEPS
        leader_learns, teammates_run = trained(self.case, step)
        alone = self.case.team.get("schedule", ScheduleConfig()).leader_alone
        done = max(0.0, (done - alone) / (1 - alone))  # of the Teammates' training
        logits = logits_by_hand(team, images, leader_trains=leader_learns)
        if not teammates_run:
            logits = {"leader": logits["leader"]}
        deepest, others, leader = self.case.labels
        loss, terms, taken = 0.0, {}, dict.fromkeys(MEMBERS, 0.0)
        for (teacher, student), edge in self.case.transfers(set(team.members())).items():
            weight, temperature, ramp = edge
            taken[student] += grown(ramp, done) * weight
            if student in logits and (student != "leader" or leader_learns):
                teaching = mixture(logits, target) if teacher == "ensemble" else logits[teacher]
                term = divergence(logits[student], teaching, temperature)
                terms[f"train/kd/{teacher}_to_{student}"] = term
                loss = loss + grown(ramp, done) * weight * term
        for member, values in logits.items():
            weight = {"leader": leader, "a/d7": deepest, "b/d7": deepest}.get(member, others)
            weight = max(0.1, 1 - taken[member]) if weight is None else weight
            if weight and (member != "leader" or leader_learns):
                term = cross_entropy(values, target, team.criterion.label_smoothing)
                terms[f"train/ce/{member}"] = term
                loss = loss + weight * term
        parameters = [parameter for parameter in team.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        squares = [(gradient**2).sum() for gradient in gradients if gradient is not None]
        labels = target if target.ndim == 1 else target.argmax(1)
        shares = {
            f"train/accuracy/{member}": (values.argmax(1) == labels).double().mean().item()
            for member, values in logits.items()
        }
        if teammates_run:
            of_depths = [share for name, share in shares.items() if "leader" not in name]
            shares["train/accuracy/mean"] = sum(of_depths) / len(of_depths)
        ramps = {
            f"train/ramp/{group}": grown(edge[2], done) for group, edge in self.case.edges.items()
        }
        self.steps.append(
            {
                "loss": (self.loss, loss.detach()),
                "gradients": (
                    [None if each.grad is None else each.grad.clone() for each in parameters],
                    gradients,
                ),
                "log": {name: term.item() for name, term in terms.items()}
                | {"train/loss": loss.item(), **ramps, **shares}
                | {"train/gradient_norm": sum(squares).sqrt().item()},
            }
        )


def grown(ramp, done):
    return min(1.0, done / ramp) if ramp else 1.0


def mixture(logits, target):
    """The prediction of Leader and deepest depths, each by its likelihood of the label."""
    predictions = [logits[name].softmax(-1) for name in ("leader", "a/d7", "b/d7")]
    predictions = torch.stack(predictions)
    if target.ndim == 1:
        target = torch.eye(predictions.shape[-1], dtype=predictions.dtype)[target]
    likelihoods = (predictions.log() * target).sum(-1).exp()
    weights = likelihoods / likelihoods.sum(0)
    return (weights[..., None] * predictions).sum(0).log()


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
    """The steps of a run, as taken and by hand, and the rows of its log."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("run")
    team = make_team(cooperation=case.cooperation(), **case.team)
    by_hand = ByHand(case)
    trainer = make_trainer(
        folder,
        callbacks=[by_hand],
        limit_train_batches=STEPS,
        logger=CSVLogger(folder),
        precision="64-true",
    )
    trainer.fit(team, make_digits(**case.data))
    return by_hand.steps, read_csv(f"{trainer.log_dir}/metrics.csv")


def test_loss_is_the_documented_sum(run):
    assert len(run[0]) == STEPS
    for step in run[0]:
        loss, expected = step["loss"]
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0)


def test_gradients_are_those_of_the_documented_sum(run):
    for step in run[0]:
        gradients, expected = step["gradients"]
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
        for gradient, other in zip(gradients, expected, strict=True):
            assert (gradient is None) == (other is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-8)


def test_each_term_is_logged_under_its_name(run):
    steps, rows = run
    assert len(rows) == STEPS
    for step, row in zip(steps, rows, strict=True):
        logged = {
            name: float(value) for name, value in row.items() if name.startswith("train/") and value
        }
        assert logged == pytest.approx(step["log"], rel=1e-5)
