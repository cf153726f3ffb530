"""A team: a Leader and two Teammates, trained together at all depths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone uses)
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torchmetrics import Metric

from teamnet_pl.backbones import create_backbone
from teamnet_pl.checkpoints import (
    check_finite,
    count_weights,
    limit_parameters,
    load_checkpoint,
)
from teamnet_pl.cooperation.configs import LeaderConfig, TeammateConfig, restore_arguments
from teamnet_pl.cooperation.metrics import member_metrics
from teamnet_pl.cooperation.optimization import (
    OptimizerConfig,
    ScheduleConfig,
    StepSchedule,
    configure,
    training_steps,
)
from teamnet_pl.cooperation.resuming import (
    apply_options,
    check_resumable,
    drop_finders,
    log_row,
    resume_epoch,
    unlogged_row,
)
from teamnet_pl.cooperation.transfers import Cooperation, distillation_loss
from teamnet_pl.elastic import ElasticNet
from teamnet_pl.errors import TeamNetError
from teamnet_pl.randomness import seeded
from teamnet_pl.trust import Trust, errors_naming

Stage = Literal["val", "test"]

RUN_KEY = "teamnet"
"""Where a checkpoint holds `Team.run`."""


class Team(LightningModule):
    """Trains a Leader and Teammates together, each Teammate at all of its depths.

    Members are named ``leader``, ``a/d7`` (Teammate a at depth d7) and so on. Each step runs the
    Leader once and each Teammate once, packed. The loss is the sum of every member's label loss and
    of every transfer, weighted. One optimiser takes one step on it.

    Args:
        num_classes: Number of classes.
        input_shape: Shape of one image, ``(channels, height, width)``.
        leader: The Leader, or None to train without.
        a: One Teammate.
        b: The other, or None to train one alone.
        cooperation: The transfers between them.
        optimizer: The optimiser of all of them.
        schedule: Its learning rate over the training.
        label_smoothing: Share of the label spread over all classes, from 0 to 1.
        on_non_finite: What to do about a term of the loss or a gradient that is infinite or NaN:
            "raise" an error that names it, or "skip" the step and count it. Where the precision
            scales losses (16-mixed), gradients are left to the scaler.

    Attributes:
        run: Plain values about the run, which each checkpoint holds: ``preprocessing`` and
            ``classes`` as the data module describes them, and what the command line adds.

    Raises:
        ValueError: If there is no such backbone, it cannot be elastic, or a depth, a transfer or an
            optimiser does not fit.
        FileNotFoundError: If there is no file with the weights to start from.

    Source: Fang, Bradford, Kim, "Cooperative Learning for Cost-Adaptive Inference"
    (arXiv 2312.08532).

    Example:
        >>> team = Team(num_classes=10, input_shape=(1, 8, 8), a=TeammateConfig(depths=3), b=None)
        >>> sorted(team(torch.randn(2, 1, 8, 8)))
        ['a/d0', 'a/d4', 'a/d7', 'leader']
        >>> [str(transfer) for transfer in team.transfers]
        ['leader->a/d7', 'a/d7->a/d4', 'a/d7->a/d0']
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        # Defaults that the CLI shows, and that never change.
        leader: LeaderConfig | None = LeaderConfig(),  # noqa: B008
        a: TeammateConfig = TeammateConfig(),  # noqa: B008
        b: TeammateConfig | None = TeammateConfig(interleaved=True),  # noqa: B008
        cooperation: Cooperation = Cooperation(),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008
        label_smoothing: float = 0.0,
        on_non_finite: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        if on_non_finite not in ("raise", "skip"):
            raise TeamNetError(f"on_non_finite must be raise or skip, found {on_non_finite!r}.")
        if not 0 <= label_smoothing < 1:
            raise TeamNetError(f"label_smoothing must be in [0, 1), found {label_smoothing}.")
        if num_classes < 2:
            raise TeamNetError(f"There must be at least 2 classes, found {num_classes}.")
        # Plain values alone, so that a checkpoint loads without running pickled code; it brings
        # all weights along, so what they started from is not needed again.
        self.save_hyperparameters(
            {
                "num_classes": num_classes,
                "input_shape": list(input_shape),
                "leader": leader and asdict(leader.without_weights()),
                "a": asdict(a.without_weights()),
                "b": b and asdict(b.without_weights()),
                "cooperation": asdict(cooperation),
                "optimizer": asdict(optimizer),
                "schedule": asdict(schedule),
                "label_smoothing": label_smoothing,
                "on_non_finite": on_non_finite,
            }
        )
        self.run: dict[str, Any] = {}
        self._data: Mapping[str, Any] = {}  # as the trainer's data module describes it
        self.num_classes = num_classes
        self.input_shape = tuple(input_shape)
        self.cooperation = cooperation
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.label_smoothing = label_smoothing
        self.on_non_finite = on_non_finite
        self._step_is_lost = False  # since a term of its loss is not finite
        self._lost_statistics: list[Tensor] = []  # of norms, as they were before

        self.leader: nn.Module | None = None
        self.leader_frozen = leader is not None and leader.frozen
        if leader is not None:
            self.leader = create_backbone(leader, num_classes, input_shape[0])
            self.leader.requires_grad_(not leader.frozen)
            self.leader.train(not leader.frozen)
        self.teammates = nn.ModuleDict()
        for name, config in {"a": a, "b": b}.items():
            if config is not None:
                self.teammates[name] = ElasticNet(
                    create_backbone(config, num_classes, input_shape[0]),
                    input_shape,
                    **config.elastic_options(),
                )
        self.transfers = cooperation.transfers(
            {name: [depth.name for depth in net.depths] for name, net in self.elastic_nets.items()},
            has_leader=leader is not None,
        )
        self._run_seed = torch.initial_seed()
        self._unlogged: object = None  # a row of the log that is due
        self.metrics = nn.ModuleDict(
            {
                stage: nn.ModuleDict(
                    {who: member_metrics(num_classes) for who in self._evaluated()}
                )
                for stage in get_args(Stage)
            }
        )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        strict: bool = True,
        *,
        trust_import: bool = False,
        **kwargs: Any,
    ) -> Team:
        """Restores a team by the arguments and weights in a checkpoint.

        Args:
            checkpoint_path: The checkpoint.
            map_location: Device that the tensors go to; by default the one they were on.
            strict: Whether the weights' names must be those of the team.
            trust_import: Whether the checkpoint may name backbones by import path, which runs code:
                only for a file that you trust as you do code.
            **kwargs: Arguments that replace those in the checkpoint.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a checkpoint of a team, is damaged, or names what is not
                trusted; or if its weights do not fit its team.
        """
        checkpoint = load_checkpoint(checkpoint_path, map_location)
        values, weights = team_content(checkpoint_path, checkpoint)
        values = {name: value for name, value in values.items() if name not in kwargs}
        trust = Trust(checkpoint_path, trust_import)
        with (
            errors_naming(checkpoint_path),
            limit_parameters(count_weights(weights), checkpoint_path),
        ):
            team = cls(**restore_arguments(cls, values, trust) | kwargs)
            team.on_load_checkpoint(checkpoint)
        load_weights(team, weights, checkpoint_path, strict)
        device = next((tensor.device for tensor in weights.values()), None)
        return team.to(device)

    def configure_callbacks(self) -> list[Callback]:
        """Refuses a callback that cannot work with a team, and adds none.

        Raises:
            ValueError: If there is such a callback.
        """
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, BackboneFinetuning) for callback in callbacks):
            raise TeamNetError(
                "BackboneFinetuning unfreezes the one `backbone` of a module, and a team has "
                "several: freeze the Leader by model.leader.frozen, or write a BaseFinetuning of "
                "your own for the modules in `team.backbones()`."
            )
        return []

    def setup(self, stage: str) -> None:
        """Notes the run's seed, its length and its data, and checks the data's classes."""
        self._run_seed = torch.initial_seed()  # unless a checkpoint brings its own
        self._epochs = self.trainer.max_epochs  # before callbacks change it
        describe = getattr(self.trainer.datamodule, "describe", None)  # type: ignore[attr-defined]
        if describe is None:
            return
        description = describe()
        self._data = description
        self._check_data(self.run)
        if stage == "fit":
            self.run |= description

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the values about the run, also where only weights are saved.

        Raises:
            ValueError: If a weight is not finite.
        """
        check_finite(
            checkpoint["state_dict"], f"The team after step {checkpoint.get('global_step')}"
        )
        checkpoint[RUN_KEY] = self.run | {"seed": self._run_seed}
        if self._trainer is None:
            return
        checkpoint[RUN_KEY]["unlogged"] = unlogged_row(self._trainer)
        # A run that goes on from here does not log again what led here.
        for logger in self._trainer.loggers:
            logger.save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the values about the run that the team does not know yet, and its seed."""
        saved = checkpoint.get(RUN_KEY) or {}
        self._check_data(saved)
        self.run = saved | self.run
        if isinstance(seed := saved.get("seed"), int):
            self._run_seed = abs(seed)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self._resume(checkpoint)

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        check_resumable(checkpoint, self.hparams)
        self._unlogged = self.run.pop("unlogged", None)
        if checkpoint["hyper_parameters"]["optimizer"] != self.hparams["optimizer"]:
            apply_options(checkpoint, self.optimizer_config.create(self, self.backbones()))
        done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        # Averaging ends with one more epoch, in which only batch norms learn.
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        done -= any(isinstance(each, StochasticWeightAveraging) for each in callbacks)
        if 0 <= (self._epochs or 0) < done:
            raise TeamNetError(
                f"The checkpoint has been trained for {done} epochs, more than the {self._epochs} "
                "that were asked for: give more (--trainer.max_epochs)."
            )
        if checkpoint["global_step"]:
            drop_finders(self.trainer)

    def _check_data(self, run: Mapping[str, Any]) -> None:
        """Compares the data with that of a run, by its classes and its preprocessing."""
        self._check_classes(run.get("classes"), self._data.get("classes"))
        trained, now = run.get("preprocessing"), self._data.get("preprocessing")
        if not isinstance(trained, Mapping) or now is None:
            return
        names = [name for name in ("mean", "std", "bits") if trained.get(name) != now[name]]
        if names:
            rank_zero_warn(
                "The team was trained, and predicts, with "
                + ", ".join(f"{name} {trained.get(name)}" for name in names)
                + "; this data has "
                + ", ".join(f"{name} {now[name]}" for name in names)
                + ". Accuracies may differ: set statistics or bits as in training."
            )

    def _check_classes(self, trained: list[str] | None, now: list[str] | None) -> None:
        """Refuses data with other classes than the team was trained on, by their names."""
        if not trained or not now or trained == now:
            return
        unnamed = [str(label) for label in range(len(trained))]
        if unnamed in (trained, now):
            return
        gone = [name for name in trained if name not in now]
        new = [name for name in now if name not in trained]
        difference = f"missing: {_listed(gone)}; new: {_listed(new)}"
        if not gone and not new:
            difference = f"the order is {_listed(now)}, not {_listed(trained)}"
        raise TeamNetError(
            f"The data has other classes than the team was trained on ({difference}). Name the "
            "classes as they were in training."
        )

    @property
    def elastic_nets(self) -> Mapping[str, ElasticNet]:
        """The Teammates by name."""
        return dict(self.teammates.items())  # type: ignore[arg-type]

    @property
    def lr(self) -> float:
        """The learning rate at its peak, by the name that Lightning's finder looks for."""
        return self.optimizer_config.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer_config = replace(self.optimizer_config, lr=value)
        self.hparams["optimizer"]["lr"] = value

    def members(self) -> list[str]:
        """Names of all that is trained: the Leader and each depth of each Teammate."""
        depths = [f"{name}/{d}" for name, net in self.elastic_nets.items() for d in net.depths]
        return depths if self.leader is None else ["leader", *depths]

    def _evaluated(self) -> list[str]:
        return self.members() + (["ensemble"] if len(self.teammates) > 1 else [])

    def train(self, mode: bool = True) -> Team:
        """Sets training mode; a frozen Leader stays in evaluation mode."""
        super().train(mode)
        if self.leader is not None and self.leader_frozen:
            self.leader.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Runs all members.

        Args:
            images: Shape ``(N, channels, height, width)``.

        Returns:
            Logits by the member's name, each ``(N, num_classes)`` and of at least single precision.
        """
        logits = {}
        if self.leader is not None:
            logits["leader"] = _single(self.leader(images))
        for name, net in self.elastic_nets.items():
            packed = _single(net.packed(images))
            logits |= {f"{name}/{d}": own for d, own in zip(net.depths, packed, strict=True)}
        return logits

    def losses(self, logits: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """Every term of the loss, unweighted.

        Args:
            logits: By the member's name, each ``(N, num_classes)``.
            target: Labels, shape ``(N,)``, or class probabilities, shape ``(N, num_classes)``.

        Returns:
            ``ce/<member>`` for each trained member and ``kd/<teacher>-><student>`` for each
            transfer, scalars.
        """
        terms = {
            f"ce/{member}": F.cross_entropy(own, target, label_smoothing=self.label_smoothing)
            for member, own in logits.items()
            if not (member == "leader" and self.leader_frozen)
        }
        for own in self.transfers:
            terms[f"kd/{own}"] = distillation_loss(
                logits[own.student], logits[own.teacher], own.temperature
            )
        return terms

    def total_loss(self, terms: Mapping[str, Tensor], ramp: float) -> Tensor:
        """Sums the terms of the loss up.

        Args:
            terms: As `losses` returns them.
            ramp: Factor of all transfers, 0 to 1.

        Returns:
            The loss, a scalar.
        """
        label = [term for name, term in terms.items() if name.startswith("ce/")]
        distilled = [transfer.weight * terms[f"kd/{transfer}"] for transfer in self.transfers]
        total = torch.stack(label).sum()
        return total + ramp * torch.stack(distilled).sum() if distilled else total

    def _step_seed(self, batch_idx: int) -> int:
        """What dropout is drawn with: the same in a run that was resumed, another per process."""
        parts = [self._run_seed, self.current_epoch, batch_idx, self.global_rank]
        return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])

    def on_train_start(self) -> None:
        """Starts the schedule, or goes on with it (Lightning's hook)."""
        resume_epoch(self.trainer, self)
        log_row(self.trainer, self._unlogged)
        self._unlogged = None
        self._steps = training_steps(self.trainer, self._epochs)
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, StepSchedule):
                config.scheduler.set_peak(self.lr)  # which a finder may have changed
                config.scheduler.start(self._steps)

    def _ramp(self) -> float:
        steps = self.cooperation.ramp * self._steps
        # Nothing to grow over without a ramp, or in a training without an end.
        return min(1.0, (self.global_step + 1) / steps) if 0 < steps < math.inf else 1.0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One step of all members on one batch of images and labels.

        Raises:
            ValueError: If a term of the loss is not finite, unless such steps are skipped.
        """
        images, target = batch
        skips = self.on_non_finite == "skip"
        statistics = [buffer.clone() for buffer in self.buffers()] if skips else []
        with seeded(self._step_seed(batch_idx), images.device):
            logits = self(images)
        terms = self.losses(logits, target)
        ramp = self._ramp()
        loss = self.total_loss(terms, ramp)
        # In one collective, by which all processes also know of what is not finite in any.
        values = torch.stack([loss, *terms.values()]).detach()
        values = self.trainer.strategy.reduce(values, reduce_op="mean")
        if not values.isfinite().all():
            # The loss itself last: it is what the terms make of it.
            named = zip([*terms, "loss"], values.roll(-1).tolist(), strict=True)
            name, value = next((n, v) for n, v in named if not math.isfinite(v))
            self._refuse_step(f"the term {name} of the loss is {value}")
            self._step_is_lost = True
            self._lost_statistics = statistics
            return loss * torch.nan  # so that no gradient is finite
        self.log("train/loss", values[0], prog_bar=True)
        self.log("train/ramp", ramp)
        self.log_dict({f"train/{n}": value for n, value in zip(terms, values[1:], strict=True)})
        return loss

    def _refuse_step(self, problem: str) -> None:
        """Raises, or warns where such steps are skipped."""
        if self.on_non_finite == "raise":
            raise TeamNetError(
                f"Step {self.global_step}: {problem}, so training stops before it. Lower the "
                "learning rate, clip gradients (gradient_clip_val), or have such steps skipped "
                "(on_non_finite: skip)."
            )
        rank_zero_warn(f"Step {self.global_step} is skipped: {problem}.")

    def on_after_backward(self) -> None:
        """Takes back what a batch whose step is skipped did to the statistics of norms."""
        if self._lost_statistics:
            for buffer, value in zip(self.buffers(), self._lost_statistics, strict=True):
                buffer.copy_(value)
            self._lost_statistics = []

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Refuses gradients that are not finite; the same on all processes, as they are.

        Raises:
            ValueError: If one is not finite, unless such steps are skipped.
        """
        lost, self._step_is_lost = self._step_is_lost, False
        # A scaler of losses looks at the gradients itself, and skips their step.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            gradients = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
            if not get_total_norm(list(gradients.values()), math.inf).isfinite():
                if not lost:
                    name = next(n for n, g in gradients.items() if not g.isfinite().all())
                    self._refuse_step(f"the gradient of {name} is not finite")
                lost = True
                optimizer.zero_grad()  # a step without gradients changes nothing
        if self.on_non_finite == "skip":
            self.run["skipped_steps"] = self.run.get("skipped_steps", 0) + lost
            self.log("train/skipped_steps", float(self.run["skipped_steps"]))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measures all members on one batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measures all members on one batch."""
        self._evaluate("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Class probabilities of one batch by the member's name, each ``(N, num_classes)``."""
        return self._probabilities(self._evaluated_logits(batch[0]))

    def _evaluated_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Runs all members, unless there is no image in a batch."""
        if len(images):
            return self(images)  # type: ignore[no-any-return]
        # None of its images could be read, or only other processes have more of them.
        return dict.fromkeys(self.members(), _single(images.new_zeros(0, self.num_classes)))

    def _probabilities(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adds to the members' predictions the mean of the Teammates' deepest ones."""
        probabilities = {member: _softmax(values) for member, values in logits.items()}
        if len(self.teammates) > 1:
            deepest = [f"{name}/{net.depths[0]}" for name, net in self.elastic_nets.items()]
            stacked = torch.stack([probabilities[member] for member in deepest])
            probabilities["ensemble"] = stacked.mean(dim=0)
        return probabilities

    def _evaluate(self, stage: Stage, batch: tuple[Tensor, Tensor]) -> None:
        images, target = batch
        for member, probabilities in self._probabilities(self._evaluated_logits(images)).items():
            for name, metric in self._metrics(stage, member).items():
                metric.update(probabilities, target)
                self.log(f"{stage}/{name}/{member}", metric)

    def _metrics(self, stage: Stage, member: str) -> Mapping[str, Metric]:
        metrics: Mapping[str, Metric] = self.metrics[stage][member]  # type: ignore[index]
        return metrics

    def on_validation_epoch_end(self) -> None:
        """Logs the mean accuracy of all depths of all Teammates."""
        self._log_mean_accuracy("val")

    def on_test_epoch_end(self) -> None:
        """Logs the mean accuracy of all depths of all Teammates."""
        self._log_mean_accuracy("test")

    def _log_mean_accuracy(self, stage: Stage) -> None:
        depths = [member for member in self.members() if member != "leader"]
        found = [self._metrics(stage, member)["accuracy"].compute() for member in depths]
        mean = torch.stack(found).mean()
        self.log(f"{stage}/accuracy/mean", mean, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimiser for all members, its learning rate scheduled by the step."""
        return configure(self, self.optimizer_config, self.schedule_config, self.backbones())

    def backbones(self) -> list[nn.Module]:
        """The Leader, if it is trained, and the Teammates' backbones."""
        leader = [] if self.leader is None or self.leader_frozen else [self.leader]
        return leader + [net.backbone for net in self.elastic_nets.values()]


def team_content(
    source: object, checkpoint: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Takes the hyper-parameters and the weights out of a checkpoint of a `Team`.

    Args:
        source: The file, for messages.
        checkpoint: Its content.

    Raises:
        ValueError: If it is not a checkpoint of a team.
    """
    values, weights = checkpoint.get("hyper_parameters"), checkpoint.get("state_dict")
    required = {"num_classes", "input_shape", "a", "b"}
    if not isinstance(values, Mapping) or not required <= values.keys():
        raise TeamNetError(
            f"{source} is not a checkpoint of a team: it holds "
            f"{', '.join(map(str, checkpoint))}. Give one that teamnet fit saved."
        )
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()
    ):
        raise TeamNetError(f"{source} does not hold weights (state_dict): use another copy of it.")
    check_task(source, values["num_classes"], values["input_shape"])
    return dict(values), dict(weights)


def check_task(source: object, num_classes: object, input_shape: object) -> None:
    """Checks the number of classes and the shape of images that come from a file.

    Args:
        source: The file, for messages.
        num_classes: Should be 2 or more.
        input_shape: Should be ``(channels, height, width)``.

    Raises:
        ValueError: If they are not.
    """
    if type(num_classes) is not int or num_classes < 2:
        raise TeamNetError(f"{source}: num_classes must be 2 or more, found {num_classes!r}.")
    if (
        not isinstance(input_shape, list | tuple)
        or len(input_shape) != 3
        or any(type(size) is not int or size < 1 for size in input_shape)
    ):
        raise TeamNetError(
            f"{source}: input_shape must be (channels, height, width), found {input_shape!r}."
        )


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], source: object, strict: bool = True
) -> None:
    """Loads weights into a module.

    Args:
        module: The module.
        weights: By name.
        source: The file that they come from, for messages.
        strict: Whether the names must be those of the module.

    Raises:
        ValueError: If they do not fit.
    """
    try:
        module.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        raise TeamNetError(f"The weights in {source} are not those of its team: {error}") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more


def _softmax(logits: Tensor) -> Tensor:
    """Class probabilities; all NaN for an image of which a logit is not finite."""
    finite = logits.isfinite().all(dim=-1, keepdim=True)
    return logits.softmax(dim=-1).masked_fill(~finite, torch.nan)


def _single(logits: Tensor) -> Tensor:
    """Losses and metrics need more than half precision."""
    return logits.float() if logits.dtype in (torch.half, torch.bfloat16) else logits
