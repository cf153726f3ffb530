"""A checkpoint alone is enough to deploy a net as it was trained."""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from teamnet_pl.checkpoints import load_checkpoint
from teamnet_pl.deploy import Predictor, Teammate
from teamnet_pl.deploy.checkpoint import SavedTeam
from teamnet_pl.trust import Trust
from tests.helpers.runs import BEST, error_of, read_csv

NAMES = [str(number) for number in range(12)]  # sorted as text: folder 10 is label 2
BRIGHTNESS = dict(zip(NAMES, np.linspace(10, 110, 12), strict=True))  # far from ImageNet's


def paint(root, split, count, endings=("png",)):
    """Saves images of two sizes, whose brightness depends on the class."""
    random = np.random.default_rng(len(split))
    for name, brightness in BRIGHTNESS.items():
        folder = root / split / name
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = random.normal(brightness, 2, (20 + index % 2, 24, 3)).clip(0, 255)
            image = Image.fromarray(pixels.astype(np.uint8))
            ending = endings[index % len(endings)]
            (image.convert("L") if ending == "pgm" else image).save(folder / f"{index}.{ending}")


@pytest.fixture(scope="module")
def fitted(cli, tmp_path_factory):
    """The folder of a run on folders of images, which have been moved away since."""
    folder = tmp_path_factory.mktemp("run")
    paint(folder / "images", "train", 12)
    paint(folder / "images", "test", 4, ("png", "ppm", "pgm", "bmp"))
    data = {"root": "images", "statistics": "data", "image_size": 16, "batch_size": 24}
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [16, 16]}}
    data |= {"train_transform": [resize]}
    options = ["--data", "ImageFolder", "--data.init_args", json.dumps(data)]
    options += ["--trainer.limit_train_batches", 1.0, "--trainer.max_epochs", 12]
    cli(folder, "fit", *options, "--test_after_fit", "true")
    cli(folder, "predict", "--ckpt_path", BEST, tiny=False)
    (folder / "images").rename(folder / "moved")
    return folder


@pytest.fixture(scope="module")
def accuracy(fitted):
    """The test accuracy of each depth of Teammate a."""
    rows = json.loads((fitted / BEST).with_name("per_depth.json").read_text())
    return {row["depth"]: row["accuracy"] for row in rows if row["net"] == "a"}


def image_files(fitted):
    """The test images, in the order of their labels, which is that of the names as text."""
    files = (fitted / "moved/test").glob("*/*")
    return sorted(files, key=lambda file: (file.parent.name, file.name))


def test_the_team_learned_more_than_one_class(accuracy):
    assert max(accuracy.values()) > 0.5


def test_prediction_is_as_good_as_the_test(fitted, accuracy):
    files = image_files(fitted)
    predictor = Predictor.from_checkpoint(fitted / BEST)
    for depth, expected in accuracy.items():
        names = predictor.predict(files, depth=depth).names
        right = [name == file.parent.name for name, file in zip(names, files, strict=True)]
        assert np.mean(right) == pytest.approx(expected)


def test_image_files_get_the_predictions_of_the_test_split(cli, fitted, tmp_path):
    """Those of `predict` on the data module, by the same preprocessing."""
    of_split = read_csv((fitted / BEST).with_name("predictions.csv"))
    for depth in ("d7", "d0"):
        words = ["--images", fitted / "moved/test", "--depth", depth, "--out", f"{depth}.csv"]
        cli(tmp_path, "predict", *words, "--ckpt_path", fitted / BEST, tiny=False)
        rows = read_csv(tmp_path / f"{depth}.csv")
        assert [row["image"] for row in rows] == list(map(str, image_files(fitted)))
        assert [row["class"] for row in rows] == [row[f"a/{depth}"] for row in of_split]


def test_predictions_of_the_command_line_have_names(fitted):
    rows = read_csv((fitted / BEST).with_name("predictions.csv"))
    predictor = Predictor.from_checkpoint(fitted / BEST)
    files = image_files(fitted)
    names = predictor.predict(files, depth="d7").names
    assert [row["a/d7"] for row in rows] == names
    assert len(set(names)) > 1


def test_a_server_names_the_class(fitted):
    from tests.helpers.serving import serving_client

    predictor = Predictor.from_checkpoint(fitted / BEST)
    files = image_files(fitted)
    with serving_client(predictor, budget_ms=5000) as client:
        for file in files[::7]:
            answer = client.post("/predict?depth=d7", content=file.read_bytes()).json()
            assert [answer["class"]] == predictor.predict(file, depth="d7").names
        assert client.get("/model").json()["classes"] == sorted(NAMES)


@pytest.mark.fault("missing training data", "`profile` and `export` need only the checkpoint.")
def test_commands_do_not_need_the_data(cli, fitted, tmp_path):
    """Neither the data nor the folder of the run is available."""
    shutil.copy(fitted / BEST, tmp_path / "team.ckpt")
    cli(tmp_path, "profile", "--ckpt_path", "team.ckpt", "--runs", 1, tiny=False)
    formats = "[safetensors,hub]"
    words = ["--ckpt_path", "team.ckpt", "--out", "out", "--formats", formats]
    cli(tmp_path, "export", *words, tiny=False)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    saved = SavedTeam.read(fitted / BEST)
    assert manifest["classes"] == saved.classes == sorted(NAMES)
    assert manifest["preprocessing"]["mean"] == saved.preprocessing.mean
    assert np.mean(saved.preprocessing.mean) < 0.3  # not ImageNet's
    teammate = Teammate.from_pretrained(tmp_path / "out/hub")
    assert (teammate.preprocessing, teammate.classes) == (saved.preprocessing, saved.classes)
    assert ", ".join(sorted(NAMES)) in ModelCard.load(tmp_path / "out/hub/README.md").text


def test_evaluation_needs_the_data(cli, fitted, tmp_path, capsys):
    checkpoint = ["--ckpt_path", fitted / BEST]
    assert "images/train" in error_of(capsys, cli, tmp_path, "test", *checkpoint, tiny=False)
    cli(tmp_path, "test", *checkpoint, "--data.root", fitted / "moved", tiny=False)


@pytest.mark.fault(
    "a class folder renamed after training", "The data is refused, and the error names the folder."
)
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_other_classes_are_refused(cli, fitted, tmp_path, capsys, command):
    shutil.copytree(fitted / "moved", tmp_path / "renamed")
    for split in ("train", "test"):
        (tmp_path / "renamed" / split / "3").rename(tmp_path / "renamed" / split / "zebra")
    words = [command, "--ckpt_path", fitted / BEST, "--data.root", "renamed"]
    message = error_of(capsys, cli, tmp_path, *words, "--trainer.max_epochs", 9, tiny=False)
    assert "other classes than the team was trained on" in message
    assert "(missing: 3; new: zebra)" in message


def test_a_checkpoint_of_weights_alone(cli, fitted, tmp_path):
    """`save_weights_only` keeps everything that a trained net needs."""
    options = ["--checkpoint.save_weights_only", "true"]
    cli(tmp_path, "fit", *options)
    checkpoint = tmp_path / BEST
    assert "optimizer_states" not in torch.load(checkpoint, weights_only=True)
    cli(tmp_path, "test", "--ckpt_path", checkpoint, tiny=False)
    cli(tmp_path, "profile", "--ckpt_path", checkpoint, "--runs", 1, tiny=False)
    assert Predictor.from_checkpoint(checkpoint).classes == [str(digit) for digit in range(10)]


@pytest.mark.fault("a `per_depth.json` that is not a report", "The error names the file.")
@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"net": "a"}]', "[" * 5000])
def test_a_file_beside_the_checkpoint_that_is_not_a_report(checkpoint, tmp_path, content):
    shutil.copy(checkpoint, tmp_path / "team.ckpt")
    (tmp_path / "per_depth.json").write_text(content)
    try:
        assert Teammate.from_checkpoint(tmp_path / "team.ckpt").accuracy == {}
    except ValueError as error:
        assert "per_depth.json is not a report of a team" in str(error)  # noqa: PT017


def test_data_with_other_statistics_causes_a_warning(cli, fitted, tmp_path):
    """Here ImageNet's; the team was trained with those of its data."""
    options = ["--data.root", fitted / "moved", "--data.statistics", "imagenet"]
    with pytest.warns(UserWarning, match=r"predicts, with mean .*; this data has mean \[0\.485"):
        cli(tmp_path, "test", "--ckpt_path", fitted / BEST, *options, tiny=False)


# Any number of Teammates


@pytest.fixture(scope="module")
def with_extra(checkpoint, tmp_path_factory):
    """Saves a checkpoint with extra Teammates, each with the weights of Teammate b."""

    def save(**extra):
        content = torch.load(checkpoint, weights_only=True)
        values, weights = content["hyper_parameters"], content["state_dict"]
        values["extra_teammates"] = {name: values["b"] | changes for name, changes in extra.items()}
        of_b = {k: v for k, v in weights.items() if k.startswith("teammates.b.")}
        for name in extra:
            weights |= {k.replace(".b.", f".{name}.", 1): v for k, v in of_b.items()}
        path = tmp_path_factory.mktemp("extra") / "team.ckpt"
        torch.save(content, path)
        return path

    return save


def test_teammates_by_name(checkpoint, with_extra):
    values = SavedTeam.read(checkpoint).hyper_parameters
    assert SavedTeam.read(checkpoint).teammates == {"a": values["a"], "b": values["b"]}
    assert list(SavedTeam.read(with_extra(c={}, small={})).teammates) == ["a", "b", "c", "small"]


def test_a_third_teammate(cli, checkpoint, with_extra, tmp_path):
    path = with_extra(c={"depths": [7, 1]})
    teammate, b = Teammate.from_checkpoint(path, "c"), Teammate.from_checkpoint(checkpoint, "b")
    assert [depth.name for depth in teammate.depths] == ["d7", "d1"]
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad(), teammate.at("d7"), b.at("d7"):
        assert torch.equal(teammate(images), b(images))
    words = ["--ckpt_path", path, "--teammate", "c"]
    cli(tmp_path, "profile", *words, "--runs", 1, tiny=False)
    assert (path.parent / "profile_c_cpu.json").is_file()
    cli(tmp_path, "export", *words, "--out", "out", "--formats", "[safetensors]", tiny=False)
    assert (tmp_path / "out/d1.safetensors").is_file()


def test_no_such_teammate(with_extra):
    with pytest.raises(ValueError, match="has the Teammates a, b, c; found d"):
        Teammate.from_checkpoint(with_extra(c={}), "d")


def test_values_of_a_third_teammate_are_not_trusted(with_extra):
    path = with_extra(c={"name": "subprocess.getoutput"})
    with pytest.raises(ValueError, match=r"import path.*model\.extra_teammates\.c\.name"):
        Teammate.from_checkpoint(path, "c")


def test_extra_teammates_must_be_a_mapping(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["extra_teammates"] = ["c"]
    torch.save(content, tmp_path / "team.ckpt")
    with pytest.raises(ValueError, match=r"extra_teammates must be a mapping .*, found \['c'\]"):
        Teammate.from_checkpoint(tmp_path / "team.ckpt")


def test_a_checkpoint_is_read_and_trusted_once(checkpoint, monkeypatch):
    made, read = [], []

    def load(path, *args):
        read.append(path)
        return load_checkpoint(path, *args)

    class CountedTrust(Trust):
        def __init__(self, *args):
            made.append(args)
            super().__init__(*args)

    for module in ("checkpoint", "teammate", "runtime.preprocessing"):
        monkeypatch.setattr(f"teamnet_pl.deploy.{module}.Trust", CountedTrust)
    monkeypatch.setattr("teamnet_pl.deploy.checkpoint.load_checkpoint", load)
    Predictor.from_checkpoint(checkpoint)
    assert read == [checkpoint]
    assert len(made) == 1
