"""The optimiser and its learning rate."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import (  # type: ignore[attr-defined]
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from teamnet_pl.elastic import ElasticNet

_GROUPING = {
    "fallback_list": "fallback_list",
    "fallback_no_weight_decay": "fallback_no_weight_decay",
    "filter_bias_and_bn": "weight_decay_exclude_1d",
    "layer_decay": "layer_decay",
    "layer_decay_min_scale": "min_scale",
    "layer_decay_no_opt_scale": "no_opt_scale",
}
"""timm's options about groups of parameters, and their names where it makes those."""


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser by its name in timm, such as ``sgd`` (with Nesterov momentum) or ``adamw``.

    Attributes:
        name: See `timm.optim.list_optimizers`.
        lr: Learning rate at its peak.
        weight_decay: Not applied to biases, the weights of norms, and what a backbone of timm
            exempts, such as positional embeddings.
        momentum: For those optimisers that have one.
        options: Further arguments of the optimiser, such as ``{betas: [0.9, 0.95]}``, or of timm's
            groups of parameters, such as ``{layer_decay: 0.75}``, in each backbone alone.
    """

    name: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = list_optimizers()
        if self.name.lower() not in known:
            close = difflib.get_close_matches(self.name, known, n=5, cutoff=0.4) or known
            raise ValueError(f"There is no optimiser {self.name!r}. Did you mean {close}?")
        self._create(nn.Linear(1, 1), self.options)  # so that wrong arguments are found now

    def create(self, module: nn.Module, backbones: Sequence[nn.Module] | None = None) -> Optimizer:
        """Makes the optimiser of all parameters of a module that need a gradient.

        Args:
            module: What to train.
            backbones: Its parts to each of which the options apply as to a whole model of timm:
                weights that a backbone exempts from decay (``no_weight_decay``), and layers that
                learn the slower the nearer they are to its input (``layer_decay``). By default the
                module itself.

        Raises:
            ValueError: If the optimiser does not take the options or needs what is not here.
        """
        groups: dict[str, dict[str, Any]] = {}  # by their settings
        group_of: dict[int, dict[str, Any]] = {}  # by parameter

        def add(part: nn.Module) -> None:
            for group in self._groups(part):
                settings = {key: value for key, value in group.items() if key != "params"}
                settings["lr"] = self.lr * settings.pop("lr_scale", 1.0)  # for other schedules
                merged = groups.setdefault(
                    repr(sorted(settings.items())), settings | {"params": []}
                )
                merged["params"] += group["params"]
                group_of.update({id(parameter): merged for parameter in group["params"]})

        for part in [module] if backbones is None else backbones:
            add(part)
        if rest := self._add_copies(module, group_of):
            add(nn.ParameterList(rest))
        others = {key: value for key, value in self.options.items() if key not in _GROUPING}
        return self._create(list(groups.values()), others)

    def _groups(self, part: nn.Module) -> list[dict[str, Any]]:
        """The parameters of one model, grouped as timm does."""
        options = {_GROUPING[key]: value for key, value in self.options.items() if key in _GROUPING}
        options |= {
            "weight_decay": self.weight_decay,
            "no_weight_decay_list": getattr(part, "no_weight_decay", set)(),
        }
        make: Callable[..., list[dict[str, Any]]] = param_groups_layer_decay
        if options.get("layer_decay") is None:
            make = param_groups_weight_decay
            for name in ("layer_decay", "min_scale", "no_opt_scale"):
                options.pop(name, None)
        return make(part, **options)

    @staticmethod
    def _add_copies(module: nn.Module, group_of: dict[int, dict[str, Any]]) -> list[nn.Parameter]:
        """Adds copies of weights for single depths to the groups of those; returns what is left."""
        originals = {
            id(copied): id(original)
            for net in module.modules()
            if isinstance(net, ElasticNet)
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

    def _create(
        self, parameters: nn.Module | list[dict[str, Any]], options: dict[str, Any]
    ) -> Optimizer:
        """Makes the optimiser of one model, or of groups of parameters, as timm does."""
        info = get_optimizer_info(self.name.lower())
        ignored = {"betas": not info.has_betas, "eps": not info.has_eps}  # by timm, in silence
        for option in self.options:
            if ignored.get(option):
                raise ValueError(f"The optimiser {self.name} has no option {option!r}.")
        try:
            optimizer: Optimizer = create_optimizer_v2(
                parameters,
                opt=self.name,
                lr=self.lr,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                **options,
            )
        except TypeError as error:
            raise ValueError(
                f"The optimiser {self.name} does not take the options {self.options}: {error}."
            ) from error
        except AssertionError as error:  # of those from bitsandbytes and Apex
            raise ValueError(f"The optimiser {self.name} cannot run here: {error}.") from error
        return optimizer


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then half a cosine, step by step.

    Attributes:
        warmup: Share of the training in which the learning rate grows to its peak.
        final: Learning rate at the end, as a share of the peak.

    Source: Loshchilov and Hutter, "SGDR" (arXiv 1608.03983), without restarts.
    """

    warmup: float = 0.1
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the training in [0, 1), found {self.warmup}.")

    def factor(self, step: int, steps: int) -> float:
        """Learning rate at a step as a share of the peak.

        Example:
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

    To count the steps, Lightning sets up the loaders, and before it has restored a checkpoint that
    would lose their position. `BatchSizeFinder` changes the number, too.

    Args:
        optimizer: What to schedule.
        config: The learning rate.
    """

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig) -> None:
        self.config = config
        self.steps = math.inf
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        return 1.0 if math.isinf(self.steps) else self.config.factor(step, int(self.steps))

    def start(self, steps: float) -> None:
        """Sets the number of steps, and the learning rate of the next one.

        Args:
            steps: Of the whole training; infinite if it has no end.
        """
        self.steps = steps
        factor = self._factor(self.last_epoch)
        self._last_lr = [base * factor for base in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """How far the schedule is: the rest is known."""
        return {key: getattr(self, key) for key in _PROGRESS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint's step."""
        self.__dict__.update({key: state_dict[key] for key in _PROGRESS})


_PROGRESS = ("last_epoch", "_step_count", "_last_lr")


def training_steps(trainer: Trainer, epochs: int | None) -> float:
    """Number of the optimiser's steps in a whole training.

    Args:
        trainer: Has set up its loaders.
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
) -> OptimizerLRScheduler:
    """What a module's ``configure_optimizers`` returns: its optimiser, scheduled by the step.

    Args:
        module: Its ``on_train_start`` has to start the schedule.
        optimizer: The optimiser of all its parameters that need a gradient.
        schedule: The learning rate; it stays at its peak in a training without an end.
        backbones: Its parts that are models of their own, see `OptimizerConfig.create`.
    """
    created = optimizer.create(module, backbones)
    scheduler = StepSchedule(created, schedule)
    return {"optimizer": created, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
