"""The benchmark scripts run, and the tables in the docs are those of the results."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

SHARED = {"harness", "make_pictures", "make_tables", "package_files"}


@pytest.fixture
def script(pytestconfig):
    def run(name, *args):
        path = pytestconfig.rootpath / "benchmarks" / name
        words = [sys.executable, str(path), *map(str, args)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def benchmark(pytestconfig, monkeypatch):
    """Imports a script, or the harness, by its name."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    return importlib.import_module


def test_tables_are_up_to_date(script):
    done = script("make_tables.py", "--check")
    assert done.returncode == 0, done.stderr


def test_no_table_is_empty(pytestconfig):
    pages = [pytestconfig.rootpath / "README.md", *pytestconfig.rootpath.glob("docs/*.md")]
    tables = [
        table
        for page in pages
        for table in re.findall(r"<!-- table: \w+ -->\n(.*?)<!-- end -->", page.read_text(), re.S)
    ]
    assert len(tables) >= 3
    assert all(table.count("\n|") >= 3 for table in tables)


def test_the_fault_table_has_a_row_for_each_marker(pytestconfig):
    """Counted in the text, since the script reads the syntax tree."""
    tests = pytestconfig.rootpath / "tests"
    markers = sum(
        len(re.findall(r"^@pytest\.mark\.fault\(", path.read_text(), re.M))
        for path in tests.rglob("test_*.py")
    )
    page = (pytestconfig.rootpath / "docs/faults.md").read_text()
    assert markers == page.count("/blob/main/tests/") > 50


def test_each_script_measures_and_makes_its_table(benchmark, pytestconfig):
    names = {path.stem for path in (pytestconfig.rootpath / "benchmarks").glob("*.py")} - SHARED
    assert len(names) >= 11
    for name in names:
        script = benchmark(name)
        assert callable(script.measure), name
        assert isinstance(script.table.__annotations__["return"], str), name


def test_published_medians_are_of_five_or_more(pytestconfig):
    for path in (pytestconfig.rootpath / "benchmarks/results").glob("*.json"):
        result = json.loads(path.read_text())
        if isinstance(result, dict) and "repeats" in result.get("settings", {}):
            assert result["settings"]["repeats"] >= 5, path


def test_measurements_rotate(benchmark):
    order = []

    def measurement(name):
        return lambda: order.append(name) or float(len(order))

    values = benchmark("harness").in_turn({name: measurement(name) for name in "abc"}, 4)
    assert "".join(order) == "abcbcacababc"
    assert values == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def settings(out, **changes):
    return argparse.Namespace(**({"out": str(out), "lr": 0.1, "seeds": [0], "jobs": 1} | changes))


@pytest.fixture
def resumable(benchmark, tmp_path):
    """Opens a result file with settings; the first time it is new."""

    def make(**changes):
        arguments = settings(tmp_path / "out.json", **changes)
        selection = {"selecting": ["seeds"], "ignored": ["jobs"]}
        return benchmark("harness").ResultFile(arguments, "a machine", resume=True, **selection)

    return make


def test_a_result_file_is_complete_after_each_row(resumable, tmp_path, capsys):
    file = resumable()
    for row in ({"seed": 0}, {"seed": 1}):
        file.write([row], lambda row: f"seed {row['seed']}")
        assert json.loads((tmp_path / "out.json").read_text())["rows"][-1] == row
    assert capsys.readouterr().out == "seed 0\nseed 1\n"
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == ["command", "date", "machine", "settings", "rows"]
    assert "a machine" in written["machine"]
    assert written["settings"] == vars(settings(tmp_path / "out.json"))


def test_a_result_file_resumes_with_more_seeds(resumable):
    resumable().add([{"seed": 0}])
    resumed = resumable(seeds=[1, 0], jobs=2)
    assert resumed.rows == [{"seed": 0}]
    assert resumed.result["settings"]["seeds"] == [0, 1]


def test_a_result_file_with_other_settings_is_kept(resumable, tmp_path):
    resumable().add([{"seed": 0}])
    before = (tmp_path / "out.json").read_text()
    with pytest.raises(SystemExit, match=r"lr 0\.1, now 0\.2"):
        resumable(lr=0.2)
    assert (tmp_path / "out.json").read_text() == before


def test_methods_are_the_shipped_configs(benchmark, pytestconfig):
    accuracy = benchmark("accuracy")
    folder = pytestconfig.rootpath / "teamnet_pl/configs"
    files = [path for name in ("ablation", "baseline") for path in (folder / name).glob("*.yaml")]
    names = [str(path.relative_to(folder).with_suffix("")) for path in files]
    assert sorted(accuracy.METHODS) == sorted(["team", *names])
    assert "width: 8" in accuracy.method_config("ablation/small_leader", width=8)
    assert accuracy.has_leader("team")
    assert accuracy.has_leader("baseline/apart_distilled")
    assert not accuracy.has_leader("baseline/apart")


def result_row(method, seed, lr, val, depth="d7", net="a"):
    accuracies = {"val": val, "test": val / 2, "val_nll": 1.0, "test_nll": 2.0}
    row = {"method": method, "seed": seed, "lr": lr, "seconds": 90.0, "net": net, "depth": depth}
    return row | {"macs": 10} | accuracies


def test_the_learning_rate_is_chosen_in_validation_on_seeds_that_all_rates_have(benchmark):
    accuracy = benchmark("accuracy")
    rows = [
        result_row("team", 0, 0.1, 0.5),
        result_row("team", 0, 0.2, 0.6),
        result_row("team", 1, 0.1, 0.9),  # another seed with one of the rates
        result_row("team", 0, 0.1, 0.9, net="leader", depth=None),
        result_row("baseline/apart", 0, 0.1, 0.4),
    ]
    assert accuracy.best_lr(rows, "team") == 0.2
    chosen = accuracy.chosen_rows({"rows": rows})
    assert [row["lr"] for row in chosen] == [0.2, 0.1]
    with pytest.raises(SystemExit, match="no run of baseline/joint"):
        accuracy.best_lr(rows, "baseline/joint")


def test_the_table_pairs_each_method_with_nets_apart(benchmark):
    accuracy = benchmark("accuracy")
    rows = []
    for seed, (team, apart) in enumerate([(0.8, 0.6), (0.7, 0.6)]):
        for depth, drop in (("d7", 0.0), ("d0", 0.2)):
            rows.append(result_row("team", seed, 0.1, team - drop, depth))
            rows.append(result_row("baseline/apart", seed, 0.1, apart - drop, depth))
            rows[-1]["macs"] = rows[-2]["macs"] = 10 if depth == "d7" else 5
    result = {"rows": rows, "command": "c", "date": "d", "machine": "m"}
    lines = accuracy.table(result).splitlines()
    # Test accuracies are half of those in validation here.
    cells = ["team", "a", "0.1", "37.5 ± 3.5", "27.5 ± 3.5", "", "", "32.5 ± 3.5", "+7.5 ± 3.5"]
    assert lines[2] == "| " + " | ".join([*cells, "2.000", "1.5", "2"]) + " |"
    assert (
        "| baseline/apart | a | 0.1 | 30.0 ± 0.0 | 20.0 ± 0.0 |  |  | 25.0 ± 0.0 | +0.0" in lines[3]
    )
    short = accuracy.summary(result).splitlines()
    assert short[2] == "| team | 37.5 ± 3.5 | 27.5 ± 3.5 |  |  | 32.5 ± 3.5 | 2.00 |"
    assert short[3] == "| apart | 30.0 ± 0.0 | 20.0 ± 0.0 |  |  | 25.0 ± 0.0 | 2.00 |"


@pytest.mark.slow
def test_packed_forward(script, tmp_path):
    out = tmp_path / "out.json"
    options = ["--only", "ResNet-20 (CIFAR)", "--batch-size", 2, "--repeats", 1, "--threads", 1]
    done = script("packed_forward.py", *options, "--out", out)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    # By hand: depths keep 7, 5, 4 (of 3½), 2 and 0 of 7 blocks; packed, each block runs once.
    assert [sum(kept) for kept in row["blocks_per_stage"]] == [7, 5, 4, 2, 0]
    assert row["blocks_ratio"] == pytest.approx(18 / 7)
    assert 1 < row["ceiling"] < 18 / 7


def test_team_step(benchmark):
    options = {"backbone": "cifar/resnet20", "width": 4, "depths": 2, "batch_size": 4, "repeats": 1}
    team_step = benchmark("team_step")
    rows = list(team_step.measure(argparse.Namespace(**options)))
    assert len({(row["policy"], row["leader"]) for row in rows}) == len(rows) == 8
    table = team_step.table({"rows": rows, "command": "", "date": "", "machine": ""})
    assert "\n| round_robin | frozen | " in table
    steps = team_step.Steps(argparse.Namespace(**options), "last_stage_first", frozen=True)
    classifiers = [net.fc.weight.detach().clone() for net, _ in steps.apart]
    leader = steps.leader.fc.weight.detach().clone()
    steps.team_step()
    steps.nets_apart(share_leader=False)
    assert len(classifiers) == 4  # a/d7, a/d0, b/d7, b/d3
    for (net, _), before in zip(steps.apart, classifiers, strict=True):
        assert not torch.equal(net.fc.weight, before)
    assert torch.equal(steps.leader.fc.weight, leader)


@pytest.mark.slow
def test_loading(script, tmp_path):
    out = tmp_path / "out.json"
    cases = ["CIFAR, in memory", "ImageNet, shards"]
    options = ["--workers", 0, "--batch-size", 2, "--repeats", 2, "--seconds", 0.1, "--threads", 1]
    done = script("loading.py", "--only", *cases, *options, "--photo-size", 32, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["data"] for row in rows] == cases
    for row in rows:
        assert all(
            len(rates) == 2 and min(rates) > 0 for rates in row["images_per_second"].values()
        )
        assert 0 < row["both_to_step"] < row["loader_to_step"]


@pytest.mark.slow
def test_accuracy(script, tmp_path):
    out = tmp_path / "out.json"
    options = ["--dataset", "digits", "--epochs", 1, "--width", 4, "--leader-width", 8]
    options += ["--seeds", 0, "--jobs", 1, "--leader-epochs", 1]
    methods = ["team", "baseline/apart_distilled", "baseline/apart"]
    done = script("accuracy.py", *options, "--methods", *methods, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["net"] for row in rows} == {"leader", "a", "b", "ensemble"}
    depths = {
        method: [row["depth"] for row in rows if row["method"] == method and row["net"] == "a"]
        for method in methods
    }
    assert depths["team"] == depths["baseline/apart"] == depths["baseline/apart_distilled"]
    assert all(0 <= row[split] <= 1 for row in rows for split in ("val", "test"))
    # The very same Leader teaches.
    first, second = [row for row in rows if row["net"] == "leader"]
    assert first["test_nll"] == second["test_nll"]

    rates = ["--lr", 0.1, 0.2, "--figure", tmp_path / "figure.png"]
    methods = ["--methods", "baseline/joint", "team", *rates]
    done = script("accuracy.py", *options, *methods, "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()[1:]) == 3  # two of joint, and one more of the team
    result = json.loads(out.read_text())
    assert result["rows"][: len(rows)] == rows
    assert result["settings"]["methods"][-1] == "baseline/joint"
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_accuracies_are_those_of_the_command_line(script, cli, tmp_path):
    out = tmp_path / "out.json"
    options = ["--dataset", "digits", "--epochs", 1, "--width", 4, "--leader-width", 4]
    options += ["--seeds", 3, "--methods", "ablation/peer"]
    done = script("accuracy.py", *options, "--out", out)
    assert done.returncode == 0, done.stderr
    fit = ["--config", "data/digits", "--config", "ablation/peer", "--test_after_fit", "true"]
    fit += [f"--model.{member}.options.width=4" for member in ("leader", "a", "b")]
    fit += ["--model.leader.name", "cifar/resnet20"]
    fit += ["--seed_everything", 3, "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu"]
    fit += ["--trainer.log_every_n_steps", 1]
    cli(tmp_path, "fit", *fit, tiny=False)
    report = json.loads((tmp_path / "logs/version_0/checkpoints/per_depth.json").read_text())
    rows = json.loads(out.read_text())["rows"]
    expected = [(row["net"], row["depth"], row["accuracy"]) for row in report]
    assert [(row["net"], row["depth"], row["test"]) for row in rows] == expected


@pytest.mark.slow
def test_onnx_files(script, tmp_path):
    pytest.importorskip("onnxscript")
    out = tmp_path / "out.json"
    options = ["--only", "ResNet-20 (CIFAR)", "--depths", 2, "--repeats", 2, "--seconds", 0.001]
    done = script("onnx_files.py", *options, "--out", out)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert 1 < row["size_ratio"] < 1.05
    assert [depth["blocks_per_stage"] for depth in row["depths"]] == [[3, 2, 2], [0, 0, 0]]
    for depth in row["depths"]:
        assert depth["largest_difference"] < 1e-4
        for name in ("single_file_ms", "separate_file_ms", "int8_ms"):
            assert len(depth[name]) == 2
        assert depth["int8_bytes"] < 0.5 * depth["separate_file_bytes"]


@pytest.mark.slow
def test_int8_accuracy(script, cli, tmp_path):
    pytest.importorskip("onnxscript")
    cli(tmp_path, "fit")
    checkpoint = tmp_path / "logs/version_0/checkpoints/best.ckpt"
    out = tmp_path / "out.json"
    done = script("int8_accuracy.py", "--ckpt_path", checkpoint, "--teammates", "b", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["depth"] for row in rows] == ["d7", "d5", "d2"]
    assert all(0 <= row[name] <= 1 for row in rows for name in ("accuracy", "int8_accuracy"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="shares a core, as Linux can")
def test_stress(script, tmp_path):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--backbone", "cifar/resnet20", "--size", 16, "--depths", 3, "--seconds", 1]
    done = script("stress.py", *options, "--out", out, "--picture", picture)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["phase"]) for row in rows] == [
        (method, phase) for method in ("budget", "fixed") for phase in ("before", "load", "after")
    ]
    for row in rows:
        assert row["requests"] == len(row["trace"]["at"]) > 0
        assert sum(row["depths"].values()) == pytest.approx(1)
        assert (row["competitor_share"] > 0) == (row["phase"] == "load")
        assert row["method"] == "budget" or row["depths"]["d7"] == 1
        assert row["choice_us"] < 100
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_load(script, tmp_path):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--backbone", "cifar/resnet20", "--size", 16, "--depths", 2, "--seconds", 1]
    options += ["--multiples", 0.5, 1, "--budget-ms", 2000]
    done = script("load.py", *options, "--out", out, "--picture", picture)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["multiple"]) for row in rows] == [
        (method, multiple) for method in ("fixed", "budget") for multiple in (0.5, 1)
    ]
    for row in rows:
        assert row["lost"] == 0
        assert sum(row["by_status"].values()) == row["sent"] > 0
        assert row["method"] == "budget" or set(row["depths"]) == {"d7"}
    assert picture.stat().st_size > 10_000


FAMILIES = {
    "torchvision/alexnet": "refused",
    "torchvision/mnasnet": "works",
    "torchvision/resnet": "works",
    "timm/cspnet": "works",  # branches around its blocks
    "timm/eva": "works",  # further arguments
    "timm/fasternet": "works",  # forwards set on instances
    "timm/tnt": "works",  # tuples
    "timm/repghost": "works",
}


def test_compatibility_of_a_sample(script, tmp_path):
    out = tmp_path / "out.json"
    done = script("compatibility.py", "--families", *FAMILIES, "--jobs", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = {row["family"]: row for row in json.loads(out.read_text())["rows"]}
    assert {family: row["result"] for family, row in rows.items()} == FAMILIES
    assert rows["torchvision/resnet"]["model"] == "torchvision/resnet18"
    assert rows["torchvision/resnet"]["stages"] == [2, 1, 1, 1]
    assert "no residual block" in rows["torchvision/alexnet"]["reason"]
    for row in rows.values():
        if row["result"] == "works":
            assert max(row["packed"], row["gradient"], row["extracted"]) < 1e-6
            assert row["finite"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compatibility_of_all(script, tmp_path, pytestconfig):
    """The committed results are those of this code, where the library's smallest model is."""
    out = tmp_path / "out.json"
    done = script("compatibility.py", "--max-parameters", 5_000_000, "--out", out)
    assert done.returncode == 0, done.stderr
    committed = pytestconfig.rootpath / "benchmarks" / "results" / "compatibility.json"
    expected = {row["model"]: row for row in json.loads(committed.read_text())["rows"]}
    rows = [row for row in json.loads(out.read_text())["rows"] if row["model"] in expected]
    assert len(rows) > 30
    for row in rows:
        for key in ("result", "stages", "blocks"):
            assert row.get(key) == expected[row["model"]].get(key), row["model"]


@pytest.mark.slow
@pytest.mark.fault("a run is killed at a random moment", "it resumes to the same weights and log")
@pytest.mark.posix
def test_kills(script, tmp_path):
    out = tmp_path / "kills.json"
    settings = ["plain", "2 workers", "mixup", "EMA", "SWA"]
    done = script("kills.py", "--kills", 10, "--only", *settings, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= 10
    assert {row["signal"] for row in rows} == {"SIGKILL", "SIGTERM"}
    assert {row["outcome"] for row in rows} == {"the uninterrupted run"}


@pytest.mark.fault(
    "mutated checkpoints, Hub folders, profiles and reports, with hostile names and values",
    "nothing they name runs; taken, or refused by a sentence that names the file",
)
@pytest.mark.posix
def test_fuzzing(script, tmp_path):
    out = tmp_path / "out.json"
    done = script("fuzz.py", "--seconds", 15, "--seed", 1, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["outcome"] for row in rows} == {"refused", "taken"}
    assert sum(row["cases"] for row in rows) >= 10


def test_the_pictures_of_the_docs_are_drawn_from_their_results(script, pytestconfig, tmp_path):
    done = script("make_pictures.py", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"digits.png", "load.png", "profile.png", "stress.png"}
    assert all((pytestconfig.rootpath / "docs" / name).is_file() for name in drawn)


def test_the_picture_of_the_load_has_the_refused_requests(benchmark, pytestconfig):
    result = json.loads((pytestconfig.rootpath / "benchmarks/results/load.json").read_text())
    figure = benchmark("load").draw(result)
    (axes,) = (axes for axes in figure.axes if axes.get_ylabel() == "refused requests, %")
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    for method in ("budget", "fixed"):
        rows = [row for row in result["rows"] if row["method"] == method]
        assert [[row["sent_per_second"], 100 * row["refused"]] for row in rows] in drawn
    assert all("1/s" in axes.get_xlabel() for axes in figure.axes)


def test_the_picture_of_accuracies_has_error_bars_over_seeds(benchmark):
    rows = []
    for seed, test in enumerate((0.4, 0.6)):  # in validation twice as much
        rows += [result_row("team", seed, 0.1, 2 * test, "d7") | {"macs": 2_000_000}]
        rows += [result_row("team", seed, 0.1, 2 * test, "d0") | {"macs": 1_000_000}]
    (axes,) = benchmark("accuracy").draw({"rows": rows}).axes
    (bars,) = axes.containers[0].lines[2]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    deviation = 200**0.5  # of 40 and 60 %
    assert ends == [pytest.approx([50 - deviation, 50 + deviation])] * 2
