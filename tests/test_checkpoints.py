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


@pytest.mark.fault("a byte of a checkpoint has flipped", "an error says so at load")
def test_flipped_bytes_are_noticed(tmp_path):
    """In the weights, wherever; torch.load alone takes them."""
    path = tmp_path / "weights.pt"
    torch.save({"weights": torch.ones(1000)}, path)
    content = path.read_bytes()
    place = content.index(torch.ones(10).numpy().tobytes())
    for offset in (0, 1999, 3999):
        flipped = bytearray(content)
        flipped[place + offset] ^= 4
        path.write_bytes(flipped)
        torch.load(path, weights_only=True)
        with pytest.raises(ValueError, match=r"is damaged: .*checksum of .*data/0 is wrong"):
            load_checkpoint(path)


@pytest.mark.fault("a checkpoint is cut short", "an error says so at load")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_ends_too_early(tmp_path, share):
    path = tmp_path / "weights.pt"
    torch.save({"weights": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="is not a checkpoint, or is damaged"):
        load_checkpoint(path)
