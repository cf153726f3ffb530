import json
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

from teamnet_pl import Team, TeammateConfig
from teamnet_pl.data.preprocessing import PreprocessingConfig
from teamnet_pl.deploy import Teammate
from teamnet_pl.elastic import depth_costs
from tests.helpers.deploy import make_teammate
from tests.helpers.runs import BEST
from tests.helpers.teams import make_team, make_trainer

# huggingface_hub opens a model card and a config without closing them.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
TINY = TeammateConfig(options={"width": 4}, depths=[7, 5, 2], policy="evenly_spread")
CROP = {"class_path": "torchvision.transforms.v2.CenterCrop", "init_args": {"size": [8, 8]}}
PREPROCESSING = PreprocessingConfig([1, 8, 8], [0.3], [0.2], [CROP], bits=12)
CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teammate():
    accuracy = {"d7": 0.875, "d2": 0.5}
    return make_teammate(TINY, PREPROCESSING, CLASSES, accuracy, "test")


def assert_same(actual, expected):
    assert isinstance(actual, Teammate)
    assert not actual.training
    assert actual.depths == expected.depths
    names = [
        "num_classes",
        "input_shape",
        "preprocessing",
        "classes",
        "accuracy",
        "split",
        "config",
    ]
    for name in names:
        assert getattr(actual, name) == getattr(expected, name), name
    state = actual.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name
    with torch.no_grad():
        assert torch.equal(actual.packed(IMAGES), expected.eval().packed(IMAGES))


def test_a_folder_round_trips(teammate, tmp_path):
    teammate.save_pretrained(tmp_path / "net")
    assert {path.name for path in (tmp_path / "net").iterdir()} == {
        "README.md", "config.json", "model.safetensors"
    }  # fmt: skip
    loaded = Teammate.from_pretrained(tmp_path / "net")
    assert_same(loaded, teammate)
    loaded.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "config.json").read_text()
    assert again == (tmp_path / "net" / "config.json").read_text()


def test_weights_per_depth(tmp_path):
    config = TeammateConfig(options={"width": 4}, depths=3, per_depth_affine=True)
    net = make_teammate(config)
    net.save_pretrained(tmp_path)
    assert_same(Teammate.from_pretrained(tmp_path), net)


def test_push_and_pull(teammate, tmp_path, monkeypatch, fake_hub):
    monkeypatch.setattr(constants, "ENDPOINT", fake_hub.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        fake_hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    teammate.push_to_hub("me/net", token="secret")
    assert fake_hub.files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert_same(Teammate.from_pretrained("me/net", cache_dir=tmp_path), teammate)

    fake_hub.files["pytorch_model.bin"] = fake_hub.files.pop("model.safetensors")
    with pytest.raises(ValueError, match=r"There is no model\.safetensors"):
        Teammate.from_pretrained("me/net", cache_dir=tmp_path / "other")


def test_model_card(teammate, tmp_path):
    teammate.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "teamnet_pl"
    assert card.data.pipeline_tag == "image-classification"
    rows = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| d")]
    assert rows[0][-1] == "accuracy, test split |"
    assert [row[0] for row in rows[1:]] == ["| d7", "| d5", "| d2"]
    assert [row[-1] for row in rows[1:]] == ["87.50% |", " |", "50.00% |"]
    costs = depth_costs(teammate, (1, 8, 8)).values()
    assert [row[2:4] for row in rows[1:]] == [[f"{c.macs:,}", f"{c.parameters:,}"] for c in costs]
    assert "normalized with mean [0.3] and standard deviation [0.2]" in card.text
    assert "distinguishes 10 classes: zero, one, two" in card.text


def test_example_of_the_model_card_runs(teammate, tmp_path):
    teammate.save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    code = text.partition("```python\n")[2].partition("```")[0]
    namespace = {"images": IMAGES}
    exec(code.replace('"..."', repr(str(tmp_path))), namespace)
    with torch.no_grad():
        torch.testing.assert_close(namespace["small"](IMAGES), namespace["logits"])


def test_card_without_accuracy_and_preprocessing(tmp_path):
    Teammate(10, (1, 8, 8), TINY).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md").text
    assert "accuracy" not in card
    assert "normalized" not in card


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.fault("a Hub folder with a malicious pickle", "It is refused; nothing is unpickled.")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pickled_code_is_not_run(teammate, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    teammate.save_pretrained("net")
    Path("net/model.safetensors").unlink()
    Path("net", name).write_bytes(pickle.dumps({"backbone.conv1.weight": Bomb()}))
    with pytest.raises(Exception, match=r"(?i)header|no such file"):
        Teammate.from_pretrained("net")
    assert not Path("ran").exists()


@pytest.mark.fault(
    "a flipped bit in the weights of a Hub folder", "The error says that the file is damaged."
)
def test_flipped_bits_are_detected(teammate, tmp_path):
    teammate.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        Teammate.from_pretrained(tmp_path)


@pytest.mark.fault("wrong values in the config of a Hub folder", "The error names the value.")
@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("net", [1], "does not hold a Teammate"),
        ("net", {"name": 3}, "name must be a text"),
        ("net", {"name": "cifar/resnet20", "depths": "many"}, "the values of net do not fit"),
        ("net", {"name": "cifar/resnet20", "options": {"width": "x"}}, "cannot be made with"),
        ("num_classes", "ten", "num_classes must be 2 or more"),
        ("input_shape", [1, 8], "input_shape must be"),
        ("classes", ["a"], "names of 10 classes"),
        ("classes", 3, "names of 10 classes"),
        ("preprocessing", [1], "does not hold a Teammate"),
        ("preprocessing", {"input_shape": [1, 8, 8], "mean": [0], "std": [0]}, "std must be"),
    ],
)
def test_config_with_wrong_values(teammate, tmp_path, entry, value, message):
    teammate.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(ValueError, match=message):
        Teammate.from_pretrained(tmp_path)


@pytest.mark.fault("missing weights in a Hub folder", "The error names them.")
def test_missing_weights(teammate, tmp_path):
    from safetensors.torch import save_file

    teammate.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["backbone.conv1.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"conv1\.weight"):
        Teammate.from_pretrained(tmp_path)


@pytest.mark.fault(
    "code named in the config of a Hub folder", "It is refused unless the user trusts it."
)
def test_code_named_in_a_config_is_not_run(teammate, tmp_path, own_nets):
    teammate.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["net"] |= {"name": "pathlib.Path.touch", "options": {"self": "ran"}}
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"names the backbone pathlib\.Path\.touch by its import path"
    ):
        Teammate.from_pretrained(tmp_path)


def test_a_users_own_backbone_needs_trust(tmp_path, own_nets):
    config = TeammateConfig("own_nets.GroupNormNet", {"width": 6}, depths=[4, 1])
    net = Teammate(10, (1, 8, 8), config).eval()
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"own_nets\.GroupNormNet.*trust_import=True"):
        Teammate.from_pretrained(tmp_path)
    assert_same(Teammate.from_pretrained(tmp_path, trust_import=True), net)


def test_pretrained_weights_are_not_loaded_again(tmp_path):
    config = TeammateConfig(
        "timm/resnet18", {"checkpoint_path": "/nowhere"}, checkpoint="/nowhere", depths=2
    )
    Teammate(10, (3, 32, 32), config).save_pretrained(tmp_path)
    Teammate.from_pretrained(tmp_path)


@pytest.mark.fault("a Hub folder without `config.json`", "The error says so.")
def test_folder_without_config(teammate, tmp_path):
    teammate.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json of a Teammate"):
        Teammate.from_pretrained(tmp_path)


# From the checkpoint of a training run


@pytest.fixture(scope="module")
def checkpoint(cli, tmp_path_factory):
    """One with a report of the validation split, as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    cli(folder, "fit")
    return folder / BEST


@pytest.mark.parametrize("name", ["a", "b"])
def test_from_checkpoint(checkpoint, name):
    teammate = Teammate.from_checkpoint(checkpoint, name)
    net = Team.load_from_checkpoint(checkpoint).eval().elastic_nets[name]
    assert teammate.depths == net.depths
    with torch.no_grad():
        assert torch.equal(teammate.packed(IMAGES), net.packed(IMAGES))
    assert (teammate.num_classes, teammate.input_shape) == (10, (1, 8, 8))
    assert teammate.preprocessing == PreprocessingConfig([1, 8, 8], [0.3053], [0.3760])
    assert teammate.classes == [str(digit) for digit in range(10)]
    assert teammate.split == "val"
    rows = json.loads((checkpoint.parent / "per_depth_val.json").read_text())
    for row in rows:
        if row["net"] == name:
            assert teammate.accuracy[row["depth"]] == row["accuracy"]
    assert teammate.accuracy.keys() == {depth.name for depth in net.depths}


@pytest.mark.fault(
    "a `per_depth.json` of other weights than the checkpoint's", "Its accuracies are not used."
)
def test_an_evaluation_of_other_weights_is_not_used(checkpoint, tmp_path):
    report = (checkpoint.parent / "per_depth_val.json").read_text()
    (tmp_path / "per_depth.json").write_text(report)
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content, tmp_path / "same.ckpt")
    assert Teammate.from_checkpoint(tmp_path / "same.ckpt").accuracy
    content["state_dict"]["teammates.b.backbone.fc.bias"][3] += 1e-6
    torch.save(content, tmp_path / "other.ckpt")
    assert Teammate.from_checkpoint(tmp_path / "other.ckpt").accuracy == {}


def test_checkpoint_that_does_not_name_its_data(tmp_path):
    team = make_team(b=None)
    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(team)
    trainer.save_checkpoint(tmp_path / "team.ckpt")
    teammate = Teammate.from_checkpoint(tmp_path / "team.ckpt")
    assert (teammate.preprocessing, teammate.classes) == (None, None)
    assert (teammate.accuracy, teammate.split) == ({}, None)
    with pytest.raises(ValueError, match="has the Teammates a; found b"):
        Teammate.from_checkpoint(tmp_path / "team.ckpt", "b")


def test_not_a_checkpoint_of_a_team(teammate, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Teammate.from_checkpoint(tmp_path / "best.ckpt")
    torch.save(teammate.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of a team: it holds backbone"):
        Teammate.from_checkpoint(tmp_path / "weights.pt")
