import json

import pytest

from teamnet_pl.cli import main
from teamnet_pl.deploy import Profile, Teammate
from tests.helpers.runs import error_of


def test_profile_of_each_depth_and_batch_size(checkpoint, capsys):
    words = ["--ckpt_path", str(checkpoint), "--teammate", "b", "--batch_sizes", "[1,2]"]
    main(["profile", *words, "--runs", "2"])
    printed = capsys.readouterr().out
    assert "Saved as" in printed
    assert all(f" {depth} " in printed for depth in ("d7", "d5", "d2"))
    profile = Profile.load(checkpoint.parent / "profile_b_cpu.json")
    assert profile.depths == ["d7", "d5", "d2"]
    assert [(row.batch_size, row.depth) for row in profile.rows[2:4]] == [(1, "d2"), (2, "d7")]
    evaluated = json.loads((checkpoint.parent / "per_depth.json").read_text())
    accuracies = {row["depth"]: row["accuracy"] for row in evaluated if row["net"] == "b"}
    assert {row.depth: row.accuracy for row in profile.rows} == accuracies
    assert profile.split == "test"
    assert (checkpoint.parent / "profile_b_cpu.png").stat().st_size > 10_000


def test_profile_of_a_folder_is_saved_in_it(checkpoint, tmp_path):
    Teammate.from_checkpoint(checkpoint, "b").save_pretrained(tmp_path)
    main(["profile", "--ckpt_path", str(tmp_path), "--batch_sizes", "[1]", "--runs", "1"])
    profile = Profile.load(tmp_path / "profile_a_cpu.json")
    assert (profile.depths, profile.split) == (["d7", "d5", "d2"], "test")


def test_profile_without_an_evaluation(checkpoint, tmp_path, capsys):
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(checkpoint.read_bytes())
    main(["profile", "--ckpt_path", str(alone), "--batch_sizes", "[1]", "--runs", "1"])
    assert "There are no accuracies of these weights: `teamnet test`" in " ".join(
        capsys.readouterr().out.split()
    )
    assert Profile.load(tmp_path / "profile_a_cpu.json").split is None
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teammate", "c"], "has the Teammates a, b; found c"),
        (["--device", "gpu"], "cannot be put on 'gpu'"),
        (["--batch_sizes", "[]"], "batch_sizes must be one or more positive numbers, found []"),
        (["--batch_sizes", "[0]"], "batch_sizes must be one or more positive numbers, found [0]"),
        (["--runs", "0"], "runs must be at least 1, found 0"),
        (["--ckpt_path", "nothing.ckpt"], "There is no file nothing.ckpt"),
    ],
)
def test_mistakes_are_reported(checkpoint, words, message, capsys):
    assert message in error_of(capsys, main, ["profile", "--ckpt_path", str(checkpoint), *words])
