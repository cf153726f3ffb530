"""The documentation site: it builds without a warning, and each link leads somewhere."""

import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import teamnet_pl


def public_names():
    """The names that the public packages export, with the package that a user imports from."""
    infos = pkgutil.walk_packages(teamnet_pl.__path__, "teamnet_pl.")
    names = {info.name for info in infos if info.ispkg} - {"teamnet_pl.cli", "teamnet_pl.commands"}
    packages = [teamnet_pl, *map(importlib.import_module, names)]
    return {
        (package.__name__, name) for package in packages for name in getattr(package, "__all__", ())
    }


def test_the_reference_has_each_public_name_once(pytestconfig):
    pages = sorted((pytestconfig.rootpath / "docs/reference").glob("*.md"))
    text = "\n".join(page.read_text() for page in pages)
    shown = [tuple(path.rsplit(".", 1)) for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    assert set(shown) <= public_names()
    objects = [getattr(importlib.import_module(package), name) for package, name in shown]
    assert len({name for _, name in shown}) == len(shown)
    for package, name in public_names():
        value = getattr(importlib.import_module(package), name)
        assert any(value is one for one in objects), f"{package}.{name} is not in the reference"


def test_each_page_is_in_the_navigation(pytestconfig):
    docs = pytestconfig.rootpath / "docs"
    listed = re.findall(r"([\w/]+\.md)$", (pytestconfig.rootpath / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))


class Links(HTMLParser):
    """Collects what a page links to and which anchors it has."""

    def __init__(self, page):
        super().__init__()
        self.targets, self.anchors = [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors.add(values.get("id"))
        self.targets += [values[key] for key in ("href", "src") if values.get(key)]


@pytest.fixture(scope="module")
def site(pytestconfig, tmp_path_factory):
    """The built site."""
    pytest.importorskip("zensical")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(pytestconfig.rootpath / "docs", folder / "docs")
    shutil.copy(pytestconfig.rootpath / "mkdocs.yml", folder)
    package, caches = Path(teamnet_pl.__file__).parent, shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / "teamnet_pl", ignore=caches)
    words = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    # Its strict mode does not count the errors of mkdocstrings.
    assert not re.search("error|warning", output, re.IGNORECASE), output
    return folder / "site"


def test_each_link_leads_somewhere(site):
    pages = {path: Links(path) for path in site.rglob("*.html")}
    assert len(pages) > 20
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            assert place.is_file(), f"{path.relative_to(site)}: {target}"
            if parts.fragment and place in pages:
                anchors = pages[place].anchors
                assert unquote(parts.fragment) in anchors, f"{path.relative_to(site)}: {target}"


def test_the_reference_has_signatures_and_examples(site):
    page = (site / "reference/elastic/index.html").read_text()
    assert 'id="teamnet_pl.elastic.ElasticNet"' in page
    assert "runs at any of its depths" in page
    assert "&gt;&gt;&gt; " in page


def test_figures_are_those_that_the_script_draws(pytestconfig, tmp_path):
    script = pytestconfig.rootpath / "docs/draw_figures.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True)
    drawn = {path.name: len(path.read_text()) for path in tmp_path.iterdir()}
    committed = {path.name: len(path.read_text()) for path in script.parent.glob("figures/*")}
    assert drawn.keys() == committed.keys()
    for name, size in committed.items():
        assert drawn[name] == pytest.approx(size, rel=0.05)


def test_the_page_of_notebooks_has_each(pytestconfig):
    root = pytestconfig.rootpath
    notebooks = sorted(path.name for path in (root / "notebooks").glob("*.ipynb"))
    page = (root / "docs/notebooks.md").read_text()
    for place in ("github.com", "colab.research.google.com"):
        listed = re.findall(rf"\(https://{place}/\S+/blob/main/notebooks/([\w.]+)\)", page)
        assert sorted(listed) == notebooks
    for name in notebooks:
        notebook = json.loads((root / "notebooks" / name).read_text())
        badge = rf"\(https://colab.research.google.com/github/\S+/blob/main/notebooks/{name}\)"
        assert re.search(badge, "".join(notebook["cells"][0]["source"]))
        assert 'find_spec("teamnet_pl") is None' in "".join(notebook["cells"][1]["source"])
        counts = [cell["execution_count"] for cell in notebook["cells"] if "outputs" in cell]
        assert counts == list(range(1, len(counts) + 1)), f"{name} was not run from top to bottom"
