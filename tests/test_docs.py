"""The code in the docs runs and does what the page says."""

import inspect
import json
import re
from dataclasses import MISSING, fields
from fractions import Fraction
from functools import reduce
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

from teamnet_pl import Team, cooperation
from teamnet_pl.cooperation import Cooperation, Transfer, TransferKind
from tests.helpers.pages import code_blocks
from tests.helpers.teams import make_trainer


def table_under(pytestconfig, heading, first):
    """The rows of the table in docs/method.md under a heading whose first column has a name."""
    page = (pytestconfig.rootpath / "docs/method.md").read_text()
    section = re.search(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", page, re.DOTALL | re.MULTILINE)[1]
    (table,) = re.findall(rf"^\| {first} .*?(?=\n\n|\Z)", section, re.DOTALL | re.MULTILINE)
    header, _, *rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    ]
    return [dict(zip(header, row, strict=True)) for row in rows]


def options_in(cell):
    """The options in a cell, and the one in bold."""
    options = [option.strip() for option in cell.split(",")]
    (default,) = [option for option in options if option.startswith("**")]
    return tuple(option.strip("*") for option in options), default.strip("*")


def test_the_table_of_transfers_has_the_defaults(pytestconfig):
    rows = {row["field"]: row for row in table_under(pytestconfig, "Transfers", "field")}
    edges = Cooperation().edges()
    assert list(rows) == [*edges, "extra"]
    for name, edge in edges.items():
        row, hints = rows[name], get_type_hints(type(edge))
        assert float(row["weight"]) == edge.weight, name
        assert row["kind"] == repr(edge.kind), name
        assert float(Fraction(row["ramp"])) == edge.ramp, name
        for option in ("teachers", "students"):
            if option in hints:
                expected = (get_args(hints[option]), getattr(edge, option))
                assert options_in(row[option]) == expected, (name, option)
            else:
                assert row[option] == "", (name, option)
    assert next(field for field in fields(Transfer) if field.name == "weight").default is MISSING
    extra = Transfer(1.0)
    assert rows["extra"]["weight"] == ""
    assert rows["extra"]["kind"] == repr(extra.kind)
    assert float(Fraction(rows["extra"]["ramp"])) == extra.ramp


def test_the_table_of_other_fields_has_the_defaults(pytestconfig):
    heading = "Labels, the Leader and the depths of a step"
    rows = {row["field"]: row["default"] for row in table_under(pytestconfig, heading, "field")}
    parameters = inspect.signature(Team).parameters
    for path, default in rows.items():
        first, *rest = path.split(".")
        value = reduce(getattr, rest, parameters[first].default)
        assert yaml.safe_load(default) == value, path
    described = {path.split(".")[1] for path in rows if path.startswith("cooperation.")}
    in_transfers = {*Cooperation().edges(), "extra"}
    assert described | in_transfers == {field.name for field in fields(Cooperation)}


def test_the_table_of_kinds_names_all(pytestconfig):
    rows = table_under(pytestconfig, "Transfers", "kind")
    kinds = {kind.__name__ for kind in TransferKind.__subclasses__()}
    kinds = {name for name in kinds if hasattr(cooperation, name)}
    assert {row["kind"] for row in rows} == kinds


def test_the_table_of_other_ways_has_each_with_its_net(pytestconfig):
    folder = pytestconfig.rootpath / "teamnet_pl/configs/baseline"
    nets = {
        path.stem: yaml.safe_load(path.read_text())["model"].get("a", {}).get("net", "ElasticNet")
        for path in folder.glob("*.yaml")
    }
    rows = table_under(pytestconfig, "The other ways", "config")
    assert {row["config"]: row["net"] for row in rows} == {
        name: net.rpartition(".")[2] for name, net in nets.items()
    }


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
            exec(compile(block.text, "parts.md", "exec"), names)
            if "optimizer" in names and before is None:
                before = [parameter.clone() for parameter in names["nets"].parameters()]
    names["before"] = before
    return names, folder


@pytest.mark.parametrize("marker", ["criterion(logits, labels", "class MyTeam"])
def test_loss_and_metrics_take_at_most_ten_lines(pytestconfig, marker):
    blocks = code_blocks(pytestconfig.rootpath / "docs/parts.md")
    (text,) = [block.text for block in blocks if marker in block.text]
    assert len([line for line in text.splitlines() if line]) <= 10


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
    loss = names["cooperation"].leader.kind(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2))
    assert loss.item() == 2.0
