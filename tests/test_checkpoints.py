import pytest
import torch

from teamnet_pl.checkpoints import load_checkpoint, weights_digest

STATE = {"a": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)}


def test_the_digest_of_saved_weights(tmp_path):
    torch.save(STATE, tmp_path / "weights.pt")
    reordered = dict(reversed(load_checkpoint(tmp_path / "weights.pt").items()))
    assert weights_digest(reordered) == weights_digest(STATE)


@pytest.mark.parametrize(
    "change",
    [
        {"a": STATE["a"] + torch.eye(2, 3) * 1e-6},
        {"a": STATE["a"].reshape(3, 2)},
        {"a": STATE["a"].bfloat16()},
        {"a": STATE["a"].T.contiguous().T[:, [1, 0, 2]]},
        {"b": torch.zeros(0)},
    ],
)
def test_other_weights_have_another_digest(change):
    assert weights_digest(STATE | change) != weights_digest(STATE)


def test_how_weights_lie_in_memory_does_not_matter():
    assert weights_digest(STATE | {"a": STATE["a"].T.contiguous().T}) == weights_digest(STATE)
