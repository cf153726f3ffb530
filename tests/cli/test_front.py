"""What the command line answers before it imports anything large."""

import pytest
import yaml

from teamnet_pl.cli.spelling import with_data_names
from teamnet_pl.cli.words import given_values, subcommand_of, with_config_files
from teamnet_pl.data import CIFAR10, FashionMNIST, ImageFolder
from tests.helpers.imports import packages_after
from tests.helpers.runs import run_teamnet

LARGE = {"jsonargparse", "lightning", "matplotlib", "rich", "timm", "torch", "wandb"}
DATA = ["--data", "Digits"]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=" ".join)
def test_all_commands_are_listed_one_line_each(words, tmp_path):
    answer = run_teamnet(tmp_path, *words)
    assert answer.returncode == (0 if words else 2)
    lines = [line for line in answer.stdout.splitlines() if line.startswith("  ")]
    names = ["fit", "validate", "test", "predict", "blocks", "configs", "profile", "serve"]
    assert [line.split("  ")[1] for line in lines] == [
        *names,
        "predict --images",
        "export",
        "doctor",
    ]
    assert all(line.rstrip().endswith(".") and len(line) <= 100 for line in lines)


@pytest.mark.fault(
    "a training without data or an end, an evaluation without a checkpoint",
    "One sentence says what is missing, before anything is imported.",
)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fti"], "There is no subcommand 'fti'. Did you mean fit?"),
        (["Fit", *DATA], "There is no subcommand 'Fit'. Did you mean fit?"),
        (["fit", "--Trainer.max_epochs", "1"], "Did you mean trainer?"),
        (["fit"], "needs data: a config that has some, such as --config digits"),
        (["fit", *DATA], "needs to know when to end, such as --trainer.max_epochs 30"),
        (["fit", *DATA, "--trainer.max_epochs", "null"], "needs to know when to end"),
        (["fit", "--config", "data/digits"], "needs to know when to end"),
        (["fit", "--config", "DIGITS", *DATA], "Did you mean digits?"),
        (["test", *DATA], "teamnet test needs a trained team"),
        (["validate", "--config", "digits"], "--ckpt_path FILE, or --ckpt_path last-run"),
        (["predict", "--data", "Digits"], "teamnet predict needs a trained team"),
        (["test", "--checkpoint", "best.ckpt"], "teamnet test --ckpt_path best.ckpt"),
        (["fit", "--checkpoint=x/last.ckpt", *DATA], "teamnet fit --ckpt_path x/last.ckpt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_in_a_sentence_at_once(words, message):
    code = (
        "import contextlib, io, sys\n"
        "from teamnet_pl.cli import main\n"
        "err = io.StringIO()\n"
        "try:\n"
        "    with contextlib.redirect_stderr(err):\n"
        f"        main({words})\n"
        "except SystemExit as ending:\n"
        "    assert ending.code == 2\n"
        f"assert {message!r} in err.getvalue(), err.getvalue()\n"
        "assert err.getvalue().count('\\n') == 1\n"
    )
    assert not packages_after(code) & LARGE


@pytest.mark.parametrize(
    ("given", "data"),
    [("cifar10", CIFAR10), ("fashion_mnist", FashionMNIST), ("imagefolder", ImageFolder)],
)
def test_data_modules_in_any_case(given, data):
    assert with_data_names(["fit", "--data", given]) == ["fit", "--data", data.__name__]
    assert with_data_names([f"--data={given}"]) == [f"--data={data.__name__}"]


def test_other_words_are_kept():
    words = [
        "fit",
        "--data",
        "my_data.Cifar10",
        "--data.root",
        "cifar10",
        "--model.a.name",
        "mnist",
    ]
    assert with_data_names(words) == words


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--config", "digits"],
        ["fit", *DATA, "--trainer.max_steps", "5"],
        ["fit", *DATA, "--trainer", "{max_time: '00:00:01:00'}"],
        ["fit", *DATA, "--trainer", "trainer.yaml"],
        ["fit", *DATA, "--trainer.fast_dev_run", "1"],
        ["fit", *DATA, "--print_config"],
        ["fit", "--ckpt_path", "last"],
        ["fit", "--config", "ckpt_path: last.ckpt"],
        ["--config", "test: {ckpt_path: x.ckpt}", "test"],
        ["test", *DATA, "--model.a.checkpoint", "weights.pt"],
        ["test", *DATA, "--model.a.options", "{pretrained: true}"],
        ["test", "--help"],
        ["fit", "--config", "digits", "--checkpoint", "checkpoint.yaml"],
        ["fit", "--config", "digits", "--checkpoint.monitor", "val/loss/a/d7"],
    ],
    ids=" ".join,
)
def test_complete_command_lines_are_not_refused(words):
    from teamnet_pl.cli.refusals import check_complete

    check_complete(with_config_files(words))


def test_a_config_before_the_subcommand_is_read(tmp_path):
    (tmp_path / "top.yaml").write_text(yaml.safe_dump({"test": {"ckpt_path": "x"}}))
    words = ["--config", str(tmp_path / "top.yaml"), "test"]
    assert subcommand_of(words) == "test"
    assert given_values(words) == {"ckpt_path": "x"}
