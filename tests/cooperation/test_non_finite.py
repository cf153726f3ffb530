"""Losses, gradients, weights and predictions that are infinite or NaN."""

import json
import os
import subprocess

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from teamnet_pl.callbacks import DepthReport, PredictionWriter
from teamnet_pl.checkpoints import check_finite
from teamnet_pl.cooperation import (
    Cooperation,
    OptimizerConfig,
    PeerEdge,
    SubNetworkEdge,
    TeacherEdge,
)
from teamnet_pl.cooperation.report import report_file
from tests.helpers.runs import read_csv, teamnet_command
from tests.helpers.teams import (
    CONSTANT,
    assert_same_state,
    make_digits,
    make_team,
    make_trainer,
    snapshot,
)

NAN = float("nan")


def batches(poisoned=(), left_out=(), count=4):
    """A loader of batches of eight images, some of which have a NaN."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 8, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (count, 8), generator=generator)
    images[list(poisoned), 0, 0, 0, 0] = NAN
    kept = [index for index in range(count) if index not in left_out]
    dataset = TensorDataset(images[kept].flatten(0, 1), labels[kept].flatten())
    return DataLoader(dataset, batch_size=8)


def fit(folder, loader, on_non_finite="skip", prepare=lambda team: None, **kwargs):
    """Fits a team at a constant rate with full transfers; returns it and its trainer."""
    team = make_team(
        schedule=CONSTANT,
        optimizer=OptimizerConfig(lr=0.05),
        cooperation=Cooperation(
            leader=TeacherEdge(0.5, ramp=0.0),
            peer=PeerEdge(0.5, ramp=0.0),
            sub_networks=SubNetworkEdge(0.5, ramp=0.0),
        ),
        on_non_finite=on_non_finite,
    )
    prepare(team)
    trainer = make_trainer(folder, **kwargs)
    trainer.fit(team, loader, loader)
    return team, trainer


def scaled():
    """16-bit precision with a loss scaler, on the CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, accumulated):
    with pytest.raises(ValueError, match=f"^Step {2 // accumulated}: the term ce/leader of the"):
        fit(tmp_path, batches(poisoned=[2]), "raise", accumulate_grad_batches=accumulated)


def test_a_gradient_that_is_not_finite_stops_the_training(tmp_path):
    def prepare(team):
        team.teammates["a"].backbone.fc.bias.register_hook(lambda gradient: gradient * torch.inf)

    with pytest.raises(ValueError, match=r"Step 0: the gradient of teammates.a.backbone.fc.bias"):
        fit(tmp_path, batches(), "raise", prepare)


@pytest.mark.parametrize("plugin", [None, scaled], ids=["32", "16-mixed"])
def test_a_skipped_step_leaves_no_trace(tmp_path, plugin):
    def options():
        return {} if plugin is None else {"plugins": [plugin()]}

    with pytest.warns(UserWarning, match="Step 1 is skipped: the term ce/leader of the loss is"):
        team, trainer = fit(tmp_path, batches(poisoned=[1]), **options())
    expected, _ = fit(tmp_path, batches(left_out=[1]), **options())
    assert_same_state(team.state_dict(), expected.state_dict())
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.filterwarnings("ignore:Step 0 is skipped")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("plugin", [None, scaled], ids=["32", "16-mixed"])
@pytest.mark.parametrize("poisoned", [0, 1])
def test_all_accumulated_batches_of_a_step_are_skipped(tmp_path, plugin, poisoned):
    options = {"accumulate_grad_batches": 2}
    skipped, expected = (
        fit(tmp_path, loader, **options, **({} if plugin is None else {"plugins": [plugin()]}))
        for loader in (batches(poisoned=[poisoned]), batches(left_out=[0, 1]))
    )
    # The scaler halves its scale at the skipped step, which changes the rounding of 16-bit values.
    tolerance = {"rtol": 0, "atol": 0} if plugin is None else {"rtol": 1e-3, "atol": 1e-4}
    pairs = zip(skipped[0].parameters(), expected[0].parameters(), strict=True)
    for actual_parameter, expected_parameter in pairs:
        torch.testing.assert_close(actual_parameter, expected_parameter, **tolerance)
    assert skipped[1].callback_metrics["train/skipped_steps"] == 1


@pytest.mark.filterwarnings("ignore:Step . is skipped")
def test_a_skipped_gradient_changes_no_weight(tmp_path):
    def prepare(team):
        team.leader.fc.bias.register_hook(lambda gradient: gradient * torch.inf)
        team.before = snapshot(team)

    team, trainer = fit(tmp_path, batches(), prepare=prepare)
    for name, parameter in team.named_parameters():
        assert torch.equal(parameter, team.before[name]), name
    assert trainer.callback_metrics["train/skipped_steps"] == 4


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    team, trainer = fit(tmp_path, batches())
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    with torch.no_grad():
        team.leader.fc.weight[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"The team after step 4 .*1 of .* values of leader.fc.we"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_unknown_values_of_on_non_finite_are_refused():
    with pytest.raises(ValueError, match="on_non_finite must be raise or skip, found 'ignore'"):
        make_team(on_non_finite="ignore")


def test_the_first_non_finite_tensor_is_named():
    weights = {"a": torch.ones(2), "b": torch.tensor([1.0, NAN, torch.inf]), "c": torch.tensor(NAN)}
    with pytest.raises(ValueError, match=r"^x has weights .* 2 of 3 values of b, the first such"):
        check_finite(weights, "x")
    check_finite({"a": weights["a"], "count": torch.tensor(3)}, "x")


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
def test_predictions_that_are_not_finite_are_scored_as_nan(tmp_path, split, value, capsys):
    team = make_team(num_classes=6)
    images, labels = torch.randn(20, 1, 8, 8), torch.randint(6, (20,))
    fc = team.teammates["b"].backbone.fc
    with torch.no_grad():
        fc.bias[3] = value
    trainer = make_trainer(tmp_path, callbacks=[DepthReport()], limit_val_batches=1.0)
    run = {"val": trainer.validate, "test": trainer.test}[split]
    run(team, DataLoader(TensorDataset(images, labels), batch_size=8), verbose=False)
    wrong = {name for name, v in trainer.callback_metrics.items() if not torch.isfinite(v)}
    members = [m for m in team.members() if m.startswith("b/")] + ["ensemble"]
    kinds = ("accuracy", "accuracy_top5", "calibration_error", "loss")
    expected = {f"{split}/{kind}/{member}" for kind in kinds for member in members}
    expected |= {f"{split}/disagreement/b/{depth}" for depth in ("d5", "d2")}
    assert wrong == expected | {f"{split}/accuracy/mean"}

    path = tmp_path / report_file(split)
    rows = json.loads(path.read_text(), parse_constant=pytest.fail)
    for row in rows:
        is_wrong = row["net"] in ("b", "ensemble")
        assert all((row[kind] is None) == is_wrong for kind in kinds)
    assert path.with_suffix(".png").stat().st_size > 0
    assert "nan%" in capsys.readouterr().out


def test_one_non_finite_image_makes_all_metrics_nan(tmp_path):
    team = make_team()
    images, labels = torch.randn(20, 1, 8, 8), torch.randint(10, (20,))
    images[5] = NAN
    trainer = make_trainer(tmp_path)
    trainer.test(team, DataLoader(TensorDataset(images, labels), batch_size=8), verbose=False)
    assert all(torch.isnan(value) for value in trainer.callback_metrics.values())


def test_predictions_that_are_not_finite_are_left_blank(tmp_path):
    team = make_team()
    images = torch.randn(4, 1, 8, 8)
    images[2] = NAN
    loader = DataLoader(TensorDataset(images, torch.zeros(4)), batch_size=3)
    trainer = make_trainer(tmp_path, callbacks=[PredictionWriter()])
    trainer.predict(team, loader)
    rows = [list(row.values())[1:] for row in read_csv(tmp_path / "predictions.csv")]
    assert [set(row) == {""} for row in rows] == [False, False, True, False]
    assert all("" not in row for row in rows if set(row) != {""})


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true", "32-true"])
def test_metrics_are_sums_in_at_least_single_precision(tmp_path, precision):
    team = make_team(b=None)
    data = make_digits(batch_size=16)
    trainer = make_trainer(tmp_path, precision=precision, limit_val_batches=1.0)
    # As after a step at a high rate: the losses of the images differ, and most are large.
    with torch.no_grad():
        for net in (team.leader, team.teammates["a"].backbone):
            net.fc.weight.mul_(20)
    trainer.test(team, data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    predicted = trainer.predict(team, data)
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    for member in team.members():
        probabilities = torch.cat([batch[member] for batch in predicted])
        assert probabilities.dtype == (torch.double if precision == "64-true" else torch.float)
        tiny_value = torch.finfo(probabilities.dtype).tiny
        probabilities = probabilities.double()
        right = probabilities.argmax(1) == labels
        picked = probabilities[torch.arange(len(labels)), labels]
        loss = -picked.clamp_min(tiny_value).log().mean()
        assert metrics[f"test/loss/{member}"] == pytest.approx(float(loss), rel=1e-5)
        assert metrics[f"test/accuracy/{member}"] == pytest.approx(float(right.double().mean()))
        confidence = probabilities.max(1).values
        bins = (confidence * 15).ceil().clamp(1, 15)
        error = sum(
            float((right.double() - confidence)[bins == b].sum().abs()) for b in range(1, 16)
        )
        calibration = metrics[f"test/calibration_error/{member}"]
        assert calibration == pytest.approx(error / len(labels), abs=2e-3)


def fit_in_a_process(cli, own_nets, folder, *args):
    """Runs ``teamnet fit`` in a new process."""
    path = os.pathsep.join([str(own_nets), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        teamnet_command("fit", "--config", cli.config, *args),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.fault(
    "an infinite or NaN loss", "The run stops with one sentence and status 2; nothing is saved."
)
def test_the_command_line_reports_a_non_finite_loss(cli, own_nets, tmp_path):
    options = ["--model.optimizer.lr", "1e6", "--trainer.limit_train_batches", "5"]
    run = fit_in_a_process(cli, own_nets, tmp_path, *options)
    assert run.returncode == 2
    assert "of the loss is" in run.stderr
    assert "Step" in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


POISONED = ["--data", "own_nets.PoisonedDigits", "--data.batch_size", "16"]
POISONED += ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
POISONED += ["--trainer.limit_train_batches", "3"]


@pytest.mark.slow
@pytest.mark.fault(
    "a NaN loss in one of two processes", "Both processes stop; the exit status is 2."
)
def test_a_non_finite_loss_in_one_of_two_processes_stops_both(cli, own_nets, tmp_path):
    run = fit_in_a_process(cli, own_nets, tmp_path, *POISONED)
    assert run.returncode == 2
    assert "Step 1: the term ce/leader of the loss is nan" in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_non_finite_loss_in_one_of_two_processes_skips_the_step_in_both(cli, own_nets, tmp_path):
    run = fit_in_a_process(cli, own_nets, tmp_path, *POISONED, "--model.on_non_finite", "skip")
    assert run.returncode == 0, run.stderr
    saved = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    assert saved["teamnet"]["skipped_steps"] == 1
    assert saved["global_step"] == 3
    check_finite(saved["state_dict"], "last.ckpt")


class CollectiveCounter(pl.Callback):
    """Counts the collective operations of training steps."""

    def on_train_start(self, trainer, pl_module):
        self.calls, reduce = 0, trainer.strategy.reduce

        def counted(*args, **kwargs):
            self.calls += 1
            return reduce(*args, **kwargs)

        trainer.strategy.reduce = counted


def test_a_step_has_one_collective_operation(tmp_path):
    counter = CollectiveCounter()
    fit(tmp_path, batches(), "raise", callbacks=[counter])
    assert counter.calls == 4
