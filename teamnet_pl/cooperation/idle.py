"""Parameters that a step does not use, in a training of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn


class IdleParameters:
    """Gives unused parameters a gradient of zero for `DistributedDataParallel`, and takes it again.

    The Leader is unused before the Teammates start or after it is finished, and so are weights of
    depths that a step does not run. DDP waits for every parameter's gradient, and its own search
    for unused ones is off. An optimizer would go on to move a parameter whose gradient is zero by
    its momentum, so those that no process used have no gradient at the step.
    """

    def __init__(self) -> None:
        self._unused: Tensor | None = None
        """For each parameter, whether no batch since the last step used it."""

    def include(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Returns the same loss, of which all parameters have a gradient.

        Args:
            loss: The loss, a scalar.
            parameters: All parameters that are trained.
        """
        used = _leaves(loss)
        unused = torch.tensor([parameter not in used for parameter in parameters])
        self._unused = unused if self._unused is None else self._unused & unused
        idle = [each for each, flag in zip(parameters, unused.tolist(), strict=True) if flag]
        included: Tensor = _WithZeroGradients.apply(loss, *idle)
        return included

    def take_gradients(self, parameters: Sequence[nn.Parameter], strategy: Strategy) -> None:
        """Takes the gradients of the parameters that no process has used since the last step.

        Args:
            parameters: All parameters that are trained.
            strategy: The trainer's strategy, which reduces values over the processes.
        """
        if self._unused is None:
            return
        used = (~self._unused).float().to(parameters[0].device)
        used = strategy.reduce(used, reduce_op="sum")
        for parameter, count in zip(parameters, used.tolist(), strict=True):
            if not count:
                parameter.grad = None
        self._unused = None


def _leaves(loss: Tensor) -> set[nn.Parameter]:
    """The parameters that a loss depends on."""
    leaves, visited, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        waiting += [parent for parent, _ in node.next_functions]
    return leaves


class _WithZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *map(torch.zeros_like, ctx.parameters)
