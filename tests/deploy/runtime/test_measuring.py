from functools import partial

import torch
from torch import nn

from teamnet_pl.deploy.runtime.measuring import peak_bytes, profile_depths, run_timed


class BatchRecorder(nn.Module):
    """Records the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return images.flatten(1)[:, :2] * self.weight


def test_every_depth_at_every_batch_size(team):
    net = team.teammates["a"]
    views = {depth.name: BatchRecorder() for depth in net.depths}
    profile = profile_depths(net, views, batch_sizes=[4, 1, 4], runs=3)
    assert [(row.depth, row.batch_size) for row in profile.rows] == [
        (depth.name, size) for size in (1, 4) for depth in net.depths
    ]
    assert profile.depths == [depth.name for depth in net.depths]
    assert (profile.device, profile.threads) == ("cpu", torch.get_num_threads())
    for view in views.values():
        # Two runs to warm up, three that are timed, and one for the peak memory.
        assert view.batches == [1] * 6 + [4] * 6
    for row in profile.rows:
        assert 0 < row.median_ms <= row.p95_ms
        plain = net.extract(row.depth)
        assert row.parameters == sum(p.numel() for p in plain.parameters())
        assert row.blocks_per_stage == net.depth(row.depth).per_stage


def test_times_are_those_of_the_runs(team, monkeypatch):
    net = team.teammates["a"]
    times = iter([900, 900, *range(1, 102)])
    monkeypatch.setattr(
        "teamnet_pl.deploy.runtime.measuring.run_timed", lambda *_: (None, next(times))
    )
    profile = profile_depths(net, {"d0": net.view("d0")}, batch_sizes=[1], runs=101)
    assert (profile.rows[0].median_ms, profile.rows[0].p95_ms) == (51, 96)


def test_a_run_returns_its_time_and_probabilities():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(torch.bfloat16)
    images = torch.rand(2, 1, 2, 2)
    probabilities, latency_ms = run_timed(net, images)
    expected = net(images.bfloat16()).float().softmax(-1)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, expected.detach())
    assert latency_ms > 0
    assert not probabilities.requires_grad


def test_peak_memory_by_hand():
    def peak(*layers):
        with torch.inference_mode():
            return peak_bytes(partial(nn.Sequential(*layers), images), torch.device("cpu"))

    images = torch.randn(8, 100)
    # 8 rows of float32: the input and the output of the ReLU.
    assert peak(nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 10)) == 4 * 8 * 2000
    # In place they share memory; the output of the last layer is added.
    assert peak(nn.Linear(100, 1000), nn.ReLU(inplace=True), nn.Linear(1000, 10)) == 4 * 8 * 1010
    assert peak(BatchRecorder()) == 4 * 8 * 2


def test_peak_memory_of_a_training_step_by_hand():
    weight = torch.randn(100, 100, requires_grad=True)
    images = torch.randn(8, 100)

    def step():
        features = images
        for _ in range(5):
            features = (features @ weight).tanh()  # each output is kept until the backward pass
        features.sum().backward()

    kept, gradient = 5 * 8 * 100, 100 * 100
    # In addition to the kept outputs: the gradient so far, that of one more use, and their sum.
    peak = peak_bytes(step, torch.device("cpu")) / 4
    assert kept + 3 * gradient <= peak < kept + 3 * gradient + 8 * 100
