import pytest

from teamnet_pl.cli.parser import SpellingParser
from teamnet_pl.commands.export import export_teammate
from teamnet_pl.commands.serve import serve_teammate
from tests.helpers.runs import error_of


@pytest.fixture
def parse():
    """Parses the options of a command; returns the values as a dictionary."""

    def run(command, *words):
        parser = SpellingParser()
        parser.add_function_arguments(command, as_group=False)
        return parser.parse_args(parser.with_lists(list(words))).as_dict()

    return run


@pytest.mark.parametrize(
    ("words", "formats"),
    [
        (["--formats", "onnx"], ["onnx"]),
        (["--formats=onnx"], ["onnx"]),
        (["--formats", "[onnx,hub]"], ["onnx", "hub"]),
        (["--formats", "onnx,hub"], ["onnx", "hub"]),
        (["--formats", "onnx", "hub"], ["onnx", "hub"]),
    ],
    ids=" ".join,
)
def test_lists_need_no_brackets(parse, words, formats):
    for depths, expected in (([], None), (["--depths", "5"], [5]), (["--depths=5,2"], [5, 2])):
        values = parse(export_teammate, "--ckpt_path", "x", *words, *depths, "--out", "y")
        assert (values["formats"], values["depths"]) == (formats, expected)
        assert values["out"] == "y"


def test_texts_are_taken_as_they_are(parse):
    words = ["--depths", "d4", "1", "--ckpt_path", "[x]"]
    values = parse(serve_teammate, *words)
    assert (values["depths"], values["ckpt_path"]) == (["d4", "1"], "[x]")
    assert parse(serve_teammate, *words, "--depths", "null")["depths"] is None


def test_a_list_in_a_training(cli, capsys, tmp_path):
    words = ["fit", "--model.a.blocks", "nothing*", "--data.batch_size", "5"]
    assert "nothing*" in error_of(capsys, cli, tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data.batchsize", "3"],
            "error: --data: no option 'batchsize'. Did you mean batch_size?",
        ),
        (["--data.batch_size", "x"], "error: --data.batch_size takes a whole number, found 'x'."),
        (["--trainer.max_epcohs", "3"], "Did you mean trainer.max_epochs"),
        (
            ["--model", "{a: {polcy: robin}}"],
            "no option --model.a.polcy. Did you mean model.a.policy",
        ),
        (["--model.a.policy", "robin"], "found 'robin'. Did you mean round_robin?"),
        (["--trainer.callbacks", "EarlyStoping"], "Did you mean EarlyStopping?"),
        (["--trainer.logger", "WandB"], "Did you mean WandbLogger?"),
        (["--model.cooperation.peer.kind", "KLDiv"], "Did you mean KLDivergence?"),
        (
            ["--model.a.name", "resnet50"],
            "cifar/resnet50 or torchvision/resnet50 or timm/resnet50?",
        ),
        (["--model.a.name", "tmm/ResNet18"], "Did you mean cifar/resnet18 or torchvision/resnet18"),
        (["--data", "Digit"], "Did you mean Digits or "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_name_what_was_meant_and_the_help(cli, capsys, tmp_path, words, message):
    error = error_of(capsys, cli, tmp_path, "fit", *words)
    assert message in error
    assert error.endswith("`teamnet fit --help` lists the options.")
