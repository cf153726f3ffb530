"""Writes the tables in README.md and docs/ from benchmarks/results/ and the tests' markers.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. NAME is that of a result file;
the script that wrote the file makes the table. With ``--check`` nothing is written, and a table
that is not up to date is an error.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

import accuracy
import faults
import package_files
from harness import RESULTS, load_result

ROOT = Path(__file__).parents[1]


def table(name: str) -> str:
    """Makes the table of a name."""
    path = RESULTS / f"{name}.json"
    match name:
        case "faults":
            return faults.table()
        case "digits":
            return package_files.report_table(path)
        case "profile":
            return package_files.profile_table(path)
        case short if short.endswith("_summary"):
            return accuracy.summary(load_result(RESULTS / f"{short.removesuffix('_summary')}.json"))
    result = load_result(path)
    script = Path(result["command"].split()[1])  # python SCRIPT ...
    text: str = importlib.import_module(script.stem).table(result)
    return text


def with_tables(page: str) -> str:
    """Replaces the tables in the text of a page."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{table(match[2])}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    """Rewrites the tables, or checks them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only check that they are up to date")
    args = parser.parse_args()
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = page.read_text()
        new = with_tables(old)
        if new != old:
            stale.append(page.name)
            if not args.check:
                page.write_text(new)
    if args.check and stale:
        sys.exit(f"Tables in {', '.join(stale)} are not up to date: run {sys.argv[0]}.")


if __name__ == "__main__":
    main()
