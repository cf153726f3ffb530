"""The image of docker/ serves a net: its list of libraries is enough, and no longer than needed."""

import json
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import packages_distributions, requires

import httpx2
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from teamnet_pl.deploy import Predictor
from tests.helpers.images import encoded, pixels
from tests.helpers.serving import wait_until_ready

SERVE = """
import atexit, json, sys
blocked, words = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(blocked))
atexit.register(lambda: print(*{name.partition(".")[0] for name, m in sys.modules.items() if m}))
from teamnet_pl.cli import main
main(words)
"""


def canonical(requirement):
    return canonicalize_name(Requirement(requirement).name)


@pytest.fixture(scope="module")
def listed(pytestconfig):
    lines = (pytestconfig.rootpath / "docker/requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def with_dependencies(requirements):
    """The distributions that pip would install for some requirements."""
    installed, waiting = set(), [Requirement(requirement) for requirement in requirements]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if (name, *extras) in installed:
            continue
        installed.add((name, *extras))
        for line in requires(name) or ():
            other = Requirement(line)
            if other.marker is None or any(other.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(other)
    return {name for name, *_ in installed}


def test_the_list_has_versions_of_the_package(listed, pytestconfig):
    text = (pytestconfig.rootpath / "pyproject.toml").read_text()
    assert len(listed) > 10
    for requirement in listed:
        assert f'"{requirement}",' in text


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_a_server_needs_the_listed_libraries_alone(listed, checkpoint, tmp_path):
    """All other libraries of this environment are blocked."""
    allowed = with_dependencies(listed)
    assert allowed.isdisjoint({"lightning", "matplotlib", "scikit-learn", "torchmetrics", "wandb"})
    blocked = [
        module
        for module, names in packages_distributions().items()
        if module != "teamnet_pl" and allowed.isdisjoint(map(canonicalize_name, names))
    ]
    assert {"lightning", "matplotlib", "rich", "sklearn", "torchmetrics", "wandb"} <= {*blocked}
    words = ["serve", "--ckpt_path", str(checkpoint), "--port", "0", "--budget_ms", "60000"]
    command = [sys.executable, "-c", SERVE, json.dumps(blocked), json.dumps(words)]
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stderr=file, stdout=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not (match := re.search(r"running on (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.1)
        image = pixels(1, 8)[0]
        with httpx2.Client(base_url=match[1]) as client:
            wait_until_ready(client)
            answer = client.post("/predict?depth=d4", content=encoded(image)).json()
        process.send_signal(signal.SIGINT)
        loaded, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    expected = Predictor.from_checkpoint(checkpoint).predict(encoded(image), depth="d4")
    assert answer["probabilities"] == pytest.approx(expected.probabilities[0].tolist())
    names = packages_distributions()
    used = {canonicalize_name(name) for m in loaded.split() for name in names.get(m, [])}
    # timm makes the backbones of its name.
    assert {canonical(requirement) for requirement in listed} <= used | {"timm"}
