"""Published kinds of transfer against torchdistill's losses, or their definition by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from torchdistill.losses.mid_level import DISTLoss, KDLoss, LogitStdKDLoss

from teamnet_pl.cooperation import DIST, DecoupledKL, KLDivergence, StandardizedKL

PATHS = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}
SEEDS = st.integers(0, 2**31)


def draw(seed, n, classes):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, classes, (n,), generator=generator)


def oracle(loss, student, teacher, target):
    return loss({".": {"output": student}}, {".": {"output": teacher}}, targets=target)


@given(SEEDS, st.integers(2, 6), st.integers(2, 9), st.floats(0.5, 6))
def test_kl_divergence(seed, n, classes, temperature):
    batch = draw(seed, n, classes)
    loss = KDLoss(**PATHS, temperature=temperature, alpha=0.5, beta=1.0)
    labels = 0.5 * torch.nn.functional.cross_entropy(batch[0], batch[2])
    expected = oracle(loss, *batch) - labels
    torch.testing.assert_close(KLDivergence(temperature)(*batch), expected, rtol=1e-6, atol=1e-9)


@given(SEEDS, st.integers(2, 6), st.integers(3, 9), st.floats(0.5, 6))
def test_logit_standardization(seed, n, classes, temperature):
    batch = draw(seed, n, classes)
    loss = LogitStdKDLoss(**PATHS, temperature=temperature, alpha=None, beta=1.0)
    expected = temperature**2 * oracle(loss, *batch)
    torch.testing.assert_close(StandardizedKL(temperature)(*batch), expected, rtol=1e-5, atol=1e-9)


@given(SEEDS, st.integers(3, 6), st.integers(3, 9), st.floats(0.5, 6), st.floats(0, 3))
def test_dist(seed, n, classes, temperature, beta):
    batch = draw(seed, n, classes)
    loss = DISTLoss(**PATHS, beta=beta, gamma=2.0, tau=temperature)
    kind = DIST(beta, 2.0, temperature)
    torch.testing.assert_close(kind(*batch), oracle(loss, *batch), rtol=1e-6, atol=1e-9)


def decoupled_by_hand(student, teacher, labels, alpha, beta, temperature):
    """Equations 4 to 7 of the paper, image by image."""
    losses = []
    for s, t, label in zip(student.numpy(), teacher.numpy(), labels.tolist(), strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        p, q = (np.array([x[label], 1 - x[label]]) for x in (p, q))
        target_part = (p * np.log(p / q)).sum()
        t, s = np.delete(t, label) / temperature, np.delete(s, label) / temperature
        others_part = (softmax(t) * (log_softmax(t) - log_softmax(s))).sum()
        losses.append(temperature**2 * (alpha * target_part + beta * others_part))
    return np.mean(losses)


@given(SEEDS, st.integers(1, 6), st.integers(3, 9), st.floats(0.5, 6), st.floats(0, 3))
def test_decoupled_distillation(seed, n, classes, temperature, alpha):
    batch = draw(seed, n, classes)
    expected = decoupled_by_hand(*batch, alpha, 2.0, temperature)
    loss = DecoupledKL(alpha, 2.0, temperature)(*batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_decoupled_distillation_with_both_weights_of_the_teacher_is_the_plain_one():
    """Equation 7: the plain divergence weighs the second part by 1 - p_target."""
    student, teacher, labels = draw(0, 1, 5)
    rest = 1 - (teacher / 4).softmax(-1)[0, labels[0]].item()
    loss = DecoupledKL(1.0, rest, 4.0)(student, teacher, labels)
    torch.testing.assert_close(loss, KLDivergence(4.0)(student, teacher, labels))


@pytest.mark.parametrize("kind", [DecoupledKL(), DIST(), StandardizedKL()])
def test_gradients_are_finite_for_confident_predictions(kind):
    student = torch.tensor([[100.0, 0, -100], [0, 90, 0]], requires_grad=True)
    teacher = torch.tensor([[-100.0, 0, 100], [0, 90, 0]])
    kind(student, teacher, torch.tensor([0, 1])).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", [DecoupledKL, DIST, StandardizedKL])
def test_a_temperature_of_zero_is_refused(kind):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        kind(temperature=0.0)


def test_mixed_labels_have_the_most_probable_class_as_target():
    student, teacher, labels = draw(1, 4, 5)
    mixed = 0.7 * torch.eye(5, dtype=torch.float64)[labels] + 0.06
    kind = DecoupledKL()
    torch.testing.assert_close(kind(student, teacher, mixed), kind(student, teacher, labels))
