"""The parts that all benchmarks share: arguments, measuring in turn, result files, tables."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

import torch

from teamnet_pl.atomic import atomic_write_text

RESULTS = Path(__file__).with_name("results")
TINY = Path(__file__).with_name("tiny.yaml")
Row = dict[str, Any]


class Result(TypedDict):
    """The content of a result file.

    Attributes:
        command: The last command that added rows.
        date: The day of that command, in ISO format.
        machine: Architecture, hardware and versions.
        settings: The arguments of the script.
        rows: The measurements.
    """

    command: str
    date: str
    machine: str
    settings: dict[str, Any]
    rows: list[Row]


# Arguments


def argument_parser(
    doc: str | None,
    *,
    only: Iterable[str] = (),
    repeats: int | None = None,
    threads: int | None = None,
    device: bool = False,
) -> argparse.ArgumentParser:
    """Makes a parser of the arguments that benchmarks have in common.

    Args:
        doc: Docstring of the script; the first line describes it.
        only: Names of the cases among which `--only` chooses.
        repeats: Default of `--repeats`.
        threads: Default of `--threads`.
        device: Whether there is `--device`.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", required=True, help="result file, JSON")
    if names := list(only):
        parser.add_argument(
            "--only", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}"
        )
    if repeats is not None:
        parser.add_argument(
            "--repeats", type=int, default=repeats, help="measurements of each median"
        )
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads)
    if device:
        parser.add_argument("--device", default="cpu")
    return parser


class Titled(Protocol):
    """A case of a benchmark."""

    title: str


Case = TypeVar("Case", bound=Titled)


def selected(cases: Iterable[Case], only: Collection[str] | None) -> list[Case]:
    """Selects the cases that `--only` names; all without it."""
    return [case for case in cases if only is None or case.title in only]


# Measuring


def in_turn(
    measurements: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """Takes each measurement once per repeat, so that a change of the machine's speed affects all.

    The order rotates from repeat to repeat.

    Args:
        measurements: Each returns one value.
        repeats: Number of values of each.

    Returns:
        The values by name, in the order of the repeats.
    """
    names = list(measurements)
    values: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            values[name].append(measurements[name]())
    return values


def milliseconds(step: Callable[[], None], device: str = "cpu") -> float:
    """Measures the wall time of one step."""
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begin)


def median_ratio(values: Sequence[float], references: Sequence[float]) -> float:
    """Computes the median of the ratios of values that were measured in the same repeat."""
    return statistics.median(a / b for a, b in zip(values, references, strict=True))


# Result files


class ResultFile:
    """A result file, complete after every row.

    Args:
        args: Arguments of the script, which become the settings; `args.out` is the file.
        hardware: Further words about the machine, such as `processor(args)`.
        resume: Whether rows that the file already has are kept. Their settings must be the same.
        selecting: Names of the arguments that select runs, which may differ from those in the file.
        ignored: Names of the arguments that do not change the results.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        *hardware: str,
        resume: bool = False,
        selecting: Collection[str] = (),
        ignored: Collection[str] = (),
    ) -> None:
        self.path = Path(args.out)
        self.extra: dict[str, Any] = {}
        self.result: Result = {
            "command": "python " + " ".join(sys.argv),
            "date": date.today().isoformat(),
            "machine": ", ".join([platform.machine(), *hardware, f"torch {torch.__version__}"]),
            "settings": vars(args).copy(),
            "rows": [],
        }
        if resume and self.path.is_file():
            self._take_over(load_result(self.path), selecting, {"out", *ignored})

    def _take_over(
        self, earlier: Result, selecting: Collection[str], ignored: Collection[str]
    ) -> None:
        settings: dict[str, Any] = json.loads(json.dumps(self.result["settings"]))
        before = {"machine": earlier["machine"]} | earlier["settings"]
        now = {"machine": self.result["machine"]} | settings
        differences = [
            f"{name} {before.get(name)!r}, now {now.get(name)!r}"
            for name in dict.fromkeys([*before, *now])
            if name not in {*selecting, *ignored} and before.get(name) != now.get(name)
        ]
        if differences:
            sys.exit(
                f"{self.path} has rows of other settings ({'; '.join(differences)}): delete it, or "
                "give another --out."
            )
        for name in selecting:
            self.result["settings"][name] = _joined(before.get(name), settings[name])
        self.result["rows"] = earlier["rows"]
        print(f"{self.path} has {len(self.rows)} rows, which are kept", flush=True)

    @property
    def rows(self) -> list[Row]:
        """The rows so far."""
        return self.result["rows"]

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows and writes the file."""
        self.rows.extend(rows)
        self.save()

    def save(self) -> None:
        """Writes the file, with `extra` beside the rows."""
        atomic_write_text(self.path, json.dumps({**self.result, **self.extra}, indent=1))

    def write(self, rows: Iterable[Row], line: Callable[[Row], str]) -> None:
        """Adds rows one by one as they are measured, and prints a line for each."""
        for row in rows:
            self.add([row])
            print(line(row), flush=True)


def _joined(before: Any, now: Any) -> Any:
    """Joins two selections; None selects everything."""
    if before is None or now is None:
        return None
    return list(dict.fromkeys([*before, *now])) if isinstance(now, list) else now


def load_result(path: str | Path) -> Result:
    """Reads a result file."""
    result: Result = json.loads(Path(path).read_text())
    return result


def processor(args: argparse.Namespace) -> str:
    """Names the processor that a benchmark with `--threads`, and perhaps `--device`, runs on."""
    if getattr(args, "device", "cpu") == "cuda":
        return torch.cuda.get_device_name()
    return f"{args.threads} CPU threads"


# Tables


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_source(table: str, result: Result) -> str:
    """Adds the command, the date and the machine below a table."""
    return f"{table}\n\n`{result['command']}`, {result['date']}, {result['machine']}"


def mean_and_deviation(values: Sequence[float], form: str = ".1f") -> str:
    """Writes the mean and the standard deviation; empty without values.

    Example:
        >>> mean_and_deviation([1.0, 3.0])
        '2.0 ± 1.4'
    """
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def depth_shares(depths: Mapping[str, float]) -> str:
    """Writes how often each depth ran, the deepest first, without those that round to nothing.

    Example:
        >>> depth_shares({"d2": 0.25, "d7": 0.75, "d0": 0.0})
        'd7 75%, d2 25%'
    """
    by_depth = sorted(depths.items(), key=lambda item: -int(item[0][1:]))
    return ", ".join(f"{depth} {share:.0%}" for depth, share in by_depth if share >= 0.005)
