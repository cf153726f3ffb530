"""Reports alone: their file, their table, and their rows."""

import json
import math
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teamnet_pl.cooperation.report import Report, ReportRow, report_lines
from teamnet_pl.elastic import ElasticNet, cost
from tests.helpers.imports import packages_after
from tests.helpers.nets import SHAPE, cifar


def row(net, depth=None, stages=None, **values):
    numbers = {"macs": 1_234_567, "parameters": 89, "accuracy": 0.5, "accuracy_top5": 0.75}
    numbers |= {"loss": 1.5, "calibration_error": 0.25, "weights": None}
    return ReportRow("test", net, depth, stages, **numbers | values)


# The file

numbers = st.floats(allow_infinity=False)
counts = st.integers(0, 2**60)
rows = st.builds(
    ReportRow,
    split=st.sampled_from(["val", "test"]),
    net=st.text(),
    depth=st.none() | st.text(),
    blocks_per_stage=st.none() | st.lists(counts),
    macs=counts,
    parameters=counts,
    accuracy=numbers,
    accuracy_top5=st.none() | st.floats(allow_infinity=False, allow_nan=False),
    loss=numbers,
    calibration_error=numbers,
    weights=st.none() | st.text(),
)


@given(st.lists(rows))
def test_a_saved_report_is_loaded_unchanged(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("report") / "per_depth.json"
    Report(tuple(rows)).save(path)
    json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert list(map(repr, Report.load(path).rows)) == list(map(repr, rows))  # NaN != NaN


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path, value):
    path = tmp_path / "per_depth.json"
    names = ("accuracy", "accuracy_top5", "loss", "calibration_error")
    Report((row("a", "d2", (2,), **dict.fromkeys(names, value)),)).save(path)
    (record,) = json.loads(path.read_text())
    assert [record[name] for name in names] == [None] * 4
    (loaded,) = Report.load(path).rows
    assert all(math.isnan(getattr(loaded, name)) for name in names if name != "accuracy_top5")
    assert loaded.accuracy_top5 is None


def test_a_report_without_weights_is_loaded(tmp_path):
    path = tmp_path / "per_depth.json"
    Report((row("a", "d2", [2]),)).save(path)
    (record,) = json.loads(path.read_text())
    del record["weights"]
    path.write_text(json.dumps([record]))
    assert Report.load(path).rows == (row("a", "d2", [2]),)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: "", "JSONDecodeError"),
        (lambda text: text[:-20], "JSONDecodeError"),
        (lambda text: "[1]", "AttributeError"),
        (lambda text: "3", "TypeError"),
        (lambda text: "[" * 5000, "RecursionError|JSONDecodeError"),
        (lambda text: text.replace('"macs": 1234567', '"macs": 1.5'), "macs cannot be 1.5"),
        (lambda text: text.replace('"macs": 1234567', '"macs": true'), "macs cannot be True"),
        (lambda text: text.replace('"net": "a"', '"net": null'), "net cannot be None"),
        (lambda text: text.replace('"loss": 1.5', '"loss": "low"'), "loss cannot be 'low'"),
        (lambda text: text.replace('"split"', '"part"'), "split cannot be None"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, reason):
    path = tmp_path / "per_depth.json"
    Report((row("a", "d2", (2,)),)).save(path)
    path.write_text(damage(path.read_text()))
    message = rf"per_depth\.json is not a report of a team \(.*({reason}).*teamnet test.*anew"
    with pytest.raises(ValueError, match=message):
        Report.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Report.load(tmp_path / "per_depth.json")


# The table


def test_each_net_and_depth_has_a_line_of_its_own():
    report = Report(
        (
            row("leader", accuracy=0.98765),
            row("a", "d7", (3, 2, 2)),
            row("a", "d0", (0, 0, 0), accuracy=math.nan),
            row("b", "d7", (3, 2, 2)),
            row("c", "d1", (1, 0, 0)),
            row("ensemble", macs=3),
        )
    )
    assert report_lines(report) == [
        ("leader", "", "", "1,234,567", "89", "98.77%"),
        ("a", "d7", "3-2-2", "1,234,567", "89", "50.00%"),
        ("a", "d0", "0-0-0", "1,234,567", "89", "nan%"),
        ("b", "d7", "3-2-2", "1,234,567", "89", "50.00%"),
        ("c", "d1", "1-0-0", "1,234,567", "89", "50.00%"),
        ("ensemble", "", "", "3", "89", "50.00%"),
    ]
    table = report.table()
    assert table.row_count == 6
    assert list(table.columns[0].cells) == ["leader", "a", "a", "b", "c", "ensemble"]
    assert [row.depth for row in report.of_net("a")] == ["d7", "d0"]
    assert report.of_net("ensemble") == [report.rows[-1]]


# The rows


def test_rows_of_three_teammates_and_a_leader():
    leader = cifar(4, 14)
    teammates = {
        name: ElasticNet(cifar(4, 14), SHAPE, depths=depths)
        for name, depths in {"a": 3, "b": [4, 1], "c": 2}.items()
    }
    names = ["leader", "a/d4", "a/d2", "a/d0", "b/d4", "b/d1", "c/d4", "c/d0", "ensemble"]
    kinds = ("accuracy", "loss", "calibration_error")
    metrics = {
        f"{kind}/{name}": 10 * i + j for i, name in enumerate(names) for j, kind in enumerate(kinds)
    }
    report = Report.of(teammates, leader, SHAPE, metrics, split="val", weights="digest")
    members = [row.net if row.depth is None else f"{row.net}/{row.depth}" for row in report.rows]
    assert members == names
    for i, report_row in enumerate(report.rows):
        assert (report_row.accuracy, report_row.loss, report_row.calibration_error) == (
            10 * i,
            10 * i + 1,
            10 * i + 2,
        )
        assert (report_row.split, report_row.accuracy_top5, report_row.weights) == (
            "val",
            None,
            "digest",
        )
        if report_row.depth is not None:
            net = teammates[report_row.net]
            assert report_row.blocks_per_stage == net.depth(report_row.depth).per_stage
            price = cost(net.extract(report_row.depth), SHAPE)
            assert (report_row.macs, report_row.parameters) == astuple(price)
    first, last = report.rows[0], report.rows[-1]
    assert (first.macs, first.parameters) == astuple(cost(leader, SHAPE))
    assert (last.macs, last.parameters) == (3 * first.macs, 3 * first.parameters)


def test_one_teammate_has_no_ensemble():
    net = ElasticNet(cifar(4, 14), SHAPE, depths=2)
    kinds = ("accuracy", "accuracy_top5", "loss", "calibration_error")
    metrics = {f"{kind}/a/{depth}": 0.5 for kind in kinds for depth in net.depths}
    report = Report.of({"a": net}, None, SHAPE, metrics, split="test")
    assert [(row.net, row.depth) for row in report.rows] == [("a", "d4"), ("a", "d0")]
    assert {row.accuracy_top5 for row in report.rows} == {0.5}


# What is loaded


@pytest.mark.parametrize(
    ("code", "unused"),
    [
        (
            "from teamnet_pl.cooperation.report import Report, report_lines",
            {"lightning", "matplotlib", "rich", "timm", "torchmetrics", "torchvision", "wandb"},
        ),
        (
            "from teamnet_pl.cooperation import CooperativeLoss",
            {"lightning", "matplotlib", "rich", "timm", "torchmetrics", "torchvision", "wandb"},
        ),
        ("from teamnet_pl.cooperation import TeamMetrics", {"lightning", "timm", "wandb"}),
    ],
)
def test_losses_metrics_and_reports_need_no_lightning(code, unused):
    loaded = packages_after(code)
    assert "torch" in loaded
    assert not loaded & unused
