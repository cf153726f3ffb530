"""No value in a checkpoint is run as code, wherever a hostile checkpoint enters."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

from teamnet_pl import Team, TeammateConfig, data
from teamnet_pl.cli import main
from teamnet_pl.cooperation.restoring import RUN_KEY
from teamnet_pl.data import ImageDataModule
from teamnet_pl.deploy import Predictor, Teammate
from teamnet_pl.deploy.checkpoint import SavedTeam
from teamnet_pl.trust import _TRANSFORM_FIELDS, Trust
from tests.helpers.runs import BEST, error_of, teamnet_command

COMMAND = {"cmd": "touch PWNED"}
CALL = {"name": "subprocess.getoutput", "options": COMMAND}
CLASS = {"class_path": "subprocess.getoutput", "init_args": COMMAND}
TRANSFORM = {
    "class_path": "torchvision.transforms.v2.Lambda",
    "init_args": {"lambd": "trap.spring"},
}
SHARDS = {"num_classes": 10, "train_images": 10, "train": "a.tar", "val": "a.tar"}


def shards_at(address):
    """The values of a data module whose test shards are at an address."""
    return {"class_path": "teamnet_pl.data.Shards", "init_args": SHARDS | {"test": address}}


def hyper_parameters(**members):
    """Changes the values of members."""

    def change(checkpoint):
        for name, values in members.items():
            saved = checkpoint["hyper_parameters"].get(name)
            both = isinstance(saved, dict) and isinstance(values, dict)
            checkpoint["hyper_parameters"][name] = saved | values if both else values

    return change


def run_entries(**entries):
    """Changes what a checkpoint says about its run."""
    return lambda checkpoint: checkpoint[RUN_KEY].update(entries)


def arguments(**values):
    """Changes the arguments of the data module."""
    return lambda checkpoint: checkpoint[RUN_KEY]["data"]["init_args"].update(values)


ATTACKS = {
    "a backbone": hyper_parameters(a=CALL),
    "the Leader's backbone": hyper_parameters(leader=CALL),
    "a member as text": hyper_parameters(
        a="{name: subprocess.getoutput, options: {cmd: touch PWNED}}"
    ),
    "a class as an option": hyper_parameters(a={"options": {"width": CLASS}}),
    "options as text": hyper_parameters(a={"options": "{width: {class_path: trap.spring}}"}),
    "an option as text": hyper_parameters(a={"options": {"width": "{class_path: trap.spring}"}}),
    "an option of the optimizer": hyper_parameters(optimizer={"options": {"betas": CLASS}}),
    "a class as the schedule": hyper_parameters(schedule=CLASS),
    "a config file as a member": hyper_parameters(a="trap.yaml"),
    "a config file as the cooperation": hyper_parameters(cooperation="trap.yaml"),
    "an instantiator": hyper_parameters(_instantiator="trap.spring", _class_path="trap.spring"),
    "the data module": run_entries(data=CLASS),
    "the data module as text": run_entries(data="trap.spring"),
    "the data module as a file": run_entries(data="trap.yaml"),
    "a pipe": run_entries(data=shards_at("pipe:touch PWNED")),
    "a pipe in braces": run_entries(data=shards_at("{pipe:touch PWNED,x}")),
    "an address": run_entries(data=shards_at("http://127.0.0.1:9/a.tar")),
    "a transform": arguments(train_transform={"class_path": "trap.spring"}),
    "a transform by its bare path": arguments(extra_transform="trap.spring"),
    "transforms by their bare paths": arguments(extra_transform=["trap.spring"]),
    "a function of a transform": arguments(extra_transform=[TRANSFORM]),
    "a transform in a file": arguments(train_transform="trap.yaml"),
    "the evaluation transform": lambda checkpoint: checkpoint[RUN_KEY]["preprocessing"].update(
        transform=[TRANSFORM]
    ),
}

SPRUNG = "import pathlib; pathlib.Path('PWNED').touch()\ndef spring(*_, **__): pass\n"


@pytest.fixture
def trapped(tmp_path, monkeypatch, checkpoint):
    """Saves a changed checkpoint in the current folder, in which there are traps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trap.py").write_text(SPRUNG)
    (tmp_path / "trap.yaml").write_text("class_path: trap.spring\n")

    def save(change):
        content = torch.load(checkpoint, weights_only=True)
        change(content)
        torch.save(content, "evil.ckpt")
        return "evil.ckpt"

    yield save
    sys.modules.pop("trap", None)


def is_sprung():
    return os.path.exists("PWNED") or "trap" in sys.modules


COMMANDS = {
    "test": ["test"],
    "predict": ["predict"],
    "fit": ["fit", "--trainer.fast_dev_run", "1"],
    "profile": ["profile", "--runs", "1"],
    "export": ["export", "--out", "out", "--formats", "[safetensors,onnx_int8]"],
}
CALLS = {
    "Team.load_from_checkpoint": Team.load_from_checkpoint,
    "Teammate.from_checkpoint": Teammate.from_checkpoint,
    "Predictor.from_checkpoint": Predictor.from_checkpoint,
    "SavedTeam.data_module": lambda path: SavedTeam.read(path).data_module(),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("entrance", CALLS)
def test_nothing_named_in_a_checkpoint_is_called_in_python(trapped, entrance, attack):
    path = trapped(ATTACKS[attack])
    try:
        CALLS[entrance](path)
    except ValueError as error:  # otherwise the value was not needed
        assert "evil.ckpt" in str(error)  # noqa: PT017
    assert not is_sprung()


@pytest.mark.fault(
    "code or an address named in a checkpoint", "It is refused unless the user trusts it."
)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_named_in_a_checkpoint_is_called_by_a_command(trapped, capsys, command, attack):
    path = trapped(ATTACKS[attack])
    try:
        main([*COMMANDS[command], "--ckpt_path", path])
    except SystemExit:
        assert "evil.ckpt" in " ".join(capsys.readouterr().err.split())
    assert not is_sprung()


def test_the_trap_works(trapped):
    subprocess.run([sys.executable, "-c", "import trap; trap.spring()"], check=True)
    assert os.path.exists("PWNED")


def test_the_server_calls_nothing_named_in_a_checkpoint(trapped):
    path = trapped(hyper_parameters(a=CALL))
    words = teamnet_command("serve", "--ckpt_path", path, "--port", 0)
    server = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert server.returncode == 2
    assert "names the backbone subprocess.getoutput by its import path" in server.stderr
    assert "Traceback" not in server.stderr
    assert not is_sprung()


@pytest.fixture(scope="module")
def own_team(cli, own_nets, tmp_path_factory):
    """A checkpoint of a team with a user's own backbone and data."""
    folder = tmp_path_factory.mktemp("own_team")
    cli(folder, "fit", "--model.a.name", "own_nets.GroupNormNet", "--data", "own_nets.FewDigits")
    return folder / BEST


def test_a_users_own_classes_need_trust(cli, own_team, capsys, tmp_path):
    short = ["--trainer.fast_dev_run", 1]
    for command in (["test", *short], ["predict", *short], ["fit", *short], ["profile"]):
        words = [*command, "--ckpt_path", own_team]
        assert "--trust_import true" in error_of(capsys, cli, tmp_path, *words, tiny=False)
        cli(tmp_path, *words, "--trust_import", "true", tiny=False)


def test_classes_given_on_the_command_line_are_trusted(cli, own_team, tmp_path):
    given = ["--model.a.name", "own_nets.GroupNormNet", "--data", "own_nets.FewDigits"]
    cli(tmp_path, "test", "--ckpt_path", own_team, *given, tiny=False)
    (tmp_path / "own.yaml").write_text(
        json.dumps({"model": {"a": {"name": given[1]}}, "data": {"class_path": given[3]}})
    )
    cli(tmp_path, "test", "--ckpt_path", own_team, "--config", "own.yaml", tiny=False)


def test_replaced_data_needs_no_trust(cli, own_team, tmp_path):
    options = ["--model.a.name", "own_nets.GroupNormNet", "--data", "Digits"]
    cli(tmp_path, "test", "--ckpt_path", own_team, *options, tiny=False)


def test_a_users_own_classes_need_trust_in_python(own_team, own_nets):
    for load in (Team.load_from_checkpoint, Teammate.from_checkpoint, Predictor.from_checkpoint):
        with pytest.raises(ValueError, match=r"trust_import=True"):
            load(own_team)
        load(own_team, trust_import=True)
    config = TeammateConfig("own_nets.GroupNormNet", {"width": 4}, depths=3)
    team = Team.load_from_checkpoint(own_team, a=config)
    assert team.elastic_nets["a"].depths[0].num_blocks == 4


@pytest.mark.parametrize("kind", [getattr(data, name) for name in data.__all__])
def test_only_transform_arguments_of_data_modules_can_be_classes(kind):
    """Text given for other arguments stays text, which the check of trust relies on."""
    if not (isinstance(kind, type) and issubclass(kind, ImageDataModule)):
        return

    for base in kind.__mro__:
        if "__init__" in vars(base) and issubclass(base, ImageDataModule):
            for name, parameter in inspect.signature(
                base.__init__, eval_str=True
            ).parameters.items():
                annotation = str(parameter.annotation)
                for word in ("Transform", "Callable", "type["):
                    assert word not in annotation or name in _TRANSFORM_FIELDS, (base, name)


def test_a_windows_path_is_not_an_address():
    values = SHARDS | {"train": r"C:\data\train.tar", "val": "D:/val.tar"}
    Trust("file").check_data({"class_path": "teamnet_pl.data.Shards", "init_args": values})


@pytest.mark.parametrize("name", ["CIFAR10", "MNIST", "MedMNIST", "HuggingFace", "Imagenette"])
@pytest.mark.parametrize("arguments", [{}, {"download": True}])
def test_data_named_in_a_checkpoint_is_not_downloaded(trapped, name, arguments):
    data = {"class_path": f"teamnet_pl.data.{name}", "init_args": arguments}
    path = trapped(run_entries(data=data))
    assert SavedTeam.read(path).data()["init_args"] == {"download": False}
    assert SavedTeam.read(path, trust_import=True).data()["init_args"] == arguments
    given = {"data.init_args.download": True}
    assert SavedTeam.read(path, given=given).data()["init_args"] == arguments


def test_a_hub_dataset_named_in_a_checkpoint_is_not_requested(trapped, capsys):
    data = {"class_path": "teamnet_pl.data.HuggingFace", "init_args": {"path": "me/images"}}
    words = ["test", "--ckpt_path", trapped(run_entries(data=data))]
    assert "There is no folder" in error_of(capsys, main, words)
