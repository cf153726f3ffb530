"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from teamnet_pl.elastic import AdaptiveNet
from teamnet_pl.errors import TeamNetError
from teamnet_pl.suggestions import did_you_mean


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by its name in timm, such as ``sgd`` (with Nesterov momentum) or ``adamw``.

    Attributes:
        name: See `timm.optim.list_optimizers`.
        lr: Learning rate at its peak.
        weight_decay: Weight decay. It is not applied to biases, the weights of norms, and the
            parameters that a backbone of timm exempts, such as positional embeddings.
        momentum: Momentum, for those optimizers that have one.
        options: More arguments of the optimizer, such as ``{betas: [0.9, 0.95]}``, or of timm's
            groups of parameters, such as ``{layer_decay: 0.75}``, for each backbone alone.
    """

    name: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "sgd" and not self.options:
            return  # the default needs no check, for which timm would be imported
        from timm.optim import list_optimizers  # type: ignore[attr-defined]

        known = [str(name) for name in list_optimizers()]
        if self.name.lower() not in known:
            meant = did_you_mean(self.name, known, count=5) or f"There are {', '.join(known)}."
            raise TeamNetError(f"There is no optimizer {self.name!r}. {meant}")
        # So that wrong arguments are found now; without a draw that would change the nets' weights.
        self.create(nn.ParameterList([torch.zeros(1, 1), torch.zeros(1)]))

    def create(
        self,
        module: nn.Module,
        backbones: Sequence[nn.Module] | None = None,
        leader: nn.Module | None = None,
    ) -> Optimizer:
        """Makes the optimizer of all parameters of a module that need a gradient.

        Args:
            module: The module to train.
            backbones: Parts of the module to which the options apply one by one, as to a whole
                model of timm: weights that a backbone exempts from decay (``no_weight_decay``), and
                layers that learn slower the nearer they are to its input (``layer_decay``). By
                default the module itself.
            leader: The one of them that has groups of its own, marked as the Leader's, for a
                schedule of its own.

        Raises:
            TeamNetError: If the optimizer does not take the options or cannot run here.
        """
        from timm.optim import create_optimizer_v2, get_optimizer_info  # type: ignore[attr-defined]

        info = get_optimizer_info(self.name.lower().rpartition("_")[2])
        ignored = {"betas": not info.has_betas, "eps": not info.has_eps}  # by timm, in silence
        for option in self.options:
            if ignored.get(option):
                raise TeamNetError(f"The optimizer {self.name} has no option {option!r}.")
        grouping = {key: value for key, value in self.options.items() if key in _GROUPING}
        options = {key: value for key, value in self.options.items() if key not in _GROUPING}
        try:
            optimizer: Optimizer = create_optimizer_v2(
                self._groups(
                    module, [module] if backbones is None else backbones, leader, **grouping
                ),
                opt=self.name,
                lr=self.lr,
                momentum=self.momentum,
                **options,
            )
        except TypeError as error:
            raise TeamNetError(
                f"The optimizer {self.name} does not take the options {self.options}: {error}."
            ) from error
        except AssertionError as error:  # of those from bitsandbytes and Apex
            raise TeamNetError(f"The optimizer {self.name} cannot run here: {error}.") from error
        return optimizer

    def _groups(
        self,
        module: nn.Module,
        backbones: Sequence[nn.Module],
        leader: nn.Module | None,
        filter_bias_and_bn: bool = True,
        layer_decay: float | None = None,
        layer_decay_min_scale: float = 0.0,
        layer_decay_no_opt_scale: float | None = None,
        **fallback: Any,
    ) -> list[dict[str, Any]]:
        """Makes timm's groups of parameters of each backbone, those with equal settings merged."""
        from timm.optim import (  # type: ignore[attr-defined]
            param_groups_layer_decay,
            param_groups_weight_decay,
        )

        groups: dict[str, dict[str, Any]] = {}  # by their settings
        group_of: dict[int, dict[str, Any]] = {}  # by parameter

        def add(part: nn.Module) -> None:
            options = fallback | {
                "weight_decay": self.weight_decay,
                "weight_decay_exclude_1d": filter_bias_and_bn,
                "no_weight_decay_list": getattr(part, "no_weight_decay", set)(),
            }
            if layer_decay is None:
                made = param_groups_weight_decay(part, **options)
            else:
                options |= {"min_scale": layer_decay_min_scale, "layer_decay": layer_decay}
                made = param_groups_layer_decay(
                    part, no_opt_scale=layer_decay_no_opt_scale, **options
                )
            for group in made:
                settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
                # Of the rate, since only timm's own schedules know of the scale.
                settings["lr"] = self.lr * settings.pop("lr_scale", 1.0)
                settings[_IS_LEADER] = part is leader
                merged = groups.setdefault(
                    repr(sorted(settings.items())), settings | {"params": []}
                )
                merged["params"] += group["params"]
                group_of.update({id(parameter): merged for parameter in group["params"]})

        for backbone in backbones:
            add(backbone)
        if rest := _add_copies(module, group_of):
            add(nn.ParameterList(rest))
        return list(groups.values())


_IS_LEADER = "is_leader"
"""Key of a group of parameters: whether they are the Leader's."""


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Returns the highest learning rates of an optimizer that `OptimizerConfig` made.

    Returns:
        By ``leader``, if the Leader has groups of its own, and ``teammates``.
    """
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = "leader" if group.get(_IS_LEADER) else "teammates"
        rates[name] = max(rates.get(name, 0.0), float(group["lr"]))
    return rates


_GROUPING = (
    "filter_bias_and_bn",
    "layer_decay",
    "layer_decay_min_scale",
    "layer_decay_no_opt_scale",
    "fallback_list",
    "fallback_no_weight_decay",
)
"""Options of timm's groups of parameters."""


def _add_copies(module: nn.Module, group_of: dict[int, dict[str, Any]]) -> list[nn.Parameter]:
    """Adds per-depth copies of weights to the groups of their originals; returns the others."""
    originals = {
        id(copied): id(original)
        for net in module.modules()
        if isinstance(net, AdaptiveNet)
        for copied, original in net.copied_parameters()
    }
    rest = []
    for parameter in module.parameters():
        if not parameter.requires_grad or id(parameter) in group_of:
            continue
        group = group_of.get(originals.get(id(parameter), 0))
        if group is None:
            rest.append(parameter)
        else:
            group["params"].append(parameter)
            group_of[id(parameter)] = group
    return rest


_ROUNDING = 1e-9


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then half a cosine, step by step.

    The Leader may be ahead of the Teammates: its whole schedule then ends at a share of the
    training, after which it is finished and only teaches.

    Attributes:
        warmup: Share of the training in which the learning rate grows to its peak.
        final: Learning rate at the end, as a share of the peak.
        leader_alone: Share of the training, at its start, in which the Leader alone is trained; the
            Teammates' schedule is over the rest.
        leader_finish: Share of the training after which the Leader is finished: in evaluation mode,
            without gradient. Equal to ``leader_alone``, the Leader is trained first. In a training
            without an end the Leader is never finished.

    Source: Loshchilov and Hutter, "SGDR" (arXiv 1608.03983), without restarts.
    """

    warmup: float = 0.1
    final: float = 0.0
    leader_alone: float = 0.0
    leader_finish: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise TeamNetError(f"warmup is a share of the training in [0, 1), found {self.warmup}.")
        if not 0 <= self.leader_alone < 1:
            raise TeamNetError(
                f"leader_alone is a share of the training in [0, 1), found {self.leader_alone}."
            )
        if not max(self.leader_alone, 1e-9) <= self.leader_finish <= 1:
            raise TeamNetError(
                "leader_finish is a share of the training above 0 and up to 1, not before the "
                f"Teammates start (leader_alone {self.leader_alone}); found {self.leader_finish}. "
                "A Leader that is never trained is one with leader.frozen true."
            )

    def member_factor(self, step: int, steps: int, is_leader: bool) -> float:
        """Returns the learning rate of the Leader or of the Teammates as a share of the peak.

        Examples:
            >>> config = ScheduleConfig(warmup=0.0, leader_alone=0.5, leader_finish=0.5)
            >>> [round(config.member_factor(step, 8, is_leader=True), 2) for step in range(8)]
            [1.0, 0.85, 0.5, 0.15, 0.0, 0.0, 0.0, 0.0]
            >>> [round(config.member_factor(step, 8, is_leader=False), 2) for step in range(8)]
            [0.0, 0.0, 0.0, 0.0, 1.0, 0.85, 0.5, 0.15]
        """
        if is_leader:
            last = max(1, math.floor(self.leader_finish * steps + _ROUNDING))
            return self.factor(min(step, last), last)
        first = math.floor(self.leader_alone * steps + _ROUNDING)
        return self.factor(step - first, steps - first) if step >= first else 0.0

    def factor(self, step: int, steps: int) -> float:
        """Returns the learning rate at a step as a share of the peak.

        Examples:
            >>> [round(ScheduleConfig(warmup=0.5).factor(step, 8), 2) for step in range(9)]
            [0.25, 0.5, 0.75, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
        """
        warmup = self.warmup * steps
        if step < warmup:
            return min(1.0, (step + 1) / warmup)
        done = min(1.0, (step - warmup) / (steps - warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


class StepSchedule(LambdaLR):
    """A schedule over all steps of a training, whose number is not known before it starts.

    Lightning sets up the loaders to count the steps, which would lose their position if it happened
    before a checkpoint is restored. `BatchSizeFinder` changes the number, too.

    Args:
        optimizer: The optimizer to schedule.
        config: The learning rate, as a share of its peak.
        peak: The learning rate at its peak, with which the optimizer was made.
    """

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig, peak: float) -> None:
        self.config = config
        self.peak = peak
        self.steps = math.inf
        super().__init__(optimizer, lambda step: 1.0)  # `get_lr` knows better

    def get_lr(self) -> list[float | Tensor]:
        """Returns the rate of each group of parameters, also of those that a callback added."""
        return [
            group.setdefault("initial_lr", group["lr"]) * self._factor(group)
            for group in self.optimizer.param_groups
        ]

    def _factor(self, group: dict[str, Any]) -> float:
        if math.isinf(self.steps):
            return 1.0
        is_leader = group.get(_IS_LEADER, False)
        return self.config.member_factor(self.last_epoch, int(self.steps), is_leader)

    def set_peak(self, peak: float) -> None:
        """Sets the learning rate at its peak, of each group of parameters in proportion."""
        for group in self.optimizer.param_groups:
            share = group["initial_lr"] / self.peak if self.peak else 1.0
            group["initial_lr"] = share * peak
        self.peak = peak

    def start(self, steps: float) -> None:
        """Sets the number of steps, and the learning rate of the next one.

        Args:
            steps: Number of steps of the whole training; infinite if it has no end.
        """
        self.steps = steps
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Returns the progress of the schedule; everything else is known."""
        return {key: getattr(self, key) for key in _PROGRESS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from the step of a checkpoint."""
        self.__dict__.update({key: state_dict[key] for key in _PROGRESS})


_PROGRESS = ("last_epoch", "_step_count", "_last_lr")


def training_steps(trainer: Trainer, epochs: int | None) -> float:
    """Counts the optimizer's steps in a whole training.

    Args:
        trainer: The trainer, which has set up its loaders.
        epochs: Number of epochs, which callbacks may have changed in the trainer; -1 or None for
            no end.

    Returns:
        The number; infinite if the training has no end.
    """
    limit = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    batches = trainer.num_training_batches
    if epochs is None or epochs < 0 or math.isinf(batches):
        return limit
    accumulated = [trainer.accumulate_grad_batches] * epochs
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            accumulated = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
    return min(limit, max(1, sum(math.ceil(batches / number) for number in accumulated)))


def configure(
    module: LightningModule,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    backbones: Sequence[nn.Module] | None = None,
    leader: nn.Module | None = None,
) -> OptimizerLRScheduler:
    """Makes the value of ``configure_optimizers``: an optimizer, scheduled by the step.

    Args:
        module: The module to train, whose ``on_train_start`` has to start the schedule.
        optimizer: The optimizer of all its parameters that need a gradient.
        schedule: The learning rate; it stays at its peak in a training without an end.
        backbones: Parts of the module that are models themselves, see `OptimizerConfig.create`.
        leader: The one of them that is the Leader.
    """
    created = optimizer.create(module, backbones, leader)
    scheduler = StepSchedule(created, schedule, optimizer.lr)
    return {"optimizer": created, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
