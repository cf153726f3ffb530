"""The description of the endpoints is valid, and the server sends what it says."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from openapi_spec_validator import validate
from starlette.testclient import TestClient

from teamnet_pl.deploy import Predictor
from teamnet_pl.deploy.serving import server as module
from teamnet_pl.deploy.serving.openapi import description, page
from teamnet_pl.deploy.serving.server import Server
from tests.helpers.images import encoded
from tests.helpers.serving import answer_to, check_answer, client_of, ready_app, serving_client


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor.from_checkpoint(checkpoint)


@pytest.fixture
def image():
    return encoded(np.zeros((8, 8), np.uint8))


def test_the_description_is_valid(predictor):
    with serving_client(predictor) as client:
        sent = client.get("/openapi.json").json()
    assert sent == description()
    validate(sent)


def test_each_answer_that_is_described_is_sent(predictor, image, monkeypatch):
    """Whether its content fits is checked by the client, here and in all other tests."""
    sent = {}

    def note(answer):
        path = answer.request.url.path
        sent.setdefault((answer.request.method.lower(), path), set()).add(str(answer.status_code))
        return answer

    with TestClient(Server(lambda: 1 / 0).app()) as client:
        client.event_hooks = {"response": [check_answer]}
        while note(client.get("/readyz")).json() != {"status": "failed"}:
            pass
        note(client.get("/model"))
        note(client.post("/predict", content=image))
    server = Server(lambda: predictor, max_body_bytes=10_000, budget_ms=60_000)
    with client_of(server) as client:
        for path in ("/model", "/livez", "/readyz", "/metrics"):
            note(client.get(path))
        note(client.post("/predict", content=image))
        note(client.post("/predict", files={"image": image}))
        note(client.post("/predict", content=b"no image"))
        note(client.post("/predict", content=bytes(10_001)))
        monkeypatch.setattr(predictor, "run", None)
        note(client.post("/predict", content=image))
    monkeypatch.setattr(module, "BODY_TIMEOUT_S", 0.05)
    sent["post", "/predict"].add(str(answer_to(ready_app(predictor), body=None).status_code))
    described = {
        (method, path): set(operation["responses"])
        for path, operations in description()["paths"].items()
        for method, operation in operations.items()
    }
    assert sent == described


def test_an_answer_that_is_not_described_is_noticed(predictor, image):
    with serving_client(predictor) as client:
        answer = client.post("/predict", content=image)
        content = answer.json()
        for wrong in (content | {"label": "3"}, content | {"more": 1}, {}):
            answer._content = json.dumps(wrong).encode()
            with pytest.raises(AssertionError, match="/predict"):
                check_answer(answer)


def test_the_parameters_that_are_described_are_those_of_the_server(predictor, image):
    (operation,) = description()["paths"]["/predict"].values()
    names = {parameter["name"] for parameter in operation["parameters"]}
    with serving_client(predictor) as client:
        message = client.post("/predict?unknown=1", content=image).json()["error"]
    assert set(re.search("There are the parameters (.*);", message)[1].split(", ")) == names


class Page(HTMLParser):
    """The text of a page, and the addresses that it loads or links."""

    def __init__(self):
        super().__init__()
        self.words, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        assert tag not in {"script", "link", "img", "iframe"}
        self.addresses += [value for name, value in attributes if name in {"src", "href"}]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_names_all_and_loads_nothing(predictor):
    with serving_client(predictor) as client:
        answer = client.get("/docs")
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert answer.text == page()
        parsed = Page()
        parsed.feed(answer.text)
        assert parsed.addresses == ["openapi.json"]
        assert client.get(f"/{parsed.addresses[0]}").status_code == 200
    for path, operations in description()["paths"].items():
        for method, operation in operations.items():
            assert f"{method.upper()} {path}" in parsed.words
            assert operation["summary"] in parsed.words
            for parameter in operation.get("parameters", []):
                assert parameter["name"] in parsed.words
            assert set(operation["responses"]) <= set(parsed.words)
