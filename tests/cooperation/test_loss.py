"""The loss of a run equals the documented sum, computed with one plain net for each depth."""

from dataclasses import dataclass, field

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from teamnet_pl.cooperation import Cooperation, Edge, KLDivergence, Transfer
from tests.helpers.runs import read_csv
from tests.helpers.teams import logits_by_hand, make_digits, make_team, make_trainer

STEPS = 4
EDGES = {
    "leader": [("leader", "a/d7"), ("leader", "b/d7")],
    "peer": [("a/d7", "b/d7"), ("b/d7", "a/d7")],
    "sub_networks": [("a/d7", "a/d4"), ("a/d7", "a/d0"), ("b/d7", "b/d5"), ("b/d7", "b/d2")],
}


@dataclass
class Case:
    """One way to train, with the expected terms of its loss."""

    team: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    ramp: tuple = (0.75, 1, 1, 1)  # a third of four steps
    edges: dict = field(default_factory=lambda: dict.fromkeys(EDGES, (0.5, 2.0)))
    extra: list = field(default_factory=list)

    def transfers(self, members):
        """(teacher, student): (weight, temperature)"""
        edges = {pair: self.edges[kind] for kind in self.edges for pair in EDGES[kind]}
        edges |= {(teacher, student): edge for teacher, student, *edge in self.extra}
        return {pair: edge for pair, edge in edges.items() if members.issuperset(pair)}


DISTINCT = {
    "leader": Edge(0.3, KLDivergence(1.0)),
    "peer": Edge(0.7, KLDivergence(3.0)),
    "sub_networks": Edge(0.9, KLDivergence(4.0)),
}
CASES = {
    "default": Case(),
    "distinct weights": Case(
        {"cooperation": Cooperation(**DISTINCT, ramp=0.0)},
        ramp=(1, 1, 1, 1),
        edges={"leader": (0.3, 1.0), "peer": (0.7, 3.0), "sub_networks": (0.9, 4.0)},
    ),
    "long ramp": Case({"cooperation": Cooperation(ramp=1.0)}, ramp=(0.25, 0.5, 0.75, 1)),
    "extra transfers": Case(
        {
            "cooperation": Cooperation(
                extra=[
                    Transfer(0.2, KLDivergence(2.5), "b/d2", "a/d0"),
                    Transfer(0.4, KLDivergence(1.5), "leader", "b/d2"),
                ]
            )
        },
        extra=[("b/d2", "a/d0", 0.2, 2.5), ("leader", "b/d2", 0.4, 1.5)],
    ),
    "label smoothing": Case({"label_smoothing": 0.1}),
    "mixed labels": Case({"label_smoothing": 0.1}, {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}),
    "frozen leader": Case({"leader": {"frozen": True}}),
    "no leader": Case({"leader": None}),
    "no b": Case({"b": None}),
    "no peer": Case(
        {"cooperation": Cooperation(peer=Edge(0.0))},
        edges={"leader": (0.5, 2.0), "sub_networks": (0.5, 2.0)},
    ),
    "labels only": Case(
        {"leader": None, "b": None, "cooperation": Cooperation(sub_networks=Edge(0.0))}, edges={}
    ),
}


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
        logits = logits_by_hand(team, images)
        ramp = self.case.ramp[len(self.steps)]
        terms = {
            f"train/ce/{member}": cross_entropy(values, target, team.criterion.label_smoothing)
            for member, values in logits.items()
        }
        if team.leader_frozen:
            del terms["train/ce/leader"]
        loss = sum(terms.values())
        for (teacher, student), edge in self.case.transfers(set(logits)).items():
            weight, temperature = edge
            term = divergence(logits[student], logits[teacher], temperature)
            terms[f"train/kd/{teacher}->{student}"] = term
            loss = loss + ramp * weight * term
        trained = [parameter for parameter in team.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, trained)
        self.steps.append(
            {
                "loss": (self.loss, loss.detach()),
                "gradients": ([parameter.grad.clone() for parameter in trained], gradients),
                "log": {name: term.item() for name, term in terms.items()}
                | {"train/loss": loss.item(), "train/ramp": ramp},
            }
        )


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
    """The steps of a run, as taken and by hand, and the rows of its log."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("run")
    team = make_team(**case.team)
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
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        torch.testing.assert_close(gradients, list(expected), rtol=1e-8, atol=1e-8)


def test_each_term_is_logged_under_its_name(run):
    steps, rows = run
    assert len(rows) == STEPS
    for step, row in zip(steps, rows, strict=True):
        logged = {name: float(value) for name, value in row.items() if name.startswith("train/")}
        assert logged == pytest.approx(step["log"], rel=1e-5)


def test_teachers_get_no_gradient():
    team = make_team()
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = {name: values.detach().requires_grad_() for name, values in team(images).items()}
    terms = team.criterion.terms(logits, torch.arange(8))
    pairs = [pair for pairs in EDGES.values() for pair in pairs]
    assert terms.transfers.keys() == {f"{teacher}->{student}" for teacher, student in pairs}
    for teacher, student in pairs:
        inputs = [logits[teacher], logits[student]]
        gradients = torch.autograd.grad(
            terms.transfers[f"{teacher}->{student}"], inputs, allow_unused=True
        )
        assert gradients[0] is None
        assert gradients[1].abs().max() > 0


def test_a_leader_learns_nothing_from_teaching():
    team = make_team()
    terms = team.criterion.terms(team(torch.randn(8, 1, 8, 8)), torch.arange(8))
    leader = list(team.leader.parameters())
    gradients = torch.autograd.grad(terms.transfers["leader->a/d7"], leader, allow_unused=True)
    assert all(gradient is None for gradient in gradients)
