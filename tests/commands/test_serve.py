import sys

import pytest
from starlette.testclient import TestClient

from teamnet_pl.cli import main
from teamnet_pl.commands import serve_teammate
from teamnet_pl.deploy import Predictor


def test_options_reach_the_server(checkpoint, monkeypatch):
    started = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: started.update(options, app=app))
    make, options = Predictor.from_checkpoint, {}

    def from_checkpoint(*args, **kwargs):
        options.update(kwargs)
        return make(*args, **kwargs)

    monkeypatch.setattr(Predictor, "from_checkpoint", from_checkpoint)
    words = ["--depths", '["d4","d0"]', "--budget_ms", 250, "--port", 99, "--max_body_bytes", 3]
    words += ["--max_batch_size", 5]
    main(["serve", "--ckpt_path", str(checkpoint), *map(str, words)])
    assert (started["host"], started["port"]) == ("127.0.0.1", 99)
    assert options["batch_sizes"] == (1, 5)
    with TestClient(started["app"]) as client:
        found = client.get("/health").json()
        assert (list(found["depths"]), found["budget_ms"]) == (["d4", "d0"], 250)
        assert "3 are allowed" in client.post("/predict", content=b"four").json()["error"]


@pytest.mark.fault("the extra `serve` is not installed", "an error that names it")
@pytest.mark.parametrize("name", ["uvicorn", "starlette", "prometheus_client"])
def test_what_is_not_installed_is_said(checkpoint, monkeypatch, name):
    for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "teamnet_pl.deploy.server")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'teamnet_pl\[serve\]'"):
        serve_teammate(str(checkpoint))
