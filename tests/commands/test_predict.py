"""``teamnet predict --images``: files that nobody labelled."""

import json
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image

from teamnet_pl import Team
from teamnet_pl.deploy import Predictor
from teamnet_pl.deploy.runtime.image_files import FilePredictions
from tests.helpers.runs import error_of, read_csv
from tests.helpers.teams import make_digits

COUNT = 40


@pytest.fixture(scope="module")
def images():
    """The first images of the test split of digits, of 8 bits."""
    data = make_digits(batch_size=COUNT)
    data.setup("test")
    images, _ = next(iter(data.test_dataloader()))
    return (255 * images).round().byte()


@pytest.fixture(scope="module")
def photos(images, tmp_path_factory):
    """The images as files, in two folders, and other files."""
    folder = tmp_path_factory.mktemp("photos")
    for place in ("one", "two/three", "two/.hidden"):
        (folder / place).mkdir(parents=True)
    for index, image in enumerate(images):
        place = folder / ("one" if index < COUNT // 2 else "two/three")
        Image.fromarray(image[0].numpy()).save(place / f"{index:03}.png")
    (folder / "one/notes.txt").write_text("not an image")
    (folder / "two/.hidden/x.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def predict(cli, checkpoint):
    """Predicts files in a folder with the checkpoint of the tests."""

    def run(folder, *words):
        cli(folder, "predict", "--images", *words, "--ckpt_path", checkpoint, tiny=False)

    return run


def test_files_get_the_predictions_of_the_team(
    predict, checkpoint, images, photos, tmp_path, capsys
):
    team = Team.load_from_checkpoint(checkpoint).eval()
    with torch.no_grad():
        logits = team(make_digits().normalize(images))
    for depth in ("d7", "d4"):
        out = tmp_path / f"{depth}.csv"
        predict(tmp_path, photos, "--depth", depth, "--batch_size", 16, "--out", out)
        printed = capsys.readouterr().out
        assert f"{COUNT} images: {COUNT} at {depth}" in printed
        assert f"Saved as {out.name}" in printed
        rows = read_csv(out)
        names = [str(path) for path in sorted(photos.glob("**/[0-9]*.png"))]
        assert [row["image"] for row in rows] == names
        expected = logits[f"a/{depth}"].softmax(1)
        actual = torch.tensor([[float(row[f"p({digit})"]) for digit in range(10)] for row in rows])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        assert [int(row["class"]) for row in rows] == expected.argmax(1).tolist()
        probabilities = [float(row["probability"]) for row in rows]
        assert probabilities == pytest.approx(expected.amax(1).tolist(), abs=1e-5)
        assert {row["depth"] for row in rows} == {depth}


def test_files_folders_and_patterns_as_json_lines(predict, photos, tmp_path):
    one, three = photos / "one", photos / "two/three"
    words = [three / "025.png", one / "00*.png", three / "025.png"]
    predict(tmp_path, *words, "--out", "out.jsonl", "--teammate", "b")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["image"].rpartition("/")[2] for record in records] == ["025.png"] + [
        f"00{digit}.png" for digit in range(10)
    ]
    for record in records:
        assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert record["probabilities"][record["class"]] == record["probability"]
        assert record["probability"] == max(record["probabilities"].values())


def test_no_file_is_replaced_by_default(predict, photos, tmp_path):
    for _ in range(2):
        predict(tmp_path, photos / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.csv", "predictions_2.csv"}


def test_a_budget_chooses_the_depth(checkpoint, photos, monkeypatch):
    """The controller is asked for the deepest depth within the images' milliseconds."""
    predictor = Predictor.from_checkpoint(checkpoint)
    asked = []

    def choose(budget_ms, images):
        asked.append((budget_ms, images))
        return predictor.depths[len(asked)]

    monkeypatch.setattr(predictor.controller, "choose", choose)
    files = sorted(photos.glob("one/*.png"))
    predictions = list(FilePredictions(predictor, files, batch_size=15, budget_ms=1000.0))
    assert [images for _, images in asked] == [15, 5]
    assert [budget for budget, _ in asked] == pytest.approx([15_000, 5000], rel=0.1)
    counts = Counter(prediction.depth for prediction in predictions)
    assert counts == {predictor.depths[1]: 15, predictor.depths[2]: 5}


@pytest.mark.fault(
    "image files to predict that cannot be read",
    "The error names them, or with `--on_error skip` they are left out and listed.",
)
def test_files_that_cannot_be_read_are_named(predict, photos, tmp_path, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(photos / "one", folder)
    (folder / "broken.png").write_bytes((folder / "000.png").read_bytes()[:40])
    Image.new("L", (9, 8)).save(folder / "wide.png")
    message = error_of(capsys, predict, tmp_path, folder)
    assert f"{folder}/broken.png" in message
    assert "--on_error skip" in message
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]
    predict(tmp_path, folder, "--on_error", "skip", "--batch_size", 3)
    printed = capsys.readouterr().out
    assert f"Skipped: {folder}/broken.png" in printed
    assert f"Skipped: {folder}/wide.png has the shape (1, 8, 9)" in printed
    names = {row["image"] for row in read_csv(tmp_path / "predictions.csv")}
    assert names == {str(path) for path in folder.glob("[0-9]*.png")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/*.png"], "There is no image file, folder or pattern nowhere/*.png."),
        (["."], "There is no image in the folder"),
        (["PHOTOS", "--depth", "d9"], "There are the depths d7, d4, d0; found d9."),
        (["PHOTOS", "--budget_ms", "0"], "budget_ms must be a positive number"),
        (["PHOTOS", "--batch_size", "0"], "batch_size must be at least 1, found 0"),
        (["PHOTOS", "--depth", "d4", "--budget_ms", "5"], "Pass one of budget_ms, macs and depth"),
        (
            ["PHOTOS", "--out", "predictions.xls"],
            "ending, .csv, .json, .jsonl; found predictions.xls",
        ),
        (["PHOTOS", "--dpeth", "d4"], "Did you mean depth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_reported(predict, photos, tmp_path, capsys, words, message):
    words = [photos if word == "PHOTOS" else word for word in words]
    assert message in error_of(capsys, predict, tmp_path, *words)
    assert list(tmp_path.iterdir()) == []
