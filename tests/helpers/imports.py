"""The packages that some code loads."""

from __future__ import annotations

import subprocess
import sys

_AT_EXIT = """
import atexit, sys
atexit.register(lambda: print(*{name.partition(".")[0] for name in sys.modules}))
"""


def packages_after(code: str, exit_code: int = 0) -> set[str]:
    """Lists the packages that are loaded when a new interpreter that runs some code exits.

    Args:
        code: The code.
        exit_code: The exit code that is expected.
    """
    command = [sys.executable, "-c", _AT_EXIT + code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == exit_code, run.stderr
    return set(run.stdout.splitlines()[-1].split())
