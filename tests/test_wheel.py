"""The wheel has all files of the package once, and declares what the package imports."""

from __future__ import annotations

import ast
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from email.parser import Parser
from functools import cache
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from sys import stdlib_module_names

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "teamnet_pl"
MODULES = sorted(PACKAGE.rglob("*.py"))
EXTRA_OF_MODULE = {"deploy/serving/server.py": "serve", "deploy/serving/uploads.py": "serve"}
"""Modules that import the libraries of an extra where they begin."""
IMPORTED_ELSEWHERE = {
    "alembic": "mlflow.store.db.utils",
    "mlflow-skinny": "lightning.pytorch.loggers.mlflow",
    "onnx": "onnxruntime.quantization.quantize",
    "sqlalchemy": "mlflow.store.db.utils",
    "tensorboard": "torch.utils.tensorboard",
}
"""Distributions that a module of another library imports for us."""


def build_wheel(source: Path, folder: Path) -> zipfile.ZipFile:
    (path,) = WheelBuilder(str(source)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with build_wheel(ROOT, tmp_path_factory.mktemp("wheel")) as archive:
        yield archive


def packaged(wheel: zipfile.ZipFile) -> list[str]:
    return sorted(name for name in wheel.namelist() if ".dist-info/" not in name)


def test_the_wheel_has_each_file_of_the_package_once(wheel):
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert packaged(wheel) == sorted(path.relative_to(ROOT).as_posix() for path in files)


def test_the_wheel_has_configs_and_types(wheel):
    names = packaged(wheel)
    for name in ("configs/digits.yaml", "configs/data/cifar10.yaml", "py.typed", "__init__.pyi"):
        assert f"teamnet_pl/{name}" in names
    lazy = [path for path in MODULES if "attach_stub" in path.read_text()]
    assert len(lazy) > 5
    for path in lazy:
        assert path.with_suffix(".pyi").relative_to(ROOT).as_posix() in names


def test_the_source_distribution_gives_the_same_wheel(wheel, tmp_path):
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert not (source / "configs").exists()
    with build_wheel(source, tmp_path) as other:
        assert packaged(other) == packaged(wheel)


@pytest.fixture(scope="module")
def declared(wheel):
    """The declared distributions of each extra, and those of the core as ``""``."""
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    headers = Parser().parsestr(wheel.read(metadata).decode())
    extras = {"", *headers.get_all("Provides-Extra")}
    requirements = [Requirement(line) for line in headers.get_all("Requires-Dist")]
    return {
        extra: {
            canonicalize_name(requirement.name)
            for requirement in requirements
            if (requirement.marker is None and extra == "")
            or (requirement.marker and extra and requirement.marker.evaluate({"extra": extra}))
        }
        for extra in extras - {"dev", "docs", "test"}
    }


@cache
def installed() -> Mapping[str, list[str]]:
    return packages_distributions()


def distributions(modules: Iterable[str]) -> set[str]:
    """The distributions of modules, apart from the standard library and this package."""
    names = {module.partition(".")[0] for module in modules} - {*stdlib_module_names, "teamnet_pl"}
    # An extra may not be installed; its distribution has the name of the module.
    return {canonicalize_name(installed().get(name, [name])[0]) for name in names}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walks through a module, apart from what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node)


def imported(statements: Iterable[ast.AST]) -> set[str]:
    """The distributions that import statements need."""
    modules = set()
    for node in statements:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module)
    return distributions(modules)


def required(statements: Iterable[ast.AST]) -> dict[str, set[str]]:
    """The distributions of the modules that `require` and `Requirement` name, by extra."""
    modules: dict[str, set[str]] = {}
    for node in statements:
        match node:
            case ast.Call(
                ast.Name("require" | "Requirement"), [ast.Constant(module), ast.Constant(extra)]
            ):
                modules.setdefault(extra, set()).add(module)
    return {extra: distributions(names) for extra, names in modules.items()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_a_module_imports_is_declared(declared, path):
    tree = ast.parse(path.read_text())
    extra = EXTRA_OF_MODULE.get(path.relative_to(PACKAGE).as_posix(), "")
    assert imported(tree.body) <= declared[""] | declared[extra]
    assert imported(nodes(tree)) <= set.union(*declared.values())
    for named, names in required(nodes(tree)).items():
        assert names <= declared[named]


def test_what_is_declared_is_imported(declared):
    used = set()
    for path in MODULES:
        tree = ast.parse(path.read_text())
        used |= imported(nodes(tree)).union(*required(nodes(tree)).values())
    assert set.union(*declared.values()) == used | IMPORTED_ELSEWHERE.keys()
    assert not used & IMPORTED_ELSEWHERE.keys()


@pytest.mark.parametrize(("name", "module"), IMPORTED_ELSEWHERE.items())
def test_what_is_imported_elsewhere_is_so(name, module):
    tree = ast.parse(Path(find_spec(module).origin).read_text())
    assert name in imported(ast.walk(tree))
