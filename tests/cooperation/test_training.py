"""What Lightning does with a team: accumulation, clipping, averaged weights, resuming."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.utils.data import DataLoader

from teamnet_pl.cooperation import OptimizerConfig
from tests.helpers.teams import (
    CONSTANT,
    Recorder,
    assert_same_state,
    make_digits,
    make_team,
    make_trainer,
    plain_nets,
    snapshot,
)


def test_accumulated_batches_are_one_large_batch(tmp_path, own_nets):
    """Without batch norm, so that a batch can be cut into pieces of the same size."""
    group_norm = {"name": "own_nets.GroupNormNet"}
    members = dict.fromkeys(("leader", "a", "b"), group_norm)
    states = []
    for pieces in (1, 4):
        team = make_team(**members, optimizer=OptimizerConfig(lr=0.05))
        trainer = make_trainer(
            tmp_path,
            accumulate_grad_batches=pieces,
            limit_train_batches=3 * pieces,
            precision="64-true",
        )
        trainer.fit(team, make_digits(batch_size=32 // pieces))
        assert trainer.global_step == 3
        states.append(team.state_dict())
    assert_same_state(states[1], states[0], rtol=1e-8, atol=1e-10)


def test_gradients_are_clipped(tmp_path):
    limit, lr = 0.01, 0.5
    gradients = []

    class GradientRecorder(pl.Callback):
        def on_after_backward(self, trainer, team):
            gradients.append({name: p.grad.clone() for name, p in team.named_parameters()})

    plain = OptimizerConfig("momentum", lr=lr, momentum=0.0, weight_decay=0.0)
    team = make_team(optimizer=plain, schedule=CONSTANT)
    before = snapshot(team)
    trainer = make_trainer(
        tmp_path, callbacks=[GradientRecorder()], gradient_clip_val=limit, limit_train_batches=1
    )
    trainer.fit(team, make_digits())
    norm = torch.cat([gradient.flatten() for gradient in gradients[0].values()]).norm()
    assert norm > limit
    for name, parameter in team.named_parameters():
        expected = before[name] - lr * limit / norm * gradients[0][name]
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-7)


def test_exponential_moving_average(tmp_path):
    recorder, decay = Recorder(), 0.6
    team = make_team()
    trainer = make_trainer(
        tmp_path, callbacks=[EMAWeightAveraging(decay=decay), recorder], limit_train_batches=4
    )
    trainer.fit(team, make_digits())
    first, *others = recorder.weights
    for name, value in team.state_dict().items():
        if value.is_floating_point():
            average = first[name]
            for weights in others:
                average = decay * average + (1 - decay) * weights[name]
            torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-6)
    assert not torch.equal(team.leader.fc.weight, others[-1]["leader.fc.weight"])


def test_the_averaged_weights_are_validated_and_saved(tmp_path):
    callbacks = [EMAWeightAveraging(decay=0.9), ModelCheckpoint(tmp_path, filename="best")]
    team, data = make_team(), make_digits()
    trainer = make_trainer(
        tmp_path, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=1.0
    )
    trainer.fit(team, data)
    logged = {name: float(v) for name, v in trainer.callback_metrics.items() if "val/" in name}
    kept = type(team).load_from_checkpoint(tmp_path / "best.ckpt")
    assert_same_state(kept.state_dict(), team.state_dict())
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    (metrics,) = trainer.validate(kept, data, verbose=False)
    assert metrics == pytest.approx(logged)


def test_stochastic_weight_averaging(tmp_path):
    starts, batches = [], []

    class EpochRecorder(pl.Callback):
        def on_train_epoch_start(self, trainer, team):
            starts.append({name: p.detach().clone() for name, p in team.named_parameters()})
            batches.clear()

        def on_train_batch_start(self, trainer, team, batch, batch_idx):
            batches.append(batch[0])

    team = make_team()
    # Lightning counts these epochs from 1 and averages the weights at the start of epochs. At the
    # end it takes one step too many, at the last learning rate, which is almost 0 here.
    swa = StochasticWeightAveraging(swa_lrs=1e-9, swa_epoch_start=3, annealing_epochs=3)
    trainer = make_trainer(
        tmp_path, callbacks=[EpochRecorder(), swa], limit_train_batches=3, max_epochs=5
    )
    trainer.fit(team, make_digits())
    for name, parameter in team.named_parameters():
        assert not torch.equal(starts[2][name], starts[3][name])
        average = torch.stack([weights[name] for weights in starts[2:5]]).mean(0)
        torch.testing.assert_close(parameter, average, rtol=1e-4, atol=1e-6)
    # The statistics of batch norm are those of one more epoch, at each depth.
    team.eval()
    images = torch.randn(8, 1, 8, 8)
    for member, (_, plain) in plain_nets(team).items():
        for norm in plain.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.reset_running_stats()
                norm.momentum = None
        with torch.no_grad():
            for batch in batches:
                plain.train()(batch)
            torch.testing.assert_close(team(images)[member], plain.eval()(images))


class StopAfter(pl.Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def fit(folder, data, batches, epochs=4, resume=None, **kwargs):
    """Trains for at most four epochs; returns the states of team and optimizer, and the metrics."""
    team = make_team(**kwargs)
    callbacks = [ModelCheckpoint(folder, save_last=True), StopAfter(epochs)]
    trainer = make_trainer(
        folder,
        callbacks=callbacks,
        enable_checkpointing=True,
        limit_train_batches=batches,
        limit_val_batches=2,
        max_epochs=4,
    )
    trainer.fit(team, data, ckpt_path=resume, weights_only=True)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return copy.deepcopy(team.state_dict()), trainer.optimizers[0].state_dict(), metrics


class Unshuffled(pl.LightningDataModule):
    """Serves the training images in the same order in each epoch."""

    def __init__(self, digits):
        super().__init__()
        self.digits = digits

    def setup(self, stage):
        self.digits.setup(stage)

    def train_dataloader(self):
        loader = self.digits.val_dataloader()
        return DataLoader(self.digits.train_set, batch_size=32, collate_fn=loader.collate_fn)

    def val_dataloader(self):
        return self.digits.val_dataloader()


@pytest.mark.parametrize(
    ("shuffled", "batches"),
    [(False, 3), (True, 2), (True, None)],
    ids=["in order", "shuffled", "shuffled, whole epochs"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, shuffled, batches):
    def run(folder, **kwargs):
        data = make_digits(train_size=100)
        data = data if shuffled else Unshuffled(data)
        return fit(tmp_path / folder, data, batches, **kwargs)

    whole = run("whole")
    half = run("half", epochs=2)
    resumed = run("resumed", resume=tmp_path / "half" / "last.ckpt", seed=1)
    assert whole[2]["train/loss"] != half[2]["train/loss"]
    assert_same_state(resumed[0], whole[0])
    torch.testing.assert_close(resumed[1], whole[1], rtol=0, atol=0)
    assert resumed[2] == whole[2]
