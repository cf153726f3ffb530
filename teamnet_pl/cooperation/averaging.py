"""Averaged teachers: moving averages of the nets that teach."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from teamnet_pl.cooperation.members import LEADER, at_least_single
from teamnet_pl.elastic import AdaptiveNet


class AveragedTeachers(nn.Module):
    """Exponential moving averages of a Leader and of Teammates, which teach in their place.

    Args:
        teammates: The Teammates by name; their deepest depths teach.
        leader: The Leader, if it is trained.
        decay: Share of the average that stays in each step.

    Source: Tarvainen and Valpola, "Mean teachers are better role models" (arXiv 1703.01780).
    """

    def __init__(
        self, teammates: Mapping[str, AdaptiveNet], leader: nn.Module | None, decay: float
    ) -> None:
        super().__init__()
        nets = dict(teammates) | ({} if leader is None else {LEADER: leader})
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.averages = nn.ModuleDict(
            {
                name: AveragedModel(net, multi_avg_fn=average, use_buffers=True)
                for name, net in nets.items()
            }
        )
        self._step = 0
        self._names = {name: f"{name}/{net.depths[0]}" for name, net in teammates.items()}
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> AveragedTeachers:
        """Stays in evaluation mode."""
        return super().train(False)

    def get_extra_state(self) -> Tensor:
        """Returns the number of the last step that the averages have taken in."""
        return torch.tensor(self._step)

    def set_extra_state(self, state: Tensor) -> None:
        """Goes on after the step of a checkpoint."""
        self._step = int(state)

    def update(self, nets: Mapping[str, nn.Module], step: int) -> None:
        """Moves the averages towards the nets, once for each step of the optimizer.

        Args:
            nets: The Teammates by name, and the Leader as ``leader``.
            step: Number of steps that the nets have taken.
        """
        if step == self._step:
            return
        self._step = step
        for name, average in self.averages.items():
            average.update_parameters(nets[name])  # type: ignore[operator]

    @torch.no_grad()
    def logits(self, members: Mapping[str, object], images: Tensor) -> dict[str, Tensor]:
        """Runs the averages of members.

        Args:
            members: By name, such as ``leader`` or ``a/d7``; others than those that are averaged do
                not count.
            images: Shape ``(N, channels, height, width)``.

        Returns:
            Logits by the member's name, each ``(N, classes)``.
        """
        names = {name: self._names.get(name, name) for name in self.averages}
        return {
            member: at_least_single(self.averages[name](images))
            for name, member in names.items()
            if member in members
        }
