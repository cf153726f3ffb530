"""Steps whose loss or gradients are infinite or NaN: refused, or skipped and counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from teamnet_pl.errors import TeamNetError

NonFinitePolicy = Literal["raise", "skip"]


class NonFiniteGuard:
    """Watches the steps of one training.

    Args:
        policy: ``raise`` an error, or ``skip`` the step.

    Attributes:
        skips: Whether such steps are skipped.

    Raises:
        TeamNetError: If the policy is unknown.
    """

    def __init__(self, policy: NonFinitePolicy) -> None:
        if policy not in ("raise", "skip"):
            raise TeamNetError(f"on_non_finite must be raise or skip, found {policy!r}.")
        self.skips = policy == "skip"
        self._step_is_lost = False  # since a term of its loss is not finite
        self._statistics: list[Tensor] = []  # of norms, before this batch
        self._restores = False

    def before_forward(self, module: nn.Module) -> None:
        """Keeps the running statistics of norms, in case this batch is not to count."""
        if self.skips:
            self._statistics = [buffer.clone() for buffer in module.buffers()]

    def check_terms(self, names: Sequence[str], values: Tensor, step: int) -> bool:
        """Checks the terms of a loss, and last the loss itself, which is their sum.

        Args:
            names: Names of the terms.
            values: The terms and the loss, shape ``(terms + 1,)``, the same on all processes.
            step: Number of the step, for messages.

        Returns:
            Whether all are finite.

        Raises:
            TeamNetError: If one is not finite, unless such steps are skipped.
        """
        if values.isfinite().all():
            return True
        described = [f"the term {name} of the loss" for name in names] + ["the loss"]
        problem, value = next(
            (name, value)
            for name, value in zip(described, values.tolist(), strict=True)
            if not math.isfinite(value)
        )
        self._refuse(step, f"{problem} is {value}")
        self._step_is_lost = self._restores = True
        return False

    def after_backward(self, module: nn.Module) -> None:
        """Undoes the effect that a skipped batch had on the running statistics of norms."""
        if self._restores:
            for buffer, value in zip(module.buffers(), self._statistics, strict=True):
                buffer.copy_(value)
        self._restores = False

    def before_step(
        self, module: nn.Module, optimizer: Optimizer, step: int, has_scaler: bool
    ) -> bool:
        """Checks the gradients, which are the same on all processes.

        Args:
            module: The module that is trained.
            optimizer: Its gradients are cleared where the step is skipped.
            step: Number of the step, for messages.
            has_scaler: Whether a loss scaler checks gradients itself, and skips their step.

        Returns:
            Whether the step is skipped.

        Raises:
            TeamNetError: If a gradient is not finite, unless such steps are skipped.
        """
        lost, self._step_is_lost = self._step_is_lost, False
        if has_scaler:
            return lost
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        if not get_total_norm(list(gradients.values()), math.inf).isfinite():
            if not lost:
                name = next(n for n, grad in gradients.items() if not grad.isfinite().all())
                self._refuse(step, f"the gradient of {name} is not finite")
            lost = True
            optimizer.zero_grad()  # a step without gradients changes nothing
        return lost

    def _refuse(self, step: int, problem: str) -> None:
        """Raises, or warns where such steps are skipped."""
        if not self.skips:
            raise TeamNetError(
                f"Step {step}: {problem}, so training stops before it. Lower the learning rate, "
                "clip gradients (gradient_clip_val), or have such steps skipped "
                "(on_non_finite: skip)."
            )
        rank_zero_warn(f"Step {step} is skipped: {problem}.")
