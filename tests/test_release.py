"""Version, Python versions, dependencies and addresses agree in all files of a release."""

import re
import sys
import zipfile
from email.parser import Parser

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONDA_NAMES = {"matplotlib": "matplotlib-base", "torch": "pytorch"}
"""Packages that have another name in conda-forge."""
OF_EXTRAS = {"docstring_parser", "typeshed_client"}
"""Packages of conda-forge for extras of others, which it does not have."""
ADDRESS = re.compile(r"github(?:usercontent)?(?:\.com)?/([\w-]+/teamnet_pl)\b")


@pytest.fixture(scope="module")
def root(pytestconfig):
    return pytestconfig.rootpath


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def recipe(root):
    return yaml.safe_load((root / "conda/recipe.yaml").read_text())


@pytest.fixture(scope="module")
def workflow(root):
    return yaml.safe_load((root / ".github/workflows/ci.yml").read_text())["jobs"]


def test_the_version_is_the_same_everywhere(root, project, recipe):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert recipe["context"]["version"] == citation["version"] == project["version"]


def test_the_python_versions_are_the_same_everywhere(project, workflow):
    pattern = r"Programming Language :: Python :: (3\.\d+)"
    versions = [
        match[1] for line in project["classifiers"] if (match := re.fullmatch(pattern, line))
    ]
    matrix = workflow["test"]["strategy"]["matrix"]
    assert versions == matrix["python-version"]
    assert len(matrix["os"]) == 3
    supported = SpecifierSet(project["requires-python"])
    assert supported.contains(versions[0])
    assert not supported.contains(f"3.{int(versions[0].partition('.')[2]) - 1}")


def test_the_conda_recipe_has_the_dependencies(project, recipe):
    wanted = {}
    for line in project["dependencies"]:
        requirement = Requirement(line)
        name = requirement.name.lower()
        wanted[CONDA_NAMES.get(name, name)] = requirement.specifier
    listed = {}
    for line in recipe["requirements"]["run"]:
        name, _, version = line.partition(" ")
        if name not in {"python", *OF_EXTRAS}:
            listed[name] = SpecifierSet(version)
    assert listed == wanted


def test_there_is_one_address(root, project):
    (address,) = ADDRESS.findall(project["urls"]["Source"])
    folders = ("", "docs", ".github", ".github/workflows", "conda", "notebooks")
    files = [path for folder in folders for path in (root / folder).glob("*") if path.is_file()]
    found = {path: set(ADDRESS.findall(path.read_text(errors="ignore"))) for path in files}
    assert {path.suffix for path, addresses in found.items() if addresses} >= {
        ".toml",
        ".md",
        ".yml",
    }
    assert set.union(*found.values()) == {address}
    site = project["urls"]["Documentation"]
    assert site.endswith(f"{address.split('/')[0]}.github.io/{address.split('/')[1]}/")
    assert yaml.safe_load((root / "mkdocs.yml").read_text())["site_url"] == site


def test_the_readme_on_pypi_has_whole_addresses(root, tmp_path):
    (path,) = WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        text = Parser().parsestr(wheel.read(name).decode()).get_payload()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 15
    assert all(target.startswith(("https://", "#")) for target in targets)
    addresses = [target for target in targets if target.endswith("docs/digits.png")]
    assert addresses
    assert "raw.githubusercontent.com" in addresses[0]
    for target in targets:
        if "/main/" in target:
            file = target.partition("/main/")[2].partition("#")[0]
            assert (root / file).is_file(), target
