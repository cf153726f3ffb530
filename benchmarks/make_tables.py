"""Writes the tables in README.md and docs/ from benchmarks/results/ and the tests' markers.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. With ``--check`` nothing is
written, and a table that is not up to date is an error.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from teamnet_pl.cooperation.report import REPORT_HEADER, Report, report_lines
from teamnet_pl.deploy.runtime.profile import Profile
from teamnet_pl.deploy.runtime.profile_report import HEADER as HEADER_OF_PROFILE
from teamnet_pl.deploy.runtime.profile_report import profile_lines

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(result: dict[str, Any]) -> str:
    """Where a table comes from."""
    return f"\n\n`{result['command']}`, {result['date']}, {result['machine']}"


def packed_forward(name: str) -> str:
    """Speed and memory of the packed step."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    header = [
        "net", "loop, ms", "packed, ms", "times as fast", "ceiling", "share of ceiling",
        "blocks run, ratio", "peak memory, ratio", "checkpointing: time", "memory",
    ]  # fmt: skip
    rows = [
        [
            f"{row['net']}, {row['size']}²",
            f"{statistics.median(row['loop_ms']):.0f}",
            f"{statistics.median(row['packed_ms']):.0f}",
            f"**{row['speedup']:.2f}**",
            f"{row['ceiling']:.2f}",
            f"{row['share_of_ceiling']:.0%}",
            f"{row['blocks_ratio']:.2f}",
            f"{row['memory_ratio']:.2f}",
            f"{row['checkpointed_time_ratio']:.2f}",
            f"{row['checkpointed_memory_ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    return markdown(header, rows) + source(result)


def accuracy(name: str) -> str:
    """Accuracy of each method, mean and standard deviation over the seeds, by net and depth."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in result["rows"]:
        found[row["method"], row["net"]][row["depth"] or row["net"]].append(100 * row["test"])
    names = {depth for own in found.values() for depth in own if depth[1:].isdigit()}
    depths = sorted(names, key=lambda depth: -int(depth[1:]))
    rows = []
    for (method, net), own in found.items():
        single = own.get("leader") or own.get("ensemble")
        cells = [spread(own.get(depth)) for depth in depths]
        rows.append([method, net, *((spread(single), *cells[1:]) if single else cells)])
    return markdown(["method", "net", *depths], rows) + source(result)


def variants(name: str) -> str:
    """Changes of a team against the team of ``accuracy_fashion_mnist``, means over depths."""
    base, result = (
        json.loads((RESULTS / f"{own}.json").read_text())
        for own in ("accuracy_fashion_mnist", name)
    )
    accuracies: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    for row in base["rows"] + result["rows"]:
        for split in ("val", "test"):
            key = row["method"], row["net"], split, row["seed"]
            accuracies[key].append(100 * row[split])

    def cells(method: str, net: str, split: str) -> list[str]:
        found, less = [], []
        for seed in base["settings"]["seeds"]:
            if own := accuracies.get((method, net, split, seed)):
                found.append(statistics.mean(own))
                less.append(found[-1] - statistics.mean(accuracies["team", net, split, seed]))
        return [spread(found), "" if method == "team" else spread(less, "+.1f")]

    rows = []
    for method in ("team", *result["settings"]["methods"]):
        rows.append([method])
        for net, split in (("a", "val"), ("a", "test"), ("b", "test"), ("ensemble", "test")):
            rows[-1] += cells(method, net, split)
    nets = ("a, validation", "a, test", "b, test", "averaged, test")
    header = ["method", *(title for net in nets for title in (net, "difference"))]
    return markdown(header, rows) + source(result)


def onnx_files(name: str) -> str:
    """Size and time of the ONNX file for all depths, and time of the 8-bit ones."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    header = [
        "net", "one file, MB", "size, ratio", "memory, ratio", "depth", "own file, ms",
        "one file, ratio", "8 bits, ratio",
    ]  # fmt: skip
    rows = []
    for row in result["rows"]:
        first = [
            f"{row['net']}, {row['size']}²",
            f"{row['one_file_bytes'] / 1e6:.2f}",
            f"**{row['size_ratio']:.3f}**",
            f"{row['one_session_bytes'] / row['own_sessions_bytes']:.2f}",
        ]
        for depth in row["depths"]:
            cells = [
                depth["depth"],
                f"{statistics.median(depth['own_file_ms']):.3g}",
                f"**{depth['time_ratio']:.3f}**",
                f"{depth['int8_time_ratio']:.2f}",
            ]
            rows.append([*first, *cells])
            first = [""] * len(first)
    return markdown(header, rows) + source(result)


def int8_accuracy(name: str) -> str:
    """Accuracy of each depth before and after it is quantised."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    header = ["data", "net", "depth", "accuracy", "with 8 bits", "points", "size, ratio"]
    rows = []
    for row in result["rows"]:
        before, after = 100 * row["accuracy"], 100 * row["int8_accuracy"]
        rows.append(
            [
                row["data"],
                f"{row['backbone']}, {row['net']}",
                row["depth"],
                f"{before:.2f}",
                f"{after:.2f}",
                f"{after - before:+.2f}",
                f"{row['int8_bytes'] / row['bytes']:.2f}",
            ]
        )
    return markdown(header, rows) + source(result)


def loading(name: str) -> str:
    """Images a second of the loaders, of the step and of both."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    header = [
        "data", "net", "workers", "loader, images/s", "float32 on the wire", "step", "both",
        "both, share of step",
    ]  # fmt: skip
    rows = []
    for row in result["rows"]:
        rates = {key: statistics.median(all_) for key, all_ in row["images_per_second"].items()}
        figures = [f"{rates[key]:,.0f}" for key in ("uint8", "float32", "step", "both")]
        share = f"**{row['both_to_step']:.0%}**"
        net = f"{row['net']}, {row['shape'][1]}²"
        rows.append([row["data"], net, str(row["workers"]), *figures, share])
    return markdown(header, rows) + source(result)


def spread(values: list[float] | None, digits: str = ".1f") -> str:
    """Mean and standard deviation, in per cent."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{deviation}"


def compatibility(name: str) -> str:
    """What became of each architecture, and how many of each library work."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    rows = []
    for row in result["rows"]:
        counts[row["family"].partition("/")[0]][row["result"]] += 1
        stages = "-".join(map(str, row.get("stages", [])))
        size = "x".join(map(str, row["input_shape"][1:]))
        reason = row.get("reason", "").partition(". ")[0]
        rows.append(
            [row["family"], row["model"].partition("/")[2], size, row["result"], stages, reason]
        )
    said = [
        f"{library}: {', '.join(f'{count} {result}' for result, count in own.most_common())}."
        for library, own in counts.items()
    ]
    header = ["family", "smallest model", "images", "result", "blocks per stage", "why"]
    return " ".join(said) + "\n\n" + markdown(header, rows) + source(result)


def per_depth(name: str) -> str:
    """What one run reports, from its per_depth.json."""
    return markdown(REPORT_HEADER, report_lines(Report.load(RESULTS / f"{name}.json")))


def profile(name: str) -> str:
    """What each depth takes, from the file of `teamnet profile`."""
    found = Profile.load(RESULTS / f"{name}.json")
    return markdown(HEADER_OF_PROFILE, profile_lines(found)) + f"\n\n{found.machine}"


def stress(name: str) -> str:
    """Latency of each method before, under and after the load."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [
        [
            "a budget" if row["method"] == "budget" else "the deepest depth",
            row["phase"],
            f"{row['share_of_other']:.0%}",
            f"{row['median_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['misses']:.1%}",
            str(row["switches"]),
            shares(row["depths"]),
        ]
        for row in result["rows"]
    ]
    header = [
        "", "phase", "core taken", "median, ms", "p95, ms", "missed", "switches", "depths",
    ]  # fmt: skip
    first = result["rows"][0]
    price = (
        f"Budget: {result['settings']['budget_ms']:.1f} ms. Choosing a depth took "
        f"{first['choice_us']:.1f} µs; the {first['views']} views took {first['views_ms']:.0f} ms "
        f"to make and copied {first['views_bytes']} bytes of weights."
    )
    return f"{markdown(header, rows)}\n\n{price}{source(result)}"


def load(name: str) -> str:
    """What became of requests by their rate."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [
        [
            "all depths" if row["method"] == "budget" else "the deepest depth",
            f"{row['multiple']:g}x",
            f"{row['sent_per_second']:.0f}",
            f"{row['answered_per_second']:.0f}",
            f"{row['in_time_per_second']:.0f}",
            f"{row['refused']:.1%}",
            str(row["lost"]),
            f"{row['p99_ms']:.0f}",
            shares(row["depths"]),
        ]
        for row in result["rows"]
    ]
    header = [
        "server", "rate", "requests/s", "answered/s", "in time/s", "refused", "lost", "p99, ms",
        "depths",
    ]  # fmt: skip
    budget = f"Budget: {result['settings']['budget_ms']:.0f} ms."
    return f"{markdown(header, rows)}\n\n{budget}{source(result)}"


def shares(depths: dict[str, float]) -> str:
    """How often each depth ran, the deepest first; what is rounded to nothing is left out."""
    found = sorted(depths.items(), key=lambda item: -int(item[0][1:]))
    return ", ".join(f"{depth} {share:.0%}" for depth, share in found if share >= 0.005)


def faults(name: str) -> str:
    """What happens at each fault, from the markers of the tests that show it."""
    rows = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    fault, outcome = map(ast.literal_eval, mark.args)
                    file = path.relative_to(ROOT).as_posix()
                    rows.append([fault, outcome, f"[{node.name}](../{file})"])
    return markdown(["fault", "what happens", "shown by"], rows)


TABLES: dict[str, Callable[[str], str]] = {
    "packed_forward": packed_forward,
    "accuracy_fashion_mnist": accuracy,
    "accuracy_ablations": variants,
    "accuracy_transfers": variants,
    "accuracy_policies": variants,
    "accuracy_wide_leader": variants,
    "compatibility": compatibility,
    "compatibility_large": compatibility,
    "digits": per_depth,
    "onnx_files": onnx_files,
    "int8_accuracy": int8_accuracy,
    "loading": loading,
    "profile": profile,
    "stress": stress,
    "load": load,
    "faults": faults,
}


def main() -> None:
    """Rewrites the tables, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = page.read_text()
        new = re.sub(
            r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
            lambda m: f"{m[1]}{TABLES[m[2]](m[2])}\n{m[3]}",
            old,
            flags=re.DOTALL,
        )
        if new != old:
            stale.append(page.name)
            if not args.check:
                page.write_text(new)
    if args.check and stale:
        sys.exit(f"Tables not up to date in {', '.join(stale)}: run {sys.argv[0]}.")


if __name__ == "__main__":
    main()
