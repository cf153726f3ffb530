"""The table of faults, from the markers of the tests that show their outcomes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from harness import Row, markdown

ROOT = Path(__file__).parents[1]


def measure() -> Iterator[Row]:
    """Yields a row for each ``pytest.mark.fault`` in the tests."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    fault, outcome = map(ast.literal_eval, mark.args)
                    file = path.relative_to(ROOT).as_posix()
                    yield {"fault": fault, "outcome": outcome, "test": node.name, "file": file}


def table() -> str:
    """Tabulates the faults, each with a link to its test in the repository."""
    source = re.search(r'^Source = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert source
    rows = [
        [row["fault"], row["outcome"], f"[{row['test']}]({source[1]}/blob/main/{row['file']})"]
        for row in measure()
    ]
    return markdown(["fault", "outcome", "test"], rows)
