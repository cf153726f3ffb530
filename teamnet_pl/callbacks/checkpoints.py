"""Recovery points of a run: the best weights, and the state to resume from."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from datetime import timedelta
from errno import ENOENT
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from teamnet_pl.atomic import atomic_write
from teamnet_pl.callbacks.folder import results_folder
from teamnet_pl.errors import TeamNetError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights with the best score of a validation, in ``best.ckpt``.

    They are saved right after the validation that gave the score, at no other moment, and never for
    a score that is not finite. A file of another run in the same folder is kept: the name of the
    new one then ends in a version. A resumed run takes over the score and a copy of the file of the
    previous run.

    Args:
        dirpath: Folder; by default ``checkpoints`` in the logger's folder.
        filename: Name of the file without its ending, which may have metrics in braces.
        monitor: Name of the metric that is the score.
        mode: Whether a higher or a lower score is better.
        save_top_k: Number of best checkpoints that are kept; -1 for all, 0 for none.
        save_weights_only: Whether to leave out the state that only resuming needs.
        every_n_epochs: The epochs whose validations count.
        verbose: Whether to log when a file is saved.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str = "best",
        monitor: str = "val/accuracy/mean",
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
        save_weights_only: bool = False,
        every_n_epochs: int = 1,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            every_n_epochs=every_n_epochs,
            verbose=verbose,
            save_on_train_epoch_end=False,
        )

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Returns whether a score is among the best ones."""
        if current is None or not torch.isfinite(current):
            return False
        return super().check_monitor_top_k(trainer, current)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the score and the files of the previous run, whatever its folder."""
        super().load_state_dict(state_dict | {"dirpath": self.dirpath})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the files of the previous run to the folder of this one."""
        super().on_train_start(trainer, pl_module)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            copies = {path: self._copied(trainer, path) for path in self.best_k_models}
        except FileNotFoundError as error:
            rank_zero_warn(
                f"The best checkpoint of the previous run, {error.filename}, is missing: the best "
                "of the remaining epochs is kept instead."
            )
            self.best_k_models, self.best_model_path, self.best_model_score = {}, "", None
            return
        self.best_k_models = {copies[path]: score for path, score in self.best_k_models.items()}
        self.best_model_path = copies.get(self.best_model_path, self.best_model_path)
        self.kth_best_model_path = copies.get(self.kth_best_model_path, self.kth_best_model_path)

    def _copied(self, trainer: Trainer, path: str) -> str:
        target = Path(self.dirpath or "") / Path(path).name
        if target.absolute() == Path(path).absolute():
            return path
        beside = Path(trainer.ckpt_path or path).with_name(Path(path).name)
        source = next((file for file in (Path(path), beside) if file.is_file()), None)
        if source is None:
            raise FileNotFoundError(ENOENT, "There is no such file", path)
        if trainer.is_global_zero:
            with open(source, "rb") as file, atomic_write(target) as copy:
                shutil.copyfileobj(file, copy)
        return str(target)


class LastCheckpoint(Checkpoint):
    """Keeps the state to resume from, in ``last.ckpt``, whatever the score.

    It is saved at the end of each epoch, at intervals within an epoch if asked for, and when the
    run receives SIGTERM or SIGINT (Ctrl-C). Such a run finishes its step, and a validation or the
    end of the epoch if one is due; then it saves and exits with the code 143 or 130. A second
    signal ends it at once. All processes of a run stop at the same step.

    Args:
        dirpath: Folder; by default that of the best checkpoint.
        every_n_train_steps: Steps of the optimizer between saves within an epoch; 0 for none.
        train_time_interval: Time between saves within an epoch; None for none.

    Attributes:
        last_model_path: The file; empty until it is saved.

    Raises:
        TeamNetError: If a number is negative.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_train_steps: int = 0,
        train_time_interval: timedelta | None = None,
    ) -> None:
        super().__init__()
        if every_n_train_steps < 0:
            raise TeamNetError(
                f"every_n_train_steps must be 0 (off) or positive, found {every_n_train_steps}."
            )
        self.dirpath = dirpath
        self.every_n_train_steps = every_n_train_steps
        self.train_time_interval = train_time_interval
        self.last_model_path = ""
        self._signal: int | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._is_due = False
        self._seen_step = 0
        self._saved_at = 0.0

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals, in the first hook after Lightning has done so."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count steps and time, and takes over the signals."""
        self._seen_step, self._saved_at = trainer.global_step, time.monotonic()
        self._is_due = False
        self._listen()

    def _listen(self) -> None:
        """Replaces the handlers of Lightning, which run a collective wherever a signal arrives."""
        if threading.current_thread() is threading.main_thread() and not self._previous_handlers:
            for number in _SIGNALS:
                self._previous_handlers[number] = signal.signal(number, self._note_signal)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves within an epoch if a save is due."""
        if trainer.global_step == self._seen_step:  # gradients are being accumulated
            return
        self._seen_step = trainer.global_step
        self._is_due |= self._is_time(trainer) or self._is_stopping(trainer)
        loop = trainer.fit_loop.epoch_loop
        # Otherwise a resumed run would leave out the validation or the end of the epoch.
        rest = loop.batch_progress.is_last_batch or loop._is_training_done
        rest |= loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if self._is_due and not rest:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after a validation within an epoch if a save was due before it."""
        within_epoch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch is False
        if self._is_due and within_epoch and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after each epoch."""
        self._is_stopping(trainer)
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the handlers of the signals."""
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restores the handlers of the signals."""
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise SystemExit(128 + number)
        self._signal = number

    def _is_stopping(self, trainer: Trainer) -> bool:
        """Whether any process received a signal, which all of them then note."""
        if trainer.world_size > 1:
            number = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
            number = trainer.strategy.reduce(number, reduce_op="max")
            self._signal = int(number) or None
        return self._signal is not None

    def _is_time(self, trainer: Trainer) -> bool:
        if self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0:
            return True
        if self.train_time_interval is None:
            return False
        passed = time.monotonic() - self._saved_at > self.train_time_interval.total_seconds()
        return trainer.strategy.broadcast(passed)

    def _save(self, trainer: Trainer) -> None:
        """Saves, and ends the run if it received a signal."""
        self._is_due, self._saved_at = False, time.monotonic()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(self.dirpath) if self.dirpath else results_folder(trainer, resumed=False)
            self.last_model_path = str(folder / "last.ckpt")
            trainer.save_checkpoint(self.last_model_path)
        if self._signal is not None:
            rank_zero_info(
                f"{signal.Signals(self._signal).name}: stopped after step {trainer.global_step}. "
                f"Resume by: teamnet fit --ckpt_path {self.last_model_path}"
            )
            # Lightning kills the other processes as soon as one that it started fails.
            launched = trainer.strategy.launcher is not None and trainer.global_rank > 0
            raise SystemExit(0 if launched else 128 + self._signal)
