"""The code in the docs runs and does what the page says."""

import json
import re

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

from teamnet_pl import Team
from teamnet_pl.cooperation import Cooperation
from tests.helpers.teams import make_trainer


def code_blocks(page) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def batches(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count * 4, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (count * 4,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=4)


@pytest.fixture(scope="module")
def parts(pytestconfig, tmp_path_factory):
    """The namespace after all blocks of the page, and the folder in which they ran."""
    folder = tmp_path_factory.mktemp("parts")
    names = {"train_batches": batches(3), "val_batches": batches(2), "__name__": "parts"}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        before = None
        for block in code_blocks(pytestconfig.rootpath / "docs/parts.md"):
            exec(compile(block, "parts.md", "exec"), names)
            if "optimizer" in names and before is None:
                before = [parameter.clone() for parameter in names["nets"].parameters()]
    names["before"] = before
    return names, folder


@pytest.mark.parametrize("marker", ["criterion(logits, labels", "class MyTeam"])
def test_loss_and_metrics_take_at_most_ten_lines(pytestconfig, marker):
    (block,) = [
        block for block in code_blocks(pytestconfig.rootpath / "docs/parts.md") if marker in block
    ]
    assert len([line for line in block.splitlines() if line]) <= 10


def test_the_plain_loop_trains_all_members(parts):
    names, _ = parts
    moved = [
        not torch.equal(old, new)
        for old, new in zip(names["before"], names["nets"].parameters(), strict=True)
    ]
    assert all(moved)


def test_the_metrics_cover_all_members(parts):
    folder = parts[1]
    rows = json.loads((folder / "per_depth.json").read_text())
    members = {
        row["net"] if row["depth"] is None else f"{row['net']}/{row['depth']}" for row in rows
    }
    assert members == {"leader", "ensemble", *(f"{n}/d{d}" for n in "ab" for d in (5, 2, 0))}
    assert (folder / "per_depth.png").stat().st_size > 1000


def test_the_module_trains_and_logs(parts, tmp_path):
    names, _ = parts
    module = names["MyTeam"]()
    assert isinstance(module, LightningModule)
    before = [parameter.clone() for parameter in module.parameters()]
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.fit(module, batches(2), batches(1))
    assert all(
        not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True)
    )
    assert {"accuracy/a/d5", "loss/leader", "accuracy/ensemble", "accuracy/mean"} <= set(
        trainer.callback_metrics
    )


def test_the_team_of_modules_is_a_team(parts):
    names, _ = parts
    assert isinstance(names["team"], Team)
    assert set(names["team"].teammates) == {"a", "b"}


def test_the_kind_is_the_one_on_the_page(parts):
    names, _ = parts
    assert isinstance(names["cooperation"], Cooperation)
    loss = names["cooperation"].peer.kind(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2))
    assert loss.item() == 2.0
