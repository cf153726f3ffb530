from teamnet_pl.places import free_name, short_path


def test_names_that_are_in_use_get_a_number(tmp_path):
    names = ["a.csv", "a_2.csv", "a_3.csv"]
    for name in names:
        assert free_name(tmp_path / "a.csv") == tmp_path / name
        (tmp_path / name).touch()


def test_paths_in_the_current_folder_are_relative(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert short_path(tmp_path / "here/logs/best.ckpt") == "logs/best.ckpt"
    assert short_path("logs/best.ckpt") == "logs/best.ckpt"
    assert short_path(tmp_path / "there") == str(tmp_path / "there")
