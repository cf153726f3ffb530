from functools import partial

import pytest
import torch
from torch import nn

from teamnet_pl.deploy.profile import (
    Profile,
    ProfileRow,
    draw_profile,
    pareto_front,
    peak_bytes,
    profile_depths,
    profile_lines,
    run_timed,
    with_accuracies,
)


def row(depth="d1", batch_size=1, median_ms=1.0, accuracy=None, p95_ms=2.0):
    return ProfileRow(depth, [1], 10, 5, batch_size, median_ms, p95_ms, 7, accuracy)


@pytest.fixture
def profile():
    rows = [row("d1", 1, 10.0), row("d0", 1, 4.0), row("d1", 9, 50.0), row("d0", 9, 20.0)]
    return Profile("cpu", "a machine", 1, rows)


class Slow(nn.Module):
    """Counts its runs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return images.flatten(1)[:, :2] * self.weight


def test_every_depth_at_every_batch_size(team):
    net = team.teammates["a"]
    views = {depth.name: Slow() for depth in net.depths}
    found = profile_depths(net, views, batch_sizes=[4, 1, 4], runs=3)
    assert [(r.depth, r.batch_size) for r in found.rows] == [
        (depth.name, size) for size in (1, 4) for depth in net.depths
    ]
    assert found.depths == [depth.name for depth in net.depths]
    assert (found.device, found.threads) == ("cpu", torch.get_num_threads())
    for view in views.values():
        # Two that warm up and three that count, and one that tells the memory.
        assert view.batches == [1] * 6 + [4] * 6
    for own in found.rows:
        assert 0 < own.median_ms <= own.p95_ms
        plain = net.extract(own.depth)
        assert own.parameters == sum(p.numel() for p in plain.parameters())
        assert own.blocks_per_stage == net.depth(own.depth).per_stage


def test_times_are_those_of_the_runs(team, monkeypatch):
    net = team.teammates["a"]
    times = iter([900, 900, *range(1, 102)])
    monkeypatch.setattr("teamnet_pl.deploy.profile.run_timed", lambda *_: (None, next(times)))
    found = profile_depths(net, {"d0": net.view("d0")}, batch_sizes=[1], runs=101)
    assert (found.rows[0].median_ms, found.rows[0].p95_ms) == (51, 96)


def test_run_is_timed_and_gives_probabilities():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(torch.bfloat16)
    images = torch.rand(2, 1, 2, 2)
    found, taken_ms = run_timed(net, images)
    expected = net(images.bfloat16()).float().softmax(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.detach())
    assert taken_ms > 0
    assert not found.requires_grad


def test_peak_memory_by_hand():
    def peak(*layers):
        with torch.inference_mode():
            return peak_bytes(partial(nn.Sequential(*layers), images), torch.device("cpu"))

    images = torch.randn(8, 100)
    # Of 8 rows of float32: ReLU's input and its output.
    assert peak(nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 10)) == 4 * 8 * 2000
    # In place there is one, beside the last layer's output.
    assert peak(nn.Linear(100, 1000), nn.ReLU(inplace=True), nn.Linear(1000, 10)) == 4 * 8 * 1010
    assert peak(Slow()) == 4 * 8 * 2


def test_peak_memory_of_a_training_step_by_hand():
    weight = torch.randn(100, 100, requires_grad=True)
    images = torch.randn(8, 100)

    def step():
        features = images
        for _ in range(5):
            features = (features @ weight).tanh()  # each output is kept until the backward pass
        features.sum().backward()

    kept, gradient = 5 * 8 * 100, 100 * 100
    # Beside what is kept: the gradient so far, that of one more use, and at last their sum.
    peak = peak_bytes(step, torch.device("cpu")) / 4
    assert kept + 3 * gradient <= peak < kept + 3 * gradient + 8 * 100


def test_expected_latency(profile):
    assert [profile.expected_ms("d1", n) for n in (1, 5, 9, 18)] == [10, 30, 50, 100]
    assert profile.expected_ms("d0", 3) == 8
    profile = Profile("cpu", "", 1, [row(batch_size=4, median_ms=8)])
    assert [profile.expected_ms("d1", n) for n in (1, 4, 8)] == [8, 8, 16]


def test_saved_and_loaded(profile, tmp_path):
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"depth": 1}]}', '{"rows": 3}'])
def test_a_file_that_is_no_profile(text, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a profile of `teamnet profile`"):
        Profile.load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Profile.load(tmp_path / "nothing.json")


def test_pareto_front():
    points = {"d9": (9, 0.8), "d7": (7, 0.9), "d5": (5, 0.7), "d4": (4, 0.7), "d3": (4, 0.6)}
    rows = [row(name, 1, *point) for name, point in points.items()]
    assert [own.depth for own in pareto_front(rows)] == ["d4", "d7"]


def test_accuracies_of_an_evaluation(profile):
    found = with_accuracies(profile, {"d1": 0.9, "d0": 0.8}, "test")
    assert found.split == "test"
    assert [own.accuracy for own in found.rows] == [0.9, 0.8, 0.9, 0.8]


def test_lines_of_the_table():
    rows = [ProfileRow("d2", [2, 0], 1_234_567, 9, 8, 1.234, 5.678, 2**20, 0.98765)]
    (line,) = profile_lines(Profile("cpu", "a machine", 1, rows))
    assert line == ("d2", "2-0", "1.235", "8", "1.23", "5.68", "1.00", "98.77%")
    (line,) = profile_lines(Profile("cpu", "a machine", 1, [row()]))
    assert line[-1] == ""


def test_picture_marks_the_front():
    rows = [row("d2", n, 3.0 * n, 0.9) for n in (1, 8)] + [
        row("d1", n, 4.0 * n, 0.8) for n in (1, 8)
    ]
    figure = draw_profile(Profile("cpu", "a machine", 1, rows, "test"))
    assert [axes.get_title() for axes in figure.axes] == ["batch of 1", "batch of 8"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[1].lines}
    assert lines["Pareto front"] == [[24, 90]]
    assert {text.get_text() for text in figure.axes[0].texts} == {"d1", "d2"}
