"""A team: a Leader and Teammates, trained together at all depths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from teamnet_pl.checkpoints import (
    check_finite,
    count_weights,
    limit_parameters,
    load_checkpoint,
)
from teamnet_pl.cooperation.averaging import AveragedTeachers
from teamnet_pl.cooperation.building import (
    check_distinct,
    describe_member,
    make_leader,
    make_teammate,
    name_teammates,
)
from teamnet_pl.cooperation.callback_check import check_callbacks
from teamnet_pl.cooperation.configs import Leader, LeaderConfig, Teammate, TeammateConfig
from teamnet_pl.cooperation.data_check import check_data
from teamnet_pl.cooperation.idle import IdleParameters
from teamnet_pl.cooperation.losses import CooperativeLoss, logged_name
from teamnet_pl.cooperation.members import (
    LEADER,
    at_least_single,
    member_logits,
    member_names,
    member_probabilities,
)
from teamnet_pl.cooperation.metrics import TeamMetrics, batch_accuracies
from teamnet_pl.cooperation.non_finite import NonFiniteGuard, NonFinitePolicy
from teamnet_pl.cooperation.optimization import (
    OptimizerConfig,
    ScheduleConfig,
    StepSchedule,
    configure,
    training_steps,
)
from teamnet_pl.cooperation.restoring import (
    RUN_KEY,
    load_weights,
    restore_arguments,
    team_content,
)
from teamnet_pl.cooperation.resuming import (
    apply_options,
    check_resumable,
    drop_finders,
    log_row,
    resume_epoch,
    unlogged_row,
)
from teamnet_pl.cooperation.training_pass import TrainingPass
from teamnet_pl.cooperation.transfers import Cooperation, Transfer
from teamnet_pl.elastic import AdaptiveNet
from teamnet_pl.errors import TeamNetError
from teamnet_pl.randomness import seeded
from teamnet_pl.trust import Trust, errors_naming

EvaluatedSplit = Literal["val", "test"]

_OF_SOME_STEPS = ("train/ce/", "train/kd/", "train/features/", "train/accuracy/")
"""What the names of values begin with that a step may lack."""


class Team(LightningModule):
    """Trains a Leader and Teammates together, each Teammate at all of its depths.

    Members are named ``leader``, ``a/d7`` (Teammate a at depth d7) and so on. Each step runs the
    Leader once and each Teammate once, packed. The loss is the sum of every member's label loss and
    of every transfer, weighted. One optimizer takes one step on it.

    Each member is given by its config, or in Python as a module: the Leader as any `nn.Module`, a
    Teammate as an `ElasticNet` or as a backbone that becomes one with default depths. A checkpoint
    does not hold the class of a module; `load_from_checkpoint` takes it as an argument.

    Args:
        num_classes: Number of classes.
        input_shape: Shape of one image, ``(channels, height, width)``.
        leader: The Leader, or None to train without. As a module it only teaches if none of its
            parameters requires a gradient.
        a: One Teammate.
        b: The other, or None to train one alone.
        extra_teammates: More Teammates, by name.
        cooperation: The transfers between them.
        optimizer: The optimizer of all of them.
        schedule: Its learning rate over the training.
        label_smoothing: Share of the label spread over all classes, from 0 to 1.
        on_non_finite: What to do about a term of the loss or a gradient that is infinite or NaN:
            "raise" an error that names it, or "skip" the step and count it. Where the precision
            scales losses (16-mixed), gradients are left to the scaler.

    Attributes:
        run: Plain values about the run, which each checkpoint holds: ``preprocessing`` and
            ``classes`` as the data module describes them, and those that the command line adds.
        criterion: The loss, see `CooperativeLoss`.
        metrics: The metrics of each evaluated split, see `TeamMetrics`.

    Raises:
        TeamNetError: If there is no such backbone, it cannot be elastic, or a depth, a transfer, a
            name or an optimizer does not fit.
        FileNotFoundError: If there is no file with the weights to start from.

    Source: Fang, Bradford, Kim, "Cooperative Learning for Cost-Adaptive Inference"
    (arXiv 2312.08532).

    Examples:
        >>> team = Team(num_classes=10, input_shape=(1, 8, 8), a=TeammateConfig(depths=3), b=None)
        >>> sorted(team(torch.randn(2, 1, 8, 8)))
        ['a/d0', 'a/d4', 'a/d7', 'leader']
        >>> [str(transfer) for transfer in team.transfers]
        ['leader->a/d7', 'leader->a/d4', 'leader->a/d0']
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        # Defaults that the CLI shows, and that never change.
        leader: Leader | None = LeaderConfig(),  # noqa: B008
        a: Teammate = TeammateConfig(),  # noqa: B008
        b: Teammate | None = TeammateConfig(interleaved=True),  # noqa: B008
        extra_teammates: dict[str, Teammate] = {},  # noqa: B006
        cooperation: Cooperation = Cooperation(),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008
        label_smoothing: float = 0.0,
        on_non_finite: NonFinitePolicy = "raise",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise TeamNetError(f"There must be at least 2 classes, found {num_classes}.")
        self._guard = NonFiniteGuard(on_non_finite)
        teammates = name_teammates(a, b, extra_teammates)
        check_distinct(leader, teammates)
        # Plain values alone, so that a checkpoint loads without running pickled code; it brings
        # all weights along, so what they started from is not needed again.
        self.save_hyperparameters(
            {
                "num_classes": num_classes,
                "input_shape": list(input_shape),
                "leader": describe_member(leader),
                "a": describe_member(a),
                "b": describe_member(b),
                "extra_teammates": {
                    name: describe_member(member) for name, member in extra_teammates.items()
                },
                "cooperation": cooperation.describe(),
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
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self._run_seed = torch.initial_seed()
        self._unlogged: object = None  # a row of the log that is due

        self._idle = IdleParameters()
        configs = {
            name: member for name, member in teammates.items() if isinstance(member, TeammateConfig)
        }
        self.leader, self.leader_frozen = make_leader(leader, num_classes, input_shape)
        self._leader_teaches_only = self.leader_frozen
        self.teammates = nn.ModuleDict(
            {
                name: make_teammate(name, teammate, num_classes, input_shape)
                for name, teammate in teammates.items()
            }
        )
        self.criterion = CooperativeLoss(
            {name: net.depths for name, net in self.elastic_nets.items()},
            cooperation,
            leader=leader is not None,
            leader_alone=schedule.leader_alone,
            leader_finish=0.0 if self.leader_frozen else schedule.leader_finish,
            label_smoothing=label_smoothing,
        )
        self._training_pass = TrainingPass(
            self.leader,
            self.elastic_nets,
            configs,
            schedule.leader_alone,
            cooperation.features,
        )
        leader_learns_throughout = self.leader_frozen or schedule.leader_finish == 1
        self._uses_all_weights = self._training_pass.uses_all_weights and (
            self.leader is None or leader_learns_throughout
        )
        self._shared_parameters = [
            shared
            for name, config in configs.items()
            if config.shared_gradients == "mean"
            for shared in self.elastic_nets[name].shared_parameters()
        ]
        self.averaged_teachers = (
            AveragedTeachers(
                self.elastic_nets,
                self._trained_leader,
                cooperation.averaged_teachers,
            )
            if cooperation.averaged_teachers
            else None
        )
        self.metrics = nn.ModuleDict(
            {
                split: TeamMetrics(self.elastic_nets, self.leader, num_classes)
                for split in get_args(EvaluatedSplit)
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
            trust_import: Whether the checkpoint may name backbones and kinds of transfer by import
                path, which runs code: only for a file that you trust as you do code.
            **kwargs: Arguments that replace those in the checkpoint, such as members that were
                given as modules.

        Raises:
            FileNotFoundError: If there is no such file.
            TeamNetError: If it is not a checkpoint of a team, is damaged, or names code that is not
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
            TeamNetError: If there is such a callback.
        """
        if type(self) is Team:  # a subclass may log more
            check_callbacks(self.trainer.callbacks, self.logged_metrics())  # type: ignore[attr-defined]
        return []

    def setup(self, stage: str) -> None:
        """Notes the run's seed, its length and its data, and checks the data's classes."""
        self._run_seed = torch.initial_seed()  # unless a checkpoint brings its own
        self._epochs = self.trainer.max_epochs  # before callbacks change it
        describe = getattr(self.trainer.datamodule, "describe", None)  # type: ignore[attr-defined]
        if describe is None:
            return
        self._data = describe()
        check_data(self.run, self._data)
        if stage == "fit":
            self.run |= self._data

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the values about the run, also where only weights are saved.

        Raises:
            TeamNetError: If a weight is not finite.
        """
        check_finite(
            checkpoint["state_dict"], f"The team after step {checkpoint.get('global_step')}"
        )
        checkpoint[RUN_KEY] = self.run | {"seed": self._run_seed}
        if self._trainer is None:
            return
        checkpoint[RUN_KEY]["unlogged"] = unlogged_row(self._trainer)
        # A run that goes on from here does not log again the rows before it.
        for logger in self._trainer.loggers:
            logger.save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the values about the run that the team does not know yet, and its seed."""
        saved = checkpoint.get(RUN_KEY) or {}
        check_data(saved, self._data)
        self.run = saved | self.run
        if isinstance(seed := saved.get("seed"), int):
            self._run_seed = abs(seed)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self._resume(checkpoint)

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        check_resumable(checkpoint, self.hparams)
        self._unlogged = self.run.pop("unlogged", None)
        if checkpoint["hyper_parameters"]["optimizer"] != self.hparams["optimizer"]:
            fresh = self.optimizer_config.create(self, self.backbones(), self._trained_leader)
            apply_options(checkpoint, fresh)
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

    @property
    def elastic_nets(self) -> Mapping[str, AdaptiveNet]:
        """The Teammates by name."""
        return dict(self.teammates.items())  # type: ignore[arg-type]

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """The transfers between the members."""
        return self.criterion.transfers

    @property
    def lr(self) -> float:
        """The learning rate at its peak, by the name that Lightning's finder looks for."""
        return self.optimizer_config.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer_config = replace(self.optimizer_config, lr=value)
        self.hparams["optimizer"]["lr"] = value

    @property
    def _trained_leader(self) -> nn.Module | None:
        return None if self.leader_frozen else self.leader

    @property
    def _tracks_idle_parameters(self) -> bool:
        return self.trainer.world_size > 1 and not self._uses_all_weights

    def members(self) -> list[str]:
        """Lists the names of all that is trained: the Leader and each depth of each Teammate."""
        return member_names(self.elastic_nets, self.leader)

    def backbones(self) -> list[nn.Module]:
        """Lists the Leader, if it is trained, and the models of the Teammates."""
        leader = [] if self._trained_leader is None else [self._trained_leader]
        return leader + [model for net in self.elastic_nets.values() for model in net.models()]

    def logged_metrics(self) -> list[str]:
        """Lists the names of all metrics that training and evaluation log."""
        trained = [
            member for member in self.members() if member != LEADER or not self.leader_frozen
        ]
        groups = ["kd"] + ["features"] * (self.criterion.cooperation.features.weight > 0)
        terms = [logged_name("ce", member) for member in trained]
        terms += [logged_name(group, str(edge)) for group in groups for edge in self.transfers]
        accuracies = [f"accuracy/{member}" for member in [*self.members(), "mean"]]
        trained = ["loss", "gradient_norm", "skipped_steps", *terms, *accuracies]
        return [
            *(f"train/{name}" for name in trained),
            *(f"train/ramp/{group}" for group in self.criterion.ramps(1.0)),
            *(
                f"{split}/{name}"
                for split in self.metrics
                for name in self.metrics_of("val").value_names()
            ),
        ]

    def train(self, mode: bool = True) -> Team:
        """Sets training mode; a Leader that only teaches stays in evaluation mode."""
        super().train(mode)
        if self.leader is not None and self._leader_teaches_only:
            self.leader.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Runs all members.

        Args:
            images: Shape ``(N, channels, height, width)``.

        Returns:
            Logits by the member's name, each ``(N, num_classes)`` and of at least single precision.
        """
        return member_logits(self.elastic_nets, self.leader, images)

    def on_train_start(self) -> None:
        """Starts the schedule, or goes on with it (Lightning's hook)."""
        resume_epoch(self.trainer, self)
        log_row(self.trainer, self._unlogged)
        self._unlogged = None
        self._steps = training_steps(self.trainer, self._epochs)
        if math.isinf(self._steps) and not self.leader_frozen:
            self.criterion.leader_finish = 1.0
            if self.schedule_config.leader_alone:
                raise TeamNetError(
                    "schedule.leader_alone is a share of a training that has an end: set "
                    "trainer.max_epochs or max_steps."
                )
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, StepSchedule):
                config.scheduler.set_peak(self.lr)  # which a finder may have changed
                config.scheduler.start(self._steps)

    def _progress(self) -> float:
        """Share of the training that is done, this step included; 1 in one without an end."""
        if not 0 < self._steps < math.inf:
            return 1.0
        return min(1.0, (self.global_step + 1) / self._steps)  # averaging adds an epoch

    def _step_seed(self, batch_idx: int) -> int:
        """Seed of dropout and the like: the same in a resumed run, another per process."""
        parts = [self._run_seed, self.current_epoch, batch_idx, self.global_rank]
        return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Runs one step of all members on one batch of images and labels.

        Raises:
            TeamNetError: If a term of the loss is not finite, unless such steps are skipped.
        """
        images, target = batch
        progress = self._progress()
        self._leader_teaches_only = not self.criterion.is_trained(LEADER, progress)
        if self.leader is not None and self.leader.training == self._leader_teaches_only:
            self.leader.train(not self._leader_teaches_only)
        if self.averaged_teachers is not None:
            nets = dict(self.elastic_nets) | ({} if self.leader is None else {LEADER: self.leader})
            self.averaged_teachers.update(nets, self.global_step)
        self._guard.before_forward(self)
        with seeded(self._step_seed(batch_idx), images.device):
            seed = [self._run_seed, self.current_epoch, batch_idx]
            leader_learns = not self._leader_teaches_only
            outputs = self._training_pass.run(images, progress, seed, leader_learns)
            teachers = self._averaged_logits(outputs.logits, images)
        terms = self.criterion.terms(outputs.logits, target, progress, teachers, outputs.features)
        loss = self.criterion.total(terms, progress)
        if self._tracks_idle_parameters:
            loss = self._idle.include(loss, self._trained_parameters())
        named = terms.named()
        accuracies = batch_accuracies(outputs.logits, target) if self._logs_step else {}
        # In one collective, by which all processes also know of values that are not finite in any.
        values = torch.stack([*named.values(), loss, *accuracies.values()]).detach()
        values = self.trainer.strategy.reduce(values, reduce_op="mean")
        if not self._guard.check_terms(list(named), values[: len(named) + 1], self.global_step):
            return loss * torch.nan  # so that no gradient is finite
        logged = [f"train/{name}" for name in (*named, "loss", *accuracies)]
        self._forget_logged(logged)
        ramps = self.criterion.ramps(progress).items()
        self.log_dict({f"train/ramp/{group}": factor for group, factor in ramps})
        for name, value in zip(logged, values, strict=True):
            self.log(name, value, prog_bar=name == "train/loss")
        return loss

    @property
    def _logs_step(self) -> bool:
        """Whether this step's values reach the loggers; the others need not be measured."""
        return self.trainer._logger_connector.should_update_logs

    def _forget_logged(self, names: Sequence[str]) -> None:
        """Keeps Lightning from logging the last values of terms again that this step lacks."""
        results: dict[str, Any] = self.trainer._results or {}
        for key in list(results):
            name = key.removeprefix("training_step.")
            if name.startswith(_OF_SOME_STEPS) and name not in names:
                del results[key]

    def _averaged_logits(self, logits: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Runs the averages of the members that take part, other than a finished Leader."""
        if self.averaged_teachers is None:
            return {}
        learning = {
            member: values
            for member, values in logits.items()
            if member != LEADER or not self._leader_teaches_only
        }
        return self.averaged_teachers.logits(learning, images)

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def on_after_backward(self) -> None:
        """Undoes the effect that a skipped batch had on the statistics of norms."""
        self._guard.after_backward(self)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Refuses gradients that are not finite.

        Raises:
            TeamNetError: If one is not finite, unless such steps are skipped.
        """
        if self._tracks_idle_parameters:
            self._idle.take_gradients(self._trained_parameters(), self.trainer.strategy)
        for parameter, number in self._shared_parameters:
            if parameter.grad is not None:
                parameter.grad /= number
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        skipped = self._guard.before_step(self, optimizer, self.global_step, has_scaler)
        if self._guard.skips:
            self.run["skipped_steps"] = self.run.get("skipped_steps", 0) + skipped
            self.log("train/skipped_steps", float(self.run["skipped_steps"]))
        if self._logs_step:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self.log("train/gradient_norm", get_total_norm(gradients))

    def on_validation_epoch_start(self) -> None:
        """Starts the counts anew that Lightning does not reset."""
        self.metrics_of("val").predictions.reset()

    def on_test_epoch_start(self) -> None:
        """Starts the counts anew that Lightning does not reset."""
        self.metrics_of("test").predictions.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measures all members on one batch; returns their probabilities, for callbacks."""
        return self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measures all members on one batch; returns their probabilities, for callbacks."""
        return self._evaluate("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Returns class probabilities by the member's name, each ``(N, num_classes)``."""
        return self._probabilities(batch[0])

    def _probabilities(self, images: Tensor) -> dict[str, Tensor]:
        if len(images):
            logits = self(images)
        else:  # none of its images could be read, or only other processes have more of them
            none = at_least_single(images.new_zeros(0, self.num_classes))
            logits = dict.fromkeys(self.members(), none)
        return member_probabilities(self.elastic_nets, logits)

    def _evaluate(self, split: EvaluatedSplit, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, target = batch
        metrics, probabilities = self.metrics_of(split), self._probabilities(images)
        metrics.update(probabilities, target)
        for name, member, metric in metrics.metrics():
            self.log(f"{split}/{name}/{member}", metric)
        return probabilities

    def metrics_of(self, split: EvaluatedSplit) -> TeamMetrics:
        """Returns the metrics of one split."""
        metrics: TeamMetrics = self.metrics[split]  # type: ignore[assignment]
        return metrics

    def on_validation_epoch_end(self) -> None:
        """Logs the values that are of several members."""
        self._log_shared("val")

    def on_test_epoch_end(self) -> None:
        """Logs the values that are of several members."""
        self._log_shared("test")

    def _log_shared(self, split: EvaluatedSplit) -> None:
        metrics = self.metrics_of(split)
        self.log(f"{split}/accuracy/mean", metrics.mean_accuracy(), prog_bar=True, sync_dist=True)
        values = metrics.disagreements().items()
        self.log_dict({f"{split}/{name}": value for name, value in values}, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Makes one optimizer for all members, its learning rate scheduled by the step."""
        return configure(
            self,
            self.optimizer_config,
            self.schedule_config,
            self.backbones(),
            self._trained_leader,
        )
