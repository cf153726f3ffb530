"""The time of a team's training step, against the steps of its nets trained apart.

A step is forward pass, losses, backward pass and optimizer. A team's step trains every depth of
both Teammates, and the Leader unless it is trained already. Apart, each depth is a plain net with
an optimizer, trained from labels and from the trained Leader, whose logits each of these runs
computes anew; a single run of all nets (`baseline/apart_distilled`) shares them. All steps run in
turn in one process. Example::

    python benchmarks/team_step.py --out benchmarks/results/team_step.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import get_args

import torch
import torch.nn.functional as F  # noqa: N812
from harness import (
    Result,
    ResultFile,
    Row,
    argument_parser,
    in_turn,
    markdown,
    median_ratio,
    milliseconds,
    processor,
    with_source,
)
from torch import Tensor, nn

from teamnet_pl import Team, TeammateConfig
from teamnet_pl.cooperation import CooperativeLoss, LeaderConfig
from teamnet_pl.cooperation.members import LEADER, member_logits
from teamnet_pl.elastic import DepthPolicy

CLASSES, SIZE = 100, 32


class Steps:
    """A team, its nets apart, and one batch."""

    def __init__(self, args: argparse.Namespace, policy: DepthPolicy, frozen: bool) -> None:
        torch.manual_seed(0)
        options = {"width": args.width}
        teammate = TeammateConfig(args.backbone, options, depths=args.depths, policy=policy)
        self.team = Team(
            CLASSES,
            (3, SIZE, SIZE),
            leader=LeaderConfig(args.backbone, {"width": 2 * args.width}, frozen=frozen),
            a=teammate,
            b=TeammateConfig(
                args.backbone, options, depths=args.depths, policy=policy, interleaved=True
            ),
        )
        assert self.team.leader is not None
        self.team.train()
        self.leader, self.frozen = self.team.leader, frozen
        self.optimizer = optimizer_of(self.team)
        self.leader_optimizer = None if frozen else optimizer_of(self.leader)
        self.images = torch.randn(args.batch_size, 3, SIZE, SIZE)
        self.labels = torch.randint(0, CLASSES, (args.batch_size,))
        nets = [
            net.extract(depth) for net in self.team.elastic_nets.values() for depth in net.depths
        ]
        self.apart = [(net.train(), optimizer_of(net)) for net in nets]
        cooperation = self.team.criterion.cooperation
        self.loss = CooperativeLoss({"a": ["d0"]}, cooperation, leader_finish=0.0)
        self.teacher = copy.deepcopy(self.leader).eval()

    def team_step(self) -> None:
        """Trains all members at once."""
        with torch.set_grad_enabled(not self.frozen):
            logits = {LEADER: self.leader(self.images)}
        logits |= member_logits(self.team.elastic_nets, None, self.images)
        take_step(self.optimizer, self.team.criterion(logits, self.labels))

    def nets_apart(self, *, share_leader: bool) -> None:
        """Trains one net after the other.

        Args:
            share_leader: Whether they share the trained Leader's logits.
        """
        if self.leader_optimizer is not None:
            loss = F.cross_entropy(self.leader(self.images), self.labels)
            take_step(self.leader_optimizer, loss)
        shared = self._taught() if share_leader else None
        for net, optimizer in self.apart:
            teacher = self._taught() if shared is None else shared
            logits = {LEADER: teacher, "a/d0": net(self.images)}
            take_step(optimizer, self.loss(logits, self.labels))

    @torch.no_grad()
    def _taught(self) -> Tensor:
        logits: Tensor = self.teacher(self.images)
        return logits


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """Makes the optimizer of a net's trained parameters."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.01, momentum=0.9, nesterov=True)


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Takes a step of the optimizer."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Yields a row for each policy, with a Leader that is trained along and one that is frozen."""
    for policy, frozen in product(get_args(DepthPolicy), (False, True)):
        steps = Steps(args, policy, frozen)
        measurements = {
            "team": partial(milliseconds, steps.team_step),
            "apart": partial(milliseconds, partial(steps.nets_apart, share_leader=False)),
            "single_run": partial(milliseconds, partial(steps.nets_apart, share_leader=True)),
        }
        in_turn(measurements, 1)  # warms up
        times = in_turn(measurements, args.repeats)
        yield {
            "policy": policy,
            "leader": "frozen" if frozen else "trained along",
            **{f"{name}_ms": values for name, values in times.items()},
            "team_to_apart": median_ratio(times["team"], times["apart"]),
            "team_to_single_run": median_ratio(times["team"], times["single_run"]),
        }


def line(row: Row) -> str:
    """Summarizes a row."""
    return (
        f"{row['policy']:18} Leader {row['leader']:14} of nets apart {row['team_to_apart']:.2f}, "
        f"of a single run {row['team_to_single_run']:.2f}"
    )


def table(result: Result) -> str:
    """Tabulates the times and ratios of each policy."""
    header = [
        "policy", "Leader", "team, ms", "nets apart, ms", "team / nets apart",
        "nets apart in a single run, ms", "team / single run",
    ]  # fmt: skip
    rows = [
        [
            row["policy"],
            row["leader"],
            f"{statistics.median(row['team_ms']):.0f}",
            f"{statistics.median(row['apart_ms']):.0f}",
            f"**{row['team_to_apart']:.2f}**",
            f"{statistics.median(row['single_run_ms']):.0f}",
            f"{row['team_to_single_run']:.2f}",
        ]
        for row in result["rows"]
    ]
    return with_source(markdown(header, rows), result)


def main() -> None:
    """Measures all policies."""
    parser = argument_parser(__doc__, repeats=7, threads=torch.get_num_threads())
    parser.add_argument("--backbone", default="cifar/resnet20")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ResultFile(args, processor(args)).write(measure(args), line)


if __name__ == "__main__":
    main()
