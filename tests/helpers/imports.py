"""The packages that an import loads."""

from __future__ import annotations

import subprocess
import sys


def packages_after(code: str) -> set[str]:
    """Lists the packages that are loaded once a new interpreter has run some code."""
    code += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return set(run.stdout.split())
