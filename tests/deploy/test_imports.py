"""Importing the package loads no library that only some of its functions need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import teamnet_pl
from teamnet_pl import deploy
from teamnet_pl.deploy import export, runtime, serving
from tests.helpers.imports import packages_after

PACKAGE = Path(teamnet_pl.__file__).parent
MODULES = sorted((PACKAGE / "deploy").rglob("*.py"))
MODULES += [PACKAGE / "commands" / f"{name}.py" for name in ("export", "profile", "serve")]
HEAVY = {
    *("executorch", "huggingface_hub", "matplotlib", "onnx", "onnx_ir", "onnxruntime"),
    *("onnxscript", "prometheus_client", "python_multipart", "rich", "sklearn", "starlette"),
    *("timm", "uvicorn", "wandb"),
}
NEEDED = {
    "deploy/teammate.py": {"huggingface_hub"},
    "deploy/serving/server.py": {"prometheus_client", "starlette", "uvicorn"},
    "deploy/serving/uploads.py": {"python_multipart"},
}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_heavy_libraries_are_imported_where_they_are_used(path):
    imported = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
    assert imported & HEAVY == NEEDED.get(path.relative_to(PACKAGE).as_posix(), set())


@pytest.mark.parametrize(
    ("module", "loaded"),
    [
        ("deploy.checkpoint", {"deploy", "deploy.checkpoint"}),
        ("deploy.export", {"deploy", "deploy.export"}),
        ("deploy.runtime", {"deploy", "deploy.runtime"}),
        ("deploy.serving", {"deploy", "deploy.serving"}),
    ],
)
def test_a_front_door_opens_no_other_room(module, loaded):
    script = f"import sys, teamnet_pl.{module}; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    ours = {name for name in modules if name.startswith("teamnet_pl.deploy")}
    assert ours == {f"teamnet_pl.{name}" for name in loaded}


@pytest.mark.parametrize("package", [deploy, export, runtime, serving])
def test_public_names(package):
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_serving_and_reading_checkpoints_load_no_lightning():
    modules = ("commands.serve", "deploy.checkpoint", "deploy.serving.server")
    code = "\n".join(f"import teamnet_pl.{module}" for module in modules)
    training = {"lightning", "matplotlib", "pytorch_lightning", "sklearn", "torchmetrics", "wandb"}
    assert not packages_after(code) & training
