import pytest

from teamnet_pl.deploy.runtime.profile import Profile
from tests.helpers.deploy import profile_row


@pytest.fixture
def profile():
    rows = [
        profile_row("d1", 1, 10.0),
        profile_row("d0", 1, 4.0),
        profile_row("d1", 9, 50.0),
        profile_row("d0", 9, 20.0),
    ]
    return Profile("cpu", "a machine", 1, rows)


def test_expected_latency(profile):
    assert [profile.expected_ms("d1", n) for n in (1, 5, 9, 18)] == [10, 30, 50, 100]
    assert profile.expected_ms("d0", 3) == 8
    profile = Profile("cpu", "", 1, [profile_row(batch_size=4, median_ms=8)])
    assert [profile.expected_ms("d1", n) for n in (1, 4, 8)] == [8, 8, 16]


def test_saved_and_loaded(profile, tmp_path):
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"depth": 1}]}', '{"rows": 3}'])
def test_a_file_that_is_not_a_profile(text, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a profile of `teamnet profile`"):
        Profile.load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Profile.load(tmp_path / "nothing.json")


def test_accuracies_of_an_evaluation(profile):
    evaluated = profile.with_accuracies({"d1": 0.9, "d0": 0.8}, "test")
    assert evaluated.split == "test"
    assert [row.accuracy for row in evaluated.rows] == [0.9, 0.8, 0.9, 0.8]
