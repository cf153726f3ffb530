import csv

import pytest
import torch

from teamnet_pl.callbacks import PredictionWriter
from tests.helpers.teams import extracted_logits, make_digits, make_team, make_trainer


@pytest.mark.parametrize("kwargs", [{}, {"leader": None, "b": None}], ids=["all", "a alone"])
def test_labels_are_those_of_each_member_alone(tmp_path, kwargs):
    team, data = make_team(**kwargs), make_digits(batch_size=64)
    trainer = make_trainer(tmp_path, callbacks=[PredictionWriter()], limit_train_batches=10)
    trainer.fit(team, data)
    trainer.save_checkpoint(tmp_path / "given" / "team.ckpt")
    trainer.predict(
        team, data, return_predictions=False, ckpt_path=tmp_path / "given" / "team.ckpt"
    )
    with open(tmp_path / "given" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))

    images = torch.cat([data.normalize(images) for images, _ in data.predict_dataloader()])
    logits = extracted_logits(team, images)
    labels = {member: own.argmax(1).tolist() for member, own in logits.items()}
    if "b/d7" in logits:
        both = logits["a/d7"].softmax(1) + logits["b/d7"].softmax(1)
        labels["ensemble"] = both.argmax(1).tolist()
    assert list(rows[0]) == ["index", *labels]
    assert [int(row["index"]) for row in rows] == list(range(len(images)))
    for member, own in labels.items():
        assert [int(row[member]) for row in rows] == own
    assert len({tuple(own) for own in labels.values()}) > 2


def test_part_of_the_images(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[PredictionWriter()], limit_predict_batches=2)
    trainer.predict(make_team(), make_digits(batch_size=10))
    with open(tmp_path / "predictions.csv", newline="") as file:
        assert [row["index"] for row in csv.DictReader(file)] == [str(i) for i in range(20)]
