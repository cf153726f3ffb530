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
def test_different_weights_have_different_digests(change):
    assert weights_digest(STATE | change) != weights_digest(STATE)


def test_the_memory_layout_of_weights_does_not_matter():
    assert weights_digest(STATE | {"a": STATE["a"].T.contiguous().T}) == weights_digest(STATE)


@pytest.mark.fault("a flipped bit in a checkpoint", "The error says that the file is damaged.")
def test_flipped_bits_are_detected(tmp_path):
    """Anywhere in the weights; torch.load alone accepts them."""
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


@pytest.mark.fault("a truncated checkpoint", "The error says that the file is damaged.")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_reported(tmp_path, share):
    path = tmp_path / "weights.pt"
    torch.save({"weights": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="is not a checkpoint, or is damaged"):
        load_checkpoint(path)
