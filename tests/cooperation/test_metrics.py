"""The metrics of a team alone, against NumPy and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from teamnet_pl.cooperation import TeamMetrics
from teamnet_pl.elastic import ElasticNet
from tests.helpers.nets import SHAPE, cifar

CLASSES = 7
DEPTHS = ["a/d4", "a/d1", "b/d4", "b/d2"]
MEMBERS = ["leader", *DEPTHS, "ensemble"]
SIZES = [5, 0, 16, 1]
"""Images in each batch; one batch is empty."""


def make_metrics(num_classes=CLASSES):
    """Metrics of a team; of its nets only the names count."""
    depths = {"a": [4, 1], "b": [4, 2]}
    teammates = {
        name: ElasticNet(cifar(4, 14), SHAPE, depths=spec) for name, spec in depths.items()
    }
    return TeamMetrics(teammates, torch.nn.Identity(), num_classes)


def make_batches(seed=0, num_classes=CLASSES):
    """Probabilities by member and labels of each batch."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            {
                member: (3 * torch.randn(size, num_classes, generator=generator)).softmax(-1)
                for member in MEMBERS
            },
            torch.randint(num_classes, (size,), generator=generator),
        )
        for size in SIZES
    ]


def calibration_error(probabilities, labels):
    """The expected calibration error over 15 bins of the same width."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.ceil(confidence * 15).astype(int).clip(1, 15)
    return sum(abs((correct[bins == i] - confidence[bins == i]).sum()) for i in range(1, 16)) / len(
        labels
    )


SHALLOW = {"a/d1": "a/d4", "b/d2": "b/d4"}
"""Each shallower depth, and the deepest of its Teammate."""


def predicted_labels(batches):
    """The labels that each member predicts for all images."""
    return {
        member: torch.cat([probabilities[member].argmax(1) for probabilities, _ in batches])
        for member in MEMBERS
    }


def expected_metrics(batches, num_classes=CLASSES):
    labels = torch.cat([labels for _, labels in batches]).numpy()
    predicted = predicted_labels(batches)
    classes, metrics = np.arange(num_classes), {}
    for depth, deepest in SHALLOW.items():
        differs = predicted[depth] != predicted[deepest]
        metrics[f"disagreement/{depth}"] = differs.double().mean().item()
    for member in MEMBERS:
        parts = [probabilities[member] for probabilities, _ in batches]
        of_member = torch.cat(parts).double().numpy()
        of_member /= of_member.sum(1, keepdims=True)  # which float32 misses by a little
        metrics[f"accuracy/{member}"] = accuracy_score(labels, of_member.argmax(1))
        metrics[f"loss/{member}"] = log_loss(labels, of_member, labels=classes)
        metrics[f"calibration_error/{member}"] = calibration_error(of_member, labels)
        if num_classes > 5:
            metrics[f"accuracy_top5/{member}"] = top_k_accuracy_score(
                labels, of_member, k=5, labels=classes
            )
    return metrics | {"accuracy/mean": np.mean([metrics[f"accuracy/{depth}"] for depth in DEPTHS])}


def update(metrics, batches):
    for probabilities, labels in batches:
        metrics.update(probabilities, labels)


def as_floats(values):
    return {name: float(value) for name, value in values.items()}


@pytest.mark.parametrize("num_classes", [CLASSES, 5])
def test_metrics_cover_all_batches(num_classes):
    metrics, batches = make_metrics(num_classes), make_batches(num_classes=num_classes)
    update(metrics, batches)
    expected = expected_metrics(batches, num_classes)
    assert as_floats(metrics.compute()) == pytest.approx(expected, abs=1e-5)
    assert len(expected) == len(MEMBERS) * (4 if num_classes > 5 else 3) + 2 + 1
    assert float(metrics.mean_accuracy()) == pytest.approx(expected["accuracy/mean"])


def test_values_so_far_may_be_computed_between_batches():
    metrics, batches = make_metrics(), make_batches()
    for count, batch in enumerate(batches, 1):
        update(metrics, [batch])
        expected = expected_metrics(batches[:count])
        assert as_floats(metrics.compute()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_prediction_that_is_not_finite_makes_the_metrics_of_its_member_nan(value):
    metrics, batches = make_metrics(), make_batches()
    expected = expected_metrics(batches)
    batches[2][0]["a/d1"][3, 4] = value
    update(metrics, batches)
    values = as_floats(metrics.compute())
    kinds = ("accuracy", "accuracy_top5", "calibration_error", "disagreement", "loss")
    nan = {name for name, number in values.items() if np.isnan(number)}
    assert nan == {f"{kind}/a/d1" for kind in kinds} | {"accuracy/mean"}
    for name in values.keys() - nan:
        assert values[name] == pytest.approx(expected[name], abs=1e-5)


def test_predictions_are_counted_by_pair_of_members_and_by_label():
    metrics, batches = make_metrics(), make_batches()
    batches[0][0]["leader"][2] = torch.nan
    update(metrics, batches)
    agreement, confusion = metrics.predictions.compute()
    predicted = predicted_labels(batches)
    labels = torch.cat([labels for _, labels in batches])
    assert metrics.names == list(MEMBERS)
    for row, member in enumerate(MEMBERS):
        finite = torch.ones_like(labels, dtype=torch.bool)
        finite[2] = member != "leader"
        counts = confusion_matrix(labels[finite], predicted[member][finite], labels=range(CLASSES))
        assert confusion[row].tolist() == counts.tolist()
        for column, other in enumerate(MEMBERS):
            if "leader" in (member, other):
                assert agreement[row, column].isnan()
            else:
                share = accuracy_score(predicted[member], predicted[other])
                assert float(agreement[row, column]) == pytest.approx(share)


def test_confusion_of_many_classes_is_not_counted():
    metrics, batches = make_metrics(101), make_batches(num_classes=101)
    update(metrics, batches)
    assert metrics.predictions.compute().confusion.numel() == 0
    assert float(metrics.compute()["disagreement/a/d1"]) > 0.5


def test_reset_forgets_all_batches():
    metrics = make_metrics()
    first, second = make_batches(seed=0), make_batches(seed=1)
    first[0][0]["leader"][0, 0] = torch.nan
    update(metrics, first)
    metrics.reset()
    update(metrics, second)
    assert as_floats(metrics.compute()) == pytest.approx(expected_metrics(second), abs=1e-5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize("batches", [[], make_batches()[1:2]], ids=["no batch", "an empty batch"])
def test_metrics_without_an_image_are_nan(batches):
    metrics = make_metrics()
    update(metrics, batches)
    values = as_floats(metrics.compute())
    assert values.keys() == expected_metrics(make_batches()).keys()
    assert all(np.isnan(value) for value in values.values())


def test_half_precision_does_not_change_the_sums():
    metrics, batches = make_metrics().half(), make_batches()
    update(metrics, batches)
    assert as_floats(metrics.compute()) == pytest.approx(expected_metrics(batches), abs=1e-5)
