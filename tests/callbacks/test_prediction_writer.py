import pytest
import torch

from teamnet_pl.callbacks import PredictionWriter
from tests.helpers.runs import read_csv
from tests.helpers.teams import extracted_logits, make_digits, make_team, make_trainer


@pytest.mark.parametrize("kwargs", [{}, {"leader": None, "b": None}], ids=["all", "a alone"])
def test_labels_match_each_member_alone(tmp_path, kwargs):
    team, data = make_team(**kwargs), make_digits(batch_size=64)
    trainer = make_trainer(tmp_path, callbacks=[PredictionWriter()], limit_train_batches=10)
    trainer.fit(team, data)
    trainer.save_checkpoint(tmp_path / "given" / "team.ckpt")
    trainer.predict(
        team, data, return_predictions=False, ckpt_path=tmp_path / "given" / "team.ckpt"
    )
    rows = read_csv(tmp_path / "given" / "predictions.csv")

    images = torch.cat([data.normalize(images) for images, _ in data.predict_dataloader()])
    logits = extracted_logits(team, images)
    labels = {member: values.argmax(1).tolist() for member, values in logits.items()}
    if "b/d7" in logits:
        both = logits["a/d7"].softmax(1) + logits["b/d7"].softmax(1)
        labels["ensemble"] = both.argmax(1).tolist()
    assert list(rows[0]) == ["index", *labels]
    assert [int(row["index"]) for row in rows] == list(range(len(images)))
    for member, of_member in labels.items():
        assert [int(row[member]) for row in rows] == of_member
    assert len({tuple(of_member) for of_member in labels.values()}) > 2


def test_predictions_of_some_of_the_images(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[PredictionWriter()], limit_predict_batches=2)
    trainer.predict(make_team(), make_digits(batch_size=10))
    rows = read_csv(tmp_path / "predictions.csv")
    assert [row["index"] for row in rows] == [str(i) for i in range(20)]
